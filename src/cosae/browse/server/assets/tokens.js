/* Text with its tokens tinted by a value: the exact number is told for the token that is pointed at or focused.

   A tint is never alone: a stronger value has a thicker line under it, a negative one a dotted line. */
"use strict";
(() => {
  const { el, significant, spell, known } = cosae;
  const LEVELS = 8;

  /* Options that hold for every text of the page, and are kept by the browser. */
  const kept = (() => { try { return JSON.parse(localStorage.getItem("cosae") ?? "{}"); } catch { return {}; } })();
  function keep(name, value) {
    kept[name] = value;
    try { localStorage.setItem("cosae", JSON.stringify(kept)); } catch { /* a browser may refuse */ }
  }

  function level(value, most) {
    if (!known(value) || value === 0) return 0;
    return Math.max(1, Math.min(LEVELS, Math.ceil(LEVELS * Math.abs(value) / (most || Math.abs(value)))));
  }
  /* One token. `words` is everything that is known of it, read out on focus. */
  function token(text, value, most, words, attributes = {}) {
    const strength = level(value, most), sign = value < 0 ? "down" : "up";
    return el("span", { class: `token${strength ? ` ${sign} t${strength}` : ""}${attributes.mark ? ` ${attributes.mark}` : ""}`,
      "data-value": value ?? null, "data-words": words }, el("bdi", {}, spell(text)));
  }

  /* A line of tokens. tokens: [{text, value, words, mark, breaks}]; `at` is the one that is focused first. */
  function line(tokens, { most, at = 0, label, around = 0, breaks = false, told }) {
    const first = around ? Math.max(0, at - around) : 0, end = around ? at + around + 1 : tokens.length;
    const spans = [];
    const parts = tokens.slice(first, end).flatMap((one, i) => {
      const made = token(one.text, one.value, most, one.words, one);
      made.tabIndex = first + i === at ? 0 : -1;
      if (first + i === at) made.classList.add("here");
      spans.push(made);
      return breaks && one.text.includes("\n") ? [made, el("br")] : [made];
    });
    const show = (made) => { if (made?.dataset.words) told.textContent = made.dataset.words; };
    const made = el("div", { class: "text", role: "group", "aria-label": label },
      first > 0 ? el("span", { class: "muted" }, "… ") : null, parts, end < tokens.length ? el("span", { class: "muted" }, " …") : null);
    made.addEventListener("pointerover", (event) => show(event.target.closest(".token")));
    made.addEventListener("focusin", (event) => show(event.target.closest(".token")));
    made.addEventListener("keydown", (event) => {
      const now = spans.indexOf(event.target.closest(".token"));
      const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: spans.length - 1 }[event.key];
      if (now < 0 || to === undefined || !spans[to]) return;
      event.preventDefault();
      spans[now].tabIndex = -1;
      spans[to].tabIndex = 0;
      spans[to].focus();
    });
    for (const span of spans) if (span.tabIndex === 0) span.setAttribute("aria-label", `${span.textContent}: ${span.dataset.words}`);
    return made;
  }

  /* An image with its patches tinted; its class token and registers beside it. layout: {n_special, grid: [rows, columns]}. */
  function patches(tokens, layout, { picture, most, at = 0, label, told }) {
    const made = el("div", { class: "picture", role: "group", "aria-label": label });
    const spans = tokens.map((one, i) => {
      const span = token("", one.value, most, one.words, one);
      span.tabIndex = i === at ? 0 : -1;
      span.setAttribute("aria-label", one.words);
      span.setAttribute("role", "img");
      if (i === at) span.classList.add("here");
      return span;
    });
    const grid = el("div", { class: "patches" }, spans.slice(layout.n_special));
    grid.style.setProperty("--columns", layout.grid[1]);
    made.append(el("div", { class: "frame" }, el("img", { src: picture, alt: "" }), grid), el("div", { class: "specials" }, spans.slice(0, layout.n_special)));
    const show = (span) => { if (span?.dataset.words) told.textContent = span.dataset.words; };
    made.addEventListener("pointerover", (event) => show(event.target.closest(".token")));
    made.addEventListener("focusin", (event) => show(event.target.closest(".token")));
    made.addEventListener("keydown", (event) => {
      const now = spans.indexOf(event.target.closest(".token")), wide = layout.grid[1];
      const to = { ArrowRight: now + 1, ArrowLeft: now - 1, ArrowDown: now + wide, ArrowUp: now - wide, Home: 0, End: spans.length - 1 }[event.key];
      if (now < 0 || to === undefined || !spans[to]) return;
      event.preventDefault();
      spans[now].tabIndex = -1;
      spans[to].tabIndex = 0;
      spans[to].focus();
    });
    return made;
  }

  /* What is said of a token of an example. */
  function words(example, at) {
    const value = example.value[at], parts = [`value ${value ? significant(value, 5) : "0"}`];
    if (known(example.norm?.[at])) parts.push(`|x − c| ${significant(example.norm[at], 4)}`);
    if (known(example.cosine?.[at])) parts.push(`κ ${significant(example.cosine[at], 4)}`);
    if (example.text[at].length > 40) parts.push(`${example.text[at].length} characters`);
    parts.push(example.picture ? example.text[at] : `position ${(example.first ?? 0) + at}`);
    if (example.sink.includes(at)) parts.push("sink");
    if (example.left_out.includes(at)) parts.push("left out by the filter");
    return parts.join(" · ");
  }
  /* One example of a feature: its own value, its text, and where it comes from. */
  function example(one, { most, around, breaks, layout }) {
    const told = el("output", { class: "told" }, words(one, one.at));
    const tokens = one.text.map((text, at) => ({ text, value: one.value[at], words: words(one, at), mark: one.sink.includes(at) ? "sink" : "" }));
    return el("li", { class: "example", "data-value": one.value[one.at] },
      one.picture && layout?.grid ? patches(tokens, layout, { picture: one.picture, most, at: one.at, told, label: `Example with value ${significant(one.value[one.at], 5)}` })
        : line(tokens, { most, at: one.at, around, breaks, told, label: `Example with value ${significant(one.value[one.at], 5)}` }),
      el("p", { class: "muted" }, el("b", { class: "most" }, significant(one.value[one.at], 4)), " ", told,
        one.document ? [" · ", el("bdi", {}, spell(one.document, 60))] : null));
  }

  const legend = () => el("p", { class: "muted keys", "aria-hidden": "true" },
    el("span", { class: "token up t2" }, "weak"), el("span", { class: "token up t5" }, "middle"),
    el("span", { class: "token up t8" }, "strongest"), el("span", { class: "token down t5" }, "negative"),
    el("span", { class: "token sink" }, "sink"), " the thicker the line, the larger the value");

  cosae.tokens = { line, example, legend, kept, keep };
})();
