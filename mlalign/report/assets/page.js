"use strict";
(() => {
  const options = { responsive: true, displayModeBar: false };
  const draw = (box) => {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const data = document.querySelector(`script[data-for="${box.id}"]`);
    const figure = JSON.parse(data.textContent);
    Plotly.newPlot(box, figure.data, figure.layout, options);
  };
  // A figure is drawn when it comes near the window: a page of a hundred figures opens at once.
  const watcher = new IntersectionObserver(
    (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => draw(e.target)),
    { rootMargin: "600px" });
  const boxes = document.querySelectorAll(".figure");
  boxes.forEach((box) => watcher.observe(box));
  window.addEventListener("beforeprint", () => boxes.forEach(draw));
  document.querySelectorAll(".tabbed").forEach((group) => {
    const buttons = [...group.querySelectorAll(":scope > .tabs > button")];
    const panels = [...group.querySelectorAll(":scope > .panel")];
    const open = (index) => {
      buttons.forEach((b, i) => b.setAttribute("aria-selected", String(i === index)));
      panels.forEach((p, i) => { p.hidden = i !== index; });
      panels[index].querySelectorAll(".figure").forEach((box) => {
        draw(box);
        Plotly.Plots.resize(box);
      });
    };
    buttons.forEach((b, i) => b.addEventListener("click", () => open(i)));
  });
})();
