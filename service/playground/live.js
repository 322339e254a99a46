// Four tiles with values from /metrics and their recent history.

import { ask, pause } from "./api.js";
import { find, make, milliseconds } from "./dom.js";

const EVERY = 2000;
const PAST = 60;

const TILES = {
  queue: ["In the queue", "requests"],
  latency: ["Latency", "mean of the last answers"],
  batch: ["Batch size", "mean of the last batches"],
  suspected: ["Suspected", "answers since the start"],
};

export async function watch() {
  const tiles = Object.fromEntries(Object.entries(TILES).map(([name, words]) => [name, tile(...words)]));
  let before = null;
  for (;;) {
    if (!document.hidden) {
      try {
        const now = parse(await (await ask("metrics", { quiet: true })).text());
        show(tiles, now, before);
        before = now;
      } catch {
        before = null; // no key yet, or no server: the page says so elsewhere
      }
    }
    await pause(EVERY);
  }
}

// Maps metric names to values, summed over labels.
function parse(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{[^}]*\})? ([^ ]+)/.exec(line);
    if (found) sums.set(found[1], (sums.get(found[1]) ?? 0) + Number(found[2]));
  }
  return sums;
}

function show(tiles, now, before) {
  const value = (name) => now.get(`tapt_${name}`) ?? 0;
  const change = (name) => value(name) - (before?.get(`tapt_${name}`) ?? 0);
  const mean = (name) => change(`${name}_sum`) / change(`${name}_count`);
  tiles.queue(value("queue_depth"), String);
  tiles.latency(1000 * mean("request_seconds"), milliseconds);
  tiles.batch(mean("batch_size"), (size) => size.toFixed(1));
  // Left out for a key without the scope `diagnostics`.
  const suspected = now.get("tapt_suspected_adversarial_total") ?? NaN;
  tiles.suspected(suspected, (count) => `${count} of ${value("adaptation_steps_count")}`);
}

function tile(title, unit) {
  const shown = make("span", { className: "value", textContent: "–" });
  const line = svg("polyline", { fill: "none" });
  const past = [];
  const chart = svg("svg", { viewBox: `0 0 ${PAST - 1} 20`, preserveAspectRatio: "none", "aria-hidden": "true" });
  chart.append(line);
  const term = make("dt", { textContent: title });
  const text = make("dd", {}, shown, make("span", { className: "note", textContent: unit }), chart);
  find("tiles").append(make("div", { className: "card tile" }, term, text));
  return (number, format) => {
    if (Number.isFinite(number)) shown.textContent = format(number);
    past.push(Number.isFinite(number) ? number : (past.at(-1) ?? 0));
    if (past.length > PAST) past.shift();
    const top = Math.max(...past, 1e-9);
    const start = PAST - past.length;
    line.setAttribute("points", past.map((y, x) => `${start + x},${19 - (18 * y) / top}`).join(" "));
  };
}

function svg(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
