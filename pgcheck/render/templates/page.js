// Sorting, filtering, CSV and links into closed sections. Without it the page is whole, in the order of the run.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const RANK = { none: 0, unbiased: 1, inconclusive: 1.5, proportional: 2, biased: 3 };

const finding = (cell) => Object.keys(RANK).find((name) => cell.classList.contains(name));
const key = (cell) => {
  if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
  const name = finding(cell);
  if (name) return RANK[name] + (cell.classList.contains("contradicts") ? 10 : 0);
  const text = cell.textContent.trim();
  if (text === "" || text === "—") return null;
  return Number.isNaN(Number(text)) ? text : Number(text);
};
const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));

function sort(table, column, direction) {
  const body = table.tBodies[0];
  const rows = (table.inOrder ??= [...body.rows]);
  const sign = direction === "descending" ? -1 : 1;
  const keyed = rows.map((row) => [key(row.cells[column]), row]);
  if (direction) keyed.sort(([a], [b]) => (a === null ? 1 : 0) - (b === null ? 1 : 0) || sign * compare(a, b));
  body.append(...keyed.map(([, row]) => row));
  all("th", table.tHead).forEach((th) => th.removeAttribute("aria-sort"));
  if (direction) head(table, column).setAttribute("aria-sort", direction);
}

const head = (table, column) => table.tHead.rows[table.tHead.rows.length - 1].cells[column];

function csv(table) {
  const field = (cell) => {
    const text = (cell.dataset.name ?? finding(cell) ?? cell.textContent).trim().replace(/\s+/g, " ");
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const lines = [table.tHead.rows[table.tHead.rows.length - 1], ...table.tBodies[0].rows];
  return lines.map((row) => [...row.cells].map(field).join(",") + "\n").join("");
}

const said = (text, words) => words.toLowerCase().split(/\s+/).every((word) => text.toLowerCase().includes(word));

function download(table) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv(table)], { type: "text/csv" }));
  link.download = `${table.id}.csv`;
  link.click();
  URL.revokeObjectURL(link.href);
}

for (const table of all("table.sortable")) {
  [...table.tHead.rows[table.tHead.rows.length - 1].cells].forEach((th, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...th.childNodes);
    th.append(button);
    button.onclick = () => {
      const sample = [...table.tBodies[0].rows].map((row) => key(row.cells[column])).find((x) => x !== null);
      const order = typeof sample === "number" ? ["descending", "ascending", ""] : ["ascending", "descending", ""];
      sort(table, column, order[(order.indexOf(th.getAttribute("aria-sort") ?? "") + 1) % 3]);
    };
  });
}
for (const button of all("button[data-csv]")) {
  button.hidden = false;
  button.onclick = () => download(document.getElementById(button.dataset.csv));
}

for (const input of all("input[data-filter]")) {
  input.parentNode.hidden = false;
  input.oninput = () => {
    for (const row of document.getElementById(input.dataset.filter).tBodies[0].rows) row.hidden = !said(row.textContent, input.value);
  };
}

const matrix = document.getElementById("matrix");
const controls = document.getElementById("controls");
function filter() {
  const [words, claim, family] = ["words", "claim", "family"].map((name) => controls.elements[name].value);
  let shown = 0;
  for (const row of matrix.tBodies[0].rows) {
    const section = document.getElementById(row.dataset.section);
    const hit = said(`${row.cells[0].textContent} ${section.querySelector(".said").textContent}`, words);
    row.hidden = section.hidden = !hit || (claim && !section.dataset.claims.split(" ").includes(claim));
    shown += !row.hidden;
  }
  all("[data-family]", matrix.tHead).forEach((th) => {
    const out = Boolean(family) && th.dataset.family !== family;
    th.hidden = out;
    if (th.parentNode.rowIndex) [...matrix.tBodies[0].rows].forEach((row) => (row.cells[th.cellIndex].hidden = out));
  });
  document.getElementById("shown").textContent = `${shown} of ${matrix.tBodies[0].rows.length} estimators`;
}
if (controls) {
  controls.hidden = false;
  controls.oninput = filter;
  controls.onsubmit = (event) => event.preventDefault();
  // one stop for the tab key in the matrix; arrows go from cell to cell
  const links = all("tbody td a", matrix);
  links.slice(1).forEach((link) => (link.tabIndex = -1));
  matrix.onkeydown = (event) => {
    const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [];
    const cell = event.target.closest("td");
    if (down === undefined || !cell) return;
    event.preventDefault();
    let [row, column] = [cell.parentNode, cell.cellIndex];
    do {
      row = down ? row[down > 0 ? "nextElementSibling" : "previousElementSibling"] : row;
      column += right;
      if (!row?.cells[column]) return;
    } while (row.hidden || row.cells[column].hidden || !row.cells[column].querySelector("a"));
    row.cells[column].querySelector("a").focus();
  };
}

// #e3 opens a section, #e3p5 a row of it; #sort=TABLE,COLUMN,ascending and #filter=WORDS are links to a view
function follow() {
  const [name, value] = decodeURIComponent(location.hash.slice(1)).split(/=(.*)/s);
  if (name === "sort") {
    const [id, column, direction] = value.split(",");
    sort(document.getElementById(id), Number(column), direction ?? "descending");
  } else if (name === "filter" && controls) {
    controls.elements.words.value = value;
    filter();
  } else if (name) {
    const target = document.getElementById(name);
    const section = target?.closest("details");
    if (section) section.open = true;
    target?.scrollIntoView({ block: target === section ? "start" : "center" });
  }
}
addEventListener("hashchange", follow);
follow();
