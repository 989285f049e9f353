"use strict";
// A click on a picture shows it as large as the window. A click anywhere, or Escape, closes it.
const viewer = document.getElementById("viewer");
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.picture");
  if (viewer.open) {
    viewer.close();
  } else if (button) {
    viewer.replaceChildren(button.firstElementChild.cloneNode(true));
    viewer.showModal();
  }
});

// The facts of the run: a script beside the report sets them, or a copy of the page holds them.
const embedded = document.getElementById("provenance");
const provenance = embedded ? JSON.parse(embedded.textContent) : window.provenance;
if (provenance) {
  const { compute, ...facts } = provenance;
  const table = document.getElementById("compute");
  addRow(table.querySelector("thead"), "col", compute.header, compute.header);
  for (const cells of compute.rows) addRow(table.querySelector("tbody"), "row", cells, compute.header);
  table.hidden = compute.rows.length === 0;
  const rows = document.getElementById("origin");
  for (const [label, text] of Object.entries(facts)) {
    const row = rows.insertRow();
    const header = document.createElement("th");
    header.scope = "row";
    header.className = "text";
    header.textContent = label;
    row.append(header);
    const cell = row.insertCell();
    cell.className = "text";
    cell.textContent = text;
  }
  document.getElementById("no-provenance").remove();
}

// Add a row to a part of a table. All cells of a header are headings, of other rows the first.
function addRow(part, scope, cells, headings) {
  const row = part.insertRow();
  cells.forEach((text, index) => {
    const isHeading = scope === "col" || index === 0;
    const cell = document.createElement(isHeading ? "th" : "td");
    if (isHeading) cell.scope = scope;
    if (index < 2 || index > 6) cell.className = "text";
    cell.textContent = text;
    if (!isHeading) cell.dataset.label = headings[index];
    row.append(cell);
  });
}

// Closed parts are printed too.
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
