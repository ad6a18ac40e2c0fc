// The page: what is being asked, what was answered, and everything that can be pressed.

import { Answer } from "./answer.js";
import { Problem, Server } from "./dialogue.js";
import { element, text } from "./elements.js";
import { mediaOf } from "./media.js";
import { Picture } from "./picture.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const KEPT = [...NUMBERS, "key", "system", "max_dynamic_patch", "grounding"]; // by the names of the API
const server = new Server(() => $("key").value.trim());
const turns = []; // {question, media, pictures, answer}; those that have their answer
let tray = [];
let atEnd = true;
let running = null; // an AbortController while an answer comes

// Settings live as long as the tab; the key must not outlive it.
function restoreSettings() {
  for (const id of KEPT) {
    $(id).value = sessionStorage.getItem(id) ?? $(id).value;
    $(id).addEventListener("change", () => keepSetting(id, $(id).value));
  }
}

function keepSetting(id, value) {
  $(id).value = value;
  sessionStorage.setItem(id, value);
  if (id === "key") showModel();
}

function sampling() {
  const options = { temperature: 0, max_tokens: 1024 };
  for (const id of NUMBERS) if ($(id).value) options[id] = Number($(id).value);
  return $("grounding").value ? { ...options, grounding: true } : options;
}

async function messagesOf(asked) {
  const tiles = Number($("max_dynamic_patch").value);
  const options = tiles ? { max_dynamic_patch: tiles } : {};
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of asked) {
    const parts = await Promise.all(turn.media.map((medium) => medium.part(options)));
    messages.push({ role: "user", content: [...parts, { type: "text", text: turn.question }] });
    if (turn.answer) messages.push({ role: "assistant", content: turn.answer.text });
  }
  return messages;
}

async function showModel() {
  try {
    $("model").textContent = await server.model();
  } catch (problem) {
    $("model").textContent = problem.code === "API_KEY_INVALID" ? "needs an API key" : "not reached";
  }
}

async function ask(turn) {
  const pictures = [...turns, turn].findLast((each) => each.pictures.some(isImage))?.pictures.filter(isImage);
  const answer = new Answer(pictures?.at(-1) ?? null);
  turn.node.querySelector(".answer")?.remove();
  turn.node.append(answer.node);
  $("log").append(turn.node);
  atEnd = true;
  follow();
  setRunning(new AbortController());
  try {
    const last = await answered(turn, answer, { mayRepeat: true });
    learn([...turns, turn], last, answer);
    if (answer.text) turns.push({ ...turn, answer });
    else answer.note("The model said nothing.");
    say("The answer is complete.");
  } catch (problem) {
    fail(turn, answer, problem);
  } finally {
    answer.end();
    setRunning(null);
    follow();
  }
}

// Streams an answer and returns its last chunk. What the server does not hold any more, or the model has no form for, is
// put right and asked once more, as long as nothing was answered.
async function answered(turn, answer, { mayRepeat }) {
  const { signal } = running;
  const asked = [...turns, turn];
  let last = null;
  try {
    const body = { messages: await messagesOf(asked), ...sampling() };
    for await (const chunk of server.chunks(body, signal)) {
      const words = chunk.choices?.[0]?.delta?.content;
      if (words) answer.grow(words);
      if (chunk.choices?.[0]?.finish_reason === "length") answer.cut = true;
      if (chunk.internvl) last = chunk;
      follow();
    }
    return last;
  } catch (problem) {
    if (!mayRepeat || answer.text || !putRight(problem, asked)) throw problem;
    return answered(turn, answer, { mayRepeat: false });
  }
}

function putRight(problem, asked) {
  const sentByName = asked.flatMap((turn) => turn.media).filter((medium) => medium.digest);
  if (problem.code === "MEDIA_NOT_FOUND" && sentByName.length) {
    sentByName.forEach((medium) => (medium.digest = ""));
    return true;
  }
  if (problem.code === "NOT_SUPPORTED_BY_MODEL" && problem.param === "grounding") {
    keepSetting("grounding", "");
    return true;
  }
  return false;
}

function learn(asked, last, answer) {
  if (answer.cut) answer.note("It ended at the longest answer that the settings allow.");
  if (!last) return;
  const media = asked.flatMap((turn) => turn.media);
  const pictures = asked.flatMap((turn) => turn.pictures);
  last.internvl.receipts.forEach((receipt, index) => {
    if (media[index]) media[index].digest = receipt.media_digest;
    pictures[index]?.drawTiles(receipt);
  });
  answer.account(last, media);
}

