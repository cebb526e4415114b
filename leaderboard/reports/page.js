// Sorting, filtering and expanding rows. Without JavaScript the page is static and shows all its content.
(() => {
  "use strict";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const entries = all("tbody.entry");
  const words = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  document.documentElement.classList.add("js");

  // Sorting: numeric columns numerically, missing values and unranked rows last; a third click restores the original order.
  function sort(header, direction) {
    const table = header.closest("table");
    const column = header.cellIndex;
    const sign = direction === "descending" ? -1 : 1;
    const isNumber = header.dataset.sort === "number";
    const key = (entry) => {
      const cell = entry.rows[0].cells[column];
      if (isNumber) return "value" in cell.dataset ? Number(cell.dataset.value) : null;
      const text = (cell.querySelector(".name") ?? cell).textContent.trim();
      return text === "" || text === "-" ? null : text;
    };
    const order = (a, b) => {
      const unranked = a.classList.contains("unranked") - b.classList.contains("unranked");
      if (unranked || direction === "none") return unranked || a.dataset.order - b.dataset.order;
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a.dataset.order - b.dataset.order;
      return sign * (isNumber ? x - y : words.compare(x, y)) || a.dataset.order - b.dataset.order;
    };
    for (const other of all("th[aria-sort]", table)) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", direction);
    table.append(...[...table.tBodies].sort(order));
  }

  for (const header of all("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...header.childNodes);
    header.append(button);
    const next = { none: "ascending", ascending: "descending", descending: "none" };
    button.addEventListener("click", () => sort(header, next[header.getAttribute("aria-sort")]));
  }

  // Expanding: a row's details appear below it.
  function open(entry, isOpen) {
    const button = entry.querySelector(".open");
    const detail = entry.querySelector(".detail");
    button.setAttribute("aria-expanded", String(isOpen));
    detail.hidden = !isOpen;
    detail.querySelector("details").open = isOpen;
  }

  entries.forEach((entry, index) => {
    entry.dataset.order = index;
    const name = entry.querySelector(".name");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "open";
    button.title = "Show the details of this row";
    name.replaceWith(button);
    button.append(name);
    const detail = entry.querySelector(".detail");
    detail.id = `${entry.id}-detail`;
    button.setAttribute("aria-controls", detail.id);
    button.addEventListener("click", () => open(entry, detail.hidden));
    open(entry, false);
  });

  for (const pre of all("pre.json")) {
    const actions = document.createElement("div");
    actions.className = "actions";
    const act = (label, run) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.addEventListener("click", () => run(button));
      actions.append(button);
    };
    act("Copy", (button) => {
      const done = () => { button.textContent = "Copied"; };
      const select = () => {
        getSelection().selectAllChildren(pre);
        button.textContent = "Selected: press Ctrl+C";
      };
      navigator.clipboard ? navigator.clipboard.writeText(pre.textContent).then(done, select) : select();
    });
    act("Download", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([pre.textContent], { type: "application/json" }));
      link.download = pre.dataset.file;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
    pre.before(actions);
  }

  // Filtering: every search word must occur in the row, the title of its table, or its dataset.
  const form = document.querySelector(".controls");
  const haystacks = entries.map((entry) =>
    [entry.rows[0], entry.closest("article").querySelector("h3"), entry.closest("section").querySelector("h2")]
      .map((element) => element.textContent).join(" ").toLowerCase());

  function filter() {
    const wanted = form.querySelector("#text").value.toLowerCase().split(/\s+/);
    const method = form.querySelector("#method").value;
    const source = new FormData(form).get("source");
    let shown = 0;
    entries.forEach((entry, i) => {
      const fits = (!method || entry.dataset.method === method) && (!source || entry.dataset.source === source)
        && wanted.every((word) => haystacks[i].includes(word));
      entry.hidden = !fits;
      shown += fits;
    });
    for (const part of all("article, section")) part.hidden = !part.querySelector("tbody.entry:not([hidden])");
    for (const link of all("nav a")) link.parentElement.hidden = document.querySelector(link.hash).hidden;
    form.querySelector("#status").textContent =
      shown ? `${shown} of ${entries.length} results` : "No result matches; clear the search or show all.";
  }

  // Energy: the chosen model determines the column, its header and the axis of the plots.
  function choose() {
    const chosen = form.querySelector("#energy")?.value;
    if (!chosen) return;
    for (const part of all("[data-energy]")) part.hidden = !part.dataset.energy.split("|").includes(chosen);
    for (const cell of all("td.energy")) {
      const shown = cell.querySelector("[data-energy]:not([hidden])");
      if (shown && "value" in shown.dataset) cell.dataset.value = shown.dataset.value;
      else delete cell.dataset.value;
    }
    for (const header of all("th.energy:not([aria-sort=none])")) sort(header, header.getAttribute("aria-sort"));
  }

  form.addEventListener("input", (event) => event.target.id === "energy" ? choose() : filter());
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  form.reset();
  filter();
  choose();

  // Following a link to a row, from the plot or another page, expands it.
  function follow() {
    const entry = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const row = entry && entry.closest("tbody.entry");
    if (!row) return;
    if (row.hidden) { form.reset(); filter(); choose(); }
    open(row, true);
    if (entry !== row) entry.open = true;
    entry.scrollIntoView({ block: "nearest" });
  }
  addEventListener("hashchange", follow);
  follow();
})();
