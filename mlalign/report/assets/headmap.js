"use strict";
// Layer by head: base, adapted and change side by side; a choice of metric, a slider of steps.
mlalign.widgets.headmap = (box, data) => {
  const { element, choice, slider, panel, layout, grids } = mlalign;
  const names = { base: "base", adapted: "adapted", delta: "change" };
  const panels = Object.fromEntries(
    Object.entries(names).map(([side, title]) => [side, panel(title)]));
  const unique = (values) => [...new Set(values)];
  const arms = unique(data.maps.map((m) => m.arm));
  const several = unique(data.maps.map((m) => m.probe)).length > 1;
  const nameOf = (m) => (several ? `${m.probe.replaceAll("_", " ")}: ` : "")
    + [m.metric, m.group].filter(Boolean).join(", ");
  const titles = unique(data.maps.map(nameOf));
  let [arm, name] = [arms[0], titles[0]];
  let map; let sides; let pass;

  const show = () => {
    Object.entries(panels).forEach(([side, { box: figure, caption, plot }]) => {
      figure.hidden = !sides[side];
      if (!sides[side]) return;
      const layers = [...Array(map.layers).keys()];
      const heads = [...Array(map.heads).keys()];
      const at = side === "base" ? "" : `, step ${map.steps[pass]}`;
      caption.textContent = names[side] + at;
      const z = layers.map((l) => heads.map((h) => sides[side].value(pass, l, h)));
      const text = layers.map((l) => heads.map((h) =>
        `${names[side]}${at}, layer ${l}, head ${h}<br>${grids.told(sides[side], pass, l, h)}`));
      const gap = map.layers * map.heads > 400 ? 0 : 1;
      const trace = {
        type: "heatmap", z, text, hovertemplate: "%{text}<extra></extra>", xgap: gap, ygap: gap,
        colorbar: mlalign.bar, ...grids.scale(side, sides, map),
      };
      const height = Math.min(Math.max(110 + 18 * map.layers, 200), 460);
      Plotly.react(plot, [trace], layout("head", "layer", {
        height, margin: { l: 46, r: 8, t: 8, b: 42 },
        xaxis: { showgrid: false, dtick: Math.max(1, Math.floor(map.heads / 8)) },
        yaxis: { showgrid: false, dtick: Math.max(1, Math.floor(map.layers / 8)) },
      }), mlalign.options);
    });
  };
  const steps = slider("step", (place) => { pass = place; show(); });
  const pick = () => {
    const before = map ? map.steps[pass] : Infinity;
    map = data.maps.find((m) => m.arm === arm && nameOf(m) === name)
      || data.maps.find((m) => m.arm === arm);
    sides = grids.open(map);
    // The same step as before, or the last one up to it.
    pass = Math.max(map.steps.findLastIndex((step) => step <= before), 0);
    steps.over(map.steps.length, pass, (place) => map.steps[place]);
    show();
  };
  box.append(
    element("div", { class: "choices" },
      choice("trained on", arms, (i) => { arm = arms[i]; pick(); }),
      choice("reading", titles, (i) => { name = titles[i]; pick(); }), steps.box),
    element("div", { class: "panels three" }, ...Object.values(panels).map((p) => p.box)));
  pick();
};
