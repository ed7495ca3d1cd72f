// page.py joins the scripts of a page into one function.
const root = document.documentElement;
root.classList.add("js");
const $ = (id) => document.getElementById(id);
const el = (tag, cls, text) => {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  if (text !== undefined && text !== null) node.textContent = String(text);
  return node;
};
// Data that is packed into the page.
const unpack = async (id) => {
  const bytes = Uint8Array.from(atob($(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
};

// Sortable tables: each table body is sorted separately, so that controls stay below; empty cells come last.
const value = (row, column) => {
  const cell = row.cells[column];
  if (!cell) return null;
  if (cell.dataset.v === undefined) return cell.textContent.trim().toLowerCase();
  return cell.dataset.v === "" ? null : Number(cell.dataset.v);
};
const sort = (table, header) => {
  const column = header.cellIndex;
  const down = header.getAttribute("aria-sort") === (header.dataset.first === "up" ? "ascending" : "descending")
    ? header.dataset.first === "up" : header.dataset.first !== "up";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((r) => !r.classList.contains("group"));
    rows.sort((a, b) => {
      const x = value(a, column), y = value(b, column);
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return down ? -order : order;
    });
    body.append(...rows);
  }
};
for (const table of document.querySelectorAll("table.sortable")) {
  for (const header of table.tHead.rows[0].cells) {
    if (header.dataset.plain !== undefined) continue;
    header.classList.add("sorts");
    header.tabIndex = 0;
    header.addEventListener("click", () => sort(table, header));
    header.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sort(table, header);
    });
  }
}

// Tooltips: the text is in <title> or title=""; it is removed while the styled tooltip is shown.
// Each pointer move checks again, so that the tooltip returns after a scroll has hidden it.
const tip = document.body.appendChild(el("div"));
tip.id = "tip";
tip.hidden = true;
let shown = null;
const corner = (node) => {
  const box = node.getBoundingClientRect();
  return box.left + " " + box.top;
};
const hide = () => {
  if (!shown) return;
  if (shown.title) shown.title.textContent = shown.text;
  else shown.node.setAttribute("title", shown.text);
  shown = null;
  tip.hidden = true;
};
const show = (node) => {
  hide();
  const title = node.matches("g.mark") ? node.querySelector("title") : null;
  const text = title ? title.textContent : node.getAttribute("title");
  if (!text) return;
  shown = { node, title, text, corner: corner(node) };
  if (title) title.textContent = "";
  else node.removeAttribute("title");
  tip.textContent = text;
  tip.hidden = false;
};
const place = (event) => {
  const box = tip.getBoundingClientRect(), room = 14;
  const right = event.clientX + room + box.width > root.clientWidth;
  const below = event.clientY + room + box.height > root.clientHeight;
  tip.style.left = Math.max(4, right ? event.clientX - room - box.width : event.clientX + room) + "px";
  tip.style.top = Math.max(4, below ? event.clientY - room - box.height : event.clientY + room) + "px";
};
const look = (event) => {
  let node = event.target;
  while (node && !(shown && node === shown.node) && !node.matches("g.mark, [title]")) node = node.parentElement;
  if (!node) hide();
  else if (!shown || node !== shown.node) show(node);
  if (shown) place(event);
};
document.addEventListener("pointerover", look);
document.addEventListener("pointermove", look);
// A late scroll event can arrive when the mark under the pointer no longer moves: hide the tooltip only if its mark has moved.
document.addEventListener("scroll", () => { if (shown && corner(shown.node) !== shown.corner) hide(); }, { passive: true, capture: true });
root.addEventListener("pointerleave", hide);

// Copy buttons, also of what is added later: local files may have no clipboard API; the text is then selected and copied.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const source = $(button.dataset.copy);
  let done = false;
  try {
    await navigator.clipboard.writeText(source.textContent);
    done = true;
  } catch {
    getSelection().selectAllChildren(source);
    done = document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Select and copy";
  setTimeout(() => { button.textContent = "Copy"; }, 1600);
});

const closed = [];
addEventListener("beforeprint", () => {
  for (const d of document.querySelectorAll("details:not([open])")) { closed.push(d); d.open = true; }
});
addEventListener("afterprint", () => { for (const d of closed.splice(0)) d.open = false; });
