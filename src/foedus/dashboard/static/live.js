// The page is whole without this script, and then renews itself every 15 seconds. With it, sections are renewed in
// place when something changed: what is open stays open, and what is being typed into is left alone.
(() => {
  "use strict";
  const sign = document.getElementById("live");
  const said = document.getElementById("said");
  const EVERY = 2000, RESTING = 15000, TIRED = 60000;
  let tag = null, wait = EVERY, timer = 0, paused = false;

  const show = (state, words) => {
    sign.className = `live ${state}`;
    sign.querySelector("span").textContent = words;
  };

  const renew = (fresh) => {
    fresh.querySelectorAll("[data-live]").forEach((section) => {
      const old = document.getElementById(section.id);
      if (!old || old.innerHTML === section.innerHTML) return;
      if (old.contains(document.activeElement) && document.activeElement.matches("input, button")) return;
      const open = new Set([...old.querySelectorAll("details[open]")].map((fold) => fold.dataset.key));
      const scrolled = new Map([...old.querySelectorAll(".scroll")].map((box) => [box.ariaLabel, [box.scrollLeft, box.scrollTop]]));
      old.replaceChildren(...[...section.childNodes].map((node) => document.importNode(node, true)));
      old.querySelectorAll("details").forEach((fold) => { if (open.has(fold.dataset.key)) fold.open = true; });
      old.querySelectorAll(".scroll").forEach((box) => {
        const [left, top] = scrolled.get(box.ariaLabel) || [0, 0];
        box.scrollLeft = left;
        box.scrollTop = top;
      });
    });
    document.title = fresh.title;
    const news = fresh.getElementById("news");
    if (news && said.textContent !== news.textContent) said.textContent = news.textContent;
  };

  const look = async () => {
    try {
      const answer = await fetch(location.href, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag");
        renew(new DOMParser().parseFromString(await answer.text(), "text/html"));
      } else if (answer.status !== 304) throw new Error(String(answer.status));
      wait = EVERY;
      show("on", "live");
    } catch {
      wait = Math.min(2 * wait, TIRED);
      show("off", "no answer; trying again");
    }
    again();
  };
  const again = () => {
    clearTimeout(timer);
    if (!paused) timer = setTimeout(look, document.hidden ? Math.max(wait, RESTING) : wait);
  };

  const stop = document.createElement("button");
  stop.type = "button";
  stop.textContent = "Pause";
  stop.addEventListener("click", () => {
    paused = !paused;
    stop.textContent = paused ? "Go on" : "Pause";
    show(paused ? "" : "on", paused ? "paused" : "live");
    if (paused) clearTimeout(timer); else look();
  });
  sign.append(stop);
  show("on", "live");
  document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) look(); });
  timer = setTimeout(look, EVERY);
})();
