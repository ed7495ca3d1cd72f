// Filters of a table: all words of a text box are in a row (with data-names: in its first cell), and the brick that is chosen is among its bricks.
for (const count of document.querySelectorAll("[data-count]")) {
  const boxes = [...document.querySelectorAll(`[data-filters="${count.dataset.count}"]`)];
  const rows = [...$(count.dataset.count).querySelectorAll("tbody tr:not(.group)")];
  const keeps = (box, row) => {
    if (box.tagName === "SELECT") return !box.value || row.dataset.bricks.split(" ").includes(box.value);
    const text = ("names" in box.dataset ? row.cells[0] : row).textContent.toLowerCase();
    return box.value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  };
  const filterRows = () => {
    for (const row of rows) row.hidden = !boxes.every((box) => keeps(box, row));
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = (shown === rows.length ? "" : shown + " of ") + rows.length + " rows";
  };
  for (const box of boxes) box.addEventListener("input", filterRows);
  filterRows();
}
