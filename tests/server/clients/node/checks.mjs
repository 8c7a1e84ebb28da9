// What the scripts of this folder share: see ../python/checks.py.
import { readFileSync } from "node:fs";

export const [SERVER, MODEL] = [process.argv[2], "smollm2-135m"];
export const [URL, KEY] = [SERVER + "/v1", "none"];
export const QUESTION = "How is the weather in Paris?";
export const CITIES = ["Paris", "Rome"];
const found = {};

export async function check(name, run) {
  try {
    await run();
    found[name] = "ok";
  } catch (error) {
    console.error(error);
    found[name] = String(error).slice(0, 500);
  }
}

export function expect(isTrue, what) {
  if (!isTrue) throw new Error(what);
}

export function report(name) {
  const { version } = JSON.parse(readFileSync(`node_modules/${name}/package.json`));
  console.log(JSON.stringify({ version, checks: found }));
}
