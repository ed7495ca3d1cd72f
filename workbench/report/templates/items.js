// What the browsers of items share: numbers, the model's choice, and rows of tables.
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
// an item's value of a ratio metric is the pair (log-likelihood, weight)
const metricText = (v) => Array.isArray(v) ? v.map((x) => number(x, x % 1 ? 2 : 0)).join(" / ")
  : typeof v === "number" ? number(v, v % 1 ? 3 : 0) : v === undefined || v === null ? "\u2013" : String(v);
const line = (cells, cls) => {
  const row = el("tr", cls);
  for (const [text, name, tag] of cells) row.append(el(tag || "td", name, text));
  return row;
};
// A closed row of an item; `bodyOf` makes its body when it is first opened.
const itemRow = (glyph, word, item, bodyOf) => {
  const details = el("details", "flip"), summary = el("summary"), way = el("span");
  details.dataset.task = item[0];
  way.append(glyph.content.firstElementChild.cloneNode(true), " " + word);
  summary.append(way, el("span", "", item[0]), el("span", "soft mono id", item[1]), el("span", "prompt", String(item[3] ?? "").replace(/\s+/g, " ")));
  details.append(summary);
  details.addEventListener("toggle", () => { if (details.open && details.children.length === 1) details.append(bodyOf()); });
  return details;
};
// Returns a function that shows rows in a list, a page at a time: rows are made when they are shown.
const paged = (list, button, rowOf) => {
  const size = Number(list.dataset.page);
  let rows = [], made = 0;
  const more = () => {
    const next = rows.slice(made, made + size);
    list.append(...next.map(rowOf));
    made += next.length;
    const left = rows.length - made;
    button.hidden = left === 0;
    button.textContent = "Show " + Math.min(size, left) + " more";
  };
  button.addEventListener("click", more);
  return (found) => {
    list.replaceChildren();
    [rows, made] = [found, 0];
    more();
  };
};
