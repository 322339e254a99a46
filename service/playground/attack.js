// The attack demonstration: a stream of stages, shown as they arrive and kept for the slider.

import { ask, lines, Refusal } from "./api.js";
import { showBars } from "./bars.js";
import { showCommand } from "./curl.js";
import { best, find, make, percent } from "./dom.js";

let page = null; // what page.js hands over
let stages = [];
let asked = null;
let control = null;

// `parts`: info(), choices(), picture(), labels(), encode(file), objection().
export function setUpAttack(parts) {
  page = parts;
  const on = page.info().policies.attack_demo;
  find("attack-off").hidden = on;
  find("attack-panel").hidden = !on;
  if (!on) return;
  const side = page.info().model.image_size;
  find("attack-size").textContent = side ? `${side} × ${side} pixels` : "size";
  for (const [id, text] of [["epsilon", (value) => `${value}/255`], ["attack-steps", String], ["scrub", String]]) {
    const tell = () => (find(`${id}-out`).textContent = text(find(id).value));
    find(id).addEventListener("input", tell);
    tell();
  }
  find("goal").addEventListener("focus", fillGoals);
  find("goal").addEventListener("pointerdown", fillGoals);
  fillGoals();
  find("attack-go").addEventListener("click", attack);
  find("attack-stop").addEventListener("click", () => control?.abort());
  find("scrub").addEventListener("input", () => showStage(Number(find("scrub").value)));
  find("download").addEventListener("click", (event) => stages.length || event.preventDefault());
}

// Stop the attack and hide its result: it belongs to another picture or to other labels.
export function clearAttack() {
  control?.abort();
  busy(false);
  stages = [];
  find("attack-result").hidden = true;
  find("attack-progress").value = 0;
  say("");
}

function fillGoals() {
  const goal = find("goal");
  const was = goal.value;
  const options = page.labels().map((label) => make("option", { value: label, textContent: `make it say ${label}` }));
  goal.replaceChildren(make("option", { value: "", textContent: "away from its answer" }), ...options);
  goal.value = page.labels().includes(was) ? was : "";
}

function say(text, wrong = false) {
  find("attack-message").textContent = text;
  find("attack-message").classList.toggle("wrong", wrong);
}

async function attack() {
  const wrong = page.objection();
  if (wrong) return say(wrong, true);
  control?.abort();
  const mine = (control = new AbortController());
  const choices = page.choices();
  const steps = Number(find("attack-steps").value);
  const attack = { epsilon: Number(find("epsilon").value), steps, adaptive: find("adaptive").checked };
  if (find("goal").value) attack.target = find("goal").value;
  expect(steps);
  busy(true);
  say("Starting ...");
  try {
    const answer = await ask("demo/attack", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...choices, image: await page.encode(page.picture()), attack }),
      signal: mine.signal,
      tell: say,
    });
    asked = choices;
    for await (const event of lines(answer)) {
      if (event.error) throw new Refusal(event.error);
      if (event.stage) await take(event.stage);
      else if (event.answer) finish(event);
    }
  } catch (error) {
    if (control !== mine) return undefined;
    find("attack-result").hidden = stages.length === 0;
    if (error.name === "AbortError") say("Stopped.");
    else if (error instanceof Refusal) say(error.message, true);
    else say("The connection broke before the attack was over.", true);
  } finally {
    if (control === mine) busy(false);
  }
  return undefined;
}

function busy(on) {
  find("attack-stop").hidden = !on;
  find("attack-panel").setAttribute("aria-busy", String(on));
  if (!on) control = null;
}

// Show the display for an attack with this many steps.
function expect(steps) {
  stages = [];
  for (const id of ["track-plain", "track-defended"]) {
    find(id).replaceChildren(...Array.from({ length: steps + 1 }, () => make("span")));
  }
  const scrub = find("scrub");
  Object.assign(scrub, { max: steps, value: 0, disabled: true });
  find("scrub-out").textContent = "0";
  find("attack-progress").value = 0;
  find("download").setAttribute("aria-disabled", "true");
  find("download").removeAttribute("href");
  for (const id of ["attack-plain-bars", "attack-defended-bars"]) showBars(find(id), [], page.labels().length);
  find("attack-verdict").textContent = "Starting ...";
  find("attack-result").hidden = false;
}

