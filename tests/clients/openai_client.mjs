// Talks to a node through OpenAI's client for Node, as its users do. Argument: the node's address.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const url = process.argv[2];
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0, timeout: 60_000 });
const capital = [{ role: "user", content: "What is the capital of France?" }];
const ask = (further = {}) => client.chat.completions.create({ model: "tiny-chat", messages: capital, temperature: 0, ...further });

async function raises(kind, status, code, call) {
  const error = await call().then(() => assert.fail(`${kind.name} was expected`), (error) => error);
  assert.ok(error instanceof kind, `${error}`);
  assert.deepEqual([error.status, error.code], [status, code]);
  return error;
}

const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.deepEqual(models, ["echo", "tiny-chat"]);

const whole = await ask();
const text = whole.choices[0].message.content;
assert.match(text, /Paris/);
assert.equal(whole.choices[0].finish_reason, "stop");
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);

const chunks = [];
for await (const chunk of await ask({ stream: true, stream_options: { include_usage: true } })) chunks.push(chunk);
assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join(""), text);
assert.deepEqual(chunks.at(-1).choices, []);
assert.deepEqual(chunks.at(-1).usage, whole.usage);
assert.equal(chunks.filter((chunk) => chunk.choices[0]?.finish_reason).length, 1);

const runner = client.chat.completions.stream({ model: "tiny-chat", messages: capital, temperature: 0 });
assert.equal(await runner.finalContent(), text);

const stopped = (await ask({ stop: ["Paris"] })).choices[0];
assert.equal(stopped.message.content, text.slice(0, text.indexOf("Paris")));
assert.equal(stopped.finish_reason, "stop");
const cut = await ask({ max_tokens: 2 });
assert.deepEqual([cut.choices[0].finish_reason, cut.usage.completion_tokens], ["length", 2]);

const story = [{ role: "user", content: "Tell me a story about Mia." }];
const seeded = [];
for (const seed of [7, 7, 8, 9]) seeded.push((await ask({ messages: story, temperature: 1.5, seed })).choices[0].message.content);
assert.equal(seeded[0], seeded[1]);
assert.ok(new Set(seeded).size > 1);

const plain = await client.completions.create({ model: "echo", prompt: "one two" });
assert.equal(plain.choices[0].text, "one two");

const vectors = await client.embeddings.create({ model: "tiny-chat", input: ["a plugin", "Paris"] });
assert.deepEqual(vectors.data.map((vector) => vector.index), [0, 1]);
const length = vectors.data[0].embedding.reduce((sum, x) => sum + x * x, 0);
assert.ok(Math.abs(length - 1) < 1e-3, `${length}`);

await raises(OpenAI.NotFoundError, 404, "model_not_found", () => ask({ model: "gpt-9" }));
const error = await raises(OpenAI.BadRequestError, 400, "invalid_value", () => ask({ temperature: 9 }));
assert.equal(error.param, "temperature");
await raises(OpenAI.BadRequestError, 400, "unknown_parameter", () => ask({ temperatur: 1 }));
const long = [{ role: "user", content: "word ".repeat(100) }];
await raises(OpenAI.BadRequestError, 400, "context_length_exceeded", () => ask({ model: "echo", messages: long }));

// Leaving a stream frees its slot, of which there is one.
const words = (number) => [{ role: "user", content: `${number} `.repeat(30) }];
const left = await ask({ model: "echo", messages: words("left"), stream: true });
for await (const chunk of left) if (chunk.choices[0]?.delta?.content) break;
assert.equal((await ask({ model: "echo", messages: words("next") })).choices[0].message.content, "next ".repeat(30));

// One slot and one place in the queue: of eight at once some are sent away. The client's own retries are let in.
const crowd = (maxRetries) =>
  Promise.allSettled([...Array(8).keys()].map((number) => client.chat.completions.create({ model: "echo", messages: words(number) }, { maxRetries })));
const refused = (await crowd(0)).filter((answer) => answer.status === "rejected").map((answer) => answer.reason);
assert.ok(refused.length > 0, "eight requests at one slot were all let in");
for (const error of refused) {
  assert.ok(error instanceof OpenAI.RateLimitError, `${error}`);
  assert.deepEqual([error.status, error.code], [429, "queue_full"]);
  assert.ok(Number(error.headers.get("retry-after")) >= 1);
}
assert.deepEqual((await crowd(8)).filter((answer) => answer.status === "rejected"), []);

const { version } = JSON.parse(readFileSync(new URL("node_modules/openai/package.json", import.meta.url)));
console.log(`openai ${version} for Node: good`);
