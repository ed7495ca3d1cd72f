// Browser of changed items. A row is created when it is shown, its body when it is opened.
const WORDS = { gained: "gained", lost: "lost", other: "same score" };
const browse = (list) => {
  const pick = { configuration: $("flip-configuration"), task: $("flip-task"), direction: $("flip-direction"), text: $("flip-text") };
  let data = null;

  const metricsText = (metrics) => Object.entries(metrics).map(([k, v]) => k + " " + metricText(v)).join(", ");
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
    box.append(el("h4", "", "Log-likelihood of each choice; \u25C2 marks the model's answer"), table);
    return box;
  };
  const answerTable = (item, answer, name) => {
    const metric = data.tasks[item[0]], table = el("table"), head = el("thead"), body = el("tbody");
    const text = (x) => (x === null || x === undefined ? "\u2013" : x === "" ? "(empty)" : x);
    const score = (metrics) => metricText(metrics[metric]);
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
    if (!item[5] && (item[6][2] || flip[3][2])) {
      const logs = (x) => (x ? x.map((v) => number(v, 2)).join(", ") : "\u2013");
      notes.push("log-likelihood " + logs(item[6][2]) + " and " + logs(flip[3][2]));
    }
    if (item[2] !== null && item[2] !== undefined) notes.push("cluster " + item[2]);
    if (notes.length) right.append(el("p", "soft sub", notes.join("; ")));
    body.append(left, right);
    return body;
  };
  const rowOf = (flip) => {
    const row = itemRow($("glyph-" + flip[2]), WORDS[flip[2]], data.items[flip[1]], () => bodyOf(flip));
    row.dataset.direction = flip[2];
    return row;
  };
  const show = paged(list, $("flip-more"), rowOf);
  const filter = () => {
    const configuration = Number(pick.configuration.value), task = pick.task.value, direction = pick.direction.value;
    const words = pick.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const own = data.flips.filter((f) => f[0] === configuration);
    const matching = own.filter((f) => {
      const item = data.items[f[1]];
      if (task && item[0] !== task) return false;
      if (direction && f[2] !== direction) return false;
      if (!words.length) return true;
      const text = [item[1], item[2], item[3], item[4], (item[5] || []).join(" "), item[6][0], f[3][0]].join(" ").toLowerCase();
      return words.every((w) => text.includes(w));
    });
    const gained = matching.filter((f) => f[2] === "gained").length, lost = matching.filter((f) => f[2] === "lost").length;
    $("flip-count").textContent = matching.length + " of " + own.length + " changed items of " + data.configurations[configuration]
      + ": " + gained + " gained, " + lost + " lost";
    show(matching);
  };
  const start = async () => {
    try {
      data = await unpack("flip-data");
    } catch (error) {
      $("flip-count").textContent = "This browser could not unpack the items (" + error.message + "). The .json file beside this page lists them.";
      return;
    }
    data.configurations.forEach((name, i) => pick.configuration.append(new Option(name, i)));
    Object.keys(data.tasks).forEach((name) => pick.task.append(new Option(name, name)));
    const first = data.configurations.indexOf(list.dataset.first);
    pick.configuration.value = String(Math.max(first, 0));
    if (!data.flips.some((f) => f[2] === "other")) pick.direction.querySelector("[value=other]").remove();
    for (const control of Object.values(pick)) control.addEventListener("input", filter);
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
};
if ($("flip-list")) browse($("flip-list"));
