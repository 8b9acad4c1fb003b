/* Feature: its numbers, values, logits, examples in groups, neighbours, matches in the other SAEs, and notes. */
"use strict";
cosae.page(async (main, about) => {
  const { el, number, percent, count, significant, href, featureLink, quoted, spell, tokens } = cosae;
  const words = cosae.query(), sae = words.get("sae") || about.saes[0].name, id = Number(words.get("id") || 0);
  const info = about.saes.find((one) => one.name === sae);
  const found = await cosae.data.feature(sae, id), row = found.row;
  const none = row.firings === 0;
  document.querySelector("h1").replaceChildren(`Feature ${id} of `, el("bdi", {}, spell(sae, 80)));
  document.title = `Feature ${id} of ${spell(sae, 80)}`;

  const tile = (value, what, more = "") => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, what), el("small", {}, more));
  const tiles = el("div", { class: "tiles", id: "numbers" },
    tile(number(row.density, percent), "of tokens", `${count(row.firings)} firings`),
    tile(number(row.largest), "largest value", `mean ${significant(row.mean)}`),
    tile(number(row.norm_driven, percent), "of firings that the norm decides", `at the median length ${count(found.vanished)} vanish, ${count(found.appeared)} appear`),
    tile(cosae.known(row.firing_norm) ? [number(row.firing_norm), " ×"] : "–", "norm where it fires, over the mean of all tokens", ""),
    tile(number(row.auroc), "AUROC of its best concept", row.concept ? el("bdi", {}, spell(row.concept, 60)) : "no labels"));

  const explanation = found.explanation ? [el("p", { class: "verdict", id: "explanation" }, el("bdi", {}, spell(found.explanation.text, 600))), scores(found.explanation)] : [];
  function scores(given) {
    const judged = [["detection", given.detection], ["fuzzing", given.fuzzing], ...Object.entries(given.baselines).map(([key, value]) => [`baseline: ${key}`, value])];
    const rows = judged.filter(([, one]) => one).map(([key, one]) => [key, number(one.value), `${significant(one.low)} to ${significant(one.high)}`, count(one.judged), count(one.failed)]);
    return el("details", {}, el("summary", {}, "Written by ", el("bdi", {}, spell(given.model, 80)), rows.length ? ": how well it tells examples apart" : ""),
      rows.length ? cosae.table("Scores of the explanation", ["by", "balanced accuracy", "95 % interval", "answers", "not readable"], rows) : el("p", {}, "It has not been scored."));
  }

  /* Values and norms. */
  const histogram = found.edges.length ? el("figure", {},
    cosae.plot.histogram({ label: `Histogram of the values of feature ${id}`, edges: found.edges, counts: found.counts, xLog: found.edges[0] > 0, xLabel: "|value| where it fires", yLabel: "firings",
      mark: { at: found.quantiles?.[2], words: "" } }),
    el("figcaption", {}, `Dashed: the median, ${significant(found.quantiles?.[2])}; 5 % to 95 % of the values: ${significant(found.quantiles?.[0])} to ${significant(found.quantiles?.[4])}`,
      cosae.known(found.negative) ? `; ${percent(found.negative)} are negative` : "")) : "";
  const parts = ["first (short)", "second", "third", "last (long)"];
  const quartiles = found.quartile_share ? cosae.table("Firings by quartile of the token's norm", ["quartile", "of its firings", "of all tokens"],
    parts.map((part, at) => [part, number(found.quartile_share[at], percent), number(info.quartile_null[at], percent)])) : "";
  const parameters = cosae.table("Its part of the SAE", ["", ""], [["exponent a", number(found.exponent)], ...(cosae.known(found.value_exponent) ? [["exponent δ of the value", number(found.value_exponent)]] : []), ["log-gain b", number(found.log_gain)], ["bias β", number(found.bias)],
    ["threshold", number(found.threshold)], ["length of the decoder row", number(found.decoder_norm)], ["length of the encoder row", number(found.encoder_norm)]]);

  /* Logits. */
  const logitTable = (caption, pairs) => cosae.table(caption, ["token", "logit"], pairs.map(([text, logit]) => [quoted(text), number(logit)]), { class: "logits short" });
  const logits = found.promoted.length ? el("div", { class: "two" }, logitTable("Tokens that it raises", found.promoted), logitTable("Tokens that it lowers", found.suppressed))
    : el("p", {}, "Logits are not known: its direction does not lie in the residual stream, or the model has no unembedding.");

  /* Examples. */
  const GROUPS = { top: "Largest values", interval: "By interval", random: "Random firings", negative: "Most negative" };
  const held = Object.keys(GROUPS).filter((group) => found.examples.some((one) => one.group === group));
  const shown = { group: held.includes(words.get("group")) ? words.get("group") : held[0], around: Number(tokens.kept.around ?? 0), breaks: Boolean(tokens.kept.breaks) };
  const list = el("div", { id: "examples" });
  const most = row.largest; // of tokens that count: a sink beside them may have a value a hundred times as large
  const tabs = el("ul", { class: "tabs", "aria-label": "Groups of examples" }, held.map((group) => el("li", {}, el("button", { type: "button", "data-group": group, "aria-pressed": "false",
    onclick: () => { shown.group = group; draw(); } }, `${GROUPS[group]} (${found.examples.filter((one) => one.group === group).length})`))));
  function draw() {
    for (const button of tabs.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.group === shown.group));
    const chosen = found.examples.filter((one) => one.group === shown.group);
    const several = [...new Set(chosen.map((one) => one.interval))];
    cosae.replace(list, several.map((interval) => [
      interval === null ? null : el("h3", {}, `${20 * interval} to ${20 * (interval + 1)} % of the largest value`),
      el("ol", { class: pictured ? "examples pictures" : "examples" }, chosen.filter((one) => one.interval === interval).map((one) => tokens.example(one, { most, layout: about.read.layout, ...shown })))]));
    cosae.say(`${GROUPS[shown.group] ?? ""}: ${chosen.length} examples`);
  }
  const pictured = Boolean(about.read.layout?.grid) && found.examples.some((one) => one.picture);
  const controls = pictured ? "" : el("div", { class: "fields-row" },
    cosae.choice("context", "around", [[0, "all that is kept"], [4, "4 tokens each side"], [8, "8 tokens each side"], [16, "16 tokens each side"]], shown.around,
      (value) => { shown.around = Number(value); tokens.keep("around", shown.around); draw(); }),
    el("label", { class: "field across" }, el("input", { type: "checkbox", name: "breaks", checked: shown.breaks,
      onchange: (event) => { shown.breaks = event.target.checked; tokens.keep("breaks", shown.breaks); draw(); } }), el("span", {}, "break lines where the text does")));
  const examples = none ? [el("p", {}, "It fires on none of these tokens, so there are no examples.")]
    : [tabs, controls, tokens.legend(), list, el("p", { class: "muted" }, pictured ? "Point at a patch, or move with Tab and the arrow keys: its value, its length |x − c|, and the cosine κ with the feature's encoder row." : "Point at a token, or move with Tab and the arrow keys: its value, its length |x − c|, and the cosine κ with the feature's encoder row.")];

  /* Other features. */
  const spelled = (texts) => texts.map((text) => quoted(text, 20));
  const near = (caption, list) => (list.length ? cosae.table(caption, ["feature", "cosine", "Jaccard", "fires on"],
    list.map((one) => [featureLink(sae, one.id, String(one.id)), number(one.cosine), number(one.jaccard), spelled(one.tokens)]), { words: [3], class: "near short" }) : el("p", {}, `${caption}: none counted.`));
  const matches = found.matches.length ? cosae.table("In the other SAEs", ["SAE", "feature", "correlation", "cosine", "one feature by the paper's rule", "fires on"], found.matches.map((one) => [
    el("bdi", {}, spell(one.sae, 60)), one.id === null ? "none" : [featureLink(one.sae, one.id, String(one.id)), " ", el("a", { href: href("compare", { a: sae, ida: id, b: one.sae, idb: one.id }) }, "compare")],
    number(one.correlation), number(one.cosine), one.id === null ? "–" : one.shared ? "yes" : "no", spelled(one.tokens)]), { words: [5], class: "matches" }) : "";

  const go = (to, text, there) => (there ? el("a", { href: href("feature", { sae, id: to }), rel: text === "next" ? "next" : "prev" }, text) : el("span", { class: "muted" }, text));
  const jump = el("form", { method: "get", action: "feature.html", class: "pair" }, el("input", { type: "hidden", name: "sae", value: sae }),
    cosae.field("feature", "id", id, { type: "number", min: 0, max: info.d_sae - 1 }), el("button", {}, "Open"));
  cosae.replace(main,
    el("nav", { class: "pages", "aria-label": "Other features" }, go(id - 1, "previous", id > 0), go(id + 1, "next", id + 1 < info.d_sae), jump,
      el("a", { href: href("features", { sae }) }, "all features"), el("a", { href: href("score", { sae, id }) }, "the score on its tokens"), cosae.live && about.live ? el("a", { href: href("try", { sae, id }) }, "steer it") : ""),
    explanation, tiles, cosae.live ? note(found.note) : "",
    el("h2", {}, "Examples"), examples,
    el("h2", {}, "Values and norms"), el("div", { class: "two" }, el("div", {}, histogram), el("div", {}, quartiles, parameters)),
    el("h2", {}, "Logits"), logits,
    matches ? [el("h2", {}, "Matches"), matches] : "",
    el("h2", {}, "Neighbours"), el("div", { class: "two" }, near("By cosine of the decoder rows", found.by_cosine), near("By firing together", found.by_cofiring)),
    found.aurocs.length ? [el("h2", {}, "Concepts"), el("details", {}, el("summary", {}, `AUROC of ${found.aurocs.length} concepts`),
      cosae.table("Concepts", ["concept", "AUROC"], found.aurocs.map(([concept, value]) => [el("bdi", {}, spell(concept, 80)), number(value)])))] : "");
  if (!none) draw();

  /* A note, its tags and a bookmark, kept by the server. */
  function note(now) {
    const state = el("output", { class: "told" });
    const text = el("textarea", { name: "note", "aria-label": "Note" });
    text.value = now.note;
    const tags = cosae.field("tags, with commas between", "tags", now.tags.join(", "));
    tags.classList.add("wide-field");
    const star = el("input", { type: "checkbox", name: "bookmark", checked: now.bookmark });
    let version = now.version;
    async function save(event) {
      event.preventDefault();
      state.textContent = "saving …";
      try {
        const sent = { sae, feature: id, note: text.value, tags: tags.querySelector("input").value.split(","), bookmark: star.checked, version };
        ({ version } = await cosae.ask("data/note", sent));
        state.textContent = "Saved.";
      } catch (error) { state.textContent = error.message; }
    }
    return el("details", { class: "mark-note", open: Boolean(now.version) }, el("summary", {}, now.bookmark ? "★ Note, tags, bookmark" : "Note, tags, bookmark"),
      el("form", { onsubmit: save, id: "note" }, text, el("div", { class: "fields-row" }, tags,
        el("label", { class: "field across" }, star, el("span", {}, "bookmark")), el("button", { class: "main" }, "Save"), state)));
  }
});
