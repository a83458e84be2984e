/** Formulas in TeX: how they are found in Markdown, and how they are drawn, as MathML. */

/** Longest formula, in characters: what looks like the beginning of one need not end. */
const LONGEST = 5000;

const BLOCK = new RegExp(
  String.raw`^ {0,3}(?:\$\$([^]{1,${LONGEST}}?)\$\$|\\\[([^]{1,${LONGEST}}?)\\\])[ \t]*(?:\n|$)`,
);
const DISPLAYED = new RegExp(String.raw`^(?:\$\$([^$]{1,${LONGEST}})\$\$|\\\[([^]{1,${LONGEST}}?)\\\])`);
// As Pandoc reads it: "$5 and $6" is not a formula.
const INLINE = new RegExp(
  String.raw`^(?:\$(?!\s)((?:\\.|[^\\$\n]){1,${LONGEST}}?)(?<!\s)\$(?!\d)|\\\(([^]{1,${LONGEST}}?)\\\))`,
);

const OPTIONS = { trust: false, strict: false, throwOnError: true, maxExpand: 500, maxSize: [20, 50] };

const ALLOWED = {
  USE_PROFILES: { mathMl: true },
  ADD_TAGS: ["menclose"],
  ADD_ATTR: ["class"],
  FORBID_ATTR: ["href", "xlink:href", "id", "style"],
  RETURN_DOM_FRAGMENT: true,
};

const at = (source, pattern) => {
  const found = source.slice(0, LONGEST).search(pattern);
  return found < 0 ? undefined : found;
};

function token(type, found, displayed) {
  return found && { type, raw: found[0], tex: (found[1] ?? found[2]).trim(), displayed };
}

/** What marked is told about formulas; `renderer` makes a place that `draw` finds. */
export const extensions = [
  {
    name: "formulaBlock",
    level: "block",
    start: (source) => at(source, /(?<=\n) {0,3}(?:\$\$|\\\[)/),
    tokenizer: (source) => token("formulaBlock", BLOCK.exec(source), true),
    renderer: ({ tex }) => `<p>${place(tex, true)}</p>`,
  },
  {
    name: "formula",
    level: "inline",
    start: (source) => at(source, /\$|\\[([]/),
    tokenizer: (source) =>
      token("formula", DISPLAYED.exec(source), true) ?? token("formula", INLINE.exec(source), false),
    renderer: ({ tex, displayed }) => place(tex, displayed),
  },
];

/** The place of a formula in HTML. Nothing that a model writes gets a class but by this. */
export function place(tex, displayed) {
  return `<span class="${displayed ? "formula displayed" : "formula"}">${escaped(tex)}</span>`;
}

export function escaped(text) {
  const names = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return text.replace(/[&<>"']/g, (character) => names[character]);
}

/** Replaces the source of every formula below `root` by MathML. */
export function draw(root) {
  for (const span of root.querySelectorAll("span.formula")) {
    const tex = span.textContent;
    const displayed = span.classList.contains("displayed");
    try {
      const markup = window.temml.renderToString(tex, { ...OPTIONS, displayMode: displayed });
      // In this markup quotation marks stand around values of attributes and nowhere else.
      const math = DOMPurify.sanitize(markup.replaceAll(' style="', ' data-style="'), ALLOWED);
      style(math);
      span.replaceChildren(math);
      span.querySelector("math")?.setAttribute("aria-label", tex);
    } catch {
      span.classList.add("source");
    }
    if (displayed) span.tabIndex = 0;
  }
}

/** The page's policy forbids style attributes in markup; a script may set styles. */
function style(fragment) {
  for (const element of fragment.querySelectorAll("[data-style]")) {
    element.style.cssText = element.dataset.style;
    delete element.dataset.style;
  }
}
