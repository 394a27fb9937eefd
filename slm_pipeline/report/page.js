"use strict";
const table = document.querySelector("table.runs");
const headers = [...table.querySelectorAll("th[aria-sort]")];
const runs = [...table.querySelectorAll("tbody.run")]; // in the order of the last sorting
const inputs = [...document.querySelectorAll("[data-filter]")];
const filter = document.querySelector("#filter");
const group = document.querySelector("#group");
const cell = (run, column) => run.rows[0].cells[column];
const value = (run, column) => cell(run, column).dataset.value;

// method=slm, num_layers<=24, pruned/average>50: of a column, by its whole name or by the end of it. Else: words.
const test = (word) => {
  const [, name, sign, wanted] = word.match(/^([^<>=!]+)(<=|>=|!=|<|>|=)(.*)$/) ?? [];
  const header = name && (headers.find((one) => one.dataset.column.toLowerCase() === name)
    ?? headers.find((one) => one.dataset.column.toLowerCase().endsWith(name)));
  if (!header) return (run) => run.text.includes(word);
  const column = header.dataset.cell;
  return (run) => {
    const [found, number] = [value(run, column), Number(wanted)];
    if (sign === "=") return found.toLowerCase() === wanted || (wanted !== "" && found !== "" && Number(found) === number);
    if (sign === "!=") return found.toLowerCase() !== wanted;
    if (found === "" || Number.isNaN(Number(found))) return false;
    return { "<": found < number, "<=": found <= number, ">": found > number, ">=": found >= number }[sign];
  };
};
for (const run of runs) run.text = (run.rows[0].textContent + value(run, 0) + (run.querySelector(".reason")?.textContent ?? "")).toLowerCase();

const arrange = () => {
  const tests = filter.value.toLowerCase().split(/\s+/).filter(Boolean).map(test);
  for (const input of inputs) if (input.value) tests.push((run) => value(run, input.dataset.filter) === input.value);
  const left = runs.filter((run) => {
    run.hidden = !tests.every((passes) => passes(run));
    return !run.hidden;
  });
  document.querySelector("#count").textContent = `${left.length} of ${runs.length} runs`;
  for (const heading of table.querySelectorAll("tbody.heading")) heading.remove();
  const by = group?.value;
  if (!by) return table.append(...runs);
  const name = headers[by].dataset.column;
  const groups = new Map();
  for (const run of runs) groups.set(value(run, by), [...(groups.get(value(run, by)) ?? []), run]);
  for (const [key, members] of groups) {
    const shown = members.filter((run) => !run.hidden).length;
    const heading = document.createElement("tbody");
    heading.className = "heading";
    heading.hidden = !shown;
    const wide = heading.insertRow().insertCell();
    wide.colSpan = headers.length;
    const words = document.createElement("span");
    words.textContent = `${name} ${key || "\u2013"} (${shown})`;
    wide.append(words);
    table.append(heading, ...members);
  }
};

const sort = (header) => {
  const column = header.dataset.cell;
  const now = header.getAttribute("aria-sort");
  const falling = now === "none" ? header.dataset.first === "descending" : now === "ascending";
  runs.sort((a, b) => {
    const [first, second] = [value(a, column), value(b, column)];
    if (first === "" || second === "") return (first === "") - (second === ""); // the empty last, either way
    const [x, y] = [Number(first), Number(second)];
    const order = !Number.isNaN(x) && !Number.isNaN(y) ? x - y : first.localeCompare(second, "en", { numeric: true });
    return falling ? -order : order;
  });
  for (const other of headers) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", falling ? "descending" : "ascending");
  arrange();
};
for (const header of headers) header.querySelector("button").addEventListener("click", () => sort(header));
for (const input of [filter, group, ...inputs]) input?.addEventListener("input", arrange);

for (const opener of table.querySelectorAll("button.opener")) {
  opener.addEventListener("click", () => {
    const more = opener.closest("tbody").querySelector("tr.more");
    more.hidden = !more.hidden;
    opener.setAttribute("aria-expanded", String(!more.hidden));
  });
}

const boxes = [...document.querySelectorAll("[data-column][type=checkbox]")];
const choose = () => {
  for (const box of boxes) {
    for (const row of [headers[box.dataset.column].parentElement, ...runs.map((run) => run.rows[0])]) {
      row.cells[box.dataset.column].hidden = !box.checked;
    }
  }
  for (const over of table.querySelectorAll("[data-cells]")) {
    const shown = over.dataset.cells.split(" ").filter((one) => !headers[one].hidden).length;
    over.hidden = shown === 0;
    over.colSpan = shown || 1;
  }
  document.querySelector("#shown").textContent = `${boxes.filter((box) => box.checked).length} of ${boxes.length}`;
};
for (const box of boxes) box.addEventListener("input", choose);
for (const button of document.querySelectorAll("[data-columns]")) {
  button.addEventListener("click", () => {
    for (const box of boxes) box.checked = button.dataset.columns === "all" || "main" in box.dataset;
    choose();
  });
}
choose();
