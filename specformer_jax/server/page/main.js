// The page: what is pressed, and what then happens to the chat that is shown.

import { findModel } from "./chat/api.js";
import { answer, emptyAnswer, fit } from "./chat/answer.js";
import * as store from "./chat/store.js";
import { fold, foldAway, showChats } from "./view/chat_list.js";
import { Follow } from "./view/follow.js";
import { Meters } from "./view/meters.js";
import { Log } from "./view/turns.js";

const $ = (id) => document.getElementById(id);
const FIELDS = { temperature: "0.7", most: "512", seed: "", speculative: "auto" };
const folds = [$("chats-fold"), $("settings")];

let model = null;
let chat = store.chats()[0] ?? store.newChat(store.settings().system ?? "");
let running = null; // the AbortController of the answer on its way
let edited = null; // the turn whose new words are in the message field

const log = new Log($("log"), { edit, regenerate, goOn: () => run(chat.turns.at(-1)) });
const follow = new Follow($("log"), $("latest"));
const meters = new Meters($);

// Shows all that may have changed.
function draw() {
  log.draw(chat, model?.max_model_len ?? "so many", running !== null, edited);
  const used = chat.turns.findLast((turn) => turn.usage)?.usage.total ?? 0;
  const left = chat.from ? `, ${chat.from} turns left out` : "";
  $("context").textContent = model ? `${used} of ${model.max_model_len}${left}` : "–";
  $("editing").hidden = edited === null;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  if ($("system").value !== chat.system) $("system").value = chat.system;
  showChats($("chats"), store.chats(), chat, { open, drop });
  follow.grown();
}

function problem(error) {
  $("problem").textContent = error?.message ?? "";
  $("problem").hidden = !error;
  if (error?.status === 401) {
    $("settings").open = true;
    $("key").focus();
  }
}

async function meetModel() {
  if (model) return;
  model = await findModel($("key").value);
  $("model").textContent = model.id;
  for (let k = 1; k <= model.max_draft_length; k++) $("speculative").add(new Option(k + " at most", k));
  $("speculative").value = store.settings().speculative ?? FIELDS.speculative;
  draw();
}

function save(about) {
  if (!about.turns.length || store.keep(about)) return;
  problem(new Error("this chat is not kept: the browser has no room for it"));
}

// Answers with this turn of an assistant, the last one. Where nothing comes of it, `undo` makes all as it was.
async function run(turn, undo = () => {}) {
  const [about, control, had] = [chat, new AbortController(), turn.text + turn.thought];
  const former = { ...turn };
  const from = about.from;
  running = control;
  problem(null);
  meters.begin();
  draw();
  follow.toEnd();
  let due = 0;
  const show = () => {
    due = 0;
    log.grow(turn);
    follow.grown();
  };
  try {
    await meetModel();
    const [key, limit, asked] = [$("key").value, model.max_model_len, request()];
    await fit(about, asked.max_tokens, limit, key, control.signal);
    if (about === chat) draw();
    turn.end = "stopped";
    for await (const usage of answer(about, asked, limit, key, control.signal)) {
      due ||= requestAnimationFrame(show); // chunks may come faster than a screen shows them
      if (about === chat) meters.take(usage);
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (turn.text + turn.thought === had) {
      Object.assign(turn, former);
      about.from = from;
      undo();
      if (!stopped && about === chat) problem(error);
    } else if (!stopped) {
      Object.assign(turn, { end: "broken", error: error.message });
    }
  }
  about.changed = Date.now();
  save(about);
  if (running === control) running = null;
  if (about !== chat) return;
  meters.end();
  log.grow(turn);
  draw();
  $("said").textContent = turn.usage ? `The answer has ${turn.usage.tokens} tokens.` : "";
  if (document.activeElement === document.body && matchMedia("(pointer: fine)").matches) $("prompt").focus();
}

function fields() {
  return Object.fromEntries(Object.keys(FIELDS).map((id) => [id, $(id).value]));
}

// The fields of a request that the settings say.
function request() {
  const { temperature, most, seed, speculative } = fields();
  return {
    model: model.id,
    max_tokens: Math.max(Number(most) || Number(FIELDS.most), 1),
    speculative: /^\d+$/.test(speculative) ? Number(speculative) : speculative,
    ...(temperature && { temperature: Number(temperature) }),
    ...(seed && { seed: Number(seed) }),
  };
}

function send() {
  const text = $("prompt").value;
  if (running || !text.trim()) return;
  const about = chat;
  const [before, from, was] = [chat.turns, chat.from, edited];
  const kept = edited ? before.slice(0, before.indexOf(edited)) : before;
  if (edited) chat.from = 0;
  const turn = emptyAnswer();
  chat.turns = [...kept, { role: "user", text }, turn];
  edited = null;
  $("prompt").value = "";
  run(turn, () => {
    if (about !== chat) return; // the question stays where it was asked
    Object.assign(about, { turns: before, from });
    edited = was;
    const typed = $("prompt").value; // while it waited
    $("prompt").value = typed ? `${text}\n${typed}` : text;
  });
}

function regenerate() {
  if (running) return;
  const [about, before, from] = [chat, chat.turns, chat.from];
  const turn = emptyAnswer();
  Object.assign(chat, { turns: [...before.slice(0, -1), turn], from: 0 });
  run(turn, () => Object.assign(about, { turns: before, from }));
}

function edit(turn) {
  edited = turn;
  $("prompt").value = turn.text;
  $("prompt").focus();
  draw();
}

function leaveEdit() {
  edited = null;
  $("prompt").value = "";
  draw();
}

// Shows another chat; an answer on its way stays as it is.
function open(other) {
  if (other.id === chat.id) return foldAway(folds);
  running?.abort();
  running = null;
  if (edited) leaveEdit();
  chat = other;
  problem(null);
  foldAway(folds);
  draw();
  follow.toEnd();
}

function drop(other) {
  if (!confirm(`Delete the chat “${store.title(other)}”?`)) return;
  store.forget(other);
  if (other.id === chat.id) open(store.newChat(chat.system));
  else draw();
}

function readSettings() {
  const kept = store.settings();
  for (const [id, value] of Object.entries(FIELDS)) $(id).value = kept[id] ?? value;
  $("colours").checked = kept.colours ?? true;
  document.body.classList.toggle("colours", $("colours").checked);
}

function settingsChanged() {
  chat.system = $("system").value;
  save(chat);
  store.keepSettings({ ...fields(), colours: $("colours").checked, system: chat.system });
  document.body.classList.toggle("colours", $("colours").checked);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
  if (event.key === "Escape" && edited) leaveEdit();
});
$("keep").addEventListener("click", leaveEdit);
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  open(store.newChat(chat.system));
  $("prompt").focus();
});
$("settings").addEventListener("input", settingsChanged);
$("key").addEventListener("change", () => meetModel().then(() => problem(null), problem));
addEventListener("beforeunload", () => running?.abort()); // else its connection breaks off first
addEventListener("pagehide", () => save(chat));
addEventListener("storage", draw); // another tab keeps chats, too

readSettings();
fold(folds);
draw();
follow.toEnd();
meetModel().catch(problem);
