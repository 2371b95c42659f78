// Drives a server of the demo model with the official `openai` package for Node.
//
//     node openai_client.mjs http://127.0.0.1:8000
//
// Chats, streams, calls tools, parses, makes responses, and provokes errors. Ends with status 0 if all of it worked.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "unused", maxRetries: 0, timeout: 120_000 });
const model = "spark-tiny-vl";
const sum = [{ role: "user", content: "What is 347 + 185?" }];
const greedy = { model, temperature: 0, max_completion_tokens: 200 };
// With the spaces that the demo model was trained with.
const rain = '{"sky": "rainy", "temperature": 7, "unit": "celsius"}';
const parameters = {
  type: "object",
  properties: { city: { type: "string" }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } },
  required: ["city"],
};

async function chat() {
  const models = await client.models.list();
  assert.equal(models.data[0].id, model);
  const { data, request_id } = await client.chat.completions.create({ ...greedy, messages: sum }).withResponse();
  assert.equal(data.choices[0].message.content, "532");
  assert.equal(data.id, `chatcmpl-${request_id}`);
}

async function stream() {
  const runner = client.chat.completions.stream({ ...greedy, messages: sum, stream_options: { include_usage: true } });
  let text = "";
  runner.on("content", (piece) => (text += piece));
  const final = await runner.finalChatCompletion();
  assert.equal(text, "532");
  assert.equal(final.choices[0].message.content, "532");
  assert.ok((await runner.totalUsage()).completion_tokens > 1);
}

async function tools() {
  const asked = [];
  const weather = {
    type: "function",
    function: {
      name: "weather",
      description: "The weather in a city.",
      parameters,
      parse: JSON.parse,
      function: (input) => {
        asked.push(input);
        return rain;
      },
    },
  };
  const messages = [{ role: "user", content: "What is the weather in Oslo in celsius?" }];
  const runner = client.chat.completions.runTools({ ...greedy, messages, tools: [weather] });
  assert.equal(await runner.finalContent(), "It is rainy in Oslo, 7 degrees celsius.");
  assert.deepEqual(asked, [{ city: "Oslo", unit: "celsius" }]);
}

async function parse() {
  const person = z.object({ name: z.string(), city: z.string(), age: z.number().int() });
  const text = "Emma is 90 years old and lives in Leipzig.\nGive name, city and age as JSON.";
  const completion = await client.chat.completions.parse({
    ...greedy,
    messages: [{ role: "user", content: text }],
    response_format: zodResponseFormat(person, "person"),
  });
  assert.deepEqual(completion.choices[0].message.parsed, { name: "Emma", city: "Leipzig", age: 90 });
}

async function responses() {
  const weather = { type: "function", name: "weather", description: "The weather in a city.", parameters, strict: false };
  const input = "What is the weather in Oslo in celsius?";
  const runner = client.responses.stream({ model, input, tools: [weather], temperature: 0 });
  const types = new Set();
  for await (const event of runner) types.add(event.type);
  const first = await runner.finalResponse();
  assert.ok(types.has("response.function_call_arguments.done"));
  const [call] = first.output;
  assert.deepEqual(JSON.parse(call.arguments), { city: "Oslo", unit: "celsius" });
  const told = await client.responses.create({
    model,
    previous_response_id: first.id,
    input: [{ type: "function_call_output", call_id: call.call_id, output: rain }],
    tools: [weather],
    temperature: 0,
  });
  assert.equal(told.output_text, "It is rainy in Oslo, 7 degrees celsius.");
  assert.equal((await client.responses.retrieve(told.id)).id, told.id);
}

async function errors() {
  const wrong = client.chat.completions.create({ model, messages: sum, temperature: 9 });
  await assert.rejects(wrong, (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
  const unknown = client.responses.create({ model: "no-such-model", input: "x" });
  await assert.rejects(unknown, OpenAI.NotFoundError);
  const controller = new AbortController();
  const endless = { ...greedy, max_completion_tokens: 3000, messages: sum, stream: true, ignore_eos: true };
  const chunks = await client.chat.completions.create(endless, { signal: controller.signal });
  for await (const _ of chunks) {
    controller.abort();
  }
}

for (const check of [chat, stream, tools, parse, responses, errors]) await check();
console.log("openai for Node: all checks passed");
