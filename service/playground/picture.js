// The image: chosen, photographed, dropped, pasted, or one of the examples.

import { find, make } from "./dom.js";

const EXAMPLES = ["goldfish", "ladybug", "school bus", "lemon", "seashore", "banana"];
const SIDE = 320;
// Formats that the server reads and some browsers cannot show.
const UNSHOWN = /\.(tiff?|hei[cf]|avif)$/i;

let current = null;
let picks = 0;
let asked = null; // the example that was asked for last, unless a file was since

// The chosen file, or null.
export const picture = () => current;

// `onPick` is called with every new image, `onRefuse` with every file that is none.
export function setUpPicture(onPick, onRefuse) {
  const drop = find("drop");
  find("camera").parentElement.hidden = navigator.maxTouchPoints === 0;

  const pick = async (file, origin = null) => {
    if (!file) return;
    asked = origin;
    const mine = (picks += 1);
    const sound = await isPicture(file);
    if (mine !== picks) return; // another one was picked meanwhile
    const preview = find("preview");
    if (current) URL.revokeObjectURL(preview.src);
    current = sound ? file : null;
    if (sound) preview.src = URL.createObjectURL(file);
    else preview.removeAttribute("src");
    preview.alt = origin ? `Drawing of a ${origin}` : sound ? `Your picture ${file.name}` : "No picture";
    for (const button of find("examples").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.value === origin));
    }
    (sound ? onPick : onRefuse)(file);
  };

  for (const id of ["file", "camera"]) {
    find(id).addEventListener("change", (event) => {
      pick(event.target.files[0]);
      event.target.value = "";
    });
  }
  document.addEventListener("paste", (event) => {
    pick(event.clipboardData.files[0]);
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") pick(event.dataTransfer.files[0]);
    });
  }
  for (const name of EXAMPLES) {
    const source = `playground/${name.replace(" ", "-")}.svg`;
    const image = make("img", { src: source, alt: name, width: 64, height: 64 });
    const button = make("button", { type: "button", value: name }, image);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", async () => {
      if (name === asked) return; // its answer stays
      asked = name;
      const file = await rasterize(source);
      if (name === asked) pick(file, name);
    });
    find("examples").append(make("li", {}, button));
  }
  const first = EXAMPLES[0];
  rasterize(`playground/${first}.svg`).then((file) => picks || pick(file, first));
}

async function isPicture(file) {
  try {
    (await createImageBitmap(file)).close();
    return true;
  } catch {
    return UNSHOWN.test(file.name);
  }
}

async function rasterize(source) {
  const image = make("img", { src: source });
  await image.decode();
  const canvas = make("canvas", { width: SIDE, height: SIDE });
  canvas.getContext("2d").drawImage(image, 0, 0, SIDE, SIDE);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new File([blob], `${source.split("/").pop().replace(".svg", "")}.png`, { type: blob.type });
}