async function take(stage) {
  if (stage.step === 0) stages = []; // a lost worker's successor begins anew
  if (stage.steps !== Number(find("scrub").max)) {
    expect(stage.steps); // the server lowered the number of steps to its limit
    set("attack-steps", stage.steps);
  }
  stage.pixels = await pixels(stage.image);
  stages.push(stage);
  const place = stages.length - 1;
  mark("track-plain", place, best(stage.undefended).label, best(stages[0].undefended).label);
  if (stage.defended) mark("track-defended", place, best(stage.defended).label, best(stages[0].defended).label);
  find("attack-progress").value = stage.steps ? stage.step / stage.steps : 1;
  say(`Step ${stage.step} of ${stage.steps}.`);
  find("scrub").value = place;
  showStage(place);
}

function mark(id, place, label, first) {
  const cell = find(id).children[place];
  cell.className = label === first ? "held" : "flipped";
  cell.title = `step ${place}: ${label}`;
}

// The defense's latest answer up to this stage.
const defended = (place) => stages.slice(0, place + 1).findLast((stage) => stage.defended)?.defended;

function showStage(place) {
  const stage = stages[place];
  if (!stage) return;
  const clean = stages[0];
  find("scrub-out").textContent = stage.step;
  draw(find("seen"), clean.pixels);
  draw(find("hurt"), stage.pixels);
  drawNoise(clean.pixels, stage.pixels);
  // Labels stay in the order of the clean image, so that changes are easy to see.
  const order = best6(stage.undefended, defended(place), clean.undefended, stages.at(-1).undefended);
  const arrange = (scored) => order.map((label) => scored.find((one) => one.label === label));
  showBars(find("attack-plain-bars"), arrange(stage.undefended));
  showBars(find("attack-defended-bars"), arrange(defended(place)));
  const [naked, guarded] = [best(stage.undefended), best(defended(place))];
  find("scrub").setAttribute("aria-valuetext", `step ${stage.step}: undefended ${naked.label}, defended ${guarded.label}`);
  find("attack-verdict").replaceChildren(
    "Undefended CLIP says ",
    make("b", { className: naked.label === best(clean.undefended).label ? "safe" : "hot", textContent: naked.label }),
    ` (${percent(naked.score)}), the defense says `,
    make("b", { className: guarded.label === best(clean.defended).label ? "safe" : "hot", textContent: guarded.label }),
    ` (${percent(guarded.score)}).`,
  );
}

// Six labels: both winners of a stage, then the top labels before and after the attack, in the
// order of the clean picture's scores.
function best6(undefended, guarded, before, after) {
  const sorted = (scored) => [...scored].sort((a, b) => b.score - a.score).map(({ label }) => label);
  const first = sorted(before);
  const winners = [best(undefended).label, best(guarded).label];
  const names = [...winners, ...first.slice(0, 3), ...sorted(after).slice(0, 3), ...first];
  const chosen = [...new Set(names)].slice(0, 6);
  return first.filter((label) => chosen.includes(label));
}

function finish({ answer, threat, epsilon, truncated }) {
  set("epsilon", epsilon);
  find("attack-progress").value = 1;
  find("scrub").max = stages.length - 1;
  find("scrub").disabled = false;
  const last = stages.at(-1);
  find("download").href = last.image;
  find("download").setAttribute("aria-disabled", "false");
  showCommand(asked, "attacked.png", last.image, page.info());
  const who = threat === "adaptive" ? "by an attacker who knows the defense" : "by an attacker who knows CLIP and not the defense";
  const doubt = answer.defense.suspected ? "; the suspicion is above the threshold" : "";
  say(`Done ${who}${truncated ? ", cut short by the deadline" : ""}${doubt}.`);
}

// Set a slider to what the server ran.
function set(id, value) {
  find(id).value = value;
  find(id).dispatchEvent(new Event("input"));
}

async function pixels(source) {
  const image = make("img", { src: source });
  await image.decode();
  const canvas = make("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

function draw(canvas, data) {
  Object.assign(canvas, { width: data.width, height: data.height });
  canvas.getContext("2d").putImageData(data, 0, 0);
}

// Gray where nothing changed; scaled so that the largest change is black or white.
function drawNoise(clean, hurt) {
  let largest = 0;
  for (let i = 0; i < clean.data.length; i += 1) {
    largest = Math.max(largest, Math.abs(hurt.data[i] - clean.data[i]));
  }
  const gain = largest ? Math.floor(127 / largest) : 1;
  const noise = new ImageData(clean.width, clean.height);
  for (let i = 0; i < clean.data.length; i += 1) {
    noise.data[i] = i % 4 === 3 ? 255 : 128 + gain * (hurt.data[i] - clean.data[i]);
  }
  draw(find("noise"), noise);
  find("gain").textContent = largest ? `${gain} times amplified` : "none yet";
}
