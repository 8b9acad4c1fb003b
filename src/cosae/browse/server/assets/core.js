/* What every page uses: elements, numbers, tokens, addresses, and where the data come from (a server, or files).

   Nothing is written as HTML: text enters the page through textContent alone. */
"use strict";
window.cosae = (() => {
  const live = document.documentElement.dataset.live === "yes";
  const SVG = "http://www.w3.org/2000/svg";

  /* An element: el("td", {class: "x", onclick: f, "data-value": 3}, child, "text", …). null and undefined are left out. */
  function el(name, attributes = {}, ...children) {
    return filled(document.createElement(name), attributes, children);
  }
  function svg(name, attributes = {}, ...children) {
    return filled(document.createElementNS(SVG, name), attributes, children);
  }
  function filled(made, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value === true ? "" : String(value));
    }
    made.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== ""));
    return made;
  }
  const replace = (where, ...children) => { where.replaceChildren(...children.flat(3).filter((child) => child !== null)); };

  /* Numbers as the report writes them: a true minus sign, a dash where there is none. */
  const known = (value) => typeof value === "number" && Number.isFinite(value);
  const thin = (text) => text.replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
  function significant(value, digits = 3) {
    if (!known(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value), rounded = Number(size.toPrecision(digits));
    const text = rounded >= 1e5 ? thin(rounded.toFixed(0)) : rounded < 1e-4 ? rounded.toExponential() : String(rounded);
    return (value < 0 ? "−" : "") + text;
  }
  const percent = (value, digits = 3) => (known(value) ? `${significant(100 * value, digits)} %` : "–");
  const count = (value) => (known(value) ? thin(String(Math.round(value))) : "–");
  /* A number that keeps its exact value for whoever reads the page by program or by pointing at it. */
  const number = (value, write = significant) => el("span", { "data-value": value, title: known(value) ? value : null }, write(value));

  /* A token as it is shown: spaces and line ends as signs, what turns the writing or prints nothing as its code point. */
  const LONGEST = 40;
  const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
  const SIGNS = { "\n": "↵", "\t": "→", "\r": "␍" };
  function spell(text, longest = LONGEST) {
    const whole = Array.from(text);
    const cut = whole.length > longest ? `${whole.slice(0, longest).join("")}…` : text;
    return cut.replace(HIDDEN, (c) => SIGNS[c] ?? `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
  }
  const quoted = (text, longest) => el("bdi", { class: "piece" }, spell(text, longest).replace(/ {4,}/g, (all) => `␣×${all.length}`).replace(/^ | $/g, "␣") || "␣");

  /* Addresses: the same names with a server and from disk. */
  const query = () => new URLSearchParams(location.search);
  function href(page, parameters = {}) {
    const given = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined && value !== "");
    const text = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
    return `${page}.html${text ? `?${text}` : ""}`;
  }
  const featureLink = (sae, id, words) => el("a", { href: href("feature", { sae, id }) }, words ?? `${sae} / ${id}`);

  /* Data. With a server they are asked for; from disk a script that calls cosae.put is loaded, as pages may not read files. */
  const arrived = new Map(), waiting = new Map();
  function put(key, value) { arrived.set(key, value); }
  function load(key, path) {
    if (arrived.has(key)) return Promise.resolve(arrived.get(key));
    if (!waiting.has(key)) {
      waiting.set(key, new Promise((done, failed) => {
        const script = el("script", { src: path });
        script.onload = () => (arrived.has(key) ? done(arrived.get(key)) : failed(new Error(`${path} holds something else.`)));
        script.onerror = () => failed(new Error(`${path} cannot be read: it belongs beside this page.`));
        document.head.append(script);
      }));
    }
    return waiting.get(key);
  }
  async function ask(path, body) {
    const sent = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    let answer;
    try { answer = await fetch(path, sent); } catch { throw new Error("The server does not answer: it was stopped. Start cosae browse again."); }
    const found = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
    if (!answer.ok) throw new Error(found.error ?? `The server answered ${answer.status}.`);
    return found;
  }
  const addressed = (path, parameters) => href(path, parameters).replace(".html", "");

  /* What a page is made of: its main part, filled by `make`, or the sentence of what went wrong. */
  async function page(make) {
    const main = document.getElementById("page");
    main.setAttribute("aria-busy", "true");
    try {
      await make(main, await cosae.data.about());
    } catch (error) {
      replace(main, el("p", { class: "warn", role: "alert" }, el("b", {}, "Note: "), error.message));
      if (!(error instanceof Error) || error instanceof TypeError) throw error;
    }
    main.removeAttribute("aria-busy");
    main.dataset.drawn = "";
  }
  function say(words) { document.getElementById("said").textContent = words; }

  /* A table; the first cell of a row names it, those of `words` are text, all others numbers. */
  function table(caption, head, rows, { words = [], most = Infinity, ...attributes } = {}) {
    const kind = (at) => (words.includes(at) ? "words" : null);
    const made = (row) => el("tr", {}, row.map((cell, at) => (at ? el("td", { class: kind(at) }, cell) : el("th", { scope: "row", class: kind(at) }, cell))));
    const body = el("tbody", {}, rows.slice(0, most).map(made));
    const rest = rows.length > most ? el("button", { type: "button", class: "rest", onclick: () => { body.append(...rows.slice(most).map(made)); rest.remove(); } },
      `Show the other ${count(rows.length - most)}`) : "";
    return el("div", { class: "wide", role: "region", "aria-label": caption, tabindex: "0" },
      el("table", attributes, el("caption", {}, caption), el("thead", {}, el("tr", {}, head.map((cell, at) => el("th", { scope: "col", class: kind(at) }, cell)))), body), rest);
  }
  function choice(label, name, options, chosen, change) {
    const made = el("select", { name, onchange: () => change?.(made.value) },
      options.map(([value, words]) => el("option", { value, selected: String(value) === String(chosen) }, words)));
    return el("label", { class: "field" }, el("span", {}, label), made);
  }
  function field(label, name, value, attributes = {}) {
    return el("label", { class: "field" }, el("span", {}, label), el("input", { name, value: value ?? "", ...attributes }));
  }

  return { live, el, svg, replace, known, significant, percent, count, number, spell, quoted, query, href, featureLink,
    addressed, put, load, ask, page, say, table, choice, field };
})();
