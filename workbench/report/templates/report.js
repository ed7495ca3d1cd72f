"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const $ = (id) => document.getElementById(id);
  const el = (tag, cls, text) => {
    const node = document.createElement(tag);
    if (cls) node.className = cls;
    if (text !== undefined && text !== null) node.textContent = String(text);
    return node;
  };

  // Sortable tables: each body is sorted by itself, so that controls stay apart; empty cells come last.
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

  // Hover values: the text stands in <title> or title=""; it is taken out while the styled tooltip is shown.
  const tip = document.body.appendChild(el("div"));
  tip.id = "tip";
  tip.hidden = true;
  let shown = null;
  const hide = () => {
    if (!shown) return;
    if (shown.title) shown.title.textContent = shown.text;
    else shown.node.setAttribute("title", shown.text);
    shown = null;
    tip.hidden = true;
  };
  const place = (event) => {
    const box = tip.getBoundingClientRect(), room = 14;
    const right = event.clientX + room + box.width > root.clientWidth;
    const below = event.clientY + room + box.height > root.clientHeight;
    tip.style.left = Math.max(4, right ? event.clientX - room - box.width : event.clientX + room) + "px";
    tip.style.top = Math.max(4, below ? event.clientY - room - box.height : event.clientY + room) + "px";
  };
  document.addEventListener("pointerover", (event) => {
    const node = event.target.closest("g.mark, [title]");
    if (shown && node !== shown.node && shown.node.contains(event.target)) return;
    if (!node || (shown && node === shown.node)) { if (!node) hide(); return; }
    hide();
    const title = node.matches("g.mark") ? node.querySelector("title") : null;
    const text = title ? title.textContent : node.getAttribute("title");
    if (!text) return;
    shown = { node, title, text };
    if (title) title.textContent = "";
    else node.removeAttribute("title");
    tip.textContent = text;
    tip.hidden = false;
    place(event);
  });
  document.addEventListener("pointermove", (event) => {
    if (shown && shown.node.contains(event.target)) place(event);
    else hide();
  });
  document.addEventListener("scroll", hide, { passive: true });
  root.addEventListener("pointerleave", hide);

  // Copy button; the clipboard interface may be absent for local files, then the text is selected and copied.
  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", async () => {
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
  }

  const closed = [];
  addEventListener("beforeprint", () => {
    for (const d of document.querySelectorAll("details:not([open])")) { closed.push(d); d.open = true; }
  });
  addEventListener("afterprint", () => { for (const d of closed.splice(0)) d.open = false; });

  // Browser of changed items: rows are made when they are shown, and their bodies when they are opened.
  const PAGE = 30;
  const WORDS = { gained: "gained", lost: "lost", other: "same score" };
  const list = $("flip-list");
  if (!list) return;
  const pick = { configuration: $("flip-configuration"), task: $("flip-task"), direction: $("flip-direction"), text: $("flip-text") };
  let data = null, matching = [], made = 0;

  const unpack = async () => {
    const bytes = Uint8Array.from(atob($("flip-data").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };
  const glyph = (direction) => $("glyph-" + direction).content.firstElementChild.cloneNode(true);
  const number = (x, digits, plus) => {
    if (x === null || x === undefined) return "\u2013";
    const text = Math.abs(x).toFixed(digits);
    return (x < 0 && Number(text) !== 0 ? "\u2212" : plus && Number(text) !== 0 ? "+" : "") + text;
  };
  const best = (logs, choices, metric) => {
    if (!logs) return -1;
    const scores = logs.map((x, i) => (metric === "acc_norm" ? x / Math.max(1, String(choices[i] ?? "").length) : x));
    return scores.indexOf(Math.max(...scores));
  };
  const metricsText = (metrics) => Object.entries(metrics).map(([k, v]) => k + " " + (typeof v === "number" ? number(v, v % 1 ? 3 : 0) : v)).join(", ");
  const line = (cells, cls) => {
    const row = el("tr", cls);
    for (const [text, name, tag] of cells) row.append(el(tag || "td", name, text));
    return row;
  };
  const choiceTable = (item, answer, name) => {
    const [, , , , gold, choices, before] = item;
    const metric = data.tasks[item[0]];
    const [was, now] = [before[2], answer[2]].map((logs) => best(logs, choices, metric));
    const table = el("table"), head = el("thead"), body = el("tbody");
    head.append(line([["Choice", "", "th"], [data.baseline, "", "th"], [name, "", "th"], ["Change", "", "th"]]));
    for (const i of [1, 2]) head.rows[0].cells[i].append(el("span", "at"));
    choices.forEach((choice, i) => {
      const a = before[2] ? before[2][i] : null, b = answer[2] ? answer[2][i] : null;
      const right = i === gold || choice === gold;
      const row = line([
        [choice + (right ? "  (right answer)" : "")],
        [number(a, 2), "n" + (i === was ? " pick" : "")],
        [number(b, 2), "n" + (i === now ? " pick" : "")],
        [a === null || b === null ? "\u2013" : number(b - a, 2, true), "n soft"],
      ], right ? "gold" : "");
      row.cells[1].append(el("span", "at", i === was ? "\u25C2" : ""));
      row.cells[2].append(el("span", "at", i === now ? "\u25C2" : ""));
      body.append(row);
    });
    table.append(head, body);
    const box = el("div");
    box.append(el("h4", "", "Log-likelihood of each choice; \u25C2 marks the answer"), table);
    return box;
  };
  const answerTable = (item, answer, name) => {
    const metric = data.tasks[item[0]], table = el("table"), head = el("thead"), body = el("tbody");
    const text = (x) => (x === null || x === undefined ? "\u2013" : x === "" ? "(nothing)" : x);
    const score = (metrics) => (typeof metrics[metric] === "number" ? number(metrics[metric], metrics[metric] % 1 ? 3 : 0) : "\u2013");
    head.append(line([["", "", "th"], ["Answer", "left", "th"], [metric, "", "th"]]));
    body.append(
      line([["right answer", "soft who"], [text(item[4]), "left mono"], ["", ""]]),
      line([[data.baseline, "soft who"], [text(item[6][0]), "left mono"], [score(item[6][1]), "n"]]),
      line([[name, "soft who"], [text(answer[0]), "left mono pick"], [score(answer[1]), "n"]]));
    table.append(head, body);
    const box = el("div");
    box.append(table);
    return box;
  };
  const bodyOf = (flip) => {
    const item = data.items[flip[1]], name = data.configurations[flip[0]];
    const body = el("div", "body"), left = el("div");
    left.append(el("h4", "", "Prompt"), el("pre", "", item[3] ?? ""));
    const right = item[5] ? choiceTable(item, flip[3], name) : answerTable(item, flip[3], name);
    const notes = [[data.baseline, item[6][1]], [name, flip[3][1]]]
      .filter(([, metrics]) => item[5] || Object.keys(metrics).length > 1)
      .map(([who, metrics]) => who + ": " + metricsText(metrics));
    if (item[2] !== null && item[2] !== undefined) notes.push("cluster " + item[2]);
    if (notes.length) right.append(el("p", "soft sub", notes.join("; ")));
    body.append(left, right);
    return body;
  };
  const rowOf = (flip) => {
    const item = data.items[flip[1]], details = el("details", "flip"), summary = el("summary"), way = el("span");
    details.dataset.direction = flip[2];
    details.dataset.task = item[0];
    way.append(glyph(flip[2]), " " + WORDS[flip[2]]);
    summary.append(way, el("span", "", item[0]), el("span", "soft mono id", item[1]), el("span", "prompt", String(item[3] ?? "").replace(/\s+/g, " ")));
    details.append(summary);
    details.addEventListener("toggle", () => { if (details.open && details.children.length === 1) details.append(bodyOf(flip)); });
    return details;
  };
  const more = () => {
    const next = matching.slice(made, made + PAGE);
    list.append(...next.map(rowOf));
    made += next.length;
    const left = matching.length - made;
    $("flip-more").hidden = left === 0;
    $("flip-more").textContent = "Show " + Math.min(PAGE, left) + " more";
  };
  const filter = () => {
    const configuration = Number(pick.configuration.value), task = pick.task.value, direction = pick.direction.value;
    const words = pick.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const own = data.flips.filter((f) => f[0] === configuration);
    matching = own.filter((f) => {
      const item = data.items[f[1]];
      if (task && item[0] !== task) return false;
      if (direction && f[2] !== direction) return false;
      if (!words.length) return true;
      const text = [item[1], item[2], item[3], item[4], (item[5] || []).join(" "), item[6][0], f[3][0]].join(" ").toLowerCase();
      return words.every((w) => text.includes(w));
    });
    list.replaceChildren();
    made = 0;
    const gained = matching.filter((f) => f[2] === "gained").length, lost = matching.filter((f) => f[2] === "lost").length;
    $("flip-count").textContent = matching.length + " of " + own.length + " changed items of " + data.configurations[configuration]
      + ": " + gained + " gained, " + lost + " lost";
    more();
  };
  const start = async () => {
    try {
      data = await unpack();
    } catch (error) {
      $("flip-count").textContent = "This browser could not unpack the items (" + error.message + "); they are in the .json file beside this page.";
      return;
    }
    data.configurations.forEach((name, i) => pick.configuration.append(new Option(name, i)));
    Object.keys(data.tasks).forEach((name) => pick.task.append(new Option(name, name)));
    const first = data.configurations.indexOf(list.dataset.first);
    pick.configuration.value = String(Math.max(first, 0));
    if (!data.flips.some((f) => f[2] === "other")) pick.direction.querySelector("[value=other]").remove();
    for (const control of Object.values(pick)) control.addEventListener("input", filter);
    $("flip-more").addEventListener("click", more);
    for (const button of document.querySelectorAll("button[data-flips]")) {
      button.addEventListener("click", () => {
        pick.configuration.value = String(data.configurations.indexOf(button.dataset.flips));
        pick.task.value = button.dataset.task;
        pick.direction.value = pick.text.value = "";
        filter();
        $("flip-count").scrollIntoView({ block: "center" });
      });
    }
    filter();
    list.dataset.ready = "yes";
  };
  start();
})();
