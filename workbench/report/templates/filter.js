// Filter of the summary table by part of a name and by brick; the table has it from 20 rows on.
const filterName = $("filter-name"), filterBrick = $("filter-brick");
const filterRows = () => {
  const text = filterName.value.trim().toLowerCase(), brick = filterBrick.value;
  const rows = [...$("summary-table").querySelectorAll("tbody tr:not(.group)")];
  let shown = 0;
  for (const row of rows) {
    const named = row.cells[0].textContent.toLowerCase().includes(text);
    const made = !brick || row.dataset.bricks.split(" ").includes(brick);
    row.hidden = !(named && made);
    shown += row.hidden ? 0 : 1;
  }
  $("filter-count").textContent = shown === rows.length ? rows.length + " rows" : shown + " of " + rows.length + " rows";
};
if (filterName) {
  filterName.addEventListener("input", filterRows);
  filterBrick.addEventListener("input", filterRows);
  filterRows();
}
