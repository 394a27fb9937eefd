"use strict";
for (const table of document.querySelectorAll("table.runs")) {
  const headers = [...table.querySelectorAll("th[aria-sort]")];
  const bodies = () => [...table.tBodies]; // one for each run: its row, and the one that opens

  const sort = (header) => {
    const column = Number(header.dataset.cell);
    const falling = header.getAttribute("aria-sort") === "none" ? header.dataset.first === "descending"
      : header.getAttribute("aria-sort") === "ascending";
    const value = (body) => body.rows[0].cells[column].dataset.value;
    const compare = (a, b) => {
      const [first, second] = [value(a), value(b)];
      if (first === "" || second === "") return (first === "") - (second === ""); // the empty last, either way
      const [x, y] = [Number(first), Number(second)];
      const order = !Number.isNaN(x) && !Number.isNaN(y) ? x - y : first.localeCompare(second, "en", { numeric: true });
      return falling ? -order : order;
    };
    for (const other of headers) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", falling ? "descending" : "ascending");
    table.append(...bodies().sort(compare));
  };
  for (const header of headers) header.querySelector("button").addEventListener("click", () => sort(header));

  for (const opener of table.querySelectorAll("td.opener button")) {
    opener.addEventListener("click", () => {
      const more = opener.closest("tbody").rows[1];
      more.hidden = !more.hidden;
      opener.setAttribute("aria-expanded", String(!more.hidden));
    });
  }

  const filter = document.querySelector("#filter");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const body of bodies()) {
      const text = body.rows[0].textContent.toLowerCase();
      body.hidden = !words.every((word) => text.includes(word));
      left += !body.hidden;
    }
    document.querySelector("#count").textContent = `${left} of ${bodies().length} runs`;
  });

  const details = document.querySelector("#details");
  if (details) {
    details.addEventListener("change", () => {
      table.classList.toggle("compact", !details.checked);
      for (const group of table.querySelectorAll("th.group")) {
        group.colSpan = details.checked ? group.dataset.whole : group.dataset.compact;
      }
    });
  }
}
