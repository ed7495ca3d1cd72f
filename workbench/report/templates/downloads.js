// Buttons that save tables as CSV and LaTeX and figures as SVG and PNG. The files are packed into the page; nothing is requested.
const savedTables = [...document.querySelectorAll("table")], savedFigures = [...document.querySelectorAll("[data-figure]")];
const unpackSaved = async () => {
  const bytes = Uint8Array.from(atob($("download-data").textContent.trim()), (c) => c.charCodeAt(0));
  return JSON.parse(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text());
};
const offer = (name, blob) => {
  const link = el("a"), url = URL.createObjectURL(blob);
  link.href = url;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
};
const painted = async (svg) => {
  const image = new Image();
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(svg);
  await image.decode();
  const canvas = el("canvas");
  canvas.width = 2 * image.naturalWidth;
  canvas.height = 2 * image.naturalHeight;
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
};
const saveBar = (place, title, kinds) => {
  const bar = el("p", "save");
  for (const [label, name, make] of kinds) {
    const button = el("button", "", label);
    button.type = "button";
    button.title = "Save " + title + " as " + name;
    button.addEventListener("click", async () => offer(name, await make()));
    bar.append(button);
  }
  place(bar);
};
const blobOf = (text, type) => new Blob([text], { type: type + ";charset=utf-8" });
const offerAll = async () => {
  const data = await unpackSaved();
  data.tables.forEach((table, i) => {
    if (!table || !savedTables[i]) return;
    const box = savedTables[i].closest(".scroll") || savedTables[i];
    saveBar((bar) => box.after(bar), "this table", [
      ["CSV", table.name + ".csv", () => blobOf(table.csv, "text/csv")],
      ["LaTeX", table.name + ".tex", () => blobOf(table.tex, "application/x-tex")],
    ]);
  });
  data.figures.forEach((figure, i) => {
    if (!figure || !savedFigures[i]) return;
    saveBar((bar) => savedFigures[i].append(bar), "this figure", [
      ["SVG", figure.name + ".svg", () => blobOf(figure.svg, "image/svg+xml")],
      ["PNG", figure.name + ".png", () => painted(figure.svg)],
    ]);
  });
  root.dataset.saves = "ready";
};
if ($("download-data") && $("download-data").textContent.trim()) offerAll();
