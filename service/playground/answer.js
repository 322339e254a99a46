// The answer: undefended and defended side by side, and the diagnostics below.

import { showBars } from "./bars.js";
import { find, make, milliseconds, percent } from "./dom.js";

const STAGES = { queue: "queue", decode: "decode", adapt: "adapt", predict: "predict" };

let plain = null;

export function setUpAnswer() {
  for (const [name, title] of Object.entries({
    entropy: "Entropy, before and after",
    agreement: "Views that agree",
    suspicion: "Suspicion",
    spent: "Spent",
  })) {
    find("facts").append(
      make("div", {}, make("dt", { textContent: title }), make("dd", { id: `fact-${name}`, textContent: "–" })),
    );
  }
  const bar = make("span", { id: "stage-bar", className: "stages" });
  bar.setAttribute("aria-hidden", "true");
  const key = make("span", { id: "stage-key", className: "note", textContent: "–" });
  for (const stage of Object.keys(STAGES)) bar.append(make("span", { className: stage }));
  find("facts").append(
    make("div", { className: "wide" }, make("dt", { textContent: "Time by stage" }), make("dd", {}, bar, key)),
  );
}

// Hide the answer: it belongs to another picture or to other labels.
export function clearAnswer() {
  plain = null;
  find("answer").hidden = true;
}

// Show where the answer will stand, with its full height, so that the layout does not jump later.
export function expectAnswer(asked, info) {
  const count = asked.candidate_labels.length;
  plain = null;
  for (const name of ["entropy", "agreement", "suspicion", "spent"]) find(`fact-${name}`).textContent = "–";
  find("stage-key").textContent = "–";
  for (const part of find("stage-bar").children) part.style.setProperty("--ms", 0);
  for (const id of ["plain-bars", "defended-bars"]) showBars(find(id), [], count);
  find("verdict").textContent = "Looking ...";
  const method = asked.defense?.method ?? info?.defaults.method;
  if (method) find("defended-by").textContent = method;
  if (info?.policies.attack_demo) {
    const views = Math.min(asked.defense?.views ?? info.defaults.views, info.limits.max_views);
    find("views-panel").hidden = false;
    showViews(Array.from({ length: info.methods?.[method]?.views === "one" ? 1 : views }, () => null));
  }
  find("answer").hidden = false;
  find("answer").scrollIntoView();
}

export function showPlain(answer) {
  plain = answer;
  showBars(find("plain-bars"), answer.labels);
  find("plain-time").textContent = `one look, no defense: ${milliseconds(answer.timings_ms.total)}`;
}

export function showDefended(answer) {
  const { defense, timings_ms: times } = answer;
  showBars(find("defended-bars"), answer.labels);
  find("defended-by").textContent = defense.method;
  find("defended-time").textContent = `${defense.steps ? "adapts, then answers" : "answers without adapting"}: ${milliseconds(times.total)}`;
  say(plain.labels[0].label, answer.labels[0].label, defense);
  const known = (value, text) => (value === null ? "not shown by this server" : text(value));
  const facts = {
    entropy: known(defense.entropy_before, (before) => `${before.toFixed(2)} → ${defense.entropy_after.toFixed(2)} nats`),
    agreement: known(defense.agreement, percent),
    suspicion: known(defense.suspicion, (doubt) => `${doubt.toFixed(2)}${defense.suspected ? ", suspected" : ""}`),
    spent: `${count(defense.steps, "step")}, ${count(defense.views, "view")}, ${defense.views_kept} kept`,
  };
  if (defense.truncated) facts.spent += `, cut short by the ${defense.truncated}`;
  for (const [name, text] of Object.entries(facts)) find(`fact-${name}`).textContent = text;
  for (const [stage, title] of Object.entries(STAGES)) {
    const part = find("stage-bar").querySelector(`.${stage}`);
    part.style.setProperty("--ms", times[stage]);
    part.title = title;
  }
  find("stage-key").textContent =
    Object.entries(STAGES).map(([stage, title]) => `${title} ${milliseconds(times[stage])}`).join(" · ") +
    ` · in all ${milliseconds(times.total)}`;
  if (answer.views) showViews(answer.views);
}

export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

function say(undefended, defended, { suspected }) {
  const same = undefended === defended;
  const words = same
    ? [make("span", { textContent: "Both say " }), make("b", { className: "safe", textContent: defended }), "."]
    : ["Undefended CLIP says ", make("b", { className: "hot", textContent: undefended }), ", the defense says ", make("b", { className: "safe", textContent: defended }), "."];
  if (suspected) words.push(" The suspicion is above the threshold.");
  find("verdict").replaceChildren(...words);
}

function showViews(views) {
  find("view-list").replaceChildren(
    ...views.map((view) => {
      if (!view) return make("li", { className: "empty" }, make("span", { className: "thumb" }), make("small", { textContent: "–" }));
      const image = make("img", { src: view.thumbnail, alt: "", width: 64, height: 64, className: "thumb" });
      const kept = view.kept ? make("span", { className: "kept", textContent: "kept" }) : "";
      const text = make("small", { textContent: view.label, title: `${view.label}, ${percent(view.score)}` });
      return make("li", { className: view.kept ? "is-kept" : "" }, image, kept, text);
    }),
  );
}
