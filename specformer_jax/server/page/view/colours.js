// The colours of drafts, within the elements that Markdown became.

import { within } from "../chat/draft_marks.js";

const FAR = 2000; // characters that Markdown leaves out between two of its texts, a link's address say

// Wraps what is marked. `root` is what became of `source`, whose letters Markdown keeps in order.
export function colour(root, source, marks) {
  if (!marks.length) return;
  const ownWords = { acceptNode: (node) => (node.parentElement.closest(".bar") ? NodeFilter.FILTER_REJECT : 1) };
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT, ownWords);
  const texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  let at = 0;
  for (const text of texts) {
    const parts = [];
    for (const line of text.data.split(/(?<=\n)/)) { // lines of code within a list have lost what stood before them
      const words = line.trimEnd();
      const begin = words ? source.indexOf(words, at) : -1;
      if (begin < 0 || begin > at + FAR) {
        parts.push(line);
      } else {
        at = begin + words.length;
        parts.push(...coloured(line, within(marks, begin, begin + line.length)));
      }
    }
    text.replaceWith(...parts);
  }
}

function coloured(line, marks) {
  const parts = [];
  let at = 0;
  for (const [begin, end] of marks) {
    const span = document.createElement("span");
    Object.assign(span, { className: "drafted", textContent: line.slice(begin, end) });
    parts.push(line.slice(at, begin), span);
    at = end;
  }
  return [...parts, line.slice(at)].filter((part) => part !== "");
}
