"use strict";
// Draws the samples of the JSON in #data. Texts are inserted as text only, never as markup.
(() => {
  const CHUNK = 20; // list entries drawn at once; more as the reader scrolls
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const list = byId("list"), more = byId("more"), tip = byId("tip");
  const largestSum = Math.max(...data.samples.map((sample) => Math.abs(sample.sum)), 1e-9);
  const unfolded = new Set(); // numbers of folds, kept when order or filter change
  let queue = [], drawn = 0, current = null; // queue: folds, each a list of equal samples

  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  const signed = (value, digits) => {
    const text = Math.abs(value).toFixed(digits);
    return (Number(text) === 0 ? "" : value > 0 ? "+" : "−") + text;
  };
  const logProb = (value) => `${value < 0 ? "−" : ""}${Math.abs(value).toFixed(6)}`;
  const percent = (value) => {
    const p = 100 * Math.exp(value);
    return p >= 99.95 && p < 100 ? ">99.9 %" : p < 0.01 ? "<0.01 %" : `${p.toPrecision(3)} %`;
  };

  // Invisible characters, and characters that change the direction of their neighbours.
  const INVISIBLE = /[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\u3164\ufe00-\ufe0f\ufeff\ufff9-\ufffb\ud800-\udfff]/u;
  const NAMED = { "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };

  function visible(text) {
    if (text === "") return [element("i", "", "∅")];
    if (/^ +$/.test(text)) return [element("i", "", "·".repeat(text.length))];
    const parts = [];
    let plain = "";
    for (const char of text) {
      if (!INVISIBLE.test(char)) {
        plain += char;
        continue;
      }
      if (plain) parts.push(plain);
      plain = "";
      const code = char.codePointAt(0);
      const shown = NAMED[char] ?? (code < 32 ? String.fromCodePoint(0x2400 + code) : `U+${code.toString(16).toUpperCase().padStart(4, "0")}`);
      parts.push(element("i", "", shown));
      if (char === "\n") parts.push("\n");
    }
    if (plain) parts.push(plain);
    return parts;
  }

  const textOf = (entry) => entry[1] ?? String(entry[0]);
  const tokenTexts = (sample) => sample.tokens.map((index) => textOf(data.vocabulary[index]));

  function scoredIndices(sample) {
    const at = new Int32Array(sample.tokens.length).fill(-1);
    let n = 0;
    for (const [start, stop] of sample.spans) for (let t = start; t < stop; t++) at[t] = n++;
    return at;
  }
  // Above 0: the policy finds the token likelier. Colours show the log-ratio, whatever the estimator of the stored KL.
  const logRatio = (sample, n) => sample.policy[n] - sample.ref[n];
  const klName = data.is_k1 ? "KL" : "KL as stored";

  function drawToken(sample, t, n) {
    const entry = data.vocabulary[sample.tokens[t]];
    const span = element("span", "t", ...(entry[1] === null ? [String(entry[0])] : visible(entry[1])));
    if (entry[1] === null) span.classList.add("id");
    span.setAttribute("role", "option");
    span.tabIndex = -1;
    span.at = { sample, t, n };
    if (n < 0) {
      span.classList.add("unscored");
      return span;
    }
    const ratio = logRatio(sample, n);
    if (ratio && data.cap) {
      span.classList.add(ratio > 0 ? "pos" : "neg");
      span.style.setProperty("--a", Math.min(1, Math.abs(ratio) / data.cap).toFixed(3));
      if (Math.abs(ratio) >= data.cap * (1 - 1e-6)) span.classList.add("worst");
    }
    return span;
  }

  function drawSample(sample, button = null) {
    const at = scoredIndices(sample);
    const scored = sample.policy.length;
    const heading = element("h2", "", `Sample ${sample.number}`);
    heading.id = `sample-${sample.number}`;
    const facts = element("dl", "facts");
    const fact = (name, value, extra = null) => facts.append(element("div", "", element("dt", "", name), element("dd", "", value, extra)));
    const bar = element("span", "sum", element("span", `${sample.sum >= 0 ? "pos" : "neg"}${data.is_k1 ? "" : " stored"}`));
    bar.firstChild.style.setProperty("--w", (Math.abs(sample.sum) / largestSum).toFixed(3));
    bar.setAttribute("aria-hidden", "true");
    fact(`sum ${klName}`, signed(sample.sum, 4), bar);
    fact(`mean ${klName}`, scored ? signed(sample.sum / scored, 4) : "none");
    fact(`max |${klName}|`, sample.max.toFixed(4));
    fact("scored", `${scored} of ${sample.tokens.length}`);
    if (sample.reward !== null) fact("reward", String(Number(sample.reward.toPrecision(4))).replace("-", "−"));
    if (sample.policy_version !== null) fact("policy version", String(sample.policy_version));
    if (sample.ref_version !== null) fact("reference version", String(sample.ref_version));
    const tokens = element("div", "tokens", ...sample.tokens.map((_, t) => drawToken(sample, t, at[t])));
    tokens.setAttribute("role", "listbox");
    tokens.setAttribute("aria-orientation", "horizontal");
    tokens.setAttribute("aria-label", `Tokens of sample ${sample.number}`);
    // The Tab key stops once per sample; arrow keys move inside.
    const first = tokens.querySelector(".t:not(.unscored)") ?? tokens.firstChild;
    if (first) first.tabIndex = 0;
    const query = sample.query ? element("p", "query", sample.query) : null;
    const card = element("article", "", element("div", "head", heading, button, query), facts, tokens);
    card.setAttribute("aria-labelledby", heading.id);
    return card;
  }

  // Equal samples are one entry of the list: the first of them, and a button that draws the others below it.
  function drawFold(samples) {
    const [first, ...others] = samples;
    if (!others.length) return element("li", "", drawSample(first));
    const button = element("button", "fold", `× ${samples.length}`);
    button.type = "button";
    button.title = `${samples.length} samples have these tokens: show or hide the others`;
    const entry = element("li", "", drawSample(first, button));
    const show = (open) => {
      button.setAttribute("aria-expanded", String(open));
      if (open) entry.append(...others.map((sample) => drawSample(sample)));
      else while (entry.children.length > 1) entry.lastChild.remove(); // the first card stays: it may have the focus
    };
    button.addEventListener("click", () => {
      const open = !unfolded.delete(first.fold);
      if (open) unfolded.add(first.fold);
      show(open);
    });
    show(unfolded.has(first.fold));
    return entry;
  }

  function drawMore() {
    const chunk = queue.slice(drawn, drawn + CHUNK);
    list.append(...chunk.map(drawFold));
    drawn += chunk.length;
    more.hidden = drawn >= queue.length;
    more.textContent = `Show more (${counted(queue.slice(drawn).flat().length)} left)`;
    // An observer reports changes only, and the button may still be in view: observe it anew after every chunk.
    observer.unobserve(more);
    if (!more.hidden) observer.observe(more);
  }
  const observer = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && drawMore(), {
    rootMargin: "800px",
  });

  const orders = {
    number: (a, b) => a.number - b.number,
    "sum-down": (a, b) => b.sum - a.sum,
    "sum-up": (a, b) => a.sum - b.sum,
    max: (a, b) => b.max - a.max,
    "reward-up": (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity),
    "reward-down": (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity),
  };
  const haystacks = new Map();
  function haystack(sample) {
    if (!haystacks.has(sample)) {
      const texts = [sample.query ?? "", sample.response ?? "", tokenTexts(sample).join("")];
      haystacks.set(sample, texts.join("\n").toLowerCase());
    }
    return haystacks.get(sample);
  }

  const counted = (n) => n.toLocaleString("en");
  function foldEqual(samples) {
    const folds = new Map();
    for (const sample of samples) {
      if (!folds.has(sample.fold)) folds.set(sample.fold, []);
      folds.get(sample.fold).push(sample);
    }
    return [...folds.values()];
  }

  function arrange() {
    hideTip();
    const wanted = byId("filter").value.toLowerCase();
    // Without rewards, Infinity - Infinity is NaN, which counts as equal.
    const order = orders[byId("order").value];
    const matching = data.samples.filter((sample) => !wanted || haystack(sample).includes(wanted));
    queue = foldEqual(matching.sort((a, b) => order(a, b) || a.number - b.number));
    drawn = 0;
    list.replaceChildren();
    const all = data.samples.length, found = matching.length;
    const count = found === all ? `${counted(all)} samples.` : `${counted(found)} of ${counted(all)} samples match.`;
    const folds = queue.length < found ? ` Equal ones are folded, which leaves ${counted(queue.length)}.` : "";
    byId("count").textContent = count + folds;
    drawMore();
  }

  function fillTip({ sample, t, n }) {
    const [id, text] = data.vocabulary[sample.tokens[t]];
    const rows = element("dl", "");
    const row = (name, value, extra = "") => rows.append(element("div", "", element("dt", "", name), element("dd", "", value), element("dd", "extra", extra)));
    if (n >= 0) {
      row("policy log-prob", logProb(sample.policy[n]), percent(sample.policy[n]));
      row("reference log-prob", logProb(sample.ref[n]), percent(sample.ref[n]));
      row(data.is_k1 ? "KL" : "log-ratio", signed(logRatio(sample, n), 6), "nats");
      if (!data.is_k1) row(klName, signed(sample.kl[n], 6), "nats");
    } else {
      row(klName, "not scored");
    }
    row("token id", String(id));
    row("position", String(t), `0 to ${sample.tokens.length - 1}`);
    if (sample.policy_version !== null) row("policy version", String(sample.policy_version));
    if (sample.ref_version !== null) row("reference version", String(sample.ref_version));
    const name = text === null ? `id ${id}` : JSON.stringify(text).replace(/[\u007f-\u{10ffff}]/gu, (char) => (INVISIBLE.test(char) ? `\\u{${char.codePointAt(0).toString(16)}}` : char));
    tip.replaceChildren(element("p", "name", name), rows);
  }

  function showTip(token) {
    hideTip();
    current = token;
    fillTip(token.at);
    tip.hidden = false;
    token.setAttribute("aria-describedby", "tip");
    placeTip(token);
  }

  function placeTip(token) {
    // A token that is broken over two lines has two boxes: take the first.
    const box = token.getClientRects()[0];
    if (!box) return;
    const width = tip.offsetWidth, height = tip.offsetHeight;
    const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), document.documentElement.clientWidth - width - 8);
    const below = box.bottom + 8 + height < window.innerHeight || box.top < height + 8;
    tip.style.setProperty("left", `${left}px`);
    tip.style.setProperty("top", `${below ? box.bottom + 8 : box.top - height - 8}px`);
  }

  function hideTip() {
    if (current) current.removeAttribute("aria-describedby");
    current = null;
    tip.hidden = true;
  }

  const tokenAt = (target) => (target instanceof Element ? target.closest(".t") : null);
  list.addEventListener("mouseover", (event) => {
    const token = tokenAt(event.target);
    if (token) showTip(token);
  });
  list.addEventListener("mouseout", (event) => {
    if (tokenAt(event.relatedTarget) || !current) return;
    const focused = tokenAt(document.activeElement);
    if (focused) showTip(focused);
    else hideTip();
  });
  list.addEventListener("focusin", (event) => {
    const token = tokenAt(event.target);
    if (!token) return;
    for (const other of token.parentElement.querySelectorAll("[tabindex='0'], [aria-selected]")) {
      other.tabIndex = -1;
      other.removeAttribute("aria-selected");
    }
    token.tabIndex = 0;
    token.setAttribute("aria-selected", "true");
    showTip(token);
  });
  list.addEventListener("focusout", hideTip);
  list.addEventListener("keydown", (event) => {
    const token = tokenAt(event.target);
    if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
    const isHere = (t) => t && !(t.classList.contains("unscored") && document.body.classList.contains("no-prompts"));
    const walk = (from, step, wanted) => {
      let next = from;
      while (next && !(isHere(next) && wanted(next))) next = next[step];
      return next;
    };
    const any = () => true, worst = (t) => t.classList.contains("worst");
    const tokens = token.parentElement;
    const next = {
      ArrowRight: () => walk(token.nextSibling, "nextSibling", any),
      ArrowLeft: () => walk(token.previousSibling, "previousSibling", any),
      ArrowDown: () => walk(token.nextSibling, "nextSibling", worst),
      ArrowUp: () => walk(token.previousSibling, "previousSibling", worst),
      Home: () => walk(tokens.firstChild, "nextSibling", any),
      End: () => walk(tokens.lastChild, "previousSibling", any),
    }[event.key];
    if (next) {
      event.preventDefault();
      next()?.focus();
    }
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  const scrolled = () => {
    if (!current) return;
    if (current === document.activeElement || current.matches(":hover")) placeTip(current);
    else hideTip();
  };
  document.addEventListener("scroll", scrolled, { passive: true });
  more.addEventListener("click", () => {
    const before = drawn;
    drawMore();
    list.children[before]?.querySelector("[tabindex='0']")?.focus();
  });
  byId("order").addEventListener("change", arrange);
  let waiting = 0;
  byId("filter").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(arrange, 120);
  });
  byId("prompts").addEventListener("change", (event) => document.body.classList.toggle("no-prompts", !event.target.checked));
  arrange();
})();