function fail(turn, answer, problem) {
  const again = ["Try again", () => running || ask(turn)];
  if (problem.name === "AbortError") {
    say("Stopped.");
    answer.note("Stopped.");
    if (answer.text) turns.push({ ...turn, answer }); // the dialogue goes on from what was said
    else answer.fail(new Problem("Nothing had been said yet."), [again]);
    return;
  }
  const known = problem instanceof Problem ? problem : new Problem("This page could not read the answer.");
  answer.fail(known, known.code === "API_KEY_INVALID" ? [["Enter a key", openSettings], again] : [again]);
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  $("renew").hidden = Boolean(controller) || !$("log").children.length;
}

function submit() {
  const question = $("question").value.trim();
  if (running || !(question || tray.length)) return;
  const media = tray;
  const pictures = media.map((medium) => new Picture(medium));
  const asked = element("div", { class: "asked" }, [
    element("div", { class: "pictures" }, pictures.map((picture) => picture.node)),
    ...(question ? [text("p", {}, question)] : []),
  ]);
  const turn = { question: question || "Describe this.", media, pictures, node: element("article", {}, [asked]) };
  $("welcome").hidden = true;
  $("question").value = "";
  setTray([]);
  ask(turn);
}

function renew() {
  for (const medium of turns.flatMap((turn) => turn.media)) medium.forget();
  turns.length = 0;
  $("log").replaceChildren();
  $("welcome").hidden = false;
  setRunning(null);
  $("question").focus();
}

function add(files) {
  const [media, complaints] = mediaOf(files);
  setTray([...tray, ...media]);
  $("complaint").textContent = complaints.join(" ");
  $("complaint").hidden = !complaints.length;
  if (media.length) $("question").focus();
}

function setTray(media) {
  tray = media;
  $("tray").replaceChildren(...media.map(trayItem));
  resize();
}

function trayItem(medium) {
  const remove = text("button", { type: "button", "aria-label": `Remove ${medium.name}` }, "×");
  remove.addEventListener("click", () => {
    medium.forget();
    setTray(tray.filter((other) => other !== medium));
    $("question").focus();
  });
  return element("li", {}, [medium.view(), remove]);
}

const isImage = (picture) => !picture.medium.isVideo;
const say = (words) => ($("status").textContent = words);

function resize() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  $("send").disabled = !(field.value.trim() || tray.length);
}

// Keeps the end in sight for whoever has not scrolled away from it.
function follow() {
  if (atEnd) document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
}

function noteScroll() {
  const { scrollHeight, scrollTop, clientHeight } = document.scrollingElement;
  atEnd = scrollHeight - scrollTop - clientHeight < 80;
}

function openSettings() {
  $("settings").showModal();
  $("key").focus();
}

function setTheme(theme) {
  document.documentElement.style.colorScheme = theme;
  sessionStorage.setItem("theme", theme);
}

function nextTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  setTheme((document.documentElement.style.colorScheme || system) === "dark" ? "light" : "dark");
}

function listen() {
  const on = (target, event, act) => target.addEventListener(event, act);
  on($("composer"), "submit", (event) => (event.preventDefault(), submit()));
  on($("stop"), "click", () => running?.abort());
  on($("renew"), "click", renew);
  on($("theme"), "click", nextTheme);
  on($("open-settings"), "click", openSettings);
  on($("settings"), "click", ({ target }) => target === $("settings") && target.close());
  on($("add"), "click", () => $("files").click());
  on($("camera"), "click", () => $("shot").click());
  for (const id of ["files", "shot"]) on($(id), "change", ({ target }) => (add(target.files), (target.value = "")));
  on($("question"), "input", resize);
  on($("question"), "keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), submit());
  });
  for (const example of document.querySelectorAll(".example")) {
    on(example, "click", () => {
      $("question").value = example.textContent;
      resize();
      tray.length ? $("question").focus() : $("files").click();
    });
  }
  on(document, "keydown", ({ key }) => key === "Escape" && !$("settings").open && running?.abort());
  on(document, "scroll", noteScroll);
  on(document, "paste", ({ clipboardData: { files } }) => files.length && add(files));
  // Without this, a file that is dropped beside the page's fields would take the page's place.
  on(document, "dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("veil").hidden = false;
  });
  on(document, "dragleave", (event) => event.relatedTarget || ($("veil").hidden = true));
  on(document, "drop", (event) => {
    if ($("veil").hidden) return;
    event.preventDefault();
    $("veil").hidden = true;
    add(event.dataTransfer.files);
  });
}

if (sessionStorage.getItem("theme")) setTheme(sessionStorage.getItem("theme"));
restoreSettings();
listen();
resize();
showModel();
