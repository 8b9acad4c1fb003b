/* The data of a store, by name. With a server they are asked for; from disk files are loaded, and filtered here. */
"use strict";
(() => {
  const { live, ask, load, addressed } = cosae;
  const SHARD = 64;

  const about = live
    ? () => (cosae.asked ??= ask("data/about"))
    : () => load("about", "data/about.js");

  async function place(sae) {
    const at = (await about()).saes.findIndex((one) => one.name === sae);
    if (at < 0) throw new Error(`There is no SAE ${sae}.`);
    return at;
  }
  async function columns(sae) {
    const at = await place(sae);
    return load(`table/${at}`, `data/table/${at}.js`);
  }

  /* Rows of the table as the server gives them: {rows, total, offset}. */
  const finds = {
    token: (row, words) => row.tokens.some((token) => token.toLowerCase().includes(words)),
    label: (row, words) => (row.label ?? "").toLowerCase().includes(words),
    concept: (row, words) => (row.concept ?? "").toLowerCase().includes(words),
    id: (row, words) => String(row.id) === words,
  };
  function passes(row, given) {
    const yes = (name, has) => !given[name] || (given[name] === "yes") === has;
    if (!yes("dead", row.firings === 0) || !yes("matched_any", row.matched > 0) || !yes("explained", row.label !== null)) return false;
    for (const [name, text] of Object.entries(given)) {
      const [, side, column] = name.match(/^(least|most)_(.+)$/) ?? [];
      if (!side || text === "") continue;
      const value = row[column];
      if (value === null || (side === "least" ? value < Number(text) : value > Number(text))) return false;
    }
    const words = (given.q ?? "").trim().toLowerCase();
    if (!words) return true;
    const where = given.in && given.in !== "any" ? [given.in] : Object.keys(finds);
    return where.some((one) => finds[one](row, words));
  }
  async function table(given) {
    if (live) return ask(addressed("data/table", given));
    const found = await columns(given.sae), names = Object.keys(found);
    const sort = given.sort || "density", sign = given.order === "up" ? 1 : -1;
    const rows = found.id.map((_, at) => Object.fromEntries(names.map((name) => [name, found[name][at]])))
      .filter((row) => passes(row, given))
      .sort((a, b) => (a[sort] === null) - (b[sort] === null) || sign * (a[sort] - b[sort]) || a.id - b.id);
    const offset = Number(given.offset ?? 0);
    return { rows: rows.slice(offset, offset + Number(given.limit ?? 50)), total: rows.length, offset };
  }
  async function scatter(given) {
    if (live) return ask(addressed("data/scatter", given));
    const found = await columns(given.sae);
    return { x: found[given.x], y: found[given.y] };
  }

  async function feature(sae, id) {
    if (live) return ask(addressed("data/feature", { sae, id }));
    const at = await place(sae), shard = Math.floor(id / SHARD);
    const found = await load(`feature/${at}/${shard}`, `data/feature/${at}/${shard}.js`);
    if (!found[id]) throw new Error(`Feature ${id} is out of range: ${sae} has ${(await about()).saes[at].d_sae} features.`);
    return found[id];
  }
  async function saes(a, b) {
    if (live) return ask(addressed("data/compare", { a, b }));
    const [i, j] = [await place(a), await place(b)];
    return load(`compare/${i}-${j}`, `data/compare/${i}-${j}.js`);
  }

  cosae.data = { about, table, scatter, feature, saes };
})();
