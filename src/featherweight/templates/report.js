// Draws the plot, switches its axis, ties points to rows, sorts tables. The page reads well without it.
(() => {
  "use strict";
  const holder = document.getElementById("plot");
  if (holder) {
    const plots = JSON.parse(document.getElementById("plots").textContent);
    const tabs = [...document.querySelectorAll(".tabs button")];
    const mark = (number) => {
      const row = document.getElementById(`trial-${number}`);
      if (!row) return;
      document.querySelectorAll("tr.marked").forEach((other) => other.classList.remove("marked"));
      row.classList.add("marked");
      row.scrollIntoView({ block: "center", behavior: "smooth" });
    };
    const draw = async (axis) => {
      const plot = plots.find((candidate) => candidate.axis === axis);
      tabs.forEach((tab) => tab.setAttribute("aria-pressed", String(tab.dataset.axis === axis)));
      holder.setAttribute("aria-label", plot.words);
      document.getElementById("plot-words").textContent = plot.words;
      // ast: expressions are interpreted, so the policy needs no unsafe-eval; svg: styled and printed by CSS.
      const { view } = await vegaEmbed(holder, plot.spec, { actions: false, renderer: "svg", ast: true });
      view.addEventListener("click", (_, item) => item && item.datum && mark(item.datum.Trial));
    };
    tabs.forEach((tab) => tab.addEventListener("click", () => draw(tab.dataset.axis)));
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
      head.querySelector("button").addEventListener("click", () => {
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
