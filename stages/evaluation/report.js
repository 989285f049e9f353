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
  const rows = document.getElementById("origin");
  for (const [label, text] of Object.entries(provenance)) {
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

// Closed parts are printed too.
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
