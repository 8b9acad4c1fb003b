/* Compare: two SAEs (what they share, what each has alone, concepts), or two features on the same texts. */
"use strict";
cosae.page(async (main, about) => {
  const { el, number, percent, count, significant, href, featureLink, quoted, spell, tokens } = cosae;
  const given = Object.fromEntries(cosae.query());
  const a = given.a || about.saes[0].name, b = given.b || (about.saes[1] ?? about.saes[0]).name;
  const both = given.ida !== undefined && given.idb !== undefined && given.ida !== "" && given.idb !== "";
  const names = about.saes.map((sae) => [sae.name, spell(sae.name, 60)]);
  const form = el("form", { method: "get", action: "compare.html" }, el("div", { class: "fields-row" },
    cosae.choice("SAE a", "a", names, a), cosae.field("feature of a", "ida", given.ida, { type: "number", min: 0 }),
    cosae.choice("SAE b", "b", names, b), cosae.field("feature of b", "idb", given.idb, { type: "number", min: 0 }),
    el("button", { class: "main" }, "Compare")), el("p", { class: "muted" }, "Without numbers of features the two SAEs are compared."));
  const spelled = (texts) => texts.map((text) => quoted(text, 20));
  const bdi = (words) => el("bdi", {}, spell(words, 80));
  cosae.replace(main, form, both ? await features() : a === b ? el("p", {}, "Choose two different SAEs, or a feature of each.") : await saes());

  async function saes() {
    const found = await cosae.data.saes(a, b);
    const link = (sae, id) => featureLink(sae, id, String(id));
    const own = (sae, list, total) => el("div", {}, el("h3", {}, bdi(sae), ` alone (${count(total)})`), list.length
      ? cosae.table(`Features that ${spell(sae, 60)} alone has`, ["feature", "fires on"], list.map(([id, texts]) => [link(sae, id), spelled(texts)]), { words: [1], most: 30, class: "own short" }) : el("p", {}, "None."));
    return [
      el("h2", {}, "Probing: the best feature of each for every concept"),
      found.concepts.length ? cosae.table("Concepts, the largest difference first", ["concept", "a: feature", "a: AUROC", "b: feature", "b: AUROC", "b − a"],
        found.concepts.map(([concept, ia, va, ib, vb]) => [bdi(concept), link(a, ia), number(va), link(b, ib), number(vb), number(vb - va)]), { most: 30, class: "concepts" })
        : el("p", {}, "The tokens of this store have no labels."),
      el("h2", {}, `Shared: ${count(found.n_shared)} pairs`),
      el("p", { class: "muted" }, "Two features that are each other's best by correlation, the highest first."),
      cosae.table("Pairs", ["a", "b", "correlation", "cosine", "", "fires on"], found.shared.map(([ia, ib, correlation, cosine, texts]) => [link(a, ia), link(b, ib), number(correlation), number(cosine),
        el("a", { href: href("compare", { a, ida: ia, b, idb: ib }) }, "compare"), spelled(texts)]), { words: [5], most: 30, class: "shared short" }),
      el("h2", {}, "Without a partner"), el("div", { class: "two" }, own(a, found.own_a, found.n_own_a), own(b, found.own_b, found.n_own_b))];
  }

  async function features() {
    const ida = Number(given.ida), idb = Number(given.idb);
    const [one, other] = await Promise.all([cosae.data.feature(a, ida), cosae.data.feature(b, idb)]);
    const match = a === b ? [...one.by_cosine, ...one.by_cofiring].find((near) => near.id === idb) : one.matches.find((found) => found.sae === b && found.id === idb);
    const line = (words, of) => [words, of(one), of(other)];
    const head = (sae, id, sign) => el("a", { href: href("feature", { sae, id }) }, `${sign}: `, bdi(`${sae} / ${id}`));
    const numbers = cosae.table("Numbers", ["", head(a, ida, "a"), head(b, idb, "b")], [
      line("fires on", (f) => spelled(f.row.tokens)), line("explanation", (f) => (f.row.label ? bdi(f.row.label) : "–")),
      line("density", (f) => number(f.row.density, percent)), line("largest value", (f) => number(f.row.largest)), line("mean value", (f) => number(f.row.mean)),
      line("firings that the norm decides", (f) => number(f.row.norm_driven, percent)), line("norm where it fires, over the mean", (f) => number(f.row.firing_norm)),
      line("exponent a", (f) => number(f.exponent)),
      ...([one, other].some((f) => cosae.known(f.value_exponent)) ? [line("exponent δ of the value", (f) => number(f.value_exponent))] : []),
      line("AUROC of its best concept", (f) => [number(f.row.auroc), f.row.concept ? el("small", {}, bdi(f.row.concept)) : ""])], { words: [1, 2] });
    const concepts = joined(one.aurocs, other.aurocs);
    return [
      numbers,
      el("p", { id: "together" }, match ? `Correlation ${significant(match.correlation)}, cosine ${significant(match.cosine)}, Jaccard ${significant(match.jaccard)}.`
        : "These two are neither neighbours nor each other's match, so that correlation, cosine and Jaccard were not counted."),
      el("h2", {}, "The same texts under both"), ...texts(one, other),
      concepts.length ? [el("h2", {}, "Concepts"), cosae.table("Concepts, the largest difference first", ["concept", "a: AUROC", "b: AUROC", "b − a"],
        concepts.map(([concept, va, vb]) => [bdi(concept), number(va), number(vb), number(vb - va)]))] : ""];
  }
  function joined(of_a, of_b) {
    const theirs = new Map(of_b);
    return of_a.filter(([concept]) => theirs.has(concept)).map(([concept, value]) => [concept, value, theirs.get(concept)])
      .sort((x, y) => Math.abs(y[2] - y[1]) - Math.abs(x[2] - x[1]));
  }

  /* Stretches that lie in an example of each; those first in which the two differ on most tokens. */
  function texts(one, other) {
    const stretches = [], seen = new Set();
    for (const x of one.examples) {
      for (const y of other.examples) {
        if (x.sequence !== y.sequence) continue;
        const first = Math.max(x.first, y.first), end = Math.min(x.first + x.text.length, y.first + y.text.length);
        const key = `${x.sequence} ${first} ${end}`;
        if (end - first < 2 || seen.has(key)) continue;
        seen.add(key);
        const part = (example, list) => list.slice(first - example.first, end - example.first);
        const va = part(x, x.value), vb = part(y, y.value);
        stretches.push({ text: part(x, x.text), va, vb, first, document: x.document, sink: x.sink.map((at) => at + x.first - first), differs: va.map((v, at) => (v !== 0) !== (vb[at] !== 0)) });
      }
    }
    if (!stretches.length) return [el("p", {}, "No text is among the examples of both.", about.live ? [" Read one under both: ", el("a", { href: href("try") }, "try a text"), "."] : "")];
    const size = (list) => list.filter(Boolean).length;
    stretches.sort((x, y) => size(y.differs) - size(x.differs));
    const largest = { va: one.row.largest || 1, vb: other.row.largest || 1 };
    const under = (stretch, key, sign, told) => el("div", { class: "under" }, el("b", {}, `${sign} `), tokens.line(stretch.text.map((text, at) => ({
      text, value: stretch[key][at], mark: `${stretch.differs[at] ? "differs" : ""} ${stretch.sink.includes(at) ? "sink" : ""}`.trim(),
      words: `a ${significant(stretch.va[at], 4)} · b ${significant(stretch.vb[at], 4)} · ${stretch.differs[at] ? "fires in one alone" : stretch.va[at] ? "fires in both" : "fires in none"} · position ${stretch.first + at}` })),
    { most: largest[key], at: Math.max(0, stretch.differs.indexOf(true)), told, label: `Text under ${sign}` }));
    return [el("p", { class: "muted" }, el("span", { class: "token differs" }, "boxed tokens"), " fire in one of the two alone; tints are relative to the largest value of each."),
      el("ol", { class: "examples" }, stretches.slice(0, 40).map((stretch) => {
        const told = el("output", { class: "told" }, `${size(stretch.differs)} of ${stretch.text.length} tokens differ`);
        return el("li", { class: "example" }, under(stretch, "va", "a", told), under(stretch, "vb", "b", told), el("p", { class: "muted" }, told, stretch.document ? [" · ", bdi(stretch.document)] : ""));
      }))];
  }
});
