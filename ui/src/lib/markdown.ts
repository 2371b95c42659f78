// Markdown to elements that are safe to show: HTML in a message stays text, links open elsewhere, pictures from the
// network become links (a message must not make the browser call out), formulas are left as marked text for `rich.ts`.
import createDOMPurify from "dompurify";
import MarkdownIt from "markdown-it";
import { math } from "./math-syntax";

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: true }).use(math);

markdown.renderer.rules["image"] = (tokens, index) => {
  const token = tokens[index]!;
  const address = String(token.attrGet("src") ?? "");
  const escape = markdown.utils.escapeHtml;
  const text = token.content === "" ? address : token.content;
  return `<a href="${escape(address)}">${escape(text)}</a>`;
};

// Alignment as a class: the content security policy takes no style attributes.
for (const rule of ["th_open", "td_open"]) {
  markdown.renderer.rules[rule] = (tokens, index, options, _env, self) => {
    const token = tokens[index]!;
    const align = /text-align:(\w+)/.exec(String(token.attrGet("style") ?? ""));
    token.attrs = align ? [["class", `align-${align[1]}`]] : null;
    return self.renderToken(tokens, index, options);
  };
}

const purify = createDOMPurify(window);
const ALLOWED_TAGS =
  "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul div".split(
    " ",
  );

purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** The elements of `text`. */
export function render(text: string): DocumentFragment {
  return purify.sanitize(markdown.render(text), {
    ALLOWED_TAGS,
    ALLOWED_ATTR: ["href", "class", "start"],
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
    RETURN_DOM_FRAGMENT: true,
  });
}
