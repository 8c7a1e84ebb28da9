// The AI SDK by its two providers: text, streams, structured output, tools.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { check, CITIES, expect, KEY, MODEL, QUESTION, report, URL } from "./checks.mjs";

const official = createOpenAI({ baseURL: URL, apiKey: KEY });
const settings = { name: "specformer", baseURL: URL, apiKey: KEY, supportsStructuredOutputs: true };
const compatible = createOpenAICompatible(settings);
const models = { compatible: compatible(MODEL), chat: official.chat(MODEL), responses: official.responses(MODEL) };
const Weather = z.object({ city: z.enum(CITIES), degrees: z.number().int() });

for (const [name, model] of Object.entries(models)) {
  const ask = { model, prompt: QUESTION, temperature: 0, maxOutputTokens: 64, maxRetries: 0 };

  await check(`text: ${name}`, async () => {
    const { text } = await generateText(ask);
    let streamed = "";
    for await (const piece of streamText(ask).textStream) streamed += piece;
    expect(text && streamed === text, `${streamed} is not ${text}`);
  });

  await check(`structured output: ${name}`, async () => {
    const { output } = await generateText({ ...ask, output: Output.object({ schema: Weather }) });
    expect(CITIES.includes(output.city), "another city");
    const stream = streamText({ ...ask, output: Output.object({ schema: Weather }) });
    for await (const _ of stream.partialOutputStream);
    expect(CITIES.includes((await stream.output).city), "streamed another city");
  });

  await check(`tools: ${name}`, async () => {
    const inputSchema = z.object({ city: z.enum(CITIES) });
    const tools = { weather: tool({ inputSchema, execute: async ({ city }) => `sunny in ${city}` }) };
    const { toolResults } = await generateText({ ...ask, tools, toolChoice: "required" });
    expect(toolResults[0].output.startsWith("sunny in "), "the tool was not run");
    const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" });
    const stream = streamText({ ...ask, tools, stopWhen: stepCountIs(2), prepareStep });
    expect(await stream.text, "no text after the tool's answer");
  });
}

report("ai");
