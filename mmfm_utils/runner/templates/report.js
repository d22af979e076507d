// The filter of the findings. Without JavaScript it stays hidden, and all findings are shown.
const filter = document.querySelector("#filter");
filter.hidden = false;
filter.onchange = () => {
  const wanted = [...new FormData(filter)].filter(([, value]) => value);
  for (const one of document.querySelectorAll("[data-verdict]"))
    one.hidden = wanted.some(([key, value]) => one.dataset[key] !== value);
  for (const lesson of document.querySelectorAll(".lesson"))
    lesson.hidden = !lesson.querySelector(".finding:not([hidden])");
  const shown = document.querySelectorAll(".finding:not([hidden])").length;
  filter.querySelector("output").value = wanted.length ? `${shown} of ${document.querySelectorAll(".finding").length} shown` : "";
};
