// The server's HTTP: which model there is, how many tokens a dialogue has, and an answer as it streams in.

// An error with the server's own sentence; `status` is HTTP's, 0 where no answer came.
export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function ask(path, { key, body, signal }) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: "Bearer " + key }) };
  const options = body && { method: "POST", body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { headers, signal, ...options }); // relative: there may be a prefix before it
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused("the server cannot be reached: is it running?");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new Refused(error?.message ?? `the server answered ${response.status}`, response.status);
}

// The card of the model that is served: `id`, `max_model_len`, `max_draft_length`.
export async function findModel(key) {
  return (await (await ask("v1/models", { key })).json()).data[0];
}

// How many tokens a dialogue is for the model, the header of the answer to come included.
export async function countTokens(dialogue, key, signal) {
  return (await (await ask("tokenize", { key, signal, body: dialogue })).json()).count;
}

// The chunks of a chat completion, as they come.
export async function* chunks(body, key, signal) {
  const response = await ask("v1/chat/completions", { key, signal, body });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw signal.aborted ? error : new Refused("the connection was lost");
    });
    if (done) throw new Refused("the connection was lost");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.message);
      yield chunk;
    }
  }
}
