// The live page: fetches its part again every few seconds, and asks the run to stop.
"use strict";
(() => {
  const told = document.getElementById("told");
  const look = async () => {
    if (document.hidden) return setTimeout(look, 1000);
    try {
      const answer = await fetch("live", { cache: "no-store" });
      const state = await answer.json();
      if (state.done) location.reload();
      else document.getElementById("live").innerHTML = state.html;
    } catch {
      told.textContent = "segfit report --watch does not answer any more.";
    }
    return setTimeout(look, 15000);  // drawing takes time from the training
  };
  setTimeout(look, 15000);
  document.getElementById("stop").addEventListener("click", async () => {
    if (!confirm("Stop what is at work in this project? The same command goes on where it was.")) return;
    const answer = await fetch("stop", { method: "POST" });
    told.textContent = answer.ok ? "Asked to stop: it ends after its present step." : "It could not be asked to stop.";
  });
})();
