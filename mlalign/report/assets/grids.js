"use strict";
// Packed cubes of readings (maps.py): passes by layers by heads, for each side.
mlalign.grids = (() => {
  const { unpack, known, digits } = mlalign;

  const opened = new WeakMap();

  // side -> {value, lo, hi, noise}, each a function of (pass, layer, head).
  const open = (map) => {
    if (!opened.has(map)) opened.set(map, read(map));
    return opened.get(map);
  };
  const read = (map) => {
    const cells = map.layers * map.heads;
    const reader = (packed) => {
      const numbers = unpack(packed);
      if (!numbers) return () => NaN;
      const passes = numbers.length / cells;
      return (pass, layer, head) =>
        numbers[Math.min(pass, passes - 1) * cells + layer * map.heads + head];
    };
    const sides = {};
    Object.entries(map.sides).forEach(([side, parts]) => {
      const value = reader(parts.value);
      const [down, up] = [reader(parts.lo), reader(parts.hi)];
      sides[side] = {
        value,
        noise: reader(parts.noise),
        lo: (...at) => value(...at) - down(...at),
        hi: (...at) => value(...at) + up(...at),
      };
    });
    const { base, delta } = sides;
    if (base && delta && !sides.adapted) {
      const none = () => NaN;
      sides.adapted = {
        value: (...at) => base.value(...at) + delta.value(...at), noise: none, lo: none, hi: none,
      };
    }
    return sides;
  };

  const told = (side, ...at) => {
    const [value, low, high, noise] = [side.value, side.lo, side.hi, side.noise].map((f) => f(...at));
    let text = digits(value);
    if (known(low) && known(high)) text += ` [${digits(low)}, ${digits(high)}]`;
    if (known(noise)) text += `<br>noise floor ${digits(noise, 2)}`;
    return text;
  };

  // Smallest and largest finite number of a side over all passes.
  const range = (side, map) => {
    let [low, high] = [Infinity, -Infinity];
    for (let p = 0; p < map.steps.length; p += 1)
      for (let l = 0; l < map.layers; l += 1)
        for (let h = 0; h < map.heads; h += 1) {
          const value = side.value(p, l, h);
          if (known(value)) { low = Math.min(low, value); high = Math.max(high, value); }
        }
    return [low, high];
  };

  const sequential = (sides, map) => {
    const ends = sides.map((side) => range(side, map));
    const low = map.zero ? 0 : Math.min(...ends.map((e) => e[0]));
    const high = Math.max(...ends.map((e) => e[1]));
    return { colorscale: mlalign.style.sequential, zmin: low, zmax: high > low ? high : low + 1e-9 };
  };
  const diverging = (side, map) => {
    const most = Math.max(...range(side, map).map(Math.abs)) || 1e-9;
    return { colorscale: mlalign.style.diverging, zmin: -most, zmax: most };
  };
  const scale = (name, sides, map) => (name === "delta" && sides.base
    ? diverging(sides.delta, map)
    : sequential(["base", "adapted"].includes(name)
      ? ["base", "adapted"].filter((s) => sides[s]).map((s) => sides[s]) : [sides[name]], map));

  return { open, told, scale };
})();
