// Drives a server of the demo model with Vercel's `ai` package, by chat completions and by responses.
//
//     node vercel_ai.mjs http://127.0.0.1:8000
//
// Ends with status 0 if all of it worked.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = `${process.argv[2]}/v1`;
const greedy = { temperature: 0, maxRetries: 0, maxOutputTokens: 200 };
const prompt = "What is 347 + 185?";

async function answer(model) {
  const { text, usage } = await generateText({ ...greedy, model, prompt });
  assert.equal(text, "532");
  assert.ok(usage.outputTokens > 1);
  const pieces = [];
  for await (const piece of streamText({ ...greedy, model, prompt }).textStream) pieces.push(piece);
  assert.equal(pieces.join(""), "532");
  assert.ok(pieces.length > 1);
}

async function tools(model) {
  const asked = [];
  const weather = tool({
    description: "The weather in a city.",
    inputSchema: z.object({ city: z.string(), unit: z.enum(["celsius", "fahrenheit"]).optional() }),
    execute: (input) => {
      asked.push(input);
      // With the spaces that the demo model was trained with.
      return '{"sky": "rainy", "temperature": 7, "unit": "celsius"}';
    },
  });
  const question = "What is the weather in Oslo in celsius?";
  const options = { ...greedy, model, tools: { weather }, stopWhen: stepCountIs(2), prompt: question };
  const { text } = await generateText(options);
  assert.equal(text, "It is rainy in Oslo, 7 degrees celsius.");
  assert.equal(await streamText(options).text, text);
  assert.deepEqual(asked, Array(2).fill({ city: "Oslo", unit: "celsius" }));
}

async function objects(model) {
  const schema = z.object({ name: z.string(), city: z.string(), age: z.number() });
  const text = "Emma is 90 years old and lives in Leipzig.\nGive name, city and age as JSON.";
  const { output } = await generateText({ ...greedy, model, prompt: text, output: Output.object({ schema }) });
  assert.deepEqual(output, { name: "Emma", city: "Leipzig", age: 90 });
}

async function thoughts(model) {
  const providerOptions = { spark: { reasoningEffort: "high" } };
  const { reasoningText, text } = await generateText({ ...greedy, model, prompt, providerOptions });
  assert.equal(text, "532");
  assert.match(reasoningText, /Result: 532/);
}

async function errors(model) {
  const wrong = generateText({ ...greedy, model, prompt, temperature: 9 });
  await assert.rejects(wrong, (error) => error.statusCode === 400 && /temperature/.test(error.message));
}

const options = { name: "spark", baseURL, supportsStructuredOutputs: true, includeUsage: true };
const compatible = createOpenAICompatible(options)("spark-tiny-vl");
const responses = createOpenAI({ baseURL, apiKey: "unused" }).responses("spark-tiny-vl");
for (const check of [answer, tools, objects, errors]) {
  await check(compatible);
  await check(responses);
}
await thoughts(compatible);
console.log("ai: all checks passed");
