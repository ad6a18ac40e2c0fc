// A picture or video as it is shown, with what the model saw and found drawn over it.

import { element } from "./elements.js";

const SVG = "http://www.w3.org/2000/svg";
const HUES = 5; // of boxes, as page.css has them

export class Picture {
  #overlay = document.createElementNS(SVG, "svg");
  #labels = element("div", { class: "labels" });
  #caption = element("span", { class: "name" });
  #toggle = element("button", { type: "button", class: "quiet toggle", hidden: "", "aria-pressed": "true" });
  #boxes = 0;

  constructor(medium) {
    this.medium = medium;
    const view = medium.view({ controls: "" });
    // In thousandths of the picture, whatever its size on the screen; that is how boxes come, too.
    this.#overlay.setAttribute("viewBox", "0 0 1000 1000");
    this.#overlay.setAttribute("preserveAspectRatio", "none");
    this.#overlay.setAttribute("aria-hidden", "true");
    this.#caption.textContent = medium.name;
    this.#toggle.addEventListener("click", () => this.#showTiles(this.#toggle.ariaPressed !== "true"));
    this.node = element("figure", { class: "picture" }, [
      element("div", { class: "canvas" }, medium.isVideo ? [view] : [view, this.#overlay, this.#labels]),
      element("figcaption", {}, [this.#caption, this.#toggle]),
    ]);
  }

  // Draws the tiles that a receipt tells of: the picture is stretched to columns x rows squares, so they divide it evenly.
  drawTiles({ columns, rows, tile_count: count, frames }) {
    if (this.medium.isVideo) {
      this.#caption.textContent = `${this.medium.name} · ${frames.length} frames seen`;
      return;
    }
    const hasThumbnail = count > columns * rows;
    const tiles = [];
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) {
        const [left, top] = [(column * 1000) / columns, (row * 1000) / rows];
        tiles.push(rectangle("tile", [left, top, left + 1000 / columns, top + 1000 / rows]));
      }
    }
    if (hasThumbnail) tiles.push(rectangle("tile thumbnail", [0, 0, 1000, 1000]));
    this.#overlay.querySelectorAll(".tile").forEach((tile) => tile.remove());
    this.#overlay.prepend(...tiles);
    this.#toggle.textContent = `${columns} × ${rows} ${columns * rows > 1 ? "tiles" : "tile"}${hasThumbnail ? " + thumbnail" : ""}`;
    this.#toggle.title = "Show or hide the tiles that the model sees";
    this.#toggle.hidden = false;
  }

  // Draws boxes under one label and returns what lets their mention in the text point at them.
  drawBoxes(label, boxes) {
    const hue = this.#boxes++ % HUES;
    const drawn = boxes.map((box) => rectangle(`box hue-${hue}`, box));
    const labels = boxes.map(([left, top, right]) => {
      const node = element("span", { class: `label hue-${hue}` });
      node.textContent = label || String(this.#boxes);
      if (left > 500) node.style.right = `${100 - right / 10}%`;
      else node.style.left = `${left / 10}%`;
      node.style.top = `${top / 10}%`;
      node.classList.toggle("inside", top < 60);
      return node;
    });
    this.#overlay.append(...drawn);
    this.#labels.append(...labels);
    const nodes = [...drawn, ...labels];
    return {
      hue,
      point: (isOn) => {
        this.node.classList.toggle("pointed", isOn);
        nodes.forEach((node) => node.classList.toggle("meant", isOn));
      },
      show: () => this.node.scrollIntoView({ block: "nearest" }),
    };
  }

  // Puts the boxes of earlier answers out of sight; who points at their mention sees them again.
  passBoxes() {
    this.#boxes = 0;
    for (const node of [...this.#overlay.querySelectorAll(".box"), ...this.#labels.children]) node.classList.add("past");
  }

  #showTiles(isOn) {
    this.#toggle.ariaPressed = String(isOn);
    this.node.classList.toggle("without-tiles", !isOn);
  }
}

function rectangle(kind, [left, top, right, bottom]) {
  const node = document.createElementNS(SVG, "rect");
  const facts = { class: kind, x: left, y: top, width: right - left, height: bottom - top };
  for (const [name, value] of Object.entries(facts)) node.setAttribute(name, value);
  return node;
}
