"use strict";

const form = document.getElementById("form");
const key = document.getElementById("key");
const message = document.getElementById("message");
const preview = document.getElementById("preview");
const ranking = document.getElementById("ranking");
const report = document.getElementById("report");

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function say(text, wrong = false) {
  message.textContent = text;
  message.className = wrong ? "wrong" : "";
}

function showRanking(labels) {
  for (const { label, score } of labels) {
    const bar = document.createElement("meter");
    bar.value = score;
    const row = document.createElement("li");
    row.append(element("span", label), bar, element("span", `${(100 * score).toFixed(1)} %`));
    ranking.append(row);
  }
}

function showReport(defense, timings) {
  const facts = {
    Method: defense.method,
    Spent: `${defense.steps} steps, ${defense.views_kept} of ${defense.views} views`,
    "Without a defense": defense.undefended_label,
    Time: `${timings.total.toFixed(0)} ms`,
  };
  for (const [name, value] of Object.entries(facts)) {
    report.append(element("dt", name), element("dd", value));
  }
}

form.elements.image.addEventListener("change", () => {
  const [file] = form.elements.image.files;
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.hidden = !file;
  if (file) preview.src = URL.createObjectURL(file);
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  ranking.replaceChildren();
  report.replaceChildren();
  say("Adapting ...");
  const headers = key.value ? { Authorization: `Bearer ${key.value}` } : {};
  try {
    const answer = await fetch("v1/classify", { method: "POST", headers, body: new FormData(form) });
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.error);
    say("");
    showRanking(body.labels);
    showReport(body.defense, body.timings_ms);
  } catch (error) {
    say(error.message, true);
  }
});
