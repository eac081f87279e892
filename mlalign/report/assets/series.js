"use strict";
// One number over the steps: the models by themselves, and the change. The table beside it chooses.
mlalign.widgets.series = (box, data) => {
  const { element, choice, panel, layout, digits, known, style } = mlalign;
  const values = panel("");
  const change = panel("");
  // As in figures.py: where the colours start again, dashes and symbols are others.
  const of = (list, i) => list[(i + Math.floor(i / style.colours.length)) % list.length];
  const colour = (i) => style.colours[i % style.colours.length];
  const faint = (i, alpha) => `rgba(${[1, 3, 5].map((at) =>
    parseInt(colour(i).slice(at, at + 2), 16)).join(",")},${alpha})`;

  const told = (label, [, steps, value, low, high, noise, counts], k) => {
    let text = `${label}, step ${steps[k]}<br>${digits(value[k])}`;
    if (known(low[k])) text += ` [${digits(low[k])}, ${digits(high[k])}]`;
    text += `<br>n = ${counts[k]}`;
    if (known(noise[k])) text += `<br>noise floor ${digits(noise[k], 2)}`;
    return text;
  };
  const area = (x, low, high, fillcolor) => ({
    x: [...x, ...[...x].reverse()], y: [...high, ...[...low].reverse()], mode: "lines",
    fill: "toself", fillcolor, line: { width: 0 }, hoverinfo: "skip", showlegend: false,
  });
  const band = (line, fill) => {
    const at = line[1].map((_, k) => k).filter((k) => known(line[3][k]) && known(line[4][k]));
    const picked = (column) => at.map((k) => line[column][k]);
    return at.length > 1 ? [area(picked(1), picked(3), picked(4), fill)] : [];
  };
  const curve = (line, label, i) => {
    const lone = line[1].length === 1;
    const ends = line[3].map((low, k) => (known(low) ? [line[4][k] - line[2][k], line[2][k] - low]
      : [0, 0]));
    return {
      x: line[1], y: line[2], name: label, mode: "lines+markers",
      text: line[1].map((_, k) => told(label, line, k)), hovertemplate: "%{text}<extra></extra>",
      line: { color: colour(i), dash: of(style.dashes, i), width: 2 },
      marker: { symbol: of(style.symbols, i), size: 6 },
      // A band needs two passes; a single one has whiskers.
      error_y: lone && ends[0][0] + ends[0][1] > 0 ? {
        type: "data", array: [ends[0][0]], arrayminus: [ends[0][1]], thickness: 1.2, width: 3,
      } : undefined,
    };
  };
  const drawn = (lines) => (lines || []).flatMap((line) => [
    ...band(line, faint(data.colours[line[0]], 0.13)), curve(line, data.arms[line[0]], data.colours[line[0]])]);
  const noiseOf = (entry) => {
    const floors = ["delta", "adapted", "base"].flatMap((side) => entry.sides[side] || [])
      .flatMap((line) => line[5]).filter(known);
    return floors.length ? Math.max(...floors) : NaN;
  };
  const span = (entry) => {
    const steps = Object.values(entry.sides).flat().flatMap((line) => line[1]);
    const [first, last] = [Math.min(...steps), Math.max(...steps)];
    return first < last ? [first, last] : [first - 0.5, last + 0.5];
  };
  const levels = (entry) => {
    const made = drawn(entry.sides.adapted);
    const base = (entry.sides.base || [])[0];
    if (!base) return made;
    const x = span(entry);
    const noise = noiseOf(entry);
    const level = base[2].find(known);
    const grey = {
      x, y: [level, level], name: "base", mode: "lines", line: { color: style.neutral, width: 1.5 },
      text: x.map(() => told("base", base, 0)), hovertemplate: "%{text}<extra></extra>",
    };
    const floor = known(noise)
      ? [area(x, [level - noise, level - noise], [level + noise, level + noise],
        "rgba(91,100,112,0.22)")] : [];
    return [...floor, grey, ...made];
  };
  const changes = (entry) => {
    const made = drawn(entry.sides.delta);
    if (!made.length) return made;
    const x = span(entry);
    const noise = noiseOf(entry);
    // A difference of two sides has its floor about zero; a statistic of the pair has it as a level.
    const paired = Boolean(entry.sides.base);
    if (known(noise) && paired)
      made.unshift(area(x, [-noise, -noise], [noise, noise], "rgba(91,100,112,0.22)"));
    if (known(noise) && !paired) made.unshift({
      x, y: [noise, noise], mode: "lines", hoverinfo: "skip", name: "noise floor",
      line: { color: style.neutral, dash: "dot", width: 1.2 },
    });
    return made;
  };
  const plot = (where, traces, title) => {
    where.box.hidden = !traces.length;
    if (!traces.length) return;
    where.caption.textContent = title;
    const legend = traces.filter((t) => t.showlegend !== false).length > 1;
    Plotly.react(where.plot, traces, layout("optimiser step", "", {
      height: 270, showlegend: legend, margin: { l: 52, r: 10, t: legend ? 30 : 8, b: 44 },
    }), mlalign.options);
  };
  const picks = [...box.parentElement.querySelectorAll("button.pick")];
  const show = (index) => {
    const entry = data.entries[index];
    const both = entry.sides.base || entry.sides.adapted;
    plot(values, levels(entry), entry.name);
    plot(change, changes(entry), both ? `${entry.name}: change` : entry.name);
    picks.forEach((b) => b.setAttribute("aria-pressed", String(Number(b.dataset.place) === index)));
  };
  const chosen = choice("number", data.entries.map((e) => e.name), show);
  picks.forEach((b) => b.addEventListener("click", () => {
    chosen.querySelector("select").value = b.dataset.place;
    show(Number(b.dataset.place));
  }));
  box.append(element("div", { class: "choices" }, chosen),
    element("div", { class: "panels" }, values.box, change.box));
  show(0);
};
