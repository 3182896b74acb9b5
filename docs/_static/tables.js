// On a phone a row is shown as a block, see site.css: each cell then needs its column's name.
for (const table of document.querySelectorAll(".table-wrapper table")) {
  const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent.trim());
  for (const row of table.querySelectorAll("tbody tr")) {
    [...row.children].forEach((cell, at) => {
      if (!cell.textContent.trim()) cell.classList.add("empty");
      else if (at && heads[at]) cell.dataset.label = heads[at];
    });
  }
}
