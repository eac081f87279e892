"use strict";
// What the page's scripts share: drawing figures when they are seen, tabs, choices, numbers.
const mlalign = (() => {
  const options = { responsive: true, displayModeBar: false };
  const style = JSON.parse(document.getElementById("figure-style").textContent);
  const widgets = {};

  const draw = (box) => {
    // In a hidden tab there is no width to draw for; opening the tab draws.
    if (box.dataset.drawn || !box.offsetWidth) return;
    box.dataset.drawn = "yes";
    const data = JSON.parse(document.querySelector(`script[data-for="${box.id}"]`).textContent);
    if (box.dataset.widget) widgets[box.dataset.widget](box, data);
    else Plotly.newPlot(box, data.data, data.layout, options);
  };

  const start = () => {
    // A figure is drawn when it comes near the window: a page of a hundred figures opens at once.
    const watcher = new IntersectionObserver(
      (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => draw(e.target)),
      { rootMargin: "600px" });
    const boxes = document.querySelectorAll(".figure[id]");
    boxes.forEach((box) => watcher.observe(box));
    window.addEventListener("beforeprint", () => boxes.forEach(draw));
    document.querySelectorAll(".tabbed").forEach(tabs);
  };

  const tabs = (group) => {
    const buttons = [...group.querySelectorAll(":scope > .tabs > button")];
    const panels = [...group.querySelectorAll(":scope > .panel")];
    const open = (index) => {
      buttons.forEach((b, i) => b.setAttribute("aria-selected", String(i === index)));
      panels.forEach((p, i) => { p.hidden = i !== index; });
      panels[index].querySelectorAll(".figure[id]").forEach(draw);
      panels[index].querySelectorAll(".js-plotly-plot").forEach((p) => Plotly.Plots.resize(p));
    };
    buttons.forEach((b, i) => b.addEventListener("click", () => open(i)));
  };

  // The numbers of a packed array (pack.py); NaN where there is none.
  const unpack = (packed) => {
    if (!packed) return null;
    const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
    const count = bytes.length / packed.bytes;
    const most = 256 ** packed.bytes - 1;
    const numbers = new Float64Array(count);
    for (let i = 0; i < count; i += 1) {
      const code = packed.bytes === 2 ? bytes[2 * i] + 256 * bytes[2 * i + 1] : bytes[i];
      numbers[i] = code === most ? NaN : packed.min + code * packed.step;
    }
    return numbers;
  };

  const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
  const digits = (value, count = 3) => {
    if (!known(value)) return "\u2013";
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text = size >= 1e5 || size < 1e-4
      ? value.toExponential(count - 1) : String(Number(value.toPrecision(count)));
    return text.replace("-", "\u2212");
  };

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    made.append(...children);
    return made;
  };

  // A labelled drop-down. names: what is shown; change(index) on a choice. None to choose: hidden.
  const choice = (label, names, change) => {
    const list = element("select", {}, ...names.map((n, i) => element("option", { value: i }, n)));
    list.addEventListener("change", () => change(Number(list.value)));
    const box = element("label", { class: "choice" }, `${label} `, list);
    box.hidden = names.length < 2;
    return box;
  };

  // A labelled slider over places 0 .. count - 1; say(place) is shown beside it.
  const slider = (label, change) => {
    const range = element("input", { type: "range", min: 0, step: 1 });
    const shown = element("output");
    const box = element("label", { class: "choice slider" }, `${label} `, range, shown);
    let say = String;
    const tell = () => { shown.textContent = say(Number(range.value)); };
    range.addEventListener("input", () => { tell(); change(Number(range.value)); });
    const over = (count, place, text) => {
      say = text;
      range.max = count - 1;
      range.value = place;
      box.hidden = count < 2;
      tell();
    };
    return { box, over };
  };

  // The house layout with axis titles and whatever else.
  const layout = (x, y, more = {}) => {
    const made = structuredClone(style.layout);
    made.xaxis.title.text = x;
    made.yaxis.title.text = y;
    const { xaxis, yaxis, ...rest } = more;
    Object.assign(made.xaxis, xaxis);
    Object.assign(made.yaxis, yaxis);
    return Object.assign(made, rest);
  };

  const bar = { thickness: 10, outlinewidth: 0, exponentformat: "e", tickfont: { size: 10 } };
  const panel = (title) => {
    const caption = element("figcaption", {}, title);
    const plot = element("div", { class: "plot-area" });
    return { box: element("figure", { class: "plot" }, caption, plot), caption, plot };
  };

  return {
    options, style, widgets, start, draw, unpack, known, digits, element, choice, slider, layout,
    bar, panel,
  };
})();
