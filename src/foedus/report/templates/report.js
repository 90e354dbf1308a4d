// Everything on this page can be read without this script. It sorts tables, shows hover texts at once, marks the
// section in view, and opens what is folded before printing.
(() => {
  "use strict";
  const all = (query, root = document) => [...root.querySelectorAll(query)];

  const valueOf = (row, column) => {
    const cell = row.children[column];
    if (!cell) return { text: "", number: NaN };
    const stated = cell.dataset.value;
    return { text: cell.textContent.trim(), number: stated === undefined ? NaN : Number(stated) };
  };
  const compare = (left, right) => {
    if (!Number.isNaN(left.number) && !Number.isNaN(right.number)) return left.number - right.number;
    if (Number.isNaN(left.number) !== Number.isNaN(right.number)) return Number.isNaN(left.number) ? 1 : -1;
    return left.text.localeCompare(right.text, "en", { numeric: true });
  };
  all("table.sortable").forEach((table) => {
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const body = [...table.tBodies].find((one) => !one.classList.contains("means"));
        const rows = [...body.rows];
        rows.sort((a, b) => (up ? 1 : -1) * compare(valueOf(a, column), valueOf(b, column)));
        body.append(...rows);
      });
    });
  });

  const hover = document.getElementById("hover");
  all("svg .tip").forEach((mark) => {
    const title = mark.querySelector("title");
    const text = title.textContent;
    title.remove();
    mark.addEventListener("pointerenter", () => {
      hover.textContent = text;
      hover.hidden = false;
    });
    mark.addEventListener("pointermove", (event) => {
      const room = window.innerWidth - hover.offsetWidth - 8;
      hover.style.left = `${Math.max(8, Math.min(event.clientX + 14, room))}px`;
      hover.style.top = `${Math.max(8, event.clientY - hover.offsetHeight - 10)}px`;
    });
    mark.addEventListener("pointerleave", () => { hover.hidden = true; });
  });

  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  if ("IntersectionObserver" in window) {
    const seen = new IntersectionObserver((entries) => {
      entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
        links.forEach((link) => link.removeAttribute("aria-current"));
        links.get(entry.target.id)?.setAttribute("aria-current", "location");
      });
    }, { rootMargin: "-20% 0px -70% 0px" });
    all("main > section").forEach((section) => seen.observe(section));
  }
  window.addEventListener("beforeprint", () => all("details").forEach((fold) => { fold.open = true; }));
})();
