// A text with Markdown, formulas and coloured code. What it may contain is decided in lib/markdown.ts.
import { useLayoutEffect, useRef } from "preact/hooks";
import { render } from "../lib/markdown";

type Rich = typeof import("../lib/rich");
let rich: Rich | undefined;

export function RichText({ text }: { text: string }) {
  const element = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const holder = element.current;
    if (holder === null) return;
    holder.replaceChildren(render(text));
    holder.querySelectorAll("pre").forEach(addBar);
    holder.querySelectorAll("table").forEach(addScroller);
    if (holder.querySelector(".math, pre code[class]") === null) return;
    if (rich !== undefined) {
      enrich(holder, rich);
      return;
    }
    void import("../lib/rich").then((module) => {
      rich = module;
      // The text may have changed meanwhile: then its own effect did this.
      if (element.current !== null) enrich(element.current, module);
    });
  }, [text]);
  return <div class="rich" ref={element} />;
}

function enrich(holder: HTMLElement, { typeset, highlight }: Rich): void {
  holder.querySelectorAll<HTMLElement>(".math:not(:has(.katex))").forEach(typeset);
  holder
    .querySelectorAll<HTMLElement>("pre code[class]:not(:has(span))")
    .forEach((code) => highlight(code, languageOf(code)));
}

const languageOf = (code: Element): string => /language-([\w+#-]+)/.exec(code.className)?.[1] ?? "";

/** A line above the code: its language, and a button that copies it. */
function addBar(pre: HTMLPreElement): void {
  const code = pre.querySelector("code") ?? pre;
  const bar = document.createElement("div");
  bar.className = "code-bar";
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", () => {
    void copy(code.textContent ?? "").then((done) => (button.textContent = done ? "Copied" : "Not allowed"));
  });
  bar.append(Object.assign(document.createElement("span"), { textContent: languageOf(code) || "text" }), button);
  const frame = document.createElement("div");
  frame.className = "code-frame";
  pre.replaceWith(frame);
  // It scrolls sideways, so the keyboard must reach it.
  pre.tabIndex = 0;
  frame.append(bar, pre);
}

function addScroller(table: HTMLTableElement): void {
  const frame = document.createElement("div");
  frame.className = "table-frame";
  frame.tabIndex = 0;
  table.replaceWith(frame);
  frame.append(table);
}

/** The clipboard needs TLS or this machine; elsewhere the old command may do. */
export async function copy(text: string): Promise<boolean> {
  if (navigator.clipboard !== undefined) {
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  }
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
