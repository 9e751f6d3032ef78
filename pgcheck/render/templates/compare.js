// The buttons of the estimators hide them in tables and figures; words and a finding choose rows of the results.
const off = new Set();
const hiding = document.createElement("style");
document.head.append(hiding);
const chips = all("button[data-e]");
const everyone = document.getElementById("everyone");
function paint() {
  hiding.textContent = [...off].map((n) => `.e${n} { display: none !important; }`).join(" ");
  chips.forEach((chip) => chip.setAttribute("aria-pressed", String(!off.has(chip.dataset.e))));
  everyone.hidden = off.size === 0;
}
for (const chip of chips) {
  chip.onclick = () => {
    if (!off.delete(chip.dataset.e)) off.add(chip.dataset.e);
    paint();
  };
}
everyone.onclick = () => {
  off.clear();
  paint();
};
const choice = document.getElementById("choice");
function choose() {
  const [words, finding] = ["words", "finding"].map((name) => choice.elements[name].value);
  const rows = [...document.getElementById("results").tBodies[0].rows];
  for (const row of rows) {
    const names = [...row.cells].slice(0, 3).map((cell) => cell.textContent).join(" ");
    row.hidden = !said(names, words) || Boolean(finding && row.dataset.finding !== finding);
  }
  document.getElementById("shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
}
choice.hidden = false;
choice.oninput = choose;
choice.onsubmit = (event) => event.preventDefault();
