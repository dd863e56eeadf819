"use strict";
// Draws the plots, hands the page's choices on to them, sorts tables, copies texts, and opens everything for printing.
const figures = JSON.parse(document.getElementById("figures").textContent);
const drawn = Object.entries(figures).map(async ([name, spec]) => {
  const place = document.getElementById("plot-" + name);
  const { view } = await vegaEmbed(place, spec, { mode: "vega-lite", renderer: "svg", actions: false, tooltip: { theme: "custom" } });
  return { view, section: place.closest("section") };
});

// Choices are text; a context is a number in the data.
const typed = (value) => (/^\d+$/.test(value) ? Number(value) : value);
for (const select of document.querySelectorAll("select[data-signal]")) {
  select.addEventListener("change", async () => {
    for (const { view, section } of await Promise.all(drawn)) {
      if (section.contains(select)) await view.signal(select.dataset.signal, typed(select.value)).runAsync();
    }
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const sign = down ? -1 : 1;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [one, two] = [value(a), value(b)];
        if (one === "" || two === "") return (one === "") - (two === ""); // what is not known stays at the end
        const difference = Number(one) - Number(two);
        return sign * (Number.isNaN(difference) ? one.localeCompare(two) : difference);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// A page without scripts has the text to be selected, and no button that does nothing.
for (const text of document.querySelectorAll("pre.copy")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(text);
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  text.before(button);
}

let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((one) => (one.open = true));
});
window.addEventListener("afterprint", () => opened.forEach((one) => (one.open = false)));
Promise.all(drawn).then(
  () => document.body.setAttribute("data-drawn", "yes"),
  (error) => console.error(error),
);
