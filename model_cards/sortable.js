for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const compare = (a, b) =>
    typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const rows = [...body.rows];
      const now = head.getAttribute("aria-sort");
      const numbers = rows.length > 0 && typeof key(rows[0], column) === "number";
      const down = now === null ? numbers : now === "ascending"; // numbers: largest first
      rows.sort((x, y) => (down ? -1 : 1) * compare(key(x, column), key(y, column)));
      body.append(...rows);
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    });
  });
}
