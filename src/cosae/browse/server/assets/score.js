/* The score on real tokens: cosine (across) and length (up) of the tokens around a feature's examples, who fires, in which
   order, and the cut-off curve, for any exponent a of the length and any exponent δ of the value.

       score(a) = g · (r / m)^a · κ + β        value = m^(own δ) · (r / m)^δ · score
       g = exp(b) · |w|^u · m^(own a), m the SAE's median length: at its own a and δ score and value are the feature's
       own, and a token of the median length has the same for every a and δ. */
"use strict";
cosae.page(async (main, about) => {
  const { el, svg, number, count, significant, href, spell, featureLink } = cosae;
  const words = cosae.query(), sae = words.get("sae") || about.saes[0].name;
  const info = about.saes.find((one) => one.name === sae);
  const given = words.get("id");
  const id = given !== null && given !== "" ? Number(given) : (await cosae.data.table({ sae, sort: "norm_driven", least_firings: 100, limit: 1 })).rows[0]?.id ?? 0;
  const found = await cosae.data.feature(sae, id);

  const form = el("form", { method: "get", action: "score.html" }, el("div", { class: "fields-row" },
    cosae.choice("SAE", "sae", about.saes.map((one) => [one.name, spell(one.name, 60)]), sae),
    cosae.field("feature", "id", id, { type: "number", min: 0, max: info.d_sae - 1 }), el("button", { class: "main" }, "Show")));

  /* Each token once, however many examples hold it. */
  const points = [], seen = new Set();
  for (const example of found.examples) {
    example.text.forEach((text, at) => {
      const key = `${example.sequence} ${example.first + at}`;
      if (seen.has(key) || example.left_out.includes(at) || !(example.norm[at] > 0)) return;
      seen.add(key);
      points.push({ text, before: example.text.slice(Math.max(0, at - 5), at), after: example.text.slice(at + 1, at + 4), r: example.norm[at], cosine: example.cosine[at],
        value: example.value[at], sink: example.sink.includes(at) });
    });
  }
  if (!points.some((p) => p.value !== 0)) {
    cosae.replace(main, form, el("p", {}, `Feature ${id} fires on none of these tokens: choose another.`));
    return;
  }
  const own = info.frame === "raw" ? found.exponent : 0, ownValue = info.frame === "raw" ? found.value_exponent ?? 0 : 1;
  const m = info.median_r, beta = found.bias ?? 0;
  const gain = Math.exp(found.log_gain) * (info.row_power ? found.encoder_norm ** info.row_power : 1) * (info.frame === "raw" ? m ** own : 1);
  const size = info.frame === "raw" ? m ** ownValue : 1;
  const score = (p, a) => gain * (p.r / m) ** a * p.cosine + beta;
  const fired = points.filter((p) => p.value !== 0).length;
  /* The threshold above which as many tokens fire as now; between the last that does and the first that does not. */
  function cutOff(a) {
    const sorted = points.map((p) => score(p, a)).sort((x, y) => y - x);
    return fired < sorted.length ? (sorted[fired - 1] + sorted[fired]) / 2 : sorted[fired - 1] - 1e-9;
  }
  const ownCut = found.threshold ?? cutOff(own);
  const state = { a: own, delta: ownValue, rule: "count" };

  const plot = el("div", { id: "plane" }), list = el("div", { id: "order" }), said = el("p", { id: "outcome", role: "status" });
  const slider = (name, label, low, high, chosen) => {
    const range = el("input", { type: "range", min: low, max: high, step: 0.01, value: chosen, id: name, "aria-label": label });
    const exact = el("input", { type: "number", min: low, max: high, step: 0.01, value: chosen, "aria-label": `${label}, as a number` });
    const set = (value) => { state[name] = Number(value); range.value = value; exact.value = value; draw(); };
    range.addEventListener("input", () => set(range.value));
    exact.addEventListener("change", () => { if (exact.value !== "" && Number.isFinite(Number(exact.value))) set(exact.value); });
    made[name] = set;
    return el("div", { class: "slider" }, el("label", { for: name }, label), range, exact);
  };
  const made = {};
  const low = Math.min(-0.5, own - 0.5), high = Math.max(1.5, own + 0.5);
  const sliders = el("div", {}, slider("a", "exponent a of the length in the score (0: cosine alone, 1: inner product)", low, high, Number(own.toFixed(2))),
    slider("delta", "exponent δ of the length in the value (it does not change who fires)", -1, 2, Number(ownValue.toFixed(2))));
  const rule = cosae.choice("the threshold", "rule", [["count", "as many of these tokens fire as now"], ["same", "the same at the median length"]], "count", (value) => { state.rule = value; draw(); });
  const buttons = el("div", { class: "fields-row" }, rule,
    [["a = 0, the cosine", 0], [`a = ${significant(own)}, its own`, own], ["a = 1, the inner product", 1]].map(([text, a]) => el("button", { type: "button", onclick: () => made.a(a) }, text)));

  /* Cosines below every one that could fire would only squeeze the others. */
  const x = cosae.plot.ends(points.map((p) => p.cosine)), y = cosae.plot.ends(points.map((p) => p.r), true);
  const bases = new Set();
  function draw() {
    const { a } = state, cut = state.rule === "count" ? cutOff(a) : ownCut;
    for (const p of points) {
      p.score = score(p, a);
      p.fires = p.score > cut;
      p.state = p.fires ? (p.value !== 0 ? "fires" : "new") : (p.value !== 0 ? "lost" : "silent");
      p.worth = size * (p.r / m) ** state.delta * p.score;
    }
    const order = points.filter((p) => p.fires || p.value !== 0).sort((p, q) => q.worth - p.worth);
    const curve = (exponent, threshold, across, up) => {
      const parts = [];
      for (let i = 0; i <= 80; i += 1) {
        const r = Math.exp(Math.log(y[0]) + (Math.log(y[1]) - Math.log(y[0])) * i / 80);
        const cosine = (threshold - beta) / (gain * (r / m) ** exponent);
        if (cosine >= x[0] && cosine <= x[1]) parts.push(`${parts.length ? "L" : "M"}${across.at(cosine).toFixed(1)} ${up.at(r).toFixed(1)}`);
      }
      return parts.join("");
    };
    const dot = (p, across, up) => {
      const left = across.at(p.cosine), top = up.at(p.r), told = `${spell(p.text)} · κ ${significant(p.cosine)} · |x − c| ${significant(p.r)} · score ${significant(p.score)} · fires: ${SAID[p.state]}`;
      const shape = p.state === "new" ? svg("path", { d: `M${left} ${top - 5}l5 9h-10z`, class: "new" }) : p.state === "lost" ? svg("path", { d: `M${left - 4} ${top - 4}l8 8m0-8l-8 8`, class: "lost" })
        : svg("circle", { cx: left, cy: top, r: p.state === "fires" ? 4 : 2.2, class: p.state });
      shape.append(svg("title", {}, told));
      return shape;
    };
    const layers = ["silent", "fires", "lost", "new"];
    cosae.replace(plot, cosae.plot.figure({ label: `Tokens by cosine and length; ${count(points.filter((p) => p.fires).length)} fire at a = ${significant(a)}`, x, y, yLog: true, height: 380,
      xLabel: "cosine κ of x − c with the encoder row", yLabel: "length |x − c|" }, (across, up) => [
      layers.map((layer) => points.filter((p) => p.state === layer).map((p) => dot(p, across, up))),
      svg("path", { class: "cut own", d: curve(own, state.rule === "count" ? cutOff(own) : ownCut, across, up) }), svg("path", { class: "cut", id: "cut", d: curve(a, cut, across, up) })]));
    const n = (name) => points.filter((p) => p.state === name).length;
    said.textContent = `At a = ${significant(a)}, ${count(n("fires") + n("new"))} of ${count(points.length)} tokens fire: ${count(n("fires"))} that fire now, ${count(n("new"))} new ones; ${count(n("lost"))} that fire now do not.`;
    cosae.replace(list, cosae.table("Tokens in the order of their value", ["token in its text", "κ", "|x − c|", "value", "fires"], order.map((p) => [
      el("span", { class: "context" }, el("bdi", {}, spell(p.before.join(""), 60)), el("mark", {}, el("bdi", {}, spell(p.text))), el("bdi", {}, spell(p.after.join(""), 40))),
      number(p.cosine), [number(p.r), p.sink ? el("small", {}, "sink") : ""], number(p.worth), SAID[p.state]]), { words: [0], most: 15, class: "order" }));
  }
  const SAID = { fires: "now and so", new: "only so", lost: "only now", silent: "no" };
  const key = (classes, text) => el("span", {}, svg("svg", { width: 14, height: 14, class: "swatch", "aria-hidden": "true" }, classes === "new" ? svg("path", { d: "M7 2l5 9h-10z", class: "new" })
    : classes === "lost" ? svg("path", { d: "M3 3l8 8m0-8l-8 8", class: "lost" }) : classes.startsWith("cut") ? svg("line", { x1: 0, x2: 14, y1: 7, y2: 7, class: classes })
      : svg("circle", { cx: 7, cy: 7, r: classes === "fires" ? 4 : 2.2, class: classes })), text);
  cosae.replace(main, form,
    el("p", {}, "What does the exponent of the norm do? Tokens around the examples of feature ", featureLink(sae, id, el("bdi", {}, `${spell(sae, 60)} / ${id}`)),
      ": what lies right of the curve fires. Move a: the curve turns about the median length, so that long or short tokens fire."),
    info.frame === "raw" ? "" : el("p", { class: "muted" }, `This SAE divides by the length first (frame ${info.frame}): its own score has a = 0, and its value gets the length back (δ = 1).`),
    sliders, buttons, said,
    el("div", { class: "two" }, el("figure", {}, el("p", { class: "keys" }, key("fires", "fires now and so"), key("new", "fires only so"), key("lost", "fires only now"), key("silent", "silent"), key("cut", "cut-off"), key("cut own", "cut-off now")), plot,
      el("figcaption", {}, `${count(points.length)} tokens, those of the feature's examples. The length is on a logarithmic scale.`)), list),
    el("p", { class: "muted" }, "Whether a token fires now is what the SAE's own selector said, which may look at all features; the order is by value."));
  draw();
});
