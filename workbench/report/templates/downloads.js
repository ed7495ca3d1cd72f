// Buttons that save tables as CSV and LaTeX, which are packed into the page, and figures as SVG and PNG. Nothing is requested.
const offer = (name, blob) => {
  const link = el("a"), url = URL.createObjectURL(blob);
  link.href = url;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
};
const saveBar = (title, kinds) => {
  const bar = el("p", "save");
  for (const [label, name, make] of kinds) {
    const button = el("button", "", label);
    button.type = "button";
    button.title = "Save " + title + " as " + name;
    button.addEventListener("click", async () => offer(name, await make()));
    bar.append(button);
  }
  return bar;
};
const blobOf = (text, type) => new Blob([text], { type: type + ";charset=utf-8" });
const taken = new Set();
const fileName = (text) => {
  const plain = text.normalize("NFKD").replace(/[^\x00-\x7f]/g, "").toLowerCase().replace(/[^a-z0-9]+/g, "-");
  let name = plain.replace(/^-|-$/g, "").slice(0, 80).replace(/-$/, "") || "unnamed";
  while (taken.has(name)) name += "-2";
  taken.add(name);
  return name;
};

// A figure as an SVG file that needs no style sheet: the browser lays it out once more, in light colors and without the buttons, and every
// text and shape is written at the place and with the look that it has there.
const LOOK = { "fill-opacity": "1", stroke: "none", "stroke-opacity": "1", "stroke-width": "1px", "stroke-dasharray": "none", "stroke-linejoin": "miter",
  "stroke-linecap": "butt", "paint-order": "normal", opacity: "1", "vector-effect": "none", "text-anchor": "start", "font-size": "", "font-weight": "400" };
