// Conversations in the browser's database, and the file they are exported to. Nothing leaves the browser.
import { newId, type Conversation, type Head, type Message } from "./conversation";
import { DEFAULTS } from "./settings";

const HEADS = "heads";
const BODIES = "conversations";

let database: Promise<IDBDatabase> | undefined;

function open(): Promise<IDBDatabase> {
  database ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("spark-engine", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore(HEADS, { keyPath: "id" });
      request.result.createObjectStore(BODIES, { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error ?? new Error("the browser's database cannot be opened"));
  });
  return database;
}

async function transact<T>(
  mode: IDBTransactionMode,
  work: (heads: IDBObjectStore, bodies: IDBObjectStore) => IDBRequest<T>,
): Promise<T> {
  const transaction = (await open()).transaction([HEADS, BODIES], mode);
  const request = work(transaction.objectStore(HEADS), transaction.objectStore(BODIES));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error ?? new Error("not saved"));
  });
}

/** Titles of all conversations, the last used first. */
export async function heads(): Promise<Head[]> {
  const all = (await transact("readonly", (store) => store.getAll())) as Head[];
  return all.sort((a, b) => b.updated - a.updated);
}

export const load = (id: string): Promise<Conversation | undefined> =>
  transact("readonly", (_, bodies) => bodies.get(id) as IDBRequest<Conversation | undefined>);

export const save = (conversation: Conversation): Promise<unknown> =>
  transact("readwrite", (heads, bodies) => {
    const { id, title, updated } = conversation;
    heads.put({ id, title, updated });
    return bodies.put(conversation);
  });

export const remove = (id: string): Promise<unknown> =>
  transact("readwrite", (heads, bodies) => {
    heads.delete(id);
    return bodies.delete(id);
  });

const FORMAT = "spark-engine-conversations";

/** Every conversation as one JSON text. */
export async function exportAll(): Promise<string> {
  const conversations = await transact("readonly", (_, bodies) => bodies.getAll() as IDBRequest<Conversation[]>);
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** Adds the conversations of an exported file; returns how many were new. What is there already is not overwritten. */
export async function importAll(text: string): Promise<number> {
  const conversations = parse(text);
  const known = new Map((await heads()).map((head) => [head.id, head.updated]));
  const fresh = conversations.filter(({ id, updated }) => known.get(id) !== updated);
  for (const conversation of fresh) {
    await save(known.has(conversation.id) ? { ...conversation, id: newId() } : conversation);
  }
  return fresh.length;
}

/** Takes nothing on trust: a file may come from anywhere. */
function parse(text: string): Conversation[] {
  const file = JSON.parse(text) as { format?: unknown; version?: unknown; conversations?: unknown };
  if (file?.format !== FORMAT || file.version !== 1 || !Array.isArray(file.conversations)) {
    throw new Error("this is not a file that was exported here");
  }
  return file.conversations.map((value, index) => conversation(value, `conversation ${index + 1}`));
}

function conversation(value: unknown, where: string): Conversation {
  const from = record(value, where);
  if (!Array.isArray(from["messages"])) throw new Error(`${where} has no messages`);
  const messages = from["messages"].map((entry: unknown) => message(entry, where));
  const ids = new Set(messages.map(({ id }) => id));
  const seen = new Set([""]);
  for (const { id, parent } of messages) {
    // Parents come before their successors, so the tree has no loops.
    if (!seen.has(parent) || ids.size !== messages.length) throw new Error(`${where}: its messages are no tree`);
    seen.add(id);
  }
  const chosen = Object.entries(record(from["chosen"] ?? {}, where)).filter(([, id]) => typeof id === "string");
  const settings = Object.entries(record(from["settings"] ?? {}, where));
  const known = settings.filter(([key, setting]) => key in DEFAULTS && typeof setting === "string");
  return {
    id: string(from["id"], where),
    title: string(from["title"], where),
    created: Number(from["created"]) || Date.now(),
    updated: Number(from["updated"]) || Date.now(),
    messages,
    chosen: Object.fromEntries(chosen) as Record<string, string>,
    settings: { ...DEFAULTS, ...Object.fromEntries(known) },
  };
}

function message(value: unknown, where: string): Message {
  const from = record(value, where);
  const role = from["role"];
  if (role !== "user" && role !== "assistant") throw new Error(`${where}: a message of ${String(role)}`);
  const images = Array.isArray(from["images"]) ? from["images"] : [];
  if (!images.every((url: unknown) => typeof url === "string" && url.startsWith("data:image/"))) {
    throw new Error(`${where}: a picture is not a data: address`);
  }
  return {
    id: string(from["id"], where),
    parent: string(from["parent"] ?? "", where),
    role,
    text: string(from["text"] ?? "", where),
    reasoning: string(from["reasoning"] ?? "", where),
    images: images as string[],
    status: from["status"] === "length" || from["status"] === "error" ? from["status"] : "done",
    error: typeof from["error"] === "string" ? from["error"] : undefined,
    created: Number(from["created"]) || Date.now(),
    model: typeof from["model"] === "string" ? from["model"] : undefined,
    json: from["json"] === true,
  };
}

function record(value: unknown, where: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null) throw new Error(`${where} is not an object`);
  return value as Record<string, unknown>;
}

function string(value: unknown, where: string): string {
  if (typeof value !== "string") throw new Error(`${where}: a text is missing`);
  return value;
}
