// Pages of `workbench view` and `--watch`: parts that the server computes or sends anew, filters of tables, and the chat.
const problem = async (answer) => (answer.headers.get("content-type") || "").startsWith("text/plain") ? (await answer.text()).trim() : "The server answers with status " + answer.status + ".";

// A part that takes time is asked for when the page is shown.
for (const part of document.querySelectorAll("[data-load]")) {
  part.setAttribute("aria-busy", "true");
  fetch(part.dataset.load).then(async (answer) => {
    if (answer.ok) part.innerHTML = await answer.text(); // escaped by the server's templates; the page's policy runs no script in it
    else part.replaceChildren(el("div", "note", await problem(answer)));
  }).catch(() => part.replaceChildren(el("p", "soft", "The server has ended."))).finally(() => part.removeAttribute("aria-busy"));
}

// A part that the server sends whenever it changes, or a newer page. A hidden tab lets its connection go, because browsers open few to one
// server; a report that grows (data-hidden) keeps it, so that it has the last scores when the command has ended.
for (const part of document.querySelectorAll("[data-stream]")) {
  const end = document.querySelector("[data-stream-end]");
  let source = null;
  const stop = (text) => {
    source.close();
    if (end) end.textContent = text || end.dataset.streamEnd;
    for (const busy of document.querySelectorAll("[data-busy]")) busy.remove();
  };
  const follow = () => {
    source = new EventSource(part.dataset.stream);
    source.addEventListener("part", (event) => { part.innerHTML = JSON.parse(event.data); }); // escaped by the server's templates
    source.addEventListener("page", () => { source.close(); location.reload(); });
    source.addEventListener("end", (event) => stop(JSON.parse(event.data)));
    source.onerror = () => stop();
  };
  if (!("hidden" in part.dataset))
    document.addEventListener("visibilitychange", () => { if (document.hidden) source.close(); else if (source.readyState === 2) follow(); });
  follow();
}

const ACTED = { router: "Router's choice", memory: "Facts that the memory put before the prompt", codebook: "Entries of the codebook that fired" };
const chat = $("chat");
if (chat) {
  let asking = null;
  const says = (text) => { $("chat-note").textContent = text; };
  const fails = (message, hint) => {
    const note = el("div", "note loud", message);
    if (hint) note.append(el("p", "soft", hint));
    $("chat-error").replaceChildren(note);
  };
  const panes = (names) => names.map((name) => {
    const pane = $("answer").content.firstElementChild.cloneNode(true);
    pane.querySelector("h2").textContent = name;
    pane.querySelector(".said").setAttribute("aria-label", "Answer of " + name);
    $("answers").append(pane);
    return pane;
  });
  const finish = (pane, data) => {
    const beside = pane.querySelector(".beside"), part = (head) => beside.appendChild(el("h3", "", head));
    pane.querySelector(".kind").textContent += ", " + data.seconds + " s";
    for (const [kind, head] of Object.entries(ACTED)) {
      const found = data.acted.filter(([acted]) => acted === kind);
      if (found.length) beside.append(el("h3", "", head), ...found.map(([, text]) => el("p", "", text)));
    }
    if (data.first.length) {
      part("First token");
      for (const [token, share] of data.first) {
        const row = beside.appendChild(el("div", "first-token")), bar = el("i");
        bar.style.width = Math.max(1, 100 * share) + "%";
        row.append(el("code", "", JSON.stringify(token).slice(1, -1).replaceAll(" ", "\u2423")), bar, el("span", "", (100 * share).toFixed(1) + " %"));
      }
    }
    if (data.make) {
      part("Make this");
      const line = beside.appendChild(el("div", "command")), copy = el("button", "", "Copy");
      copy.type = "button";
      line.append(el("pre", "", data.make), copy);
      line.firstChild.id = copy.dataset.copy = "make-" + document.querySelectorAll("#answers .command").length;
    }
  };
  let pane = null; // of the model that answers
  const take = (name, data, shown) => {
    if (name === "note") says(data);
    else if (name === "error") { says(""); fails(data.message, data.hint); }
    else if (name === "model") { pane = shown[data.number]; pane.querySelector(".kind").textContent = data.kind; pane.querySelector(".said").classList.add("busy"); }
    else if (name === "piece") pane.querySelector(".said").append(data);
    else if (name === "done") { pane.querySelector(".said").classList.remove("busy"); finish(pane, data); }
  };
  const ask = async () => {
    const form = new FormData(chat), names = form.getAll("name").map((name) => name.trim()).filter(Boolean);
    asking = new AbortController();
    $("chat-ask").disabled = true;
    $("chat-stop").hidden = false;
    $("answers").replaceChildren();
    $("chat-error").replaceChildren();
    says("");
    const shown = panes(names);
    try {
      const body = JSON.stringify({ names, prompt: form.get("prompt"), tokens: Number(form.get("tokens")), plain: form.has("plain") });
      const answer = await fetch("/chat", { method: "POST", body, headers: { "Content-Type": "application/json" }, signal: asking.signal });
      if (!answer.ok) throw new Error(await problem(answer));
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", read = await reader.read(); !read.done; read = await reader.read()) {
        const events = (rest + read.value).split("\n\n");
        rest = events.pop();
        for (const text of events) {
          const [, name, data] = text.match(/^event: (\w+)\ndata: (.*)$/s) || [];
          if (name) take(name, JSON.parse(data), shown);
        }
      }
    } catch (error) {
      if (error.name === "AbortError") says("Stopped.");
      else fails(error.message);
    }
    for (const said of document.querySelectorAll(".said.busy")) said.classList.remove("busy");
    $("chat-ask").disabled = false;
    $("chat-stop").hidden = true;
  };
  chat.addEventListener("submit", (event) => { event.preventDefault(); if (!$("chat-ask").disabled) ask(); });
  chat.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) chat.requestSubmit(); });
  $("chat-stop").addEventListener("click", () => asking && asking.abort());
}
