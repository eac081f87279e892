"use strict";
// Layers over the steps: choices of the metric, the token group or module, and the side.
mlalign.widgets.layermap = (box, data) => {
  const { element, choice, panel, layout, grids } = mlalign;
  const unique = (values) => [...new Set(values)];
  const metrics = unique(data.maps.map((m) => m.metric));
  const arms = unique(data.maps.map((m) => m.arm));
  const words = { base: "base", adapted: "adapted", delta: "change" };
  const figure = panel("");
  const choices = element("div", { class: "choices" });
  let [arm, metric, group, side] = [arms[0], metrics[0], null, null];
  const here = () => data.maps.filter((m) => m.arm === arm && m.metric === metric);

  const show = () => {
    const map = here().find((m) => m.group === group);
    const sides = grids.open(map);
    const layers = [...Array(map.layers).keys()];
    const x = map.steps.map(String);
    const name = [metric, group, sides.base ? words[side] : ""].filter(Boolean).join(", ");
    const z = layers.map((l) => x.map((_, p) => sides[side].value(p, l, 0)));
    const text = layers.map((l) => x.map((step, p) =>
      `${name}<br>layer ${l}, step ${step}<br>${grids.told(sides[side], p, l, 0)}`));
    figure.caption.textContent = name;
    const trace = {
      type: "heatmap", x, z, text, hovertemplate: "%{text}<extra></extra>", colorbar: mlalign.bar,
      xgap: 1, ygap: map.layers > 20 ? 0 : 1, ...grids.scale(side, sides, map),
    };
    Plotly.react(figure.plot, [trace], layout("optimiser step", "layer", {
      height: Math.min(Math.max(130 + 16 * map.layers, 220), 480),
      margin: { l: 46, r: 8, t: 8, b: 46 },
      xaxis: { showgrid: false, type: "category", nticks: 12 },
      yaxis: { showgrid: false, dtick: Math.max(1, Math.floor(map.layers / 8)) },
    }), mlalign.options);
  };
  // Choices that follow from the metric are made anew; what was chosen stays where it can.
  const refresh = () => {
    const offered = unique(data.maps.filter((m) => m.arm === arm).map((m) => m.metric));
    if (!offered.includes(metric)) [metric] = offered;
    const groups = here().map((m) => m.group);
    if (!groups.includes(group)) [group] = groups;
    const map = here().find((m) => m.group === group);
    const open = Object.keys(words).filter((s) => grids.open(map)[s]);
    if (!open.includes(side)) side = open.includes("delta") ? "delta" : open[0];
    const make = (label, values, shown, now, change) => {
      const made = choice(label, shown, (i) => { change(values[i]); refresh(); });
      made.querySelector("select").value = values.indexOf(now);
      return made;
    };
    const focus = [...choices.children].findIndex((c) => c.contains(document.activeElement));
    choices.replaceChildren(
      make("trained on", arms, arms, arm, (v) => { arm = v; }),
      make("metric", offered, offered, metric, (v) => { metric = v; }),
      make("group", groups, groups.map((g) => g || "all"), group, (v) => { group = v; }),
      make("side", open, open.map((s) => words[s]), side, (v) => { side = v; }));
    if (focus >= 0) choices.children[focus].querySelector("select").focus();
    show();
  };
  box.append(choices, figure.box);
  refresh();
};
