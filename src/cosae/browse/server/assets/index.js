/* Overview: what was read, norms with sinks marked, the SAEs as columns, how they pair, notes. */
"use strict";
cosae.page((main, about) => {
  const { el, number, percent, count, significant, href, featureLink, spell } = cosae;
  const { read, norms } = about;
  const tile = (value, what, more = "") => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, what), el("small", {}, more));
  const name = (words) => el("bdi", {}, spell(words ?? "not named", 300));

  const tiles = el("div", { class: "tiles" },
    tile(count(read.tokens), "tokens read", `${count(read.left_out)} of them left out: special tokens, and those that the SAEs' filter drops`),
    tile(count(read.documents), "documents", `${count(read.sequences)} sequences of ${read.context} tokens`),
    tile(count(norms.sinks), "sinks", `position 0, special ids, and norms of at least ${significant(norms.factor)} × the median`),
    tile(significant(norms.median), "median norm |x|", `95 % below ${significant(norms.quantiles[6])}`),
    tile(`${significant(norms.quantiles[8] / norms.median)} ×`, "largest norm over the median", "of a sample of the tokens"));

  const hatch = () => cosae.svg("pattern", { id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    cosae.svg("line", { class: "hatch", x1: 0, y1: 0, x2: 0, y2: 5 }));
  const top = Math.max(...norms.counts, 1);
  const powers = norms.edges.map((edge) => 10 ** edge);
  const drawn = cosae.plot.figure({ label: "Histogram of token norms, sinks hatched", x: [powers[0], powers.at(-1)], y: [0.7, top * 1.6],
    xLog: true, yLog: true, xLabel: "norm |x| of a token", yLabel: "tokens", height: 240 }, (across, up, ground) => [hatch(), norms.counts.map((n, at) => {
    const box = (height, classes, words) => (height > 0 ? cosae.svg("rect", { class: classes, x: across.at(powers[at]) + 0.3,
      width: Math.max(across.at(powers[at + 1]) - across.at(powers[at]) - 0.6, 0.5), y: up.at(height), height: Math.max(ground - up.at(height), 1) },
    cosae.svg("title", {}, words)) : null);
    const between = `|x| ${significant(powers[at])} to ${significant(powers[at + 1])}`;
    return [box(n, "bar", `${between}: ${count(n)} tokens`), box(norms.sink_counts[at], "bar other", `${between}: ${count(norms.sink_counts[at])} sinks`)];
  })]);

  const evaluation = [...new Set(about.saes.flatMap((sae) => Object.keys(sae.evaluation)))];
  const share = (sae) => (sae.quartile_share ? sae.quartile_share.map((v) => percent(v, 2)).join(" · ") : "–");
  const facts = [
    ["features", (sae) => number(sae.d_sae, count)], ["score", (sae) => sae.score], ["frame", (sae) => sae.frame], ["selector", (sae) => sae.selector],
    ["exponent a, mean", (sae) => number(sae.exponent)],
    ...(about.saes.some((sae) => cosae.known(sae.value_exponent)) ? [["exponent δ of the value, mean", (sae) => number(sae.value_exponent)]] : []),
    ["fire on a token, mean (L0)", (sae) => number(sae.l0)],
    ["never fire here", (sae) => [number(sae.dead, count), sae.dead ? [" ", el("a", { href: href("features", { sae: sae.name, dead: "yes" }) }, "show")] : ""]],
    ["firings that the norm decides", (sae) => number(sae.norm_driven, percent)],
    ["firings by norm quartile, short to long", (sae) => share(sae)],
    ["tokens by norm quartile", (sae) => sae.quartile_null.map((v) => percent(v, 2)).join(" · ")],
    ["explained", (sae) => number(sae.explained, count)],
    ...evaluation.map((key) => [key, (sae) => number(sae.evaluation[key])]),
  ];
  const saes = cosae.table("SAEs", ["", ...about.saes.map((sae) => el("a", { href: href("features", { sae: sae.name }) }, name(sae.name)))],
    facts.map(([words, of]) => [words, ...about.saes.map(of)]), { class: "saes" });

  const pairs = about.pairings.length ? [
    el("h2", {}, "Features that two SAEs share"),
    el("p", { class: "muted" }, `Counted on ${count(about.pair_tokens)} tokens without sinks. A pair are two features, each the other's best by correlation; shared: correlation at least 0.7 and cosine above 0.7.`),
    cosae.table("Pairs of SAEs", ["SAEs", "features compared", "pairs", "shared"], about.pairings.map((one) => [
      el("a", { href: href("compare", { a: one.a, b: one.b }) }, name(one.a), " and ", name(one.b)),
      `${count(one.alive_a)} and ${count(one.alive_b)}`, number(one.pairs, count), number(one.shared, count)]))] : [];

  const notes = about.notes ?? [];
  const noted = cosae.live ? [
    el("h2", {}, "Notes and bookmarks"),
    notes.length ? cosae.table("Notes", ["feature", "bookmark", "tags", "note"], notes.map((note) => [
      featureLink(note.sae, note.feature, name(`${note.sae} / ${note.feature}`)), note.bookmark ? "★ yes" : "no", note.tags.join(", "),
      el("span", {}, spell(note.note, 120))]), { words: [0, 2, 3], most: 50, class: "notes" }) : el("p", {}, "None yet: a feature's page has a place for them."),
    notes.length ? el("p", {}, el("a", { href: "data/notes.json", download: "notes.json" }, "All notes as JSON")) : ""] : [];

  const origin = Object.entries({ model: read.model, site: read.site, corpus: read.corpus, seed: read.seed, "tokens of an example": read.window,
    "written at": read.written_at, commit: read.commit, "tokens with labels": count(about.labelled) });
  cosae.replace(main,
    el("section", {}, el("h2", {}, "What was read"), tiles),
    el("h2", {}, "Norms of the tokens"),
    el("figure", {}, el("p", { class: "keys" }, el("span", {}, el("span", { class: "swatch-up", "aria-hidden": "true" }, "■ "), "all tokens"), el("span", {}, el("span", { class: "swatch-down", "aria-hidden": "true" }, "▨ "), "sinks")),
      drawn, el("figcaption", {}, "Both axes are logarithmic. Sinks stand before the other tokens of their bin.")),
    el("h2", {}, "SAEs"), saes, pairs, noted,
    about.concepts.length ? el("details", {}, el("summary", {}, `${about.concepts.length} concepts`),
      el("dl", { class: "glossary" }, about.concepts.map(([word, meaning]) => [el("dt", {}, word), el("dd", {}, meaning)]))) : "",
    el("h2", {}, "Where it comes from"),
    el("dl", { class: "fields" }, origin.filter(([, value]) => value !== null).map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, name(String(value)))))));
});
