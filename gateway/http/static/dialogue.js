// Talks to the server: one dialogue, asked through /v1/chat/completions as any client would.

const ADVICE = {
  API_KEY_INVALID: "Enter a key that this server knows.",
  MEDIA_UNREADABLE: "Try another file: JPEG, PNG, WebP, GIF, BMP, or a video.",
  PROMPT_TOO_LONG: "Begin a new chat, or lower tiles or longest answer in the settings.",
  VISION_UNAVAILABLE: "Pictures cannot be read just now; text can. Try again in a moment.",
  INTERNAL: "If it happens again, tell whoever runs this server the request's id.",
};
const PASSES = /_UNAVAILABLE|_FULL|_READY|RATE_|DEADLINE_/;

// What went wrong, with what can be done. `code` is the server's reason; empty where it said none.
export class Problem extends Error {
  constructor(message, { code = "", param = "", requestId = "", retryAfter = "" } = {}) {
    super(message);
    Object.assign(this, { code, param, requestId, retryAfter });
  }

  get advice() {
    const wait = this.retryAfter ? `in ${this.retryAfter} s` : "in a moment";
    return ADVICE[this.code] ?? (PASSES.test(this.code) ? `Try again ${wait}.` : "");
  }
}

export class Server {
  constructor(key) {
    this.key = key; // a function: the key may change
  }

  // Returns the name of the served model.
  async model() {
    const answer = await this.#request("v1/models", {});
    return (await answer.json()).data?.[0]?.id ?? "";
  }

  // Yields the chunks of an answer; raises Problem, or AbortError when `signal` says to stop.
  async *chunks(body, signal) {
    const answer = await this.#request("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    const requestId = answer.headers.get("x-request-id") ?? "";
    let isWhole = false; // what ends otherwise has been cut off
    for await (const data of eventsOf(answer.body)) {
      isWhole = data === "[DONE]";
      if (isWhole) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw problemOf(chunk, { requestId });
      yield chunk;
    }
    if (!isWhole) throw new Problem("The answer broke off.", { code: "LLM_UNAVAILABLE", requestId });
  }

  async #request(path, { headers = {}, ...options }) {
    const authorization = this.key() ? { authorization: `Bearer ${this.key()}` } : {};
    let answer;
    try {
      answer = await fetch(path, { ...options, headers: { ...headers, ...authorization }, credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server does not answer.", { code: "LLM_UNAVAILABLE" });
    }
    if (answer.ok) return answer;
    const said = await answer.json().catch(() => ({}));
    throw problemOf(said, {
      requestId: answer.headers.get("x-request-id") ?? "",
      retryAfter: answer.headers.get("retry-after") ?? "",
    });
  }
}

function problemOf({ error = {} }, facts) {
  return new Problem(error.message ?? "The server could not answer.", {
    code: error.code ?? "",
    param: error.param ?? "",
    ...facts,
  });
}

// Yields the data of server-sent events.
async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        return { done: true };
      });
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (event.startsWith("data: ")) yield event.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
