/** The chat page: joins what is stored, what is asked and what is shown. State lives here alone. */
import { finish, fold, newRun, requestBody } from "./answer.js";
import { ApiError, modelName, streamChat } from "./client.js";
import { el, icon } from "./dom.js";
import { settingsForm, settingsOf } from "./settings.js";
import { showList } from "./sidebar.js";
import * as store from "./store.js";
import { MessageView } from "./view.js";

const $ = (id) => document.getElementById(id);
const THEMES = { system: "follows the system", light: "light", dark: "dark" };

const runs = new Map(); // conversation id -> the run that answers in it
const views = new Map(); // message -> its view, for the conversation that is shown
let conversations = [];
let current = store.newConversation();
let settings = settingsOf(store.loadValue("settings"));
let model = ""; // its name, once the server has told

// Conversations

function keep(conversation) {
  conversation.updated = Date.now();
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  if (!store.save(conversation)) {
    tell("The browser has no room: this conversation is lost when the page closes. Export it.");
  }
  showConversations();
}

function open(conversation) {
  current = conversation;
  const address = conversations.includes(conversation) ? `#${conversation.id}` : location.pathname;
  history.replaceState(null, "", address);
  views.clear();
  followAgain();
  sidebar(false);
  showMessages();
  showConversations();
}

function openNew() {
  open(store.newConversation());
  $("input").focus();
}

function openAddress() {
  open(conversations.find(({ id }) => `#${id}` === location.hash) ?? store.newConversation());
}

function rename(conversation, title) {
  conversation.title = title;
  keep(conversation);
  $("list").querySelector(`[data-id="${conversation.id}"] .rename`).focus();
}

function remove(conversation) {
  $("confirm-text").textContent = conversation.title;
  $("confirm-yes").onclick = () => {
    $("confirm").close();
    runs.get(conversation.id)?.control.abort();
    conversations = conversations.filter((one) => one !== conversation);
    store.remove(conversation.id);
    if (conversation === current) openNew();
    else showConversations();
  };
  $("confirm").showModal();
}

function download(conversation) {
  const { title, updated, messages } = conversation;
  const text = JSON.stringify(
    { title, updated: new Date(updated).toISOString(), messages },
    null,
    2,
  );
  const href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 50) || "conversation";
  el("a", { href, download: `${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

/** Takes over what another tab changed, but for a conversation that is being answered here. */
function changedElsewhere(event) {
  const id = store.changedId(event);
  if (!id || runs.has(id)) return;
  const stored = store.load(id);
  conversations = conversations.filter((one) => one.id !== id);
  if (stored) conversations.unshift(stored);
  if (current.id === id && stored) open(stored);
  showConversations();
}

// Asking

function send(text) {
  if (!text.trim() || runs.has(current.id)) return;
  if (!current.messages.length) current.title = titleOf(text);
  current.messages.push({ role: "user", content: text });
  answer(current);
}

function titleOf(text) {
  const letters = [...text.trim().split("\n")[0]];
  return letters.length > 80 ? `${letters.slice(0, 79).join("")}…` : letters.join("");
}

function regenerate(message) {
  if (runs.has(current.id)) return;
  current.messages.splice(current.messages.indexOf(message));
  answer(current);
  $("input").focus();
}

function edit(message, text) {
  if (runs.has(current.id) || !text.trim()) return;
  message.content = text;
  if (message.role === "assistant") {
    keep(current);
    return showMessages();
  }
  current.messages.splice(current.messages.indexOf(message) + 1);
  answer(current);
  $("input").focus();
}

function stop() {
  runs.get(current.id)?.control.abort();
}

async function answer(conversation) {
  const run = newRun(performance.now());
  conversation.messages.push(run.message);
  runs.set(conversation.id, run);
  keep(conversation);
  history.replaceState(null, "", `#${conversation.id}`);
  followAgain();
  showMessages();
  announce("Answering");
  const ticks = setInterval(() => paint(run), 500); // the seconds of thinking
  const failure = await stream(conversation, run).catch((error) => error);
  clearInterval(ticks);
  end(conversation, run, failure);
}

async function stream(conversation, run) {
  const access = { key: store.apiKey.value, signal: run.control.signal };
  model ||= await modelName(access);
  const body = requestBody(conversation.messages.slice(0, -1), settings, model);
  for await (const chunk of streamChat(body, access)) {
    fold(run, chunk, performance.now());
    run.frame ||= requestAnimationFrame(() => {
      run.frame = 0;
      paint(run);
    });
  }
}

function end(conversation, run, failure) {
  const { message } = run;
  cancelAnimationFrame(run.frame);
  if (run.control.signal.aborted) message.finish = "stopped";
  else if (failure) message.error = failure.message;
  finish(run, performance.now());
  runs.delete(conversation.id);
  if (conversations.includes(conversation)) keep(conversation);
  showModel();
  if (conversation !== current) return;
  showMessages();
  announce(
    message.error ? `Failed: ${message.error}` : `Assistant: ${message.content || "no text"}`,
  );
  if (failure instanceof ApiError && failure.status === 401) askKey(message);
}

function askKey(message) {
  if (store.apiKey.value) $("key-reason").textContent = "The server refused this key.";
  $("key").querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    store.apiKey.save($("key-input").value);
    $("key").close();
    if (current.messages.includes(message)) regenerate(message);
  };
  $("key").showModal();
}

// Showing

