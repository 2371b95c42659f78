// The calls to the server: its models, streamed chats, its metrics. Knows bodies and status codes, nothing of the page.
import type { Message, Stats } from "./conversation";
import { requestFields, type Settings } from "./settings";
import { events } from "./sse";

const KEY = "spark-engine.api-key";

/** The key is forgotten when the tab is closed. */
export const apiKey = {
  get: (): string => sessionStorage.getItem(KEY) ?? "",
  set: (key: string): void => (key === "" ? sessionStorage.removeItem(KEY) : sessionStorage.setItem(KEY, key)),
};

/** An answer other than 200, or none. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

export interface Model {
  id: string;
  maxModelLen: number | null;
}

async function call(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  if (apiKey.get() !== "") headers.set("Authorization", `Bearer ${apiKey.get()}`);
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (!response.ok) throw new ApiError(response.status, await reason(response));
  return response;
}

async function reason(response: Response): Promise<string> {
  const text = await response.text().catch(() => "");
  try {
    const body = JSON.parse(text) as { error?: { message?: unknown } };
    if (typeof body.error?.message === "string") return body.error.message;
  } catch {
    // Not ours: a proxy's page, for example.
  }
  return `HTTP ${response.status} ${response.statusText}`.trim();
}

export async function models(): Promise<Model[]> {
  const body = (await (await call("v1/models")).json()) as { data?: { id: string; max_model_len?: number }[] };
  return (body.data ?? []).map(({ id, max_model_len }) => ({ id, maxModelLen: max_model_len ?? null }));
}

export const metricsText = async (signal: AbortSignal): Promise<string> => (await call("metrics", { signal })).text();

/** What has arrived of an answer so far. */
export interface Progress {
  text: string;
  reasoning: string;
  stats: Stats | undefined;
  /** Share of the prompt that has been read, while it is long. */
  promptShare: number | undefined;
  /** `finish_reason`, once there is one. */
  finish: string | undefined;
}

interface Chunk {
  error?: { message?: string };
  prompt_progress?: { total: number; processed: number };
  choices?: {
    delta?: { content?: string | null; reasoning?: string | null; reasoning_content?: string | null };
    finish_reason?: string | null;
  }[];
  usage?: {
    prompt_tokens: number;
    completion_tokens: number;
    prompt_tokens_details?: { cached_tokens?: number } | null;
  } | null;
}

/** Streams the answer to `messages`; calls `report` for every chunk, always with all that has arrived. */
export async function chat(
  model: string,
  messages: Message[],
  settings: Settings,
  signal: AbortSignal,
  report: (progress: Progress) => void,
): Promise<void> {
  const system = settings.system.trim() === "" ? [] : [{ role: "system", content: settings.system }];
  const body = {
    model,
    messages: [...system, ...messages.map(wire)],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    return_progress: true,
    ...requestFields(settings),
  };
  const began = performance.now();
  const init = { method: "POST", body: JSON.stringify(body), signal, headers: { "Content-Type": "application/json" } };
  const response = await call("v1/chat/completions", init);
  if (response.body === null) throw new ApiError(response.status, "The answer has no body.");
  const progress: Progress = { text: "", reasoning: "", stats: undefined, promptShare: undefined, finish: undefined };
  const clock = new Clock(began);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data) as Chunk;
    if (chunk.error) throw new ApiError(200, chunk.error.message ?? "The answer broke off.");
    const { prompt_progress: read } = chunk;
    if (read !== undefined && read.total > 0) progress.promptShare = read.processed / read.total;
    const choice = chunk.choices?.[0];
    const reasoning = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "";
    const content = choice?.delta?.content ?? "";
    progress.reasoning += reasoning;
    progress.text += content;
    progress.finish = choice?.finish_reason ?? progress.finish;
    progress.stats = clock.tick(chunk.usage, reasoning + content !== "") ?? progress.stats;
    report({ ...progress });
  }
  if (progress.finish === undefined) throw new ApiError(200, "The connection was closed before the answer ended.");
}

/** Times of tokens. A server without running usage is counted by chunks. */
class Clock {
  private first = 0;
  private last = 0;
  private numChunks = 0;

  constructor(private readonly began: number) {}

  tick(usage: Chunk["usage"], hasText: boolean): Stats | undefined {
    const outputTokens = usage?.completion_tokens ?? (this.numChunks += hasText ? 1 : 0);
    if (outputTokens === 0) return undefined;
    const now = performance.now();
    if (this.first === 0) this.first = now;
    // The last chunk brings the usage of all and no token.
    if (hasText) this.last = now;
    const seconds = (this.last - this.first) / 1000;
    return {
      promptTokens: usage?.prompt_tokens ?? 0,
      outputTokens,
      cachedTokens: usage?.prompt_tokens_details?.cached_tokens ?? 0,
      firstTokenMs: this.first - this.began,
      // Chunks that come together say nothing about the time between them.
      tokensPerSecond: seconds > 0.02 ? (outputTokens - 1) / seconds : 0,
    };
  }
}

/** A message as the API takes it. Thoughts stay here: templates drop them too. */
function wire({ role, text, images }: Message): unknown {
  if (images.length === 0) return { role, content: text };
  const parts: unknown[] = images.map((url) => ({ type: "image_url", image_url: { url } }));
  if (text !== "") parts.push({ type: "text", text });
  return { role, content: parts };
}
