// OpenAI's client for Node against the service with its embedded models. `tests/test_openai_demo.py` runs it.
// Reads {"url", "picture", "description"} from stdin, prints the name of each check that has passed.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const given = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL: given.url, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const user = (content) => [{ role: "user", content }];

const checks = {
  async models() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    assert.deepEqual(names, ["avibe", "avision"]);
    assert.equal((await client.models.retrieve("avision")).id, "avision");
  },

  async chat() {
    const asked = { model: "avibe", messages: user("What is the capital of France?"), temperature: 0, max_tokens: 20 };
    const { data, request_id } = await client.chat.completions.create(asked).withResponse();
    assert.match(data.choices[0].message.content, /Paris/);
    assert.equal(data.choices[0].finish_reason, "stop");
    assert.ok(request_id);
  },

  async stream() {
    const asked = {
      model: "avibe", messages: user("Ёжик 🎉 и\u0306"), temperature: 1, seed: 5, max_tokens: 16,
    };
    const whole = await client.chat.completions.create(asked);
    const stream = await client.chat.completions.create({
      ...asked, stream: true, stream_options: { include_usage: true },
    });
    let text = "", usage;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
    const runner = client.chat.completions.stream(asked);
    assert.equal(await runner.finalContent(), text);
  },

  async completions() {
    const answer = await client.completions.create({ model: "avibe", prompt: "One, two, three,", max_tokens: 4 });
    assert.equal(answer.usage.completion_tokens, 4);
  },

  async error() {
    const fails = async (fields, Kind, code, param) => {
      const asked = client.chat.completions.create({ model: "avibe", messages: user("a"), ...fields });
      await assert.rejects(asked, (error) => {
        assert.ok(error instanceof Kind && error.requestID, String(error));
        assert.deepEqual([error.code, error.param], [code, param]);
        return true;
      });
    };
    await fails({ model: "gpt-4o" }, OpenAI.NotFoundError, "model_not_found", "model");
    await fails({ temperature: 3 }, OpenAI.BadRequestError, "invalid_request", "temperature");
    await fails({ temperature: 3, stream: true }, OpenAI.BadRequestError, "invalid_request", "temperature");
    const tools = [{ type: "function", function: { name: "f", parameters: { type: "object", properties: {} } } }];
    await fails({ tools }, OpenAI.BadRequestError, "tools_unsupported", "tools");
  },

  async picture() {
    const content = [
      { type: "image_url", image_url: { url: given.picture } },
      { type: "text", text: "Describe the picture." },
    ];
    const answer = await client.chat.completions.create({ model: "avision", messages: user(content), temperature: 0 });
    assert.equal(answer.choices[0].message.content, given.description);
  },

  async schema() {
    const schema = {
      type: "object",
      properties: { colour: { enum: ["красный", "синий"] }, wheels: { type: "integer", minimum: 2, maximum: 4 } },
      required: ["colour", "wheels"],
      additionalProperties: false,
    };
    const answer = await client.chat.completions.parse({
      model: "avibe", messages: user("Describe a car in JSON."), temperature: 1, seed: 3, max_tokens: 60,
      response_format: { type: "json_schema", json_schema: { name: "car", schema, strict: true } },
    });
    const car = answer.choices[0].message.parsed;
    assert.ok(["красный", "синий"].includes(car.colour) && [2, 3, 4].includes(car.wheels), JSON.stringify(car));
    const back = [...user("Describe a car in JSON."), answer.choices[0].message, ...user("And another.")];
    await client.chat.completions.create({ model: "avibe", messages: back, max_tokens: 1 });
  },

  async leave() {
    const stream = await client.chat.completions.create({
      model: "avibe", messages: user("Tell a story."), stream: true,
    });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
    assert.ok(stream.controller.signal.aborted);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(name);
}
