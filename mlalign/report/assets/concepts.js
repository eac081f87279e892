"use strict";
// One image, its patches labelled by the lens: base beside aligned.
mlalign.widgets.concepts = (box, data) => {
  const { element, choice, slider, unpack, digits, style } = mlalign;
  const COMMON = 6;
  const ROOM = 30; // pixels of a cell from which a word has room
  let [record, layer, arm, word, marked] = [data.records[0], data.layers.length - 1, 0, "", ""];
  const captions = [element("figcaption"), element("figcaption")];
  const views = [element("div", { class: "lens" }), element("div", { class: "lens" })];
  const lists = [element("p", { class: "common" }), element("p", { class: "common" })];
  const told = element("output", { class: "told" });
  const choices = element("div", { class: "choices" });

  const view = (name) => {
    const found = data.views[[record.id, data.layers[layer], name, word].join("\n")];
    if (!found) return null;
    const values = unpack(found.values) || [];
    const words = found.words ? [...unpack(found.words)].map((i) => data.vocabulary[i] || "\u2423")
      : null;
    return { values: [...values], words };
  };
  const counts = (words) => {
    const found = new Map();
    words.forEach((w) => found.set(w, (found.get(w) || 0) + 1));
    return [...found].sort((a, b) => b[1] - a[1]);
  };
  const paint = (where, shown, colours, top) => {
    const [rows, columns] = record.grid;
    const picture = element("img", { src: record.image, alt: `image of ${record.id}` });
    const cells = element("div", { class: "cells" });
    cells.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
    const room = where.clientWidth / columns >= ROOM;
    for (let k = 0; k < rows * columns; k += 1) {
      const cell = element("span");
      const here = shown.words ? shown.words[k] : word;
      const text = `row ${Math.floor(k / columns)}, column ${k % columns}: ${here}, `
        + `p = ${digits(shown.values[k])}`;
      cell.title = text;
      cell.dataset.word = here;
      if (shown.words) {
        const colour = colours.get(here);
        if (colour) cell.style.background = `${colour}${marked && marked !== here ? "22" : "99"}`;
        if (marked === here) cell.classList.add("marked");
        if (room) cell.textContent = here;
      } else {
        const alpha = top > 0 ? 0.85 * (Math.max(shown.values[k], 0) / top) ** 0.7 : 0;
        cell.style.background = `rgba(213,60,0,${alpha.toFixed(3)})`;
      }
      ["mouseenter", "click"].forEach((e) => cell.addEventListener(e, () => {
        told.textContent = text;
      }));
      cells.append(cell);
    }
    where.classList.toggle("grey", !shown.words);
    where.replaceChildren(picture, cells);
  };
  const show = () => {
    const name = data.arms[arm];
    const found = [view(""), view(name)];
    const titles = ["base", data.arms.length > 1 ? `aligned by ${name}` : "aligned"];
    const all = found.flatMap((each) => (each && each.words) || []);
    const colours = new Map(counts(all).slice(0, COMMON).map(([w], i) => [w, style.colours[i]]));
    const top = Math.max(0, ...found.flatMap((each) => (each ? each.values : [])));
    const object = record.objects.find(([w]) => w === word);
    told.textContent = object
      ? `p of ${word} (${object[1] ? "in the image" : "not in the image"}), at most ${digits(top)}`
      : "";
    found.forEach((each, i) => {
      captions[i].textContent = `${titles[i]}, layer ${data.layers[layer]}`;
      lists[i].replaceChildren();
      if (!each) {
        views[i].replaceChildren("not read at this layer");
        return;
      }
      paint(views[i], each, colours, top);
      counts(each.words || []).slice(0, COMMON).forEach(([w, n]) => {
        const button = element("button", { "aria-pressed": String(marked === w) }, `${w} \u00d7 ${n}`);
        if (colours.get(w)) button.style.borderColor = colours.get(w);
        button.addEventListener("click", () => { marked = marked === w ? "" : w; show(); });
        lists[i].append(button);
      });
    });
  };
  const layers = slider("layer", (place) => { layer = place; show(); });
  const refresh = () => {
    const objects = record.objects.map(([w]) => w);
    if (!objects.includes(word)) word = "";
    const shown = ["likeliest word",
      ...record.objects.map(([w, real]) => `p of ${w} (${real ? "there" : "not there"})`)];
    const make = (label, names, now, change) => {
      const made = choice(label, names, (i) => { change(i); marked = ""; refresh(); });
      made.querySelector("select").value = now;
      return made;
    };
    const focus = [...choices.children].findIndex((c) => c.contains(document.activeElement));
    layers.over(data.layers.length, layer, (place) => data.layers[place]);
    choices.replaceChildren(
      make("image", data.records.map((r) => r.id), data.records.indexOf(record),
        (i) => { record = data.records[i]; }),
      make("trained on", data.arms, arm, (i) => { arm = i; }),
      make("show", shown, ["", ...objects].indexOf(word), (i) => { word = ["", ...objects][i]; }),
      layers.box);
    if (focus >= 0) choices.children[focus].querySelector("select, input").focus();
    show();
  };
  box.append(choices, element("div", { class: "panels lenses" }, ...views.map((v, i) =>
    element("figure", { class: "plot" }, captions[i], v, lists[i]))), told);
  refresh();
  let width = box.clientWidth;
  new ResizeObserver(() => {
    if (box.clientWidth !== width) { width = box.clientWidth; show(); }
  }).observe(box);
};
