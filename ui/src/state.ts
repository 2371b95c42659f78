// What the page shows and what a person can do: signals, and the actions that change them. Draws nothing.
import { computed, signal } from "@preact/signals";
import * as api from "./lib/api";
import * as tree from "./lib/conversation";
import type { Conversation, Head, Message } from "./lib/conversation";
import { DEFAULTS, problem, type Settings } from "./lib/settings";
import * as store from "./lib/store";

export type View = "chat" | "engine";
export type Theme = "system" | "light" | "dark";

export const view = signal<View>("chat");
export const heads = signal<Head[]>([]);
export const models = signal<api.Model[]>([]);
export const modelId = signal("");
export const notice = signal("");
export const spoken = signal("");
export const isKeyWanted = signal(false);
export const connection = signal<"connecting" | "ready" | "failed">("connecting");
export const theme = signal<Theme>((localStorage.getItem("spark-engine.theme") as Theme | null) ?? "system");
/** Pictures that go with the next message. */
export const attached = signal<string[]>([]);

/** Conversations in memory: the shown one, and those that are being answered. */
const loaded = signal<ReadonlyMap<string, Conversation>>(new Map());
const currentId = signal("");
/** Requests under way, by conversation. */
const running = signal<ReadonlyMap<string, AbortController>>(new Map());

export const current = computed(() => loaded.value.get(currentId.value));
export const shown = computed(() => (current.value === undefined ? [] : tree.path(current.value)));
export const isRunning = computed(() => running.value.has(currentId.value));
export const model = computed(() => models.value.find(({ id }) => id === modelId.value));

/** Chunks come faster than a page has to be drawn. */
const DRAW_MS = 50;
/** How often a growing answer is saved. */
const SAVE_MS = 2000;

export async function start(): Promise<void> {
  applyTheme();
  try {
    heads.value = await store.heads();
  } catch (error) {
    notice.value = `Conversations cannot be kept: ${text(error)}`;
  }
  await follow(location.hash);
  window.addEventListener("hashchange", () => void follow(location.hash));
  window.addEventListener("pagehide", () => [...running.value.keys()].forEach((id) => void keep(id)));
  await connect();
}

/** Asks for the models, again and again while the server is starting. */
export async function connect(): Promise<void> {
  try {
    models.value = await api.models();
    if (model.value === undefined) modelId.value = models.value[0]?.id ?? "";
    connection.value = "ready";
    isKeyWanted.value = false;
  } catch (error) {
    connection.value = "failed";
    isKeyWanted.value = error instanceof api.ApiError && error.status === 401;
    if (!isKeyWanted.value) setTimeout(() => void connect(), 3000);
  }
}

async function follow(hash: string): Promise<void> {
  const [, place, id] = /^#\/(\w*)\/?(\w*)/.exec(hash) ?? [];
  view.value = place === "engine" ? "engine" : "chat";
  if (place === "chat" && id && (await bring(id))) {
    currentId.value = id;
  } else if (view.value === "chat" && current.value?.messages.length !== 0) {
    begin();
  }
}

/** Loads a conversation; false if there is none of that id. */
async function bring(id: string): Promise<boolean> {
  if (loaded.value.has(id)) return true;
  const conversation = await store.load(id).catch(() => undefined);
  if (conversation === undefined) return false;
  put(tree.settled({ ...conversation, settings: { ...DEFAULTS, ...conversation.settings } }));
  return true;
}

function begin(): void {
  const conversation = tree.newConversation(current.value?.settings ?? rememberedSettings());
  put(conversation);
  currentId.value = conversation.id;
}

export function newChat(): void {
  if (current.value?.messages.length !== 0) begin();
  attached.value = [];
  location.hash = "#/";
  view.value = "chat";
}

function put(conversation: Conversation): void {
  loaded.value = new Map(loaded.value).set(conversation.id, conversation);
}

function update(id: string, change: (conversation: Conversation) => Conversation): void {
  const conversation = loaded.value.get(id);
  if (conversation !== undefined) put(change(conversation));
}

async function keep(id: string): Promise<void> {
  const conversation = loaded.value.get(id);
  if (conversation === undefined || conversation.messages.length === 0) return;
  const { title, updated } = conversation;
  heads.value = [{ id, title, updated }, ...heads.value.filter((head) => head.id !== id)].sort(
    (a, b) => b.updated - a.updated,
  );
  await store.save(conversation).catch((error: unknown) => {
    notice.value = `This conversation could not be saved: ${text(error)}`;
  });
}

/** Sends a message after `parent` and has it answered; false if it cannot be sent now, and `notice` says why. */
export function send(content: string, images: string[], parent = shown.value.at(-1)?.id ?? ""): boolean {
  const conversation = current.value;
  if (conversation === undefined || isRunning.value || !isReady(conversation)) return false;
  const message = tree.newMessage("user", parent, content, images);
  put(tree.withMessage(conversation, message));
  location.hash = `#/chat/${conversation.id}`;
  void answer(conversation.id, message.id);
  return true;
}

