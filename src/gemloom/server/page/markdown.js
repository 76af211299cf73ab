/**
 * A subset of Markdown as DOM nodes: headings, lists, tables, quotes, emphasis, code, links.
 *
 * What a model writes is untrusted. Text becomes text nodes, elements and attributes are only those
 * named here, HTML is shown as it was written, and nothing is fetched: an image becomes a link.
 * Time is near linear in the text, whatever it holds, since it is parsed again with every frame.
 */
import { copyButton, el } from "./dom.js";

const MAX_DEPTH = 6; // of lists and quotes in one another
const MAX_EMPHASIS = 12; // open at once
const MAX_COLUMNS = 50;
const PROTOCOLS = ["http:", "https:", "mailto:"];
const EMPHASIS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };

const shown = new WeakMap(); // container -> the source of each of its blocks

/**
 * Shows `text` in `container`. Blocks that did not change since the last call keep their nodes, so
 * a selection or a focused button in them survives streaming.
 * @param {HTMLElement} container
 * @param {string} text
 */
export function update(container, text) {
  const known = shown.get(container) ?? [];
  const found = blocks(split(text));
  const sources = found.map(({ kind, lines }) => [kind, ...lines].join("\n"));
  found.forEach((block, i) => {
    if (sources[i] === known[i]) return;
    const node = BLOCKS[block.kind].node(block.lines, 0);
    if (i < container.children.length) container.children[i].replaceWith(node);
    else container.append(node);
  });
  while (container.children.length > found.length) container.lastElementChild.remove();
  shown.set(container, sources);
}

/**
 * The address of a link that may be followed, or null.
 * @param {string} address
 * @returns {string | null}
 */
export function safeUrl(address) {
  if (!URL.canParse(address)) return null; // relative ones, too: a model knows no page of ours
  const url = new URL(address);
  return PROTOCOLS.includes(url.protocol) ? url.href : null;
}

/**
 * Marks characters that reorder the text around them, which can make code or an address read as
 * what it is not.
 * @param {string} text
 */
export function visible(text) {
  const code = (c) => `[U+${c.charCodeAt(0).toString(16).toUpperCase()}]`;
  return text.replace(/[\u202A-\u202E\u2066-\u2069]/g, code);
}

// Blocks. A kind has `length`, how many lines from `at` belong to such a block (0: none starts
// there), and `node`, which makes the element of these lines.

const BLOCKS = {
  code: { length: codeLength, node: codeNode },
  heading: { length: (lines, at) => (HEADING.test(lines[at]) ? 1 : 0), node: headingNode },
  rule: { length: (lines, at) => (RULE.test(lines[at]) ? 1 : 0), node: () => el("hr") },
  quote: { length: quoteLength, node: quoteNode },
  table: { length: tableLength, node: tableNode },
  list: { length: listLength, node: listNode },
  paragraph: { length: paragraphLength, node: paragraphNode },
};
const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+(.*))?$/;

function split(text) {
  return text
    .split(/\r\n?|\n/)
    .map((line) => line.replace(/^\t+/, (tabs) => "    ".repeat(tabs.length)));
}

function blocks(lines) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = blockAt(lines, at);
    found.push(block);
    at += block.lines.length;
  }
  return found;
}

function blockAt(lines, at) {
  for (const [kind, { length }] of Object.entries(BLOCKS)) {
    const count = length(lines, at);
    if (count) return { kind, lines: lines.slice(at, at + count) };
  }
  throw new Error("a paragraph starts at any line");
}

function nodes(lines, depth) {
  if (depth > MAX_DEPTH) return [el("p", {}, visible(lines.join("\n")))];
  return blocks(lines).map((block) => BLOCKS[block.kind].node(block.lines, depth));
}

function interrupts(line) {
  return HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || fence(line) !== null;
}

function paragraphLength(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim()) {
    if (interrupts(lines[end]) || item(lines[end]) || tableLength(lines, end)) break;
    end += 1;
  }
  return end - at;
}

function paragraphNode(lines) {
  return el("p", { dir: "auto" }, inline(lines.map((line) => line.trim()).join("\n")));
}

