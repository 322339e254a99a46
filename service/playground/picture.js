// The image: chosen, photographed, dropped, pasted, or one of the examples.

import { find, make } from "./dom.js";

const EXAMPLES = ["goldfish", "ladybug", "school bus", "lemon", "seashore", "banana"];
const SIDE = 320;

let current = null;

// The chosen file, or null.
export const picture = () => current;

// `onPick` is called with every new image.
export function setUpPicture(onPick) {
  const drop = find("drop");
  find("camera").parentElement.hidden = navigator.maxTouchPoints === 0;

  const pick = (file, origin = null) => {
    if (!file) return;
    const preview = find("preview");
    if (current) URL.revokeObjectURL(preview.src);
    current = file;
    preview.src = URL.createObjectURL(file);
    preview.alt = origin ? `Drawing of a ${origin}` : `Your picture ${file.name ?? ""}`;
    for (const button of find("examples").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.value === origin));
    }
    onPick(file);
  };

  for (const id of ["file", "camera"]) {
    find(id).addEventListener("change", (event) => {
      pick(event.target.files[0]);
      event.target.value = "";
    });
  }
  document.addEventListener("paste", (event) => {
    const [file] = [...event.clipboardData.files].filter(({ type }) => type.startsWith("image/"));
    pick(file);
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
    button.addEventListener("click", async () => pick(await rasterize(source), name));
    find("examples").append(make("li", {}, button));
  }
  const first = EXAMPLES[0];
  rasterize(`playground/${first}.svg`).then((file) => current ?? pick(file, first));
}

async function rasterize(source) {
  const image = make("img", { src: source });
  await image.decode();
  const canvas = make("canvas", { width: SIDE, height: SIDE });
  canvas.getContext("2d").drawImage(image, 0, 0, SIDE, SIDE);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new File([blob], `${source.split("/").pop().replace(".svg", "")}.png`, { type: blob.type });
}
