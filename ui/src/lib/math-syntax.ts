// A markdown-it plugin that finds formulas: $x$, $$x$$, \(x\) and \[x\]. It typesets nothing: the formula stays as the
// text of an element of class `math`, so that a page without KaTeX still shows it.
import type { MarkdownIt, StateBlock, StateInline } from "markdown-it";

const FENCES: [open: string, close: string, display: boolean][] = [
  ["$$", "$$", true],
  ["\\[", "\\]", true],
  ["\\(", "\\)", false],
  ["$", "$", false],
];

export function math(markdown: MarkdownIt): void {
  // Before `escape`, which would take the backslash of `\(`.
  markdown.inline.ruler.before("escape", "math", inline);
  markdown.block.ruler.before("fence", "math", block, { alt: ["paragraph", "blockquote", "list"] });
  markdown.renderer.rules["math"] = (tokens, index) => {
    const { content, info } = tokens[index]!;
    return `<span class="math ${info}">${markdown.utils.escapeHtml(content)}</span>`;
  };
}

function inline(state: StateInline, silent: boolean): boolean {
  const { src, pos, posMax } = state;
  for (const [open, close, display] of FENCES) {
    if (!src.startsWith(open, pos)) continue;
    const start = pos + open.length;
    const end = closing(src, start, posMax, close);
    if (end < 0) continue;
    const content = src.slice(start, end);
    if (open === "$" && !isDollarMath(content, src[end + 1])) continue;
    if (content.trim() === "") continue;
    if (!silent) {
      const token = state.push("math", "", 0);
      token.content = content.trim();
      token.info = display ? "display" : "inline";
    }
    state.pos = end + close.length;
    return true;
  }
  return false;
}

/** `$5 and $6` is money: a formula has no space inside its dollars and no digit after them. */
const isDollarMath = (content: string, after: string | undefined): boolean =>
  !/^\s|\s$|\n/.test(content) && !/\d/.test(after ?? "");

/** Where `close` begins, or -1. A backslash before it makes it part of the formula. */
function closing(src: string, start: number, max: number, close: string): number {
  for (let at = src.indexOf(close, start); at >= 0 && at < max; at = src.indexOf(close, at + 1)) {
    if (close.startsWith("\\") || src[at - 1] !== "\\") return at;
  }
  return -1;
}

/** A formula whose fences begin a line and end one. */
function block(state: StateBlock, startLine: number, endLine: number, silent: boolean): boolean {
  const line = (index: number): string =>
    state.src.slice(state.bMarks[index]! + state.tShift[index]!, state.eMarks[index]!).trimEnd();
  const first = line(startLine);
  const fence = FENCES.find(([open, , display]) => display && first.startsWith(open));
  if (fence === undefined) return false;
  const [open, close] = fence;
  const lines: string[] = [];
  for (let index = startLine; index < endLine; index++) {
    const text = index === startLine ? first.slice(open.length) : line(index);
    const end = text.indexOf(close);
    if (end >= 0) {
      if (text.slice(end + close.length).trim() !== "") return false;
      if (silent) return true;
      lines.push(text.slice(0, end));
      const token = state.push("math", "", 0);
      token.content = lines.join("\n").trim();
      token.info = "display";
      token.map = [startLine, index + 1];
      state.line = index + 1;
      return true;
    }
    lines.push(text);
  }
  return false;
}