function headingNode([line]) {
  const [, marks, text] = HEADING.exec(line);
  const level = Math.min(marks.length + 2, 6); // the page has the first two levels
  return el(`h${level}`, { dir: "auto" }, inline(text.trim().replace(/[ \t]#+$/, "")));
}

function quoteLength(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  return end - at;
}

function quoteNode(lines, depth) {
  return el(
    "blockquote",
    {},
    nodes(
      lines.map((line) => line.replace(QUOTE, "")),
      depth + 1,
    ),
  );
}

/** @returns {{mark: string, language: string} | null} */
function fence(line) {
  const [, mark, info] = FENCE.exec(line) ?? [];
  if (!mark || (mark[0] === "`" && info.includes("`"))) return null;
  return { mark, language: info.trim().split(/\s/)[0] };
}

function closes(line, mark) {
  const found = fence(line);
  return found?.mark.startsWith(mark) && !found.language;
}

function codeLength(lines, at) {
  const opening = fence(lines[at]);
  if (!opening) return 0;
  let end = at + 1;
  while (end < lines.length && !closes(lines[end], opening.mark)) end += 1;
  return Math.min(end + 1, lines.length) - at; // one that is still open goes to the end
}

function codeNode(lines) {
  const { mark, language } = fence(lines[0]);
  const whole = lines.length > 1 && closes(lines.at(-1), mark);
  const indent = new RegExp(`^ {0,${indentOf(lines[0])}}`);
  const text = lines.slice(1, whole ? -1 : undefined).map((line) => line.replace(indent, ""));
  const name = visible(language.slice(0, 30)) || "text";
  const code = el("code", {}, visible(text.join("\n")));
  return el("figure", { class: "code", dir: "ltr" }, [
    el("figcaption", {}, [el("span", {}, name), copyButton("Copy code", () => code.textContent)]),
    el("pre", { tabindex: "0", role: "group", "aria-label": `Code, ${name}` }, [code]),
  ]);
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "");
  const found = inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  if (found.length > 1 && !found.at(-1)) found.pop();
  return found.slice(0, MAX_COLUMNS);
}

function tableLength(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return 0;
  const marks = cells(lines[at + 1]);
  if (!marks.every((cell) => /^:?-+:?$/.test(cell)) || marks.length !== cells(lines[at]).length)
    return 0;
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end += 1;
  return end - at;
}

function tableNode([head, marks, ...rows]) {
  const sides = cells(marks).map((mark) =>
    !mark.endsWith(":") ? "" : mark[0] === ":" ? "centre" : "end",
  );
  const row = (line, tag, props) => {
    const found = cells(line);
    const cell = (side, i) =>
      el(tag, { ...props, class: side || null, dir: "auto" }, inline(found[i] ?? ""));
    return el("tr", {}, sides.map(cell));
  };
  const table = el("table", {}, [
    el("thead", {}, [row(head, "th", { scope: "col" })]),
    el(
      "tbody",
      {},
      rows.map((line) => row(line, "td", {})),
    ),
  ]);
  return el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, [
    table,
  ]);
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

/** What a line that starts an item says, or null. `width` is where its text begins. */
function item(line) {
  const [, space, mark, text = ""] = RULE.test(line) ? [] : (ITEM.exec(line) ?? []);
  if (!mark) return null;
  const number = parseInt(mark, 10);
  return {
    indent: space.length,
    width: space.length + mark.length + 1,
    ordered: number >= 0,
    number,
    text,
  };
}

function listLength(lines, at) {
  const first = item(lines[at]);
  if (!first) return 0;
  let end = at + 1;
  while (end < lines.length) {
    let next = end;
    while (next < lines.length && !lines[next].trim()) next += 1;
    if (next === lines.length || !continues(first, lines[next], next > end)) break;
    end = next + 1;
  }
  return end - at;
}

function continues(first, line, afterBlank) {
  if (indentOf(line) >= first.indent + 2) return true;
  const found = item(line);
  return found ? found.ordered === first.ordered : !afterBlank && !interrupts(line);
}

function listNode(lines, depth) {
  const first = item(lines[0]);
  const items = [];
  for (const line of lines) {
    const found = item(line);
    if (found && found.indent < first.indent + 2)
      items.push({ width: found.width, lines: [found.text] });
    else items.at(-1).lines.push(line.slice(Math.min(indentOf(line), items.at(-1).width)));
  }
  const start = first.ordered && first.number !== 1 ? first.number : null;
  return el(
    first.ordered ? "ol" : "ul",
    { start },
    items.map((one) => itemNode(one.lines, depth)),
  );
}

function itemNode(lines, depth) {
  const [first, ...rest] = nodes(lines, depth + 1);
  if (first?.tagName !== "P") return el("li", { dir: "auto" }, [first ?? "", ...rest]);
  return el("li", { dir: "auto" }, [...first.childNodes, ...rest]);
}

// Inline. `RULES` are tried in order where a character may be special; the rest is plain text.

const PLAIN = /(?:[^\\`*_~![<h\n]|h(?!ttps?:\/\/))+/y;
const LABEL = /(?:[^[\]\\]|\\.){0,1000}/.source;
const ADDRESS = /[^()\s<>]*(?:\([^()\s]*\)[^()\s<>]*)*/.source;
const RULES = [
  [/\\([!-/:-@[-`{-~])/y, (state, [, character]) => state.add(character)],
  [/`+/y, codeSpan],
  [new RegExp(`(!?)\\[(${LABEL})\\]\\(<?(${ADDRESS})>?(?:\\s+"[^"\\n]*")?\\s?\\)`, "y"), link],
  [/<((?:https?:\/\/|mailto:)[^\s<>]+)>/y, autolink],
  [/https?:\/\/[^\s<>`*|]+/y, bareLink],
  [/\*+|_+|~~/y, emphasis],
  [/\n/y, (state) => state.add(el("br"))],
];
const LINKS = new Set([link, autolink, bareLink]); // not tried within the text of a link

function inline(text, links = true) {
  const state = new Inline(text, links);
  while (state.at < text.length) {
    const plain = match(PLAIN, state);
    if (plain) state.add(plain[0]);
    else special(state);
  }
  return state.end();
}

function match(rule, state) {
  rule.lastIndex = state.at;
  const found = rule.exec(state.text);
  if (found) state.at += found[0].length;
  return found;
}

function special(state) {
  for (const [rule, use] of RULES) {
    if (!state.links && LINKS.has(use)) continue;
    const found = match(rule, state);
    if (found) return use(state, found);
  }
  state.add(state.text[state.at]);
  state.at += 1;
}

/** The emphasis that is open, innermost last, each with the nodes made in it so far. */
class Inline {
  constructor(text, links) {
    this.text = text;
    this.links = links;
    this.at = 0;
    this.frames = [{ mark: "", nodes: [] }];
  }

  add(node) {
    this.frames.at(-1).nodes.push(typeof node === "string" ? visible(node) : node);
  }

  /** Closes the innermost emphasis that the run of marks can close; says which marks it used. */
  close(run) {
    const at = this.frames.findLastIndex(({ mark }) => mark && run.startsWith(mark));
    if (at < 0) return "";
    this.unwrap(at + 1);
    const { mark, nodes: inner } = this.frames.pop();
    this.add(el(EMPHASIS[mark], {}, inner));
    return mark;
  }

  /** What was opened at `from` or later and not closed is text after all. */
  unwrap(from) {
    const below = this.frames[from - 1].nodes;
    for (const { mark, nodes: inner } of this.frames.splice(from)) {
      below.push(mark);
      for (const node of inner) below.push(node);
    }
  }

  end() {
    this.unwrap(1);
    return this.frames[0].nodes;
  }
}

function emphasis(state, [run]) {
  const before = state.text[state.at - run.length - 1] ?? " ";
  const after = state.text[state.at] ?? " ";
  const inWord = run[0] === "_" && /[\p{L}\p{N}]/u.test(before) && /[\p{L}\p{N}]/u.test(after);
  if (run.length > 3 || inWord) return state.add(run);
  for (let rest = run; rest;) {
    const used = /\s/.test(before) ? "" : state.close(rest);
    const mark = used || rest.slice(0, 2);
    if (!used && !/\s/.test(after) && state.frames.length <= MAX_EMPHASIS)
      state.frames.push({ mark, nodes: [] });
    else if (!used) state.add(mark);
    rest = rest.slice(mark.length);
  }
}

function codeSpan(state, [marks]) {
  const start = state.at;
  const ends = state.text.slice(start).matchAll(/`+/g);
  const end = ends.find(([run]) => run === marks);
  if (!end) return state.add(marks);
  state.at = start + end.index + marks.length;
  const text = state.text.slice(start, start + end.index).replaceAll("\n", " ");
  const padded = text.startsWith(" ") && text.endsWith(" ") && text.trim() !== "";
  state.add(el("code", { dir: "ltr" }, visible(padded ? text.slice(1, -1) : text)));
}

function anchor(address, children) {
  const href = safeUrl(address);
  if (!href) return null;
  const text = typeof children === "string" ? visible(children) : children;
  return el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" }, text);
}

function autolink(state, [all, address]) {
  state.add(anchor(address, address) ?? all);
}

function link(state, [all, image, label, address]) {
  const name = label.trim() || address;
  const text = image ? `Image: ${name}` : inline(name, false);
  state.add(anchor(address, text) ?? all);
}

function bareLink(state, [all]) {
  const after = all.includes("(") ? /[.,;:!?'"]{1,20}$/ : /[.,;:!?'")\]]{1,20}$/;
  const address = all.replace(after, ""); // without the marks of the sentence around it
  state.at -= all.length - address.length;
  state.add(anchor(address, address) ?? address);
}