/** Another version of a message of the person, with an answer of its own. */
export const edit = (message: Message, content: string, images: string[]): boolean =>
  send(content, images, message.parent);

/** Another answer to the same message. */
export function regenerate(message: Message): void {
  const conversation = current.value;
  if (conversation === undefined || isRunning.value || !isReady(conversation)) return;
  void answer(conversation.id, message.parent);
}

function isReady({ settings }: Conversation): boolean {
  notice.value = problem(settings);
  return notice.value === "";
}

async function answer(id: string, parent: string): Promise<void> {
  const reply = { ...tree.newMessage("assistant", parent), model: modelId.value };
  update(id, (conversation) => {
    reply.json = conversation.settings.format !== "text";
    return tree.withMessage(conversation, reply);
  });
  const conversation = loaded.value.get(id)!;
  const controller = new AbortController();
  running.value = new Map(running.value).set(id, controller);
  await keep(id);
  let latest: api.Progress | undefined;
  let drawing: ReturnType<typeof setTimeout> | undefined;
  const draw = (): void => {
    drawing = undefined;
    if (latest === undefined) return;
    const { text, reasoning, stats, promptShare } = latest;
    update(id, (conversation) => tree.withUpdate(conversation, reply.id, { text, reasoning, stats, promptShare }));
  };
  const saving = setInterval(() => void keep(id), SAVE_MS);
  let end: Partial<Message>;
  try {
    const before = tree.path(conversation).filter((message) => message.id !== reply.id && !isEmpty(message));
    await api.chat(modelId.value, before, conversation.settings, controller.signal, (progress) => {
      latest = progress;
      drawing ??= setTimeout(draw, DRAW_MS);
    });
    end = { status: latest?.finish === "length" ? "length" : "done" };
  } catch (error) {
    const isStopped = controller.signal.aborted;
    end = isStopped ? { status: "stopped" } : { status: "error", error: text(error) };
    if (error instanceof api.ApiError && error.status === 401) isKeyWanted.value = true;
  }
  clearInterval(saving);
  clearTimeout(drawing);
  draw();
  update(id, (conversation) => tree.withUpdate(conversation, reply.id, end));
  const left = new Map(running.value);
  left.delete(id);
  running.value = left;
  if (id === currentId.value) spoken.value = end.error ?? latest?.text ?? "";
  await keep(id);
}

/** An answer that broke off before its first word says nothing to the model. */
const isEmpty = (message: Message): boolean =>
  message.role === "assistant" && message.text === "" && message.status !== "done";

export function stop(): void {
  running.value.get(currentId.value)?.abort();
}

export function choose(message: Message): void {
  update(currentId.value, (conversation) => tree.withChoice(conversation, message));
  void keep(currentId.value);
}

/** Goes on in a new conversation that has everything up to `message`. */
export async function fork(message: Message): Promise<void> {
  if (current.value === undefined) return;
  const forked = tree.fork(current.value, message);
  put(forked);
  await keep(forked.id);
  location.hash = `#/chat/${forked.id}`;
}

export async function remove(head: Head): Promise<void> {
  running.value.get(head.id)?.abort();
  // What is not loaded is not kept again.
  const left = new Map(loaded.value);
  left.delete(head.id);
  loaded.value = left;
  await store.remove(head.id);
  // Only now: what is shown as gone is gone, also for a page that is loaded at once.
  heads.value = heads.value.filter(({ id }) => id !== head.id);
  if (currentId.value === head.id) newChat();
}

export async function rename(head: Head, title: string): Promise<void> {
  if (title.trim() === "" || !(await bring(head.id))) return;
  update(head.id, (conversation) => ({ ...conversation, title: title.trim() }));
  await keep(head.id);
}

export function changeSettings(settings: Settings): void {
  update(currentId.value, (conversation) => ({ ...conversation, settings }));
  localStorage.setItem("spark-engine.settings", JSON.stringify(settings));
  void keep(currentId.value);
}

function rememberedSettings(): Settings {
  try {
    const kept = JSON.parse(localStorage.getItem("spark-engine.settings") ?? "{}") as Partial<Settings>;
    return { ...DEFAULTS, ...kept };
  } catch {
    return DEFAULTS;
  }
}

export async function importFile(file: File): Promise<void> {
  try {
    const added = await store.importAll(await file.text());
    heads.value = await store.heads();
    notice.value = `${added} ${added === 1 ? "conversation" : "conversations"} imported`;
  } catch (error) {
    notice.value = `${file.name} was not imported: ${text(error)}`;
  }
}

export async function exportFile(): Promise<void> {
  const url = URL.createObjectURL(new Blob([await store.exportAll()], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = `spark-engine-conversations-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  URL.revokeObjectURL(url);
}

export function setKey(key: string): void {
  api.apiKey.set(key);
  void connect();
}

export function setTheme(value: Theme): void {
  theme.value = value;
  localStorage.setItem("spark-engine.theme", value);
  applyTheme();
}

function applyTheme(): void {
  document.documentElement.dataset["theme"] = theme.value;
}

const text = (error: unknown): string => (error instanceof Error ? error.message : String(error));
