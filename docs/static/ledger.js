// The ledgers' search field and filters.
document.addEventListener("DOMContentLoaded", () => {
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
