// Two configurations side by side, item by item. A row is created when it is shown, its body when it is opened.
const CHANGES = { won: "won", lost: "lost", same: "same score" };
const sideBySide = (list) => {
  const pick = Object.fromEntries(["first", "second", "task", "only", "text"].map((name) => [name, $("beside-" + name)]));
  let data = null;

  // the higher level is better; the level of a ratio metric is a log-likelihood divided by its weight
  const level = (task, score) => {
    const [, lower, ratio] = data.tasks[task] || ["", false, false];
    const number = Array.isArray(score) ? score[0] / (score[1] || 1) : score;
    return typeof number !== "number" ? null : lower && !ratio ? -number : number;
  };
  const chosen = (item, answer) => best(answer[2], item[5] || [], (data.tasks[item[0]] || [""])[0]);
  const compare = (item, a, b) => {
    const [x, y] = [a, b].map((answer) => level(item[0], answer[0]));
    const change = x === null || y === null || x === y ? "same" : y > x ? "won" : "lost";
    const other = a[1] !== b[1] || (item[5] && chosen(item, a) !== chosen(item, b));
    return { change, differs: change !== "same" || other };
  };
  const text = (x) => (x === null || x === undefined ? "\u2013" : x === "" ? "(empty)" : String(x));
  const rightOf = (item) => (item[5] && [].concat(item[4]).every((g) => Number.isInteger(g)))
    ? [].concat(item[4]).map((g) => item[5][g]).join(" | ") : text(item[4]);
  const paneOf = (name, item, answer) => {
    const pane = el("div", "pane"), metric = (data.tasks[item[0]] || [""])[0];
    const head = el("h4", "", name);
    head.append(el("span", "soft", metric + " " + metricText(answer[0])));
    pane.append(head, el("pre", "", text(answer[1])));
    return pane;
  };
  const choicesOf = (item, names, answers) => {
    const table = el("table"), head = el("thead"), body = el("tbody");
    head.append(line([["Choice", "", "th"], ...names.map((name) => [name, "", "th"])]));
    const marks = answers.map((answer) => chosen(item, answer));
    item[5].forEach((choice, i) => {
      const right = [].concat(item[4]).some((g) => g === i || g === choice);
      const row = line([[choice + (right ? "  (right answer)" : "")],
        ...answers.map((answer, k) => [number(answer[2] ? answer[2][i] : null, 2), "n" + (marks[k] === i ? " pick" : "")])], right ? "gold" : "");
      marks.forEach((mark, k) => row.cells[k + 1].append(el("span", "at", mark === i ? "\u25C2" : "")));
      body.append(row);
    });
    table.append(head, body);
    const box = el("div", "wide");
    box.append(el("h4", "", "Log-likelihood of each choice; \u25C2 marks the model's answer"), table);
    return box;
  };
  const bodyOf = (row) => {
    const item = data.items[row.item], names = [pick.first, pick.second].map((s) => data.configurations[s.value]);
    const answers = [row.a, row.b], body = el("div", "body both"), prompt = el("div", "wide");
    prompt.append(el("h4", "", "Prompt"), el("pre", "", text(item[3])));
    body.append(prompt);
    if (item[5] && answers.every((answer) => answer[1] === null)) body.append(choicesOf(item, names, answers));
    else {
      const right = el("div", "wide");
      right.append(el("h4", "", "Right answer"), el("pre", "", rightOf(item)));
      body.append(right, ...answers.map((answer, k) => paneOf(names[k], item, answer)));
    }
    return body;
  };
  const rowOf = (row) => {
    const made = itemRow($("beside-" + row.change), CHANGES[row.change], data.items[row.item], () => bodyOf(row));
    made.dataset.change = row.change;
    return made;
  };
  const show = paged(list, $("beside-more"), rowOf);
  const filter = () => {
    const [first, second] = [Number(pick.first.value), Number(pick.second.value)];
    const words = pick.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const common = [];
    data.items.forEach((item, i) => {
      const a = data.answers[first][i], b = data.answers[second][i];
      if (a && b && (!pick.task.value || item[0] === pick.task.value)) common.push({ item: i, a, b, ...compare(item, a, b) });
    });
    const matching = common.filter((row) => {
      const only = pick.only.value;
      if (only === "changed" ? !row.differs : only !== "all" && row.change !== only) return false;
      const item = data.items[row.item];
      const whole = [item[1], item[2], item[3], item[4], (item[5] || []).join(" "), row.a[1], row.b[1]].join(" ").toLowerCase();
      return words.every((word) => whole.includes(word));
    });
    const names = [first, second].map((i) => data.configurations[i]);
    const of = (change) => matching.filter((row) => row.change === change).length;
    $("beside-count").textContent = first === second ? "Choose two different configurations."
      : matching.length + " of " + common.length + " items: " + names[1] + " against " + names[0] + ", " + of("won") + " won, "
        + of("lost") + " lost, " + of("same") + " with the same score";
    show(matching);
  };
  const start = async () => {
    try {
      data = await unpack("beside-data");
    } catch (error) {
      $("beside-count").textContent = "This browser could not unpack the answers (" + error.message + "). The .json file beside this page lists them.";
      return;
    }
    [...new Set(data.items.map((item) => item[0]))].forEach((name) => pick.task.append(new Option(name, name)));
    for (const name of ["first", "second"]) pick[name].value = String(data.configurations.indexOf(list.dataset[name]));
    for (const control of Object.values(pick)) control.addEventListener("input", filter);
    $("beside-swap").addEventListener("click", () => { [pick.first.value, pick.second.value] = [pick.second.value, pick.first.value]; filter(); });
    filter();
    list.dataset.ready = "yes";
  };
  start();
};
if ($("beside-list")) sideBySide($("beside-list"));
