// Markdown to elements. What a model says is untrusted: marked only takes it apart, and the elements are made here, one
// by one, from a list of those that a text may have. No HTML is ever parsed, and no picture is loaded.

import { lexer } from "../vendor/marked.js";
import { copyButton } from "./clipboard.js";

const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", "#39": "'", nbsp: "\u00a0" };

const DEEPEST = 50; // of what stands within each other; a browser breaks down at some thousands

// The blocks of a text, one after the other: what each was written as, and what makes its element, or null.
export function blocks(text) {
  try {
    return lexer(text).map((token) => ({ raw: token.raw, make: () => (isTooDeep(token) ? written : block)(token) }));
  } catch {
    return [{ raw: text, make: () => written({ raw: text }) }]; // so deep that even taking it apart failed
  }
}

function isTooDeep({ tokens = [], items = [], header = [], rows = [] }, depth = 0) {
  const parts = [tokens, items, Array.isArray(header) ? header : [], ...rows].flat(); // a cell's `header` is a boolean
  return depth > DEEPEST || parts.some((part) => isTooDeep(part, depth + 1));
}

function written({ raw }) {
  return element("p", [raw]);
}

export function element(tag, children = [], properties = {}) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function block(token) {
  switch (token.type) {
    case "space":
    case "def":
      return null;
    case "heading": // the first is the page's own
      return element(`h${Math.min(token.depth + 1, 6)}`, inlines(token));
    case "paragraph":
      return element("p", inlines(token));
    case "blockquote":
      return element("blockquote", token.tokens.map(block));
    case "hr":
      return element("hr");
    case "code":
      return code(token);
    case "list":
      return list(token);
    case "table":
      return table(token);
    case "html":
      return written(token);
    default:
      return inline(token);
  }
}

function code({ text, lang }) {
  const language = element("span", [lang?.split(/\s/)[0] || "text"]);
  const bar = element("div", [language, copyButton(() => text, "Copy code")], { className: "bar" });
  const lines = element("pre", [element("code", [text])], { tabIndex: 0 }); // wide ones scroll by keyboard, too
  lines.setAttribute("aria-label", "Code");
  lines.setAttribute("role", "group");
  return element("div", [bar, lines], { className: "code" });
}

function list(token) {
  const entry = ({ task, tokens }) => element("li", tokens.map(block), { className: task ? "task" : "" });
  const items = token.items.map(entry);
  const numbered = token.ordered && Number.isInteger(token.start) ? { start: token.start } : {};
  return element(token.ordered ? "ol" : "ul", items, numbered);
}

function table({ header, rows }) {
  const cell = (tag) => (column) => element(tag, inlines(column), { className: column.align ?? "" });
  const head = element("thead", [element("tr", header.map(cell("th")))]);
  const body = element("tbody", rows.map((row) => element("tr", row.map(cell("td")))));
  const wide = element("div", [element("table", [head, body])], { className: "wide", tabIndex: 0 });
  wide.setAttribute("role", "group");
  wide.setAttribute("aria-label", "Table");
  return wide;
}

function inlines(token) {
  return (token.tokens ?? []).map(inline);
}

function inline(token) {
  switch (token.type) {
    case "strong":
    case "em":
    case "del":
      return element(token.type, inlines(token));
    case "codespan":
      return element("code", [token.text]);
    case "br":
      return element("br");
    case "link":
      return link(token, inlines(token));
    case "image": // loading it would tell others what was said
      return link(token, [token.text || token.href]);
    case "checkbox":
      return element("input", [], { type: "checkbox", checked: token.checked, disabled: true, ariaLabel: "done" });
    case "text":
      return token.tokens ? element("span", inlines(token)) : document.createTextNode(plain(token.text));
    case "escape":
      return document.createTextNode(token.text);
    default: // HTML among them
      return document.createTextNode(token.raw);
  }
}

function link({ href }, children) {
  if (!SCHEMES.has(URL.parse(href)?.protocol)) return element("span", children);
  return element("a", children, { href, target: "_blank", rel: "noopener noreferrer nofollow" });
}

function plain(text) {
  return text.replace(/&(#39|[a-z]+);/g, (whole, name) => ENTITIES[name] ?? whole);
}
