/* Try a text: which features fire on each of its tokens in every SAE, and what the model says with a feature changed. */
"use strict";
cosae.page((main, about) => {
  const { el, number, count, significant, percent, featureLink, spell, tokens } = cosae;
  if (!cosae.live || !about.live) {
    cosae.replace(main, el("p", { class: "warn" }, el("b", {}, "Note: "), cosae.live ? "no model is at hand: start cosae browse with the SAEs' own model to try a text."
      : "these pages are plain files, and trying a text needs the model: start cosae browse with the SAEs to do so."));
    return;
  }
  const words = cosae.query();
  const results = el("div", { id: "results", "aria-live": "polite" }), outcome = el("div", { id: "steered", "aria-live": "polite" });
  const box = (label, name, value) => el("label", { class: "field" }, el("span", {}, label), el("textarea", { name, maxlength: 20000 }, value));

  function busy(form, working) {
    for (const button of form.querySelectorAll("button")) button.disabled = working;
  }
  async function run(form, where, make) {
    busy(form, true);
    cosae.replace(where, el("p", { class: "muted" }, "The model is reading …"));
    try { cosae.replace(where, await make()); } catch (error) {
      cosae.replace(where, el("p", { class: "warn", role: "alert" }, el("b", {}, "Note: "), error.message));
    }
    busy(form, false);
  }

  /* Reading. */
  const text = box("text", "text", words.get("text") ?? "The quick brown fox jumps over the lazy dog.");
  const reading = el("form", { id: "reading", onsubmit: (event) => { event.preventDefault(); run(reading, results, read); } }, text, el("div", { class: "fields-row" }, el("button", { class: "main" }, "Read")));
  async function read() {
    const found = await cosae.ask("data/activations", { text: text.querySelector("textarea").value });
    return found.saes.map((sae) => under(found.tokens, sae));
  }
  function under(read, sae) {
    const entries = sae.entries.map(([token, feature, value]) => ({ token, feature, value }));
    const largest = new Map(), at = read.map(() => []);
    for (const one of entries) {
      at[one.token].push(one);
      const size = sae.largest[one.feature] ?? null;
      const share = size ? Math.abs(one.value) / size : 0;
      if (!largest.has(one.feature) || share > largest.get(one.feature).share) largest.set(one.feature, { ...one, share });
    }
    for (const list of at) list.sort((x, y) => Math.abs(y.value) - Math.abs(x.value));
    const order = [...largest.values()].sort((x, y) => y.share - x.share);
    const lines = el("div", {}), detail = el("div", { class: "detail" });
    const ignored = (token) => sae.left_out.includes(token);
    function tint(feature) {
      const told = el("output", { class: "told" }, "Point at a token, or move with the arrow keys.");
      const values = read.map((_, token) => at[token].find((one) => one.feature === feature)?.value ?? 0);
      const made = tokens.line(read.map((token, i) => ({ text: token.text, value: feature === null ? null : values[i], mark: token.sink ? "sink" : "",
        words: [`token ${i}`, `|x| ${significant(token.norm, 4)}`, token.sink ? "sink" : "", ignored(i) ? "left out by this SAE's filter" : `${count(at[i].length)} features fire`,
          feature === null ? "" : `value ${significant(values[i], 4)}`].filter(Boolean).join(" · ") })),
      { most: Math.max(...values.map(Math.abs), 1e-12), at: Math.max(0, read.findIndex((_, i) => values[i] !== 0)), told, label: `The text under ${sae.name}` });
      const choose = (event) => { const chosen = event.target.closest(".token"); if (chosen) fires([...made.querySelectorAll(".token")].indexOf(chosen)); };
      made.addEventListener("click", choose);
      made.addEventListener("focusin", choose);
      cosae.replace(lines, made, told);
    }
    function fires(token) {
      cosae.replace(detail, cosae.table(`Features on token ${token}, ${spell(read[token].text)}`, ["feature", "value", "of its largest"], at[token].slice(0, 12).map((one) => [
        featureLink(sae.name, one.feature, String(one.feature)), number(one.value), number(sae.largest[one.feature] ? Math.abs(one.value) / sae.largest[one.feature] : null, percent)]), { class: "short" }));
    }
    const list = cosae.table("Features of this text", ["feature", "value", "of its largest", "on", ""], order.slice(0, 12).map((one) => [
      featureLink(sae.name, one.feature, String(one.feature)), number(one.value), number(one.share, percent), el("span", { class: "piece" }, spell(read[one.token].text)),
      el("button", { type: "button", onclick: () => tint(one.feature) }, "tint")]), { class: "short" });
    tint(order.length ? order[0].feature : null);
    return el("section", { class: "of-sae", "data-sae": sae.name }, el("h2", {}, el("bdi", {}, spell(sae.name, 80))),
      el("p", { class: "muted" }, order.length ? `Tinted by feature ${order[0].feature} at first; dashed boxes are sinks.` : "No feature fires."), lines, el("div", { class: "two" }, list, detail));
  }

  /* Steering. */
  const first = words.get("sae") || about.saes[0].name;
  const prompt = box("text to go on from", "prompt", "The quick brown fox");
  const fields = {
    sae: cosae.choice("SAE", "sae", about.saes.map((sae) => [sae.name, spell(sae.name, 60)]), first),
    feature: cosae.field("feature", "feature", words.get("id") ?? 0, { type: "number", min: 0, required: true }),
    action: cosae.choice("change", "action", [["add", "add × decoder row"], ["set", "set the value to"], ["scale", "multiply the value by"], ["ablate", "take it out"]], "add",
      (value) => { fields.amount.querySelector("input").disabled = value === "ablate"; }),
    amount: cosae.field("amount", "amount", 10, { type: "number", step: "any" }),
    new_tokens: cosae.field("new tokens", "new_tokens", 30, { type: "number", min: 1, max: 200 }),
    temperature: cosae.field("temperature", "temperature", 0, { type: "number", min: 0, step: "any" }),
    seed: cosae.field("seed", "seed", 0, { type: "number", min: 0 }),
  };
  const value = (name) => fields[name].querySelector("input, select").value;
  const steering = el("form", { id: "steering", onsubmit: (event) => { event.preventDefault(); run(steering, outcome, steer); } }, prompt,
    el("div", { class: "fields-row" }, Object.values(fields), el("button", { class: "main" }, "Go on")));
  async function steer() {
    const whole = (name) => Number(value(name));
    const found = await cosae.ask("data/steer", { sae: value("sae"), feature: whole("feature"), action: value("action"), amount: whole("amount"),
      prompt: prompt.querySelector("textarea").value, new_tokens: whole("new_tokens"), temperature: whole("temperature"), seed: whole("seed") });
    const show = (heading, name, words) => el("div", {}, el("h3", {}, heading), el("p", { class: "outcome", "data-text": name }, el("bdi", {}, words)));
    return [el("p", {}, found.what), found.notes.map((note) => el("p", { class: "warn" }, note)),
      el("div", { class: "two" }, show("Without the change", "without", found.without), show("With it", "changed", found.changed)),
      found.without === found.changed ? el("p", {}, "The change made no difference.") : ""];
  }

  cosae.replace(main, el("p", {}, "The model runs on this machine; nothing is sent anywhere."), reading, results,
    el("h2", {}, "Steer a feature"), el("p", { class: "muted" }, "What the SAE misses is put back, so only the change acts. Temperature 0 takes the likeliest token; above, tokens are drawn with the same seed on both sides."), steering, outcome);
});
