// The Vercel AI SDK against the real binary: text, a stream, a tool, an object.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

import { startServer } from "./server.mjs";

const prompt = "What is the capital of France?";
const hana = { name: "Hana", age: 48, city: "Warsaw" };
const person = z.object({ name: z.string(), age: z.number().int(), city: z.string() });
let server;
let options;

before(async () => {
  server = await startServer();
  const windrose = createOpenAICompatible({
    name: "windrose",
    baseURL: `${server.url}/v1`,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
  options = { model: windrose("windrose-demo"), temperature: 0, maxRetries: 0 };
});

after(async () => {
  assert.equal(await server.stop(), 0);
});

test("generateText answers", async () => {
  const { text, finishReason, usage } = await generateText({ ...options, prompt });
  assert.match(text, /Paris/);
  assert.equal(finishReason, "stop");
  assert.equal(usage.totalTokens, usage.inputTokens + usage.outputTokens);
});

test("streamText is the same answer", async () => {
  const { text } = await generateText({ ...options, prompt });
  const stream = streamText({ ...options, prompt });
  const pieces = [];
  for await (const piece of stream.textStream) pieces.push(piece);
  assert.ok(pieces.length > 1);
  assert.equal(pieces.join(""), text);
  assert.ok((await stream.usage).outputTokens > 0);
});

const tools = {
  get_time: tool({
    description: "Get the time in a city.",
    // As the demo model has seen it: zod's `additionalProperties` would put it off.
    inputSchema: jsonSchema({ type: "object", properties: { city: { type: "string" } }, required: ["city"] }),
    // As text, spaced as the demo model has read results: others it copies well or badly by the call's random id.
    execute: async () => '{"time": "15:43"}',
  }),
};
const askTime = { tools, prompt: "What time is it in Hamburg?", stopWhen: stepCountIs(2) };

/** Asks again if the time was miscopied, as the demo model does after one call's random id in some 750. */
async function withTime(ask) {
  const answer = await ask();
  return /15:43/.test(await answer.text) ? answer : ask();
}

test("generateText calls a tool and answers from its result", async () => {
  const { steps, text } = await withTime(() => generateText({ ...options, ...askTime }));
  assert.deepEqual(
    steps[0].toolCalls.map(({ toolName, input }) => [toolName, input]),
    [["get_time", { city: "Hamburg" }]],
  );
  assert.match(text, /15:43/);
});

test("streamText calls the same tool", async () => {
  const stream = await withTime(async () => {
    const stream = streamText({ ...options, ...askTime });
    await stream.consumeStream();
    return stream;
  });
  const [first] = await stream.steps;
  assert.deepEqual(first.toolCalls[0].input, { city: "Hamburg" });
  assert.match(await stream.text, /15:43/);
});

test("generateObject and streamObject read an object out of a sentence", async () => {
  const question = { ...options, schema: person, prompt: "Extract JSON: Hana is 48 and lives in Warsaw." };
  assert.deepEqual((await generateObject(question)).object, hana);
  const stream = streamObject(question);
  let last;
  for await (const partial of stream.partialObjectStream) last = partial;
  assert.deepEqual(last, hana);
});

test("an error has the server's words", async () => {
  const refused = generateText({ ...options, prompt, temperature: 9 });
  await assert.rejects(refused, (error) => error.statusCode === 400 && /temperature/.test(error.message));
});
