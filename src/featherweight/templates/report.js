// Draws the plot, switches its axis, ties points to rows, sorts tables. The page reads well without it.
(() => {
  "use strict";
  const holder = document.getElementById("plot");
  if (holder) {
    const plots = JSON.parse(document.getElementById("plots").textContent);
    const tabs = [...document.querySelectorAll(".tabs button")];
    const browse = document.querySelector(".browse");
    const said = document.getElementById("picked");
    let shown = null; // the plot and its view
    const pick = (trial) => {
      const point = shown.plot.points.find((candidate) => candidate.trial === trial);
      if (!point) return;
      shown.trial = trial;
      shown.view.signal("picked", trial).runAsync();
      said.textContent = `${point.words} `;
      document.querySelectorAll("tr.marked").forEach((other) => other.classList.remove("marked"));
      const row = document.getElementById(`trial-${trial}`);
      if (!row) return;
      row.classList.add("marked");
      const link = document.createElement("a");
      link.href = `#${row.id}`;
      link.textContent = "Show it in the table";
      said.append(link);
    };
    const go = (by) => {
      const points = shown.plot.points;
      const at = points.findIndex((point) => point.trial === shown.trial);
      pick(points[at < 0 ? 0 : (at + by + points.length) % points.length].trial);
    };
    const draw = async (axis) => {
      const plot = plots.find((candidate) => candidate.axis === axis);
      tabs.forEach((tab) => tab.setAttribute("aria-pressed", String(tab.dataset.axis === axis)));
      holder.setAttribute("aria-label", plot.words);
      document.getElementById("plot-words").textContent = plot.words;
      // ast: expressions are interpreted, so the policy needs no unsafe-eval; svg: styled and printed by CSS.
      const { view } = await vegaEmbed(holder, plot.spec, { actions: false, renderer: "svg", ast: true });
      const trial = shown && shown.trial;
      shown = { plot, view };
      browse.hidden = false;
      if (trial) pick(trial);
      view.addEventListener("click", (_, item) => item && item.datum && item.datum.Trial && pick(item.datum.Trial));
    };
    tabs.forEach((tab) => tab.addEventListener("click", () => draw(tab.dataset.axis)));
    browse.querySelectorAll("button").forEach((button) => button.addEventListener("click", () => go(Number(button.dataset.go))));
    browse.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) go(by);
    });
    draw(plots[0].axis);
  }

  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    const key = (row, index) => row.cells[index].dataset.sort ?? row.cells[index].textContent.trim();
    heads.forEach((head, index) => {
      const button = head.querySelector("button");
      if (button) button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [key(a, index), key(b, index)];
          if (x === "" || y === "") return (x === "") - (y === ""); // not measured: last, either way
          return up ? compare(x, y) : compare(y, x);
        });
        table.tBodies[0].append(...rows);
      });
    });
  });
})();
