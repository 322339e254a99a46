// Scores as bars.

import { make, percent, best } from "./dom.js";

const ROWS = 6;

// Fill a list with the first scored labels, in the given order, and highlight the best one. Empty
// rows reserve space for missing labels, so that the layout does not jump.
export function showBars(list, scored, rows = scored.length) {
  const winner = scored.length ? best(scored).label : null;
  const wanted = Math.min(ROWS, rows);
  while (list.children.length > wanted) list.lastElementChild.remove();
  while (list.children.length < wanted) {
    const bar = make("span", { className: "bar" });
    bar.setAttribute("aria-hidden", "true");
    list.append(make("li", {}, make("span", { className: "name" }), bar, make("span", { className: "score" })));
  }
  [...list.children].forEach((row, place) => {
    const [name, bar, score] = row.children;
    const one = scored[place];
    row.classList.toggle("first", one !== undefined && one.label === winner);
    row.classList.toggle("empty", one === undefined);
    name.textContent = one?.label ?? "–";
    name.title = name.textContent;
    score.textContent = one ? percent(one.score) : "";
    bar.style.setProperty("--share", one?.score ?? 0);
  });
}
