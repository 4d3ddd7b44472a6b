// The official OpenAI package for Node against the real binary.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import OpenAI from "openai";

import { startServer } from "./server.mjs";

const messages = [{ role: "user", content: "What is the capital of France?" }];
const question = { model: "windrose-demo", messages, temperature: 0 };
let server;
let client;

before(async () => {
  server = await startServer();
  client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "none", maxRetries: 0 });
});

after(async () => {
  assert.equal(await server.stop(), 0);
});

test("a question is answered", async () => {
  const answer = await client.chat.completions.create(question);
  assert.match(answer.choices[0].message.content, /Paris/);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
});

test("a stream is the same answer", async () => {
  const whole = await client.chat.completions.create(question);
  const stream = await client.chat.completions.create({
    ...question,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);
});

test("the stream helper assembles the final message", async () => {
  const runner = client.chat.completions.stream(question);
  const final = await runner.finalChatCompletion();
  assert.match(final.choices[0].message.content, /Paris/);
});

test("completions continue text", async () => {
  const answer = await client.completions.create({
    model: "windrose-demo",
    prompt: ["Once upon a time", "The capital of Italy is"],
    max_tokens: 8,
    temperature: 0,
  });
  assert.deepEqual(
    answer.choices.map((choice) => choice.index),
    [0, 1],
  );
});

test("a response is the same whole, streamed and gone on from", async () => {
  const request = { model: "windrose-demo", input: messages[0].content, temperature: 0 };
  const whole = await client.responses.create(request);
  assert.match(whole.output_text, /Paris/);
  const final = await client.responses.stream(request).finalResponse();
  assert.equal(final.output_text, whole.output_text);
  const next = await client.responses.create({
    ...request,
    input: "And of Italy?",
    previous_response_id: whole.id,
  });
  assert.equal(next.status, "completed");
  assert.equal((await client.responses.retrieve(next.id)).output_text, next.output_text);
  await assert.rejects(client.responses.create({ ...request, background: true }), OpenAI.BadRequestError);
});

test("models are listed", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, ["windrose-demo"]);
});

test("errors have the client's classes", async () => {
  await assert.rejects(client.chat.completions.create({ ...question, temperature: 9 }), OpenAI.BadRequestError);
  await assert.rejects(client.chat.completions.create({ ...question, model: "gpt-9" }), OpenAI.NotFoundError);
});

test("an aborted stream frees its sequence", async () => {
  const stream = await client.chat.completions.create({
    ...question,
    stream: true,
    max_tokens: 1000,
    ignore_eos: true,
  });
  for await (const _ of stream) break;
  stream.controller.abort();
  const running = async () => {
    const text = await (await fetch(`${server.url}/metrics`)).text();
    return Number(text.match(/^windrose_requests_running(?:\{.*\})? (\d+)/m)[1]);
  };
  const deadline = Date.now() + 5000;
  while ((await running()) > 0) assert.ok(Date.now() < deadline, "the sequence still runs");
});
