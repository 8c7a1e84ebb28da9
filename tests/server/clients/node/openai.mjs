// openai-node: chat, streams, parse, tools, responses.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { check, CITIES, expect, KEY, MODEL, QUESTION, report, URL } from "./checks.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: KEY, maxRetries: 0 });
const greedy = { model: MODEL, temperature: 0, messages: [{ role: "user", content: QUESTION }] };
const Weather = z.object({ city: z.enum(CITIES), degrees: z.number().int() });
const parameters = {
  type: "object",
  properties: { city: { enum: CITIES } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];

await check("chat", async () => {
  const answer = await client.chat.completions.create({ ...greedy, max_tokens: 16 });
  expect(answer.choices[0].message.content, "no text");
  expect((await client.models.list()).data[0].id === MODEL, "another model");
});

await check("streams", async () => {
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...greedy, max_tokens: 16, stream: true }))
    text += chunk.choices[0]?.delta.content ?? "";
  const whole = await client.chat.completions.create({ ...greedy, max_tokens: 16 });
  expect(text === whole.choices[0].message.content, `${text} is not the whole answer`);
});

await check("parse", async () => {
  const response_format = zodResponseFormat(Weather, "weather");
  const answer = await client.chat.completions.parse({ ...greedy, response_format, max_tokens: 64 });
  expect(CITIES.includes(answer.choices[0].message.parsed.city), "another city");
});

await check("tools", async () => {
  const ask = { ...greedy, tools, tool_choice: "required", max_tokens: 64 };
  const [call] = (await client.chat.completions.create(ask)).choices[0].message.tool_calls;
  expect(CITIES.includes(JSON.parse(call.function.arguments).city), "another city");
  const streamed = await client.chat.completions.stream(ask).finalMessage();
  expect(streamed.tool_calls[0].function.arguments === call.function.arguments, "streamed another call");
  let ran = 0;
  const run = (city) => `${++ran} ${city}`;
  const tool = { type: "function", function: { name: "get_weather", parameters, parse: JSON.parse, function: run } };
  const runner = client.chat.completions.runTools({ ...ask, tools: [tool] }, { maxChatCompletions: 2 });
  await runner.done();
  expect(ran > 0, "the tool was not run");
});

await check("responses", async () => {
  const { messages, ...rest } = greedy;
  const ask = { ...rest, input: QUESTION, max_output_tokens: 64 };
  expect((await client.responses.create(ask)).output_text, "no text");
  const format = zodTextFormat(Weather, "weather");
  expect(CITIES.includes((await client.responses.parse({ ...ask, text: { format } })).output_parsed.city), "no city");
  let text = "";
  for await (const event of await client.responses.create({ ...ask, stream: true }))
    if (event.type === "response.output_text.delta") text += event.delta;
  expect(text, "no stream");
});

report("openai");
