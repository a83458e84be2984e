/**
 * What a model writes, as elements. All of it is hostile: raw HTML is shown as text, only the tags that Markdown makes
 * pass DOMPurify, links open elsewhere without a referrer, and images are not loaded.
 */

import { Lexer, Parser, marked } from "../vendor/marked.js";
import { copyButton, make } from "./dom.js";
import { draw, escaped, extensions, place } from "./math.js";

/** Longest paragraph, item or cell whose inline markup is parsed, in characters; of longer ones the text is shown. */
const LONGEST_INLINE = 10_000;

/** Least time between two drawings of an answer that grows, in ms, and how many times as long as one took. */
const PAUSE = 40;
const PAUSE_BY_COST = 8;

const ALLOWED = {
  ALLOWED_TAGS: [
    ..."p br hr em strong del code pre blockquote ul ol li a span".split(" "),
    ..."h3 h4 h5 h6 table thead tbody tr th td".split(" "),
  ],
  ALLOWED_ATTR: ["href", "title", "start", "class", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  // DOMPurify takes the values of all others for addresses, and drops them.
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

marked.use({
  gfm: true,
  extensions,
  // Raw HTML is no markup, but for line breaks, which tables need.
  tokenizer: {
    html: () => undefined,
    tag: (source) => {
      const found = /^<br ?\/?>/i.exec(source);
      return found ? { type: "br", raw: found[0] } : undefined;
    },
  },
  renderer: {
    heading({ tokens, depth }) {
      const level = Math.min(depth + 2, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    code({ text, lang }) {
      const language = /^[\w+#.-]*/.exec(lang ?? "")[0];
      if (language === "math") return `<p>${place(text, true)}</p>`;
      return `<pre><code class="language-${language}">${escaped(text)}</code></pre>`;
    },
    image: ({ href, text }) => `<a href="${escaped(href)}">picture: ${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

/** The blocks of a text: paragraphs, lists, tables, and so on. Takes time in proportion to its length. */
function blocks(text) {
  const lexer = new Lexer(marked.defaults);
  // Of the same length, so that lengths of blocks add up to places in the text.
  lexer.blockTokens(text.replaceAll("\r", " "), lexer.tokens);
  for (const { src, tokens } of lexer.inlineQueue.splice(0)) {
    if (src.length <= LONGEST_INLINE) lexer.inlineTokens(src, tokens);
    else tokens.push({ type: "text", raw: src, text: src });
  }
  return lexer.tokens;
}

function elements(tokens) {
  const fragment = DOMPurify.sanitize(Parser.parse(tokens, marked.defaults), ALLOWED);
  draw(fragment);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const code of fragment.querySelectorAll("pre > code")) frame(code);
  for (const table of fragment.querySelectorAll("table")) scroll(table);
  // Not of what is inside: an element's direction does not follow from descendants that have one of their own.
  for (const block of fragment.children) block.dir = "auto";
  return fragment;
}

/** A block of code gets a line with its language and a button that copies it. */
function frame(code) {
  const language = code.className.replace("language-", "");
  const head = make("div", "code-head");
  head.append(make("span", "", language), copyButton(() => code.textContent, "Copy this code"));
  const block = make("div", "code");
  code.parentElement.replaceWith(block);
  const pre = make("pre");
  // Only what scrolls is reached by the keyboard, so it must be reachable.
  pre.tabIndex = 0;
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  pre.append(code);
  block.append(head, pre);
}

function scroll(table) {
  const frame = make("div", "table");
  frame.tabIndex = 0;
  frame.setAttribute("role", "group");
  frame.setAttribute("aria-label", "Table");
  table.replaceWith(frame);
  frame.append(table);
}

/** A text that grows, drawn into an element. A block that is followed by another one is drawn once. */
export class Rendering {
  constructor(body) {
    this._body = body;
    this._settled = 0;
    this._kept = 0;
    this._text = "";
    this._timer = 0;
    this._cost = 0;
  }

  /** Draws the text soon. It begins with what was given before; `drawn` is called each time. */
  update(text, drawn) {
    this._text = text;
    this._timer ||= setTimeout(() => {
      this._timer = 0;
      this._draw();
      drawn();
    }, Math.max(PAUSE, PAUSE_BY_COST * this._cost));
  }

  /** Draws the text now, as a whole: a link's address may follow the link. */
  finish(text) {
    clearTimeout(this._timer);
    this._timer = this._settled = this._kept = 0;
    this._text = text;
    this._draw();
  }

  _draw() {
    const began = performance.now();
    try {
      this._drawBlocks();
    } catch {
      // A parser that gives up, for example because of ten thousand levels of quotation.
      this._body.replaceChildren(make("p", "plain", this._text));
      this._settled = this._kept = 0;
    }
    this._cost = performance.now() - began;
  }

  _drawBlocks() {
    const tokens = blocks(this._text.slice(this._settled));
    const last = tokens.findLastIndex((token) => token.type !== "space");
    const [settled, open] = [tokens.slice(0, Math.max(last, 0)), tokens.slice(Math.max(last, 0))];
    while (this._body.childNodes.length > this._kept) this._body.lastChild.remove();
    this._body.append(elements(settled));
    this._kept = this._body.childNodes.length;
    this._settled += settled.reduce((length, token) => length + token.raw.length, 0);
    this._body.append(elements(open));
  }
}
