// An answer as it grows: its text, the places it names, and at the end what it cost.

import { element, text } from "./elements.js";
import { piecesOf } from "./grounding.js";

const SPANS = ["Media", "Queue", "Prefill", "Decode"];
const INLINE = /(\*\*[^*\n]+\*\*|`[^`\n]+`)/;

export class Answer {
  #said = element("div", { class: "said", "aria-busy": "true" });
  #mentions = [];
  #picture;
  #scheduled = 0;

  // `picture` is what boxes are drawn on; null where there is none.
  constructor(picture) {
    this.text = "";
    this.#picture = picture;
    this.node = element("div", { class: "answer" }, [this.#said]);
    this.#said.append(text("span", { class: "waiting" }, picture ? "Looking" : "Thinking"));
  }

  grow(words) {
    this.text += words;
    // Many words may come between two pictures of the screen.
    this.#scheduled ||= requestAnimationFrame(() => this.#render(true));
  }

  end() {
    cancelAnimationFrame(this.#scheduled);
    this.#render(false);
    this.#said.removeAttribute("aria-busy");
  }

  note(words) {
    this.node.append(text("p", { class: "note" }, words));
  }

  // Shows what went wrong and what can be done; `actions` are [words, function].
  fail(problem, actions) {
    const lines = [text("p", {}, problem.message)];
    if (problem.advice) lines.push(text("p", {}, problem.advice));
    if (problem.requestId) lines.push(text("p", { class: "request" }, `${problem.code} request ${problem.requestId}`));
    const buttons = actions.map(([words, act]) => {
      const button = text("button", { type: "button" }, words);
      button.addEventListener("click", act);
      return button;
    });
    this.node.append(element("div", { class: "problem", role: "alert" }, [...lines, ...buttons]));
  }

  account({ usage, internvl }, media) {
    const { timings, receipts } = internvl;
    const spans = SPANS.map((name) => [name, timings[`${name.toLowerCase()}_s`]]);
    const parts = spans.map(([name]) => element("i", { class: name.toLowerCase() }));
    spans.forEach(([, seconds], index) => (parts[index].style.flexGrow = seconds));
    const rate = timings.decode_s > 0 ? (usage.completion_tokens - 1) / timings.decode_s : 0;
    const cached = usage.prompt_tokens_details.cached_tokens;
    const first = timings.time_to_first_token_s;
    const brief = [
      `${usage.completion_tokens} tokens`,
      first === null ? "" : `first after ${time(first)}`,
      rate ? `${rate.toFixed(1)} tokens/s` : "",
    ];
    const rows = [
      ...receipts.map((receipt, index) => [media[index]?.name ?? "medium", costOf(receipt)]),
      ["Prompt", `${usage.prompt_tokens} tokens, ${internvl.visual_tokens} of them visual, ${cached} cached`],
      ...spans.map(([name, seconds]) => [name, time(seconds)]),
      ["First token", first === null ? "none" : time(first)],
      ["Total", time(timings.total_s)],
      ["Request", internvl.request_id],
    ];
    const facts = rows.flatMap(([name, value]) => [text("dt", {}, name), text("dd", {}, value)]);
    this.node.append(
      element("details", { class: "account" }, [
        element("summary", {}, [element("div", { class: "bar" }, parts), text("span", {}, brief.filter(Boolean).join(" · "))]),
        element("dl", {}, facts),
      ]),
    );
  }

  #render(growing) {
    this.#scheduled = 0;
    let count = 0;
    const nodes = piecesOf(this.text, { growing }).flatMap((piece) => {
      if (!piece.boxes) return formatted(piece.text);
      const index = count++;
      return [(this.#mentions[index] ??= this.#mentioned(piece, index))]; // drawn once, when it is first seen
    });
    this.#said.replaceChildren(...nodes);
  }

  #mentioned({ label, boxes }, index) {
    const words = label || (boxes.length > 1 ? `${boxes.length} boxes` : `box ${index + 1}`);
    if (!this.#picture) return text("strong", {}, words);
    if (!index) this.#picture.passBoxes();
    const drawn = this.#picture.drawBoxes(label, boxes);
    const places = boxes.map((box) => box.map(Math.round).join(", ")).join("; ");
    const attributes = { type: "button", class: `mention hue-${drawn.hue}`, title: places };
    const button = text("button", { ...attributes, "aria-label": `${words}, at ${places}` }, words);
    for (const [event, isOn] of [["pointerenter", 1], ["focus", 1], ["pointerleave", 0], ["blur", 0]]) {
      button.addEventListener(event, () => drawn.point(Boolean(isOn)));
    }
    button.addEventListener("click", drawn.show);
    return button;
  }
}

function formatted(words) {
  return words.split(INLINE).map((piece, index) => {
    if (index % 2 === 0) return document.createTextNode(piece);
    return piece[0] === "`" ? text("code", {}, piece.slice(1, -1)) : text("strong", {}, piece.slice(2, -2));
  });
}

function costOf(receipt) {
  const { columns, rows, tile_count: count, token_count: tokens, cache_tier: tier, frames } = receipt;
  const grid = frames.length ? `${frames.length} frames` : `${columns} × ${rows}${count > columns * rows ? " + thumbnail" : ""}`;
  const made = `encoded in ${time(receipt.preprocess_s + receipt.encode_s)}`;
  const path = tier === "NONE" ? made : `from the ${tier.toLowerCase()} cache`;
  const shared = receipt.coalesced ? ", shared with another call" : "";
  const moved = receipt.transfer_tier === "PREFIX" ? ", not read again" : ` + ${time(receipt.transfer_s)} to the model`;
  return `${grid} = ${count} ${count === 1 ? "tile" : "tiles"}, ${tokens} tokens, ${path}${shared}${moved}`;
}

function time(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}
