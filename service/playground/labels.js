// The labels as chips, with presets.

import { find, make } from "./dom.js";

const PRESETS = {
  Everyday: ["goldfish", "ladybug", "school bus", "lemon", "seashore", "banana", "dog", "umbrella"],
  Animals: ["dog", "cat", "goldfish", "ladybug", "lion", "bee", "snail", "jellyfish"],
  Food: ["lemon", "banana", "orange", "pizza", "ice cream", "espresso", "mushroom", "pretzel"],
  Places: ["seashore", "lakeside", "cliff", "barn", "fountain", "suspension bridge", "alp"],
  Vehicles: ["school bus", "sports car", "tractor", "bullet train", "convertible", "go-kart"],
};

let chosen = [];
let tell = () => {};

export const labels = () => [...chosen];

// `onChange` is called after every change.
export function setUpLabels(onChange) {
  tell = onChange;
  const input = find("label");
  input.addEventListener("keydown", (event) => {
    if ((event.key === "Enter" || event.key === ",") && !event.isComposing) {
      event.preventDefault();
      add(input);
    } else if (event.key === "Backspace" && input.value === "") {
      show(chosen.slice(0, -1));
    }
  });
  input.addEventListener("input", () => input.value.includes(",") && add(input));
  input.addEventListener("blur", () => add(input));
  for (const [name, words] of Object.entries(PRESETS)) {
    const button = make("button", { type: "button", className: "small", textContent: name });
    button.addEventListener("click", () => show(words));
    find("presets").append(button);
  }
  show(PRESETS.Everyday);
}

function add(input) {
  const words = input.value.split(",").map((word) => word.trim()).filter(Boolean);
  input.value = "";
  if (words.length) show([...new Set([...chosen, ...words])]);
}

function show(words) {
  chosen = [...words];
  find("chips").replaceChildren(
    ...chosen.map((word, place) => {
      const remove = make("button", { type: "button", textContent: "×", ariaLabel: `Remove ${word}` });
      remove.addEventListener("click", () => {
        show(chosen.filter((other) => other !== word));
        const next = find("chips").querySelectorAll("button")[Math.min(place, chosen.length - 1)];
        (next ?? find("label")).focus();
      });
      return make("li", {}, make("span", { textContent: word }), remove);
    }),
  );
  tell(labels());
}
