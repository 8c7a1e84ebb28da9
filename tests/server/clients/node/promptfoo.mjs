// promptfoo: an evaluation of two prompts with assertions, as its command runs it.
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { check, CITIES, expect, KEY, MODEL, report, URL } from "./checks.mjs";

const folder = mkdtempSync(join(tmpdir(), "promptfoo-"));
const schema = {
  type: "object",
  properties: { city: { enum: CITIES } },
  required: ["city"],
  additionalProperties: false,
};

function evaluate(kind, more, assertion) {
  const config = { apiBaseUrl: URL, apiKey: KEY, temperature: 0, max_tokens: 32, ...more };
  const asked = {
    prompts: ["Is {{city}} a city?", "Name the city {{city}}."],
    providers: [{ id: `openai:${kind}:${MODEL}`, config }],
    tests: [{ vars: { city: "Paris" }, assert: [assertion] }],
  };
  const [input, output] = [join(folder, "config.json"), join(folder, "out.json")];
  writeFileSync(input, JSON.stringify(asked));
  const quiet = { PROMPTFOO_DISABLE_TELEMETRY: "1", PROMPTFOO_DISABLE_UPDATE: "1", PROMPTFOO_CONFIG_DIR: folder };
  const command = ["node_modules/promptfoo/dist/src/entrypoint.js", "eval", "-c", input, "-o", output, "--no-cache"];
  const env = { ...process.env, ...quiet };
  const run = spawnSync(process.execPath, command, { env, encoding: "utf8", timeout: 180000 });
  expect(run.status === 0, (run.stdout + run.stderr).slice(-800));
  const { stats } = JSON.parse(readFileSync(output)).results;
  expect(stats.successes === 2 && stats.failures + stats.errors === 0, JSON.stringify(stats));
}

await check("chat", async () => evaluate("chat", {}, { type: "javascript", value: "output.length > 0" }));
await check("structured output", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "place", schema, strict: true } };
  evaluate("chat", { response_format }, { type: "is-json", value: schema });
});
await check("completions", async () =>
  evaluate("completion", {}, { type: "javascript", value: "output.length > 0" }),
);

report("promptfoo");
