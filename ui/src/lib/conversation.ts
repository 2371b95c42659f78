// A conversation is a tree: editing a message or asking again adds a sibling, and the shown path follows the choices.
// Pure functions over plain data; nothing here knows the browser.
import type { Settings } from "./settings";

export interface Stats {
  promptTokens: number;
  outputTokens: number;
  cachedTokens: number;
  /** Milliseconds from sending to the first token. */
  firstTokenMs: number;
  /** Tokens a second after the first; 0 of an answer too short to tell. */
  tokensPerSecond: number;
}

export type Status = "streaming" | "done" | "stopped" | "length" | "error";

export interface Message {
  id: string;
  /** The message before this one; "" for a first message. */
  parent: string;
  role: "user" | "assistant";
  text: string;
  reasoning: string;
  /** Pictures as `data:` addresses. */
  images: string[];
  status: Status;
  error?: string;
  created: number;
  model?: string;
  stats?: Stats;
  /** Share of the prompt that has been read; of an answer that has not begun. */
  promptShare?: number;
  /** Set when the answer was held to a JSON form, so that it is shown as code. */
  json?: boolean;
}

export interface Conversation {
  id: string;
  title: string;
  created: number;
  updated: number;
  messages: Message[];
  /** For a message (or "" for the beginning): which of its successors is shown. */
  chosen: Record<string, string>;
  settings: Settings;
}

/** What the list of conversations needs to know. */
export type Head = Pick<Conversation, "id" | "title" | "updated">;

export const newId = (): string => {
  // `crypto.randomUUID` is missing where the page is served without TLS from another machine.
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
};

export function newConversation(settings: Settings): Conversation {
  const now = Date.now();
  return { id: newId(), title: "New chat", created: now, updated: now, messages: [], chosen: {}, settings };
}

export function newMessage(role: Message["role"], parent: string, text = "", images: string[] = []): Message {
  const status = role === "user" ? "done" : "streaming";
  return { id: newId(), parent, role, text, reasoning: "", images, status, created: Date.now() };
}

export const siblings = (conversation: Conversation, message: Message): Message[] =>
  conversation.messages.filter((other) => other.parent === message.parent);

/** The messages that are shown, first to last. */
export function path(conversation: Conversation): Message[] {
  const shown: Message[] = [];
  let parent = "";
  for (;;) {
    const next = conversation.messages.filter((message) => message.parent === parent);
    const message = next.find(({ id }) => id === conversation.chosen[parent]) ?? next.at(-1);
    if (message === undefined) return shown;
    shown.push(message);
    parent = message.id;
  }
}

/** With `message` as the shown successor of its parent. */
export function withMessage(conversation: Conversation, message: Message): Conversation {
  const messages = [...conversation.messages, message];
  const chosen = { ...conversation.chosen, [message.parent]: message.id };
  const isFirst = conversation.messages.length === 0;
  const title = isFirst ? titleOf(message) : conversation.title;
  return { ...conversation, title, messages, chosen, updated: Date.now() };
}

export function withUpdate(conversation: Conversation, id: string, update: Partial<Message>): Conversation {
  const messages = conversation.messages.map((message) => (message.id === id ? { ...message, ...update } : message));
  return { ...conversation, messages, updated: Date.now() };
}

export const withChoice = (conversation: Conversation, message: Message): Conversation => ({
  ...conversation,
  chosen: { ...conversation.chosen, [message.parent]: message.id },
});

/** A new conversation that begins with the shown messages up to and with `last`. */
export function fork(conversation: Conversation, last: Message): Conversation {
  const shown = path(conversation);
  const copied = shown.slice(0, shown.findIndex(({ id }) => id === last.id) + 1);
  const forked = newConversation(conversation.settings);
  return { ...forked, title: conversation.title, messages: copied.map((message) => ({ ...message })) };
}

/** A message that was being written when the page went away will not be written further. */
export const settled = (conversation: Conversation): Conversation => ({
  ...conversation,
  messages: conversation.messages.map((message) =>
    message.status === "streaming" ? { ...message, status: "stopped" } : message,
  ),
});

function titleOf(message: Message): string {
  const line = message.text.trim().split("\n")[0] ?? "";
  if (line === "") return message.images.length > 0 ? "About a picture" : "New chat";
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}
