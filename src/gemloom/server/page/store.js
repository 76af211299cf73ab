/**
 * Conversations and settings in the browser's localStorage, one key each, so that one which cannot
 * be read or written takes no other with it. The version is in the key: what another version wrote
 * is left alone. Where the browser keeps nothing, all works until the page closes.
 */

const PREFIX = "gemloom.v1.";
const CHAT = `${PREFIX}chat.`;

/**
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} title
 * @property {number} updated milliseconds since 1970
 * @property {import("./answer.js").Message[]} messages
 */

/** A conversation without messages; it is kept once it is saved. */
export function newConversation() {
  const bytes = crypto.getRandomValues(new Uint8Array(8)); // randomUUID needs https
  const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "New chat", updated: Date.now(), messages: [] };
}

/**
 * All conversations, the newest first, and how many could not be read.
 * @returns {{conversations: Conversation[], broken: number}}
 */
export function loadAll() {
  const keys = area ? Object.keys(area).filter((key) => key.startsWith(CHAT)) : [];
  const found = keys.map((key) => conversationOf(read(key), key.slice(CHAT.length)));
  const conversations = found.filter(Boolean).sort((a, b) => b.updated - a.updated);
  return { conversations, broken: found.length - conversations.length };
}

/**
 * One conversation as it is stored now, or null.
 * @param {string} id
 */
export function load(id) {
  return conversationOf(read(CHAT + id), id);
}

/**
 * @param {Conversation} conversation
 * @returns {boolean} whether there was room
 */
export function save(conversation) {
  return write(CHAT + conversation.id, conversation);
}

/** @param {string} id */
export function remove(id) {
  area?.removeItem(CHAT + id);
}

/**
 * The id of the conversation that a storage event is about, or null.
 * @param {StorageEvent} event
 */
export function changedId({ key }) {
  return key?.startsWith(CHAT) ? key.slice(CHAT.length) : null;
}

/**
 * A value such as "settings" or "theme", or null.
 * @param {string} name
 */
export function loadValue(name) {
  return read(PREFIX + name);
}

/** @returns {boolean} whether there was room */
export function saveValue(name, value) {
  return write(PREFIX + name, value);
}

/** The API key: never longer than the tab lives. */
export const apiKey = {
  value: "",
  load() {
    this.value = read(`${PREFIX}key`, session) ?? "";
  },
  save(value) {
    this.value = value;
    write(`${PREFIX}key`, value, session);
  },
};

const area = browserStore("localStorage");
const session = browserStore("sessionStorage");

function browserStore(name) {
  try {
    return window[name];
  } catch {
    return null; // refused by the browser's settings
  }
}

function read(key, from = area) {
  try {
    return JSON.parse(from?.getItem(key) ?? "null");
  } catch {
    return null;
  }
}

function write(key, value, into = area) {
  try {
    into.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false; // full, or there is none
  }
}

function conversationOf(value, id) {
  if (!Array.isArray(value?.messages)) return null;
  const messages = value.messages.map(messageOf);
  if (messages.includes(null)) return null;
  return {
    id,
    title: text(value.title) || "Untitled",
    updated: number(value.updated) ?? 0,
    messages,
  };
}

function messageOf(value) {
  if (!["user", "assistant"].includes(value?.role) || typeof value.content !== "string")
    return null;
  if (value.role === "user") return { role: "user", content: value.content };
  const message = { role: "assistant", content: value.content, reasoning: text(value.reasoning) };
  message.calls = Array.isArray(value.calls) ? value.calls.map(callOf) : [];
  if (number(value.usage?.prompt) !== undefined) message.usage = usageOf(value.usage);
  if (number(value.thought) !== undefined) message.thought = value.thought;
  for (const name of ["finish", "error"]) if (text(value[name])) message[name] = value[name];
  return message;
}

function callOf(value) {
  return { name: text(value?.name), arguments: text(value?.arguments) };
}

function usageOf({ prompt, completion, cached, wait, speed }) {
  const usage = { prompt, completion: number(completion) ?? 0, cached: number(cached) ?? 0 };
  return { ...usage, wait: number(wait), speed: number(speed) };
}

function text(value) {
  return typeof value === "string" ? value : "";
}

function number(value) {
  return Number.isFinite(value) ? value : undefined;
}
