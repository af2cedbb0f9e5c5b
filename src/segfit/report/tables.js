// Tables of a report: sorted by a click on a head, filtered by what is typed, saved as CSV.
"use strict";
(() => {
  const text = (cell) => cell.textContent.trim();
  const number = (value) => (value === "–" || value === "" ? NaN : Number(value.replace(/[\u202f %]/g, "").replace("−", "-")));
  const formula = /^[=+\-@\t\r]/;  // a spreadsheet would run it, unless it is a number
  const quoted = (value) => {
    const safe = formula.test(value) && Number.isNaN(number(value)) ? `'${value}` : value;
    return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };

  const sort = (table, column, head) => {
    const rising = head.getAttribute("aria-sort") !== "ascending", rows = [...table.tBodies[0].rows];
    const values = new Map(rows.map((row) => [row, text(row.cells[column])]));
    const numbers = rows.every((row) => values.get(row) === "–" || values.get(row) === "" || !Number.isNaN(number(values.get(row))));
    rows.sort((one, other) => {
      const [a, b] = [values.get(one), values.get(other)];
      if (!numbers) return (rising ? 1 : -1) * a.localeCompare(b, undefined, { numeric: true });
      const [x, y] = [number(a), number(b)];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);  // what is missing comes last
      return (rising ? 1 : -1) * (x - y);
    });
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    table.tBodies[0].append(...rows);
  };

  const save = (table, name) => {
    const cells = (row) => [...row.cells].filter((cell) => !cell.classList.contains("meter")).map((cell) => quoted(text(cell.querySelector("[data-value]") ?? cell)));
    const rows = [table.tHead.rows[0], ...[...table.tBodies[0].rows].filter((row) => !row.hidden)];
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([rows.map((row) => cells(row).join(",")).join("\n") + "\n"], { type: "text/csv" }));
    link.download = `${name}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  for (const table of document.querySelectorAll("table[data-table]")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (head.classList.contains("meter")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, column, head));
      head.append(button);
    });
    const bar = document.createElement("div"), filter = document.createElement("input"), csv = document.createElement("button");
    bar.className = "table-bar";
    bar.dataset.of = table.dataset.table;
    Object.assign(filter, { type: "search", placeholder: "Filter, e.g. part of a name", ariaLabel: "Filter the rows" });
    Object.assign(csv, { type: "button", textContent: "Save as CSV" });
    const left = document.createElement("span");
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toLowerCase(), rows = [...table.tBodies[0].rows];
      for (const row of rows) row.hidden = !text(row).toLowerCase().includes(wanted);
      left.textContent = wanted ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
    });
    csv.addEventListener("click", () => save(table, table.dataset.table));
    bar.append(...(table.tBodies[0].rows.length > 8 ? [filter, left] : []), csv);
    table.parentElement.before(bar);
  }
})();
