// Line-by-line difference of two recipes. Their texts come from the list below it.
const CONTEXT = 3;
const lineDiff = (a, b) => {
  let start = 0, end = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start++;
  while (end < Math.min(a.length, b.length) - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const x = a.slice(start, a.length - end), y = b.slice(start, b.length - end);
  // longest common subsequence of the remaining lines, built from the end
  const longest = Array.from({ length: x.length + 1 }, () => new Uint32Array(y.length + 1));
  for (let i = x.length - 1; i >= 0; i--)
    for (let j = y.length - 1; j >= 0; j--)
      longest[i][j] = x[i] === y[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  const lines = a.slice(0, start).map((text) => [" ", text]);
  for (let i = 0, j = 0; i < x.length || j < y.length;) {
    if (i < x.length && j < y.length && x[i] === y[j]) { lines.push([" ", x[i]]); i++; j++; }
    else if (i < x.length && (j === y.length || longest[i + 1][j] >= longest[i][j + 1])) lines.push(["-", x[i++]]);
    else lines.push(["+", y[j++]]);
  }
  return [...lines, ...a.slice(a.length - end).map((text) => [" ", text])];
};
const SIGNS = { " ": "", "-": "\u2212", "+": "+" }, KINDS = { " ": "same", "-": "del", "+": "add" };
const lineOf = ([sign, text], other) => {
  const row = el("div", KINDS[sign]), body = el("span", "text");
  row.append(el("span", "sign", SIGNS[sign]), body);
  let head = 0, tail = 0;
  if (other !== undefined) {
    while (head < Math.min(text.length, other.length) && text[head] === other[head]) head++;
    while (tail < Math.min(text.length, other.length) - head && text[text.length - 1 - tail] === other[other.length - 1 - tail]) tail++;
    // whole words
    while (head > 0 && /[\w.-]/.test(text[head - 1])) head--;
    while (tail > 0 && /[\w.-]/.test(text[text.length - tail])) tail--;
  }
  if (other === undefined || head + tail === 0) body.textContent = text;
  else body.append(text.slice(0, head), el("b", "", text.slice(head, text.length - tail)), text.slice(text.length - tail));
  return row;
};
const drawDiff = (lines) => {
  const box = el("div", "diff mono");
  for (let i = 0; i < lines.length;) {
    let j = i;
    while (j < lines.length && lines[j][0] === lines[i][0]) j++;
    const run = lines.slice(i, j);
    if (lines[i][0] === " ") {
      const first = i === 0 ? 0 : CONTEXT, last = j === lines.length ? 0 : CONTEXT, hidden = run.length - first - last;
      if (hidden > 2) {
        const fold = el("button", "fold", "\u22EF " + hidden + " unchanged lines");
        fold.type = "button";
        fold.addEventListener("click", () => fold.replaceWith(...run.slice(first, run.length - last).map((l) => lineOf(l))));
        box.append(...run.slice(0, first).map((l) => lineOf(l)), fold, ...run.slice(run.length - last).map((l) => lineOf(l)));
      } else box.append(...run.map((l) => lineOf(l)));
      i = j;
      continue;
    }
    // equal numbers of removed and added lines are shown in pairs, with the changed part of each line marked
    let k = j;
    while (k < lines.length && lines[k][0] !== " " && lines[k][0] !== lines[i][0]) k++;
    const next = lines.slice(j, k), paired = next.length === run.length;
    box.append(...run.map((l, n) => lineOf(l, paired ? next[n][1] : undefined)), ...next.map((l, n) => lineOf(l, paired ? run[n][1] : undefined)));
    i = k;
  }
  return box;
};
const compareRecipes = (box) => {
  const recipes = [...document.querySelectorAll("details.recipe")].map((d) => {
    const text = d.querySelector("pre");
    return { name: d.dataset.name, what: d.dataset.what, lines: text ? text.textContent.split("\n") : null };
  });
  const from = $("diff-from"), to = $("diff-to"), count = $("diff-count"), out = $("diff-lines");
  const draw = () => {
    const [a, b] = [recipes[from.value], recipes[to.value]];
    const bare = [...new Set([a, b])].filter((r) => !r.lines);
    out.replaceChildren();
    if (bare.length) {
      count.textContent = bare.map((r) => r.name + " has no recipe in this report: it is " + r.what + ".").join(" ");
      const whole = [a, b].find((r) => r.lines);
      if (whole) out.append(el("p", "soft sub", "The recipe of " + whole.name + ":"), el("pre", "", whole.lines.join("\n")));
      return;
    }
    const lines = lineDiff(a.lines, b.lines);
    const [less, more] = ["-", "+"].map((sign) => lines.filter((l) => l[0] === sign).length);
    const number = (n) => n + (n === 1 ? " line" : " lines");
    count.textContent = less + more === 0 ? a.name + " and " + b.name + " have the same text."
      : "From " + a.name + " to " + b.name + ": " + number(less) + " removed, " + number(more) + " added.";
    if (less + more) out.append(drawDiff(lines));
  };
  const at = (name) => String(Math.max(0, recipes.findIndex((r) => r.name === name)));
  from.value = at(box.dataset.first);
  to.value = at(box.dataset.second);
  for (const control of [from, to]) control.addEventListener("input", draw);
  $("diff-swap").addEventListener("click", () => { [from.value, to.value] = [to.value, from.value]; draw(); });
  draw();
};
if ($("recipe-diff")) compareRecipes($("recipe-diff"));
