/* Small figures: axes, bars and lines as SVG; many points on a canvas. */
"use strict";
(() => {
  const { el, svg, significant } = cosae;

  /* Data to pixels, linear or logarithmic. */
  function scale(low, high, start, end, log = false) {
    const write = log ? Math.log : Number;
    const first = write(low), last = write(high);
    const at = (value) => start + (end - start) * (last === first ? 0.5 : (write(value) - first) / (last - first));
    const back = (pixel) => {
      const value = first + (last - first) * (pixel - start) / (end - start);
      return log ? Math.exp(value) : value;
    };
    return { at, back, low, high, log, ticks: () => (log ? powers(low, high) : rounds(low, high)) };
  }
  function rounds(low, high, about = 5) {
    if (!(high > low)) return [low];
    const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= rough * (1 - 1e-9));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(Number((i * step).toPrecision(12)));
    return found;
  }
  function powers(low, high) {
    const inside = (factors) => {
      const found = [];
      for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p += 1) {
        for (const f of factors) if (f * 10 ** p >= low * (1 - 1e-9) && f * 10 ** p <= high * (1 + 1e-9)) found.push(Number((f * 10 ** p).toPrecision(3)));
      }
      return found;
    };
    let found = [];
    for (const factors of [[1], [1, 3], [1, 2, 5]]) if ((found = inside(factors)).length >= 3) break;
    if (found.length < 2) return rounds(low, high, 4);
    const every = Math.max(1, Math.ceil(found.length / 7));
    return found.filter((_, at) => at % every === 0);
  }
  /* The ends of a scale that holds the values, with a little room. */
  function ends(values, log = false) {
    const fit = values.filter((v) => Number.isFinite(v) && (!log || v > 0));
    if (!fit.length) return log ? [0.1, 1] : [0, 1];
    let low = Infinity, high = -Infinity;
    for (const v of fit) { if (v < low) low = v; if (v > high) high = v; }
    if (log) return [low / 1.15, high * 1.15];
    const room = high > low ? 0.04 * (high - low) : Math.max(0.02 * Math.abs(high), 1e-3);
    return [low - room, high + room];
  }

  const WIDTH = innerWidth < 700 ? 390 : 560, LEFT = 54, RIGHT = 24, TOP = 10, BOTTOM = 42;
  /* An SVG with axes; `draw` gets the two scales and returns what lies between them. */
  function figure({ label, x, y, xLabel, yLabel, xLog = false, yLog = false, height = 260, width = WIDTH, xTicks }, draw) {
    const across = scale(...x, LEFT, width - RIGHT, xLog), up = scale(...y, height - BOTTOM, TOP, yLog);
    const text = (words, attributes) => svg("text", { class: "axis", ...attributes }, words);
    const parts = [];
    for (const tick of up.ticks()) {
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: up.at(tick), y2: up.at(tick) }));
      parts.push(text(significant(tick), { x: LEFT - 7, y: up.at(tick) + 4, "text-anchor": "end" }));
    }
    for (const [tick, words] of xTicks ?? across.ticks().map((v) => [v, significant(v)])) {
      parts.push(text(words, { x: across.at(tick), y: height - BOTTOM + 17, "text-anchor": "middle" }));
    }
    parts.push(svg("line", { class: "ground", x1: LEFT, x2: width - RIGHT, y1: height - BOTTOM, y2: height - BOTTOM }));
    parts.push(text(xLabel, { x: (LEFT + width - RIGHT) / 2, y: height - 7, "text-anchor": "middle" }));
    const middle = (TOP + height - BOTTOM) / 2;
    parts.push(text(yLabel, { x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` }));
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "drawn" },
      parts, draw(across, up, height - BOTTOM));
  }

  /* Bars between edges. */
  function histogram({ label, edges, counts, xLabel, yLabel, xLog = false, mark }) {
    const top = Math.max(...counts, 1);
    return figure({ label, x: [edges[0], edges.at(-1)], y: [0, top * 1.05], xLabel, yLabel, xLog, height: 220 }, (across, up, ground) => [
      counts.map((n, at) => (n > 0 ? svg("rect", {
        class: "bar", x: across.at(edges[at]) + 0.5, width: Math.max(across.at(edges[at + 1]) - across.at(edges[at]) - 1, 0.5),
        y: Math.min(up.at(n), ground - 1), height: Math.max(ground - up.at(n), 1) },
      svg("title", {}, `${significant(edges[at])} to ${significant(edges[at + 1])}: ${cosae.count(n)}`)) : null)),
      cosae.known(mark?.at) ? [
        svg("line", { class: "marked", x1: across.at(mark.at), x2: across.at(mark.at), y1: TOP, y2: ground }),
        svg("text", { class: "axis", x: across.at(mark.at) + 4, y: TOP + 10 }, mark.words)] : null,
    ]);
  }

  /* Many points on a canvas under SVG axes: the nearest one is told, a click or Enter opens it, arrows go through them. */
  function scatter({ label, points, xLabel, yLabel, xLog = false, yLog = false, tell, open }) {
    const fits = (v, log) => Number.isFinite(v) && v !== null && (!log || v > 0);
    const shown = points.filter((p) => fits(p.x, xLog) && fits(p.y, yLog)).sort((a, b) => a.x - b.x);
    const x = ends(shown.map((p) => p.x), xLog), y = ends(shown.map((p) => p.y), yLog), height = 320;
    let across, up;
    const axes = figure({ label, x, y, xLabel, yLabel, xLog, yLog, height }, (a, u) => { across = a; up = u; return []; });
    axes.removeAttribute("role");
    axes.setAttribute("aria-hidden", "true");
    const canvas = el("canvas", { "aria-hidden": "true" });
    const told = el("output", { class: "told" }, shown.length ? `${cosae.count(shown.length)} points. Point at one, or use the arrow keys.` : "No feature has both numbers.");
    const frame = el("div", { class: "scatter", tabindex: "0", role: "application", "aria-label": `${label}. Arrow keys go from point to point, Enter opens.` }, canvas, axes);
    let current = -1, size = 1;
    function draw() {
      const box = axes.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
      if (!box.width) return;
      size = box.width / WIDTH;
      canvas.width = box.width * ratio; canvas.height = box.height * ratio;
      const pen = canvas.getContext("2d"), colours = getComputedStyle(frame);
      pen.scale(ratio * size, ratio * size);
      pen.fillStyle = colours.getPropertyValue("--up");
      pen.globalAlpha = shown.length > 5000 ? 0.35 : 0.7;
      const r = shown.length > 5000 ? 1.6 : 3;
      for (const p of shown) { pen.beginPath(); pen.arc(across.at(p.x), up.at(p.y), r, 0, 7); pen.fill(); }
      if (current >= 0) {
        const p = shown[current];
        pen.globalAlpha = 1; pen.lineWidth = 2; pen.strokeStyle = colours.getPropertyValue("--ink");
        pen.beginPath(); pen.arc(across.at(p.x), up.at(p.y), 7, 0, 7); pen.stroke();
      }
    }
    function choose(at) {
      if (!shown.length) return;
      current = Math.max(0, Math.min(shown.length - 1, at));
      cosae.replace(told, tell(shown[current]));
      draw();
    }
    function nearest(event) {
      const box = axes.getBoundingClientRect();
      const left = (event.clientX - box.left) / size, top = (event.clientY - box.top) / size;
      let best = -1, least = 400;
      shown.forEach((p, at) => {
        const away = (across.at(p.x) - left) ** 2 + (up.at(p.y) - top) ** 2;
        if (away < least) { least = away; best = at; }
      });
      return best;
    }
    frame.addEventListener("pointermove", (event) => { const at = nearest(event); if (at >= 0 && at !== current) choose(at); });
    frame.addEventListener("click", (event) => { const at = nearest(event); if (at >= 0) open(shown[at]); });
    frame.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowUp: 10, ArrowDown: -10 }[event.key];
      if (step) { event.preventDefault(); choose(current + step); }
      if (event.key === "Enter" && current >= 0) open(shown[current]);
    });
    new ResizeObserver(draw).observe(frame);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    return el("figure", {}, frame, told);
  }

  cosae.plot = { scale, ends, figure, histogram, scatter };
})();
