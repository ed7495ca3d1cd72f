// A search box above tables that were made from CSV files.
addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.searched")) {
    const box = document.createElement("input");
    box.type = "search";
    box.placeholder = "Search the table";
    box.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/);
      for (const row of table.tBodies[0].rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    });
    table.before(box);
  }
});