function showMessages() {
  const running = runs.get(current.id);
  $("empty").hidden = current.messages.length > 0;
  $("title").textContent = current.title;
  document.title = current.messages.length ? `${current.title} · Gemloom` : "Gemloom";
  const shown = current.messages.map(viewOf);
  const elements = shown.map(({ element }) => element);
  for (const stale of [...$("messages").children]) if (!elements.includes(stale)) stale.remove();
  $("messages").append(...elements.filter(({ isConnected }) => !isConnected));
  for (const view of shown) view.update(stateOf(running, view.message));
  $("messages").classList.toggle("busy", Boolean(running));
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  keepUp();
}

function viewOf(message) {
  if (!views.has(message)) views.set(message, new MessageView(message, { edit, regenerate }));
  return views.get(message);
}

function stateOf(run, message) {
  if (run?.message !== message) return {};
  if (run.thinking === null) return { running: true };
  return { running: true, thinking: true, seconds: (performance.now() - run.thinking) / 1000 };
}

function paint(run) {
  if (runs.get(current.id) !== run) return;
  viewOf(run.message).update(stateOf(run, run.message));
  keepUp();
}

function showConversations() {
  conversations.sort((a, b) => b.updated - a.updated);
  const state = { current: current.id, running: (id) => runs.has(id) };
  const actions = {
    rename,
    download,
    remove,
    open: (id) => open(conversations.find((one) => one.id === id)),
  };
  showList($("list"), conversations, state, actions);
  $("title").textContent = current.title;
}

function showModel() {
  $("model").textContent = model;
}

function announce(text) {
  $("status").textContent = text;
}

function tell(text) {
  $("notice-text").textContent = text;
  $("notice").hidden = false;
  announce(text);
}

// Scrolling: follows the answer until the reader scrolls up

let follow = true;
let lastTop = 0;

function followAgain() {
  follow = true;
  lastTop = 0;
}

function keepUp() {
  const box = $("scroll");
  scrolled(); // a reader's scroll tells of itself a frame later: look before following
  if (follow) box.scrollTop = lastTop = box.scrollHeight - box.clientHeight;
}

function scrolled() {
  const box = $("scroll");
  if (box.scrollTop < lastTop - 1) follow = false;
  if (box.scrollHeight - box.scrollTop - box.clientHeight < 30) follow = true;
  lastTop = box.scrollTop;
  $("latest").hidden = follow;
}

// Settings, theme, sidebar

function changeSettings(changes) {
  settings = settingsOf({ ...settings, ...changes });
  if (!store.saveValue("settings", settings)) tell("The browser has no room to keep the settings.");
  $("thinking").setAttribute("aria-pressed", String(settings.thinking));
}

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").replaceChildren(icon(theme));
  $("theme").setAttribute("aria-label", `Theme: ${THEMES[theme]}`);
  $("theme").title = `Theme: ${THEMES[theme]}`;
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const theme = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  store.saveValue("theme", theme);
  showTheme(theme);
}

function sidebar(opened) {
  document.body.classList.toggle("aside", opened);
  $("shade").hidden = !opened;
  $("main").inert = opened;
  $("menu").setAttribute("aria-expanded", String(opened));
  if (opened) $("new").focus();
}

// Wiring

function key(event) {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("aside")) {
    sidebar(false);
    $("menu").focus();
  } else stop();
}

function sendInput(event) {
  event.preventDefault();
  if (runs.has(current.id)) return;
  send($("input").value);
  $("input").value = "";
  $("input").focus();
}

function inputKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) sendInput(event);
}

function wireComposer() {
  $("composer").addEventListener("submit", sendInput);
  $("input").addEventListener("keydown", inputKey);
  $("stop").addEventListener("click", () => {
    stop();
    $("input").focus();
  });
  $("thinking").addEventListener("click", () => changeSettings({ thinking: !settings.thinking }));
  for (const example of document.querySelectorAll(".example")) {
    example.addEventListener("click", () => send(example.textContent));
  }
  $("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address holds the conversation
    $("input").focus();
  });
}

function wirePage() {
  document.addEventListener("keydown", key);
  $("scroll").addEventListener("scroll", scrolled);
  $("latest").addEventListener("click", () => {
    followAgain();
    keepUp();
  });
  $("new").addEventListener("click", openNew);
  $("menu").addEventListener("click", () => sidebar(!document.body.classList.contains("aside")));
  $("shade").addEventListener("click", () => sidebar(false));
  $("theme").addEventListener("click", nextTheme);
  $("notice-close").addEventListener("click", () => ($("notice").hidden = true));
  window.addEventListener("storage", changedElsewhere);
  window.addEventListener("hashchange", openAddress);
  window.addEventListener("pagehide", () => {
    for (const one of conversations.filter(({ id }) => runs.has(id))) {
      runs.get(one.id).message.finish = "stopped";
      store.save(one);
    }
  });
}

function wireDialogs() {
  const showSettings = settingsForm($("settings"), changeSettings);
  $("open-settings").addEventListener("click", () => {
    showSettings(settings);
    $("settings").showModal();
  });
  $("reset").addEventListener("click", () => {
    settings = settingsOf(null);
    changeSettings({});
    showSettings(settings);
  });
  for (const button of document.querySelectorAll("dialog .close")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
}

async function start() {
  wireComposer();
  wirePage();
  wireDialogs();
  const stored = store.loadAll();
  conversations = stored.conversations;
  store.apiKey.load();
  const theme = store.loadValue("theme");
  showTheme(Object.hasOwn(THEMES, theme) ? theme : "system");
  changeSettings({});
  openAddress();
  if (stored.broken) tell(`${stored.broken} stored conversation(s) cannot be read; they are left.`);
  // Where this fails it is asked again, and the failure shown, with the first message.
  model = await modelName({ key: store.apiKey.value }).catch(() => "");
  showModel();
}

start();
