// What the browser keeps: the chats, an entry each, and the settings. Several servers may share an origin behind
// prefixes, so the names begin with the page's path.

const PREFIX = `specformer:${location.pathname}:`;
const CHAT = PREFIX + "chat:";
const forgotten = new Set(); // an answer may still be on its way to one of them

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // no JSON, or a browser that keeps nothing
  }
}

// Whether it was kept: the room that a browser gives may be used up, or be none.
function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// A chat: what was said, from the turn on that the model still reads; see answer.js for what a turn holds.
export function newChat(system) {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), changed: Date.now(), system, from: 0, turns: [] };
}

export function title(chat) {
  const first = chat.turns[0]?.text.trim().split("\n")[0] || "New chat";
  return first.length > 60 ? first.slice(0, 59) + "…" : first;
}

// All that are kept, the one that changed last first.
export function chats() {
  let names = [];
  try {
    names = Object.keys(localStorage).filter((name) => name.startsWith(CHAT));
  } catch {
    // a browser that keeps nothing
  }
  const found = names.map(read).filter((chat) => Array.isArray(chat?.turns));
  return found.sort((one, other) => other.changed - one.changed);
}

// Whether it was kept, or is to be forgotten.
export function keep(chat) {
  return forgotten.has(chat.id) || write(CHAT + chat.id, chat);
}

export function forget(chat) {
  forgotten.add(chat.id);
  localStorage.removeItem(CHAT + chat.id);
}

export function settings() {
  return read(PREFIX + "settings") ?? {};
}

export function keepSettings(values) {
  write(PREFIX + "settings", values);
}
