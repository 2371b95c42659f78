// Formulas and coloured code, in a chunk that is loaded when the first message needs it.
import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import c from "highlight.js/lib/languages/c";
import cpp from "highlight.js/lib/languages/cpp";
import css from "highlight.js/lib/languages/css";
import diff from "highlight.js/lib/languages/diff";
import go from "highlight.js/lib/languages/go";
import java from "highlight.js/lib/languages/java";
import javascript from "highlight.js/lib/languages/javascript";
import json from "highlight.js/lib/languages/json";
import markdown from "highlight.js/lib/languages/markdown";
import python from "highlight.js/lib/languages/python";
import rust from "highlight.js/lib/languages/rust";
import sql from "highlight.js/lib/languages/sql";
import ini from "highlight.js/lib/languages/ini";
import typescript from "highlight.js/lib/languages/typescript";
import xml from "highlight.js/lib/languages/xml";
import yaml from "highlight.js/lib/languages/yaml";
import katex from "katex";
import "katex/dist/katex.css";

const languages = {
  bash,
  c,
  cpp,
  css,
  diff,
  go,
  ini,
  java,
  javascript,
  json,
  markdown,
  python,
  rust,
  sql,
  typescript,
  xml,
  yaml,
};
for (const [name, language] of Object.entries(languages)) hljs.registerLanguage(name, language);

/** KaTeX writes these two with style attributes, which the content security policy refuses. */
const MACROS = { "\\pmb": "\\boldsymbol{#1}", "\\fcolorbox": "\\boxed{\\@firstoftwo{#3}{#1#2}}" };

/** Typesets the text of `element`; a formula that is none stays text. */
export function typeset(element: HTMLElement): void {
  const formula = element.textContent ?? "";
  const displayMode = element.classList.contains("display");
  const holder = document.createElement("span");
  try {
    // Elements, not HTML: sizes are then set through the object model, which the policy allows.
    katex.render(formula, holder, {
      displayMode,
      throwOnError: true,
      maxSize: 20,
      maxExpand: 200,
      macros: { ...MACROS },
    });
  } catch {
    return;
  }
  element.replaceChildren(...holder.childNodes);
}

/** Colours the text of `element`, if its language is known. */
export function highlight(element: HTMLElement, language: string): void {
  if (hljs.getLanguage(language) === undefined) return;
  // The highlighter escapes the code and writes nothing but spans with classes.
  element.innerHTML = hljs.highlight(element.textContent ?? "", { language, ignoreIllegals: true }).value;
}
