/* Features: a table that is paged, sorted, filtered and searched, and a scatter of two of its columns. */
"use strict";
cosae.page(async (main, about) => {
  const { el, number, percent, count, significant, href, featureLink, quoted, choice, field } = cosae;
  const given = Object.fromEntries(cosae.query());
  const state = { limit: "50", ...given, sae: given.sae || about.saes[0].name, sort: given.sort || "density", order: given.order || "down" };
  const WORDS = { id: "feature", density: "density", firings: "firings", largest: "largest value", mean: "mean value", norm_driven: "norm-driven share",
    firing_norm: "norm where it fires", auroc: "AUROC of best concept", matched: "matches", score: "explanation score" };
  const LOG = new Set(["density", "firings", "largest", "mean", "firing_norm"]);
  const SHOWN = ["density", "largest", "norm_driven", "firing_norm", "auroc", "matched", "score"];
  const WRITE = { density: percent, norm_driven: percent, firings: count, matched: count };
  const link = (changes) => href("features", { ...state, ...changes });
  const missing = new Set(about.labelled ? [] : ["auroc"]);
  if (!about.saes.some((sae) => sae.explained)) missing.add("score");
  if (about.saes.length < 2) missing.add("matched");
  const columns = SHOWN.filter((name) => !missing.has(name));
  const numbers = about.numbers.filter((name) => !missing.has(name));

  const found = await cosae.data.table(state);

  const any = [["", "any"], ["yes", "yes"], ["no", "no"]];
  const range = (name) => el("span", { class: "pair" },
    field(`${WORDS[name]} from`, `least_${name}`, state[`least_${name}`], { type: "number", step: "any", inputmode: "decimal" }),
    field("to", `most_${name}`, state[`most_${name}`], { type: "number", step: "any", inputmode: "decimal", "aria-label": `${WORDS[name]} to` }));
  const form = el("form", { class: "search", method: "get", action: "features.html", role: "search" },
    el("div", { class: "fields-row" },
      choice("SAE", "sae", about.saes.map((sae) => [sae.name, cosae.spell(sae.name, 60)]), state.sae, () => form.requestSubmit()),
      field("search", "q", state.q, { type: "search", placeholder: "token, words, concept or number" }),
      choice("in", "in", [["any", "everything"], ["token", "tokens"], ["label", "explanations"], ["concept", "concepts"], ["id", "feature numbers"]], state.in ?? "any"),
      el("button", { class: "main" }, "Show")),
    el("details", { open: Object.keys(state).some((name) => /^(least|most)_|^(dead|matched_any|explained)$/.test(name) && state[name]) },
      el("summary", {}, "Filters"),
      el("div", { class: "fields-row" }, ["density", "largest", "norm_driven", "auroc"].filter((name) => !missing.has(name)).map(range),
        choice("never fires here", "dead", any, state.dead ?? ""),
        missing.has("matched") ? null : choice("has a match", "matched_any", any, state.matched_any ?? ""),
        missing.has("score") ? null : choice("explained", "explained", any, state.explained ?? ""),
        el("a", { href: href("features", { sae: state.sae }) }, "Without filters")),
      el("p", { class: "muted" }, "Shares are numbers from 0 to 1: 0.01 is 1 %.")),
    ["sort", "order", "limit", "x", "y"].filter((name) => state[name]).map((name) => el("input", { type: "hidden", name, value: state[name] })));
  form.addEventListener("submit", () => { for (const input of form.elements) if (input.value === "") input.disabled = true; });

  const head = (name) => {
    const sorted = state.sort === name, down = sorted && state.order === "down";
    return el("th", { scope: "col", "aria-sort": sorted ? (down ? "descending" : "ascending") : null },
      el("a", { href: link({ sort: name, order: down ? "up" : "down", offset: 0 }) }, WORDS[name], el("span", { "aria-hidden": "true" }, sorted ? (down ? " ▼" : " ▲") : "")));
  };
  const table = el("div", { class: "wide", role: "region", "aria-label": "Features", tabindex: "0" }, el("table", { class: "features" },
    el("caption", {}, `${count(found.total)} of ${count(about.saes.find((sae) => sae.name === state.sae)?.d_sae)} features`),
    el("thead", {}, el("tr", {}, head("id"), el("th", { scope: "col", class: "words" }, "what it fires on"), columns.map(head))),
    el("tbody", {}, found.rows.map((row) => el("tr", { "data-id": row.id },
      el("th", { scope: "row" }, featureLink(state.sae, row.id, String(row.id)), row.bookmark ? el("span", { title: "bookmarked" }, " ★") : ""),
      el("td", { class: "words" }, row.label ? el("div", {}, el("bdi", {}, cosae.spell(row.label, 160))) : "", row.tokens.map((token) => quoted(token, 24)),
        row.firings === 0 ? el("span", { class: "state" }, "never fires") : "", row.tags?.length ? el("div", { class: "muted" }, row.tags.join(", ")) : ""),
      columns.map((name) => el("td", { "data-column": name }, number(row[name], WRITE[name] ?? significant),
        name === "auroc" && row.concept ? el("small", {}, el("bdi", {}, cosae.spell(row.concept, 40))) : "")))))));

  const limit = Number(state.limit), offset = Number(found.offset), last = Math.max(0, Math.ceil(found.total / limit) - 1) * limit;
  const turn = (words, to, there) => (there ? el("a", { href: link({ offset: to }) }, words) : el("span", { class: "muted" }, words));
  const pages = (label) => el("nav", { class: "pages", "aria-label": label },
    turn("first", 0, offset > 0), turn("previous", Math.max(0, offset - limit), offset > 0),
    el("span", {}, found.total ? `${count(offset + 1)} to ${count(Math.min(offset + limit, found.total))}` : "none"),
    turn("next", offset + limit, offset + limit < found.total), turn("last", last, offset < last),
    el("span", { class: "muted" }, "rows: ", [25, 50, 100, 200].map((n) => [String(n) === state.limit ? el("b", {}, n) : el("a", { href: link({ limit: n, offset: 0 }) }, n), " "])));

  /* The scatter: any two columns of numbers, of all features of the SAE. */
  const axes = { x: state.x || "density", y: state.y || "norm_driven" };
  const plot = el("div", { id: "scatter" });
  const options = numbers.map((name) => [name, WORDS[name]]);
  async function draw() {
    const both = await cosae.data.scatter({ sae: state.sae, ...axes });
    const points = both.x.map((x, id) => ({ id, x, y: both.y[id] }));
    cosae.replace(plot, cosae.plot.scatter({ label: `${WORDS[axes.x]} and ${WORDS[axes.y]} of every feature`, points, xLabel: WORDS[axes.x], yLabel: WORDS[axes.y],
      xLog: LOG.has(axes.x), yLog: LOG.has(axes.y), open: (p) => { location.href = href("feature", { sae: state.sae, id: p.id }); },
      tell: (p) => [featureLink(state.sae, p.id, `feature ${p.id}`), ` · ${WORDS[axes.x]} ${significant(p.x)} · ${WORDS[axes.y]} ${significant(p.y)}`] }));
  }
  const set = (axis) => (name) => { axes[axis] = name; draw(); };
  cosae.replace(main, form, pages("Pages of the table"), table, found.total > limit ? pages("Pages of the table, again") : "",
    el("h2", {}, "Every feature as a point"),
    el("div", { class: "fields-row" }, choice("across", "x", options, axes.x, set("x")), choice("up", "y", options, axes.y, set("y"))), plot);
  cosae.say(`${found.total} features`);
  await draw();
});