const SHAPES = "path, line, rect, circle, text", LENGTHS = ["x", "x1", "x2", "cx", "dx", "width"];
const made = (tag, attributes, ...content) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, typeof value === "number" ? Math.round(value * 100) / 100 : value);
  node.append(...content);
  return node;
};
// Other programs than browsers know no colors with an opacity in them.
const paint = (color) => {
  const [, r, g, b, a] = color.match(/^rgba?\((\d+), (\d+), (\d+)(?:, ([\d.]+))?\)$/) || [];
  return r === undefined ? [color, 1] : ["#" + [r, g, b].map((v) => Number(v).toString(16).padStart(2, "0")).join(""), a === undefined ? 1 : Number(a)];
};
const shapeOf = (node) => {
  const style = getComputedStyle(node), attributes = {};
  const given = (name) => style.getPropertyValue(name);
  for (const [name, usual] of Object.entries(LOOK)) if (given(name) !== usual) attributes[name] = given(name).replace(/px$/, "");
  for (const name of ["fill", "stroke"]) {
    const [color, alpha] = paint(given(name));
    if (color !== "none" || name === "fill") attributes[name] = color;
    if (alpha !== 1) attributes[name + "-opacity"] = String(alpha * Number(given(name + "-opacity")));
  }
  if (node.localName !== "text") for (const name of Object.keys(attributes)) if (/^(font|text)/.test(name)) delete attributes[name];
  if (node.localName === "circle") attributes.r = given("r").replace(/px$/, "");
  for (const name of LENGTHS) {
    if (!(node.getAttribute(name) || "").endsWith("%")) continue;
    const length = node[name].baseVal;
    attributes[name] = String(Math.round(100 * (length.value === undefined ? length[0].value : length.value)) / 100);
  }
  return attributes;
};
const drawingOf = (svg, origin) => {
  for (const use of svg.querySelectorAll("use")) {
    const mark = $(use.getAttribute("href").slice(1)).cloneNode(true);
    mark.removeAttribute("id");
    use.replaceWith(made("g", { transform: "translate(" + use.x.baseVal.value + " " + use.y.baseVal.value + ")" }, mark));
  }
  const shapes = [...svg.querySelectorAll(SHAPES)].map((node) => [node, shapeOf(node)]);
  const inner = [...svg.querySelectorAll("svg")].map((node) => [node, { width: node.width.baseVal.value, height: node.height.baseVal.value }]);
  const boxes = [[svg, svg.getBoundingClientRect()], ...inner];
  for (const [node, look] of shapes) for (const [name, value] of Object.entries(look)) node.setAttribute(name, value);
  for (const [node, box] of boxes) Object.entries({ width: box.width, height: box.height, overflow: "visible" }).forEach((pair) => node.setAttribute(...pair));
  svg.setAttribute("x", boxes[0][1].left - origin.left);
  svg.setAttribute("y", boxes[0][1].top - origin.top);
  for (const node of [svg, ...svg.querySelectorAll("*")])
    for (const name of [...node.getAttributeNames()]) if (/^(class|style|role|id|aria-.*|data-.*)$/.test(name)) node.removeAttribute(name);
  return svg;
};
const textsOf = (node, origin) => {
  const style = getComputedStyle(node.parentElement), [color] = paint(style.color), range = document.createRange(), lines = [];
  for (const word of node.data.matchAll(/\S+/g)) {
    range.setStart(node, word.index);
    range.setEnd(node, word.index + word[0].length);
    const box = range.getBoundingClientRect(), last = lines[lines.length - 1];
    if (last && Math.abs(last.box.top - box.top) < 2) last.words.push(word[0]);
    else lines.push({ box, words: [word[0]] });
  }
  return lines.map(({ box, words }) => made("text", { x: box.left - origin.left, y: box.top - origin.top + 0.79 * box.height,
    fill: color, "font-size": style.fontSize.replace("px", ""), "font-weight": style.fontWeight }, words.join(" ")));
};
const boxesOf = (node, origin) => {
  const style = getComputedStyle(node), box = node.getBoundingClientRect(), [x, y] = [box.left - origin.left, box.top - origin.top], found = [];
  const [fill, alpha] = paint(style.backgroundColor), border = parseFloat(style.borderTopWidth), under = parseFloat(style.borderBottomWidth);
  if (alpha > 0) found.push(made("rect", { x, y, width: box.width, height: box.height, rx: 2, fill, "fill-opacity": alpha }));
  for (const [width, at, color, dashed] of [[border, y, style.borderTopColor, style.borderTopStyle], [under, y + box.height, style.borderBottomColor, ""]])
    if (width > 0) found.push(made("path", { d: "M" + x + " " + at + "h" + box.width, stroke: paint(color)[0], "stroke-width": width, ...(dashed === "dashed" ? { "stroke-dasharray": "5 3" } : {}) }));
  return found;
};
const partsOf = (node, origin) => {
  if (node.nodeType === Node.TEXT_NODE) return textsOf(node, origin);
  if (node.nodeType !== Node.ELEMENT_NODE || getComputedStyle(node).display === "none") return [];
  return node.localName === "svg" ? [drawingOf(node, origin)] : [...boxesOf(node, origin), ...[...node.childNodes].flatMap((child) => partsOf(child, origin))];
};
const svgOf = (figure) => {
  const copy = figure.cloneNode(true);
  for (const node of copy.querySelectorAll(".save, .caption, .hit, .mark > .reach[d], .m-halo, summary")) node.remove();
  for (const node of copy.querySelectorAll("details")) node.open = true;
  for (const node of copy.querySelectorAll(".name")) node.style.maxWidth = "none";
  if (!copy.querySelector("h2, h3, h4")) copy.prepend(el("h3", "", figure.dataset.figure));
  if (figure.dataset.note) copy.append(el("p", "sub", figure.dataset.note));
  copy.style.cssText = "position: absolute; top: 0; left: 0; width: " + (copy.querySelector(".multiples") ? 880 : 620) + "px";
  root.classList.add("light");
  figure.after(copy);
  try {
    const origin = copy.getBoundingClientRect();
    const right = Math.max(...[copy, ...copy.querySelectorAll("svg")].map((node) => node.getBoundingClientRect().right)) - origin.left;
    const [width, height] = [Math.ceil(right) + 24, Math.ceil(origin.height) + 24];
    const parts = [...copy.childNodes].flatMap((node) => partsOf(node, origin));
    return new XMLSerializer().serializeToString(made("svg", { width, height, viewBox: "-12 -12 " + width + " " + height, "font-family": getComputedStyle(copy).fontFamily },
      made("rect", { x: -12, y: -12, width, height, fill: "#ffffff" }), ...parts)) + "\n";
  } finally {
    copy.remove();
    root.classList.remove("light");
  }
};
const pngOf = async (figure) => {
  const image = new Image();
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(svgOf(figure));
  await image.decode();
  const canvas = el("canvas");
  canvas.width = 2 * image.naturalWidth;
  canvas.height = 2 * image.naturalHeight;
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
};
const offerAll = async () => {
  const packed = $("download-data") && $("download-data").textContent.trim() ? await unpack("download-data") : {};
  for (const table of document.querySelectorAll("table")) {
    const name = fileName(table.dataset.name || table.id.replace(/-table$/, "")), files = packed[name];
    if (files) (table.closest(".scroll") || table).after(saveBar("this table", [
      ["CSV", name + ".csv", () => blobOf(files.csv, "text/csv")],
      ["LaTeX", name + ".tex", () => blobOf(files.tex, "application/x-tex")],
    ]));
  }
  for (const figure of document.querySelectorAll("[data-figure]")) {
    if (!figure.querySelector("svg")) continue;
    const head = figure.querySelector("h2, h3, h4"), name = fileName(figure.dataset.figure || (head ? head.textContent : "figure"));
    figure.append(saveBar("this figure", [
      ["SVG", name + ".svg", () => blobOf(svgOf(figure), "image/svg+xml")],
      ["PNG", name + ".png", () => pngOf(figure)],
    ]));
  }
  root.dataset.saves = "ready";
};
offerAll();
