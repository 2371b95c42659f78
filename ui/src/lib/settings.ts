// What a person may set for a conversation, and the fields of the request that follow from it.

/** Numbers are kept as they were typed; an empty one leaves the choice to the server. */
export interface Settings {
  system: string;
  temperature: string;
  top_p: string;
  top_k: string;
  min_p: string;
  max_tokens: string;
  seed: string;
  presence_penalty: string;
  frequency_penalty: string;
  repetition_penalty: string;
  /** One stop string a line. */
  stop: string;
  thinking: "default" | "on" | "off";
  format: "text" | "json_object" | "json_schema";
  schema: string;
}

export const DEFAULTS: Settings = {
  system: "",
  temperature: "",
  top_p: "",
  top_k: "",
  min_p: "",
  max_tokens: "",
  seed: "",
  presence_penalty: "",
  frequency_penalty: "",
  repetition_penalty: "",
  stop: "",
  thinking: "default",
  format: "text",
  schema: "",
};

export interface NumberField {
  key: keyof Settings;
  label: string;
  hint: string;
  min: number;
  max: number;
  step: number;
}

export const NUMBER_FIELDS: NumberField[] = [
  { key: "temperature", label: "Temperature", hint: "0 always takes the likeliest token", min: 0, max: 5, step: 0.05 },
  { key: "top_p", label: "Top p", hint: "smallest set of tokens with this probability", min: 0.01, max: 1, step: 0.01 },
  { key: "top_k", label: "Top k", hint: "likeliest tokens to choose from; 0 is all", min: 0, max: 1e6, step: 1 },
  {
    key: "min_p",
    label: "Min p",
    hint: "least share of the likeliest token's probability",
    min: 0,
    max: 1,
    step: 0.01,
  },
  { key: "max_tokens", label: "Most tokens", hint: "of an answer, thoughts included", min: 1, max: 1e7, step: 1 },
  { key: "seed", label: "Seed", hint: "equal seeds repeat an answer", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
  {
    key: "presence_penalty",
    label: "Presence penalty",
    hint: "on tokens that have occurred",
    min: -2,
    max: 2,
    step: 0.1,
  },
  { key: "frequency_penalty", label: "Frequency penalty", hint: "for each time they did", min: -2, max: 2, step: 0.1 },
  {
    key: "repetition_penalty",
    label: "Repetition penalty",
    hint: "divides their logits; 1 is none",
    min: 0.01,
    max: 2,
    step: 0.01,
  },
];

/** Why the settings cannot be used, or "". */
export function problem(settings: Settings): string {
  for (const { key, label, min, max, step } of NUMBER_FIELDS) {
    const text = settings[key].trim();
    if (text === "") continue;
    const value = Number(text);
    if (!Number.isFinite(value) || value < min || value > max) return `${label} must be from ${min} to ${max}`;
    if (step === 1 && !Number.isInteger(value)) return `${label} must be a whole number`;
  }
  if (settings.format !== "json_schema") return "";
  try {
    const schema: unknown = JSON.parse(settings.schema);
    return typeof schema === "object" && schema !== null && !Array.isArray(schema)
      ? ""
      : "The JSON schema must be an object";
  } catch (error) {
    return `The JSON schema is not JSON: ${error instanceof Error ? error.message : String(error)}`;
  }
}

/** Fields of a chat request. The settings have no `problem`. */
export function requestFields(settings: Settings): Record<string, unknown> {
  const fields: Record<string, unknown> = {};
  for (const { key } of NUMBER_FIELDS) {
    const text = settings[key].trim();
    // The name of the field that OpenAI has now.
    if (text !== "") fields[key === "max_tokens" ? "max_completion_tokens" : key] = Number(text);
  }
  const stop = settings.stop.split("\n").filter((line) => line !== "");
  if (stop.length > 0) fields["stop"] = stop;
  if (settings.thinking !== "default") fields["chat_template_kwargs"] = { enable_thinking: settings.thinking === "on" };
  if (settings.format === "json_object") fields["response_format"] = { type: "json_object" };
  if (settings.format === "json_schema") {
    const json_schema = { name: "answer", schema: JSON.parse(settings.schema) as unknown, strict: true };
    fields["response_format"] = { type: "json_schema", json_schema };
  }
  return fields;
}
