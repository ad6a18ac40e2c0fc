// Reads what a model writes about places in a picture: <ref>words</ref><box>[[x1, y1, x2, y2]]</box>, in thousandths.

const MARKUP = /(?:<ref>([^<]*)<\/ref>\s*)?<box>([\s\d[\],.-]*)<\/box>/g;
const TAG = /<\/?(?:ref|box)>/g;
const UNFINISHED = /<box>[^<]*(?:<\/?[a-z]*)?$|<\/?[a-z]{0,3}$/;

// Returns the answer as pieces in order: {text}, or {label, boxes}; each box is [left, top, right, bottom] within 0 and
// 1000. While the answer grows, a tag that is not complete yet is left out.
export function piecesOf(answer, { growing = false } = {}) {
  const whole = growing ? answer.replace(UNFINISHED, "") : answer;
  const pieces = [];
  let end = 0;
  for (const match of whole.matchAll(MARKUP)) {
    const boxes = boxesIn(match[2]);
    if (!boxes.length) continue;
    addText(pieces, whole.slice(end, match.index));
    pieces.push({ label: (match[1] ?? "").trim(), boxes });
    end = match.index + match[0].length;
  }
  addText(pieces, whole.slice(end));
  return pieces;
}

function addText(pieces, marked) {
  const text = marked.replace(TAG, "");
  if (text) pieces.push({ text });
}

function boxesIn(written) {
  let value;
  try {
    value = JSON.parse(written);
  } catch {
    return [];
  }
  const candidates = Array.isArray(value) && typeof value[0] === "number" ? [value] : value;
  return Array.isArray(candidates) ? candidates.filter(isBox).map(ordered) : [];
}

function isBox(value) {
  return Array.isArray(value) && value.length === 4 && value.every(Number.isFinite);
}

function ordered([x1, y1, x2, y2]) {
  const within = (number) => Math.min(1000, Math.max(0, number));
  const [left, top, right, bottom] = [x1, y1, x2, y2].map(within);
  return [Math.min(left, right), Math.min(top, bottom), Math.max(left, right), Math.max(top, bottom)];
}
