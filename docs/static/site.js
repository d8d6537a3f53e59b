document.addEventListener("DOMContentLoaded", () => {
  // What the theme leaves out for keyboards and screen readers: the level of a caption, boxes that scroll.
  for (const caption of document.querySelectorAll(".caption[role=heading]")) caption.setAttribute("aria-level", "2");
  for (const box of document.querySelectorAll("article pre, article table, .math")) box.tabIndex = 0;

  // The ledgers' search field and filters.
  for (const ledger of document.querySelectorAll(".ledger")) {
    const rows = [...ledger.querySelectorAll("tbody tr")];
    const [search, ...choices] = ledger.querySelectorAll("input, select");
    const show = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = (row.id + " " + row.textContent).toLowerCase();
        const fits = choices.every((choice) => !choice.value || row.dataset[choice.name] === choice.value);
        row.hidden = !(fits && words.every((word) => text.includes(word)));
        shown += !row.hidden;
      }
      ledger.querySelector("output").textContent = `${shown} of ${rows.length}`;
    };
    ledger.addEventListener("input", show);
    show();
  }
});
