"use strict";
// Tables that are sorted by a click on a heading and searched by what stands in their cells.
(() => {
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    return text !== "" && Number.isFinite(Number(text)) ? Number(text) : text.toLowerCase();
  };
  const compare = (a, b) => (typeof a === typeof b ? (a < b ? -1 : Number(a > b))
    : typeof a === "number" ? -1 : 1);

  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    const body = table.tBodies[0];
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      // Numbers start with the largest, words with the first.
      const rows = [...body.rows];
      const numeric = rows.length > 0 && typeof value(rows[0], column) === "number";
      const now = head.getAttribute("aria-sort");
      const down = now === "none" ? numeric : now === "ascending";
      heads.forEach((h) => h.hasAttribute("aria-sort") && h.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((a, b) => (down ? -1 : 1) * compare(value(a, column), value(b, column)));
      body.append(...rows);
    }));
    const scope = table.closest(".panel") || table.parentElement.parentElement;
    const find = scope.querySelector("input.find");
    find?.addEventListener("input", () => {
      const wanted = find.value.trim().toLowerCase();
      let shown = 0;
      [...body.rows].forEach((row) => {
        const cells = [...row.cells].map((c) => c.textContent.trim().toLowerCase());
        row.hidden = Boolean(wanted) && !cells.some((text) => (/^\d+$/.test(wanted)
          ? text === wanted : text.includes(wanted)));
        shown += Number(!row.hidden);
      });
      scope.querySelector(".found").textContent = wanted ? `${shown} found` : "";
    });
  });
})();
