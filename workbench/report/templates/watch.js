// A report that `eval --watch` or `search --watch` serves: asks the server that the page came from how far the work is, and reloads for new scores.
const watchBox = $("watch");
const watchEnd = (text) => {
  $("watch-head").textContent = "The command has ended.";
  $("watch-text").textContent = text;
};
const ask = async () => {
  let state = null;
  try {
    state = await (await fetch("state", { cache: "no-store" })).json();
  } catch {
    return watchEnd("This page stays as it is until it is closed; the scores are stored: workbench report writes them to a file.");
  }
  if (String(state.version) !== watchBox.dataset.version) return location.reload();
  if (state.ended) return watchEnd("All scores are on this page, and stored: workbench report writes them to a file.");
  $("watch-text").textContent = state.text;
  setTimeout(ask, 1000);
};
if (watchBox) ask();
