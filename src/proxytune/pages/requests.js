// The server, asked: answers as they stream in, waits while it is full, and what went wrong in words. The key that
// it may want is the page's `state.key`; tokens go to the page's answers as they come.

const MAX_WAITS = 4; // how often a full server is asked again
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

class Problem extends Error {
  constructor(title, message, next, { param = null, isKeyMissing = false, isTooLong = false } = {}) {
    super(message || title);
    // The server's own hint knows more than ours.
    Object.assign(this, { title, next: this.message.includes("\nhint:") ? "" : next, param, isKeyMissing, isTooLong });
  }
}

const headers = () => ({
  "Content-Type": "application/json",
  ...(state.key ? { Authorization: `Bearer ${state.key}` } : {}),
});

const sleep = (ms, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, ms);
  signal.addEventListener("abort", () => {
    clearTimeout(timer);
    reject(signal.reason);
  }, { once: true });
});

const retryAfter = (response) => {
  const value = response.headers.get("Retry-After") ?? "";
  const seconds = /^\d+$/.test(value.trim()) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Math.min(120, Math.max(1, Number.isFinite(seconds) ? Math.ceil(seconds) : 2));
};

const problemOf = async (response) => {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not JSON: a proxy in between, perhaps. The status has to do.
  }
  const message = typeof error.message === "string" ? error.message : `The server answered ${response.status}.`;
  const { status } = response;
  if (status === 401) return new Problem("The server needs an API key.", message, "", { isKeyMissing: true });
  if (status === 429) return new Problem("The server is full.", message, "Try again in a little while.");
  if (status === 404) return new Problem("The server does not know this.", message, "Reload the page: it may serve another recipe now.");
  if (status === 413) return new Problem("That is too long for the server.", message, "Shorten the prompt.");
  if (status === 503) return new Problem("The server takes no questions now.", message, "It may be starting or shutting down. Try again in a little while.");
  if (status >= 500) return new Problem("The server failed.", message, "Its log says more. Try again, or ask for something else.");
  return new Problem("The server refused the question.", message, "Change it and run again.", { param: error.param ?? null, isTooLong: error.code === "context_length_exceeded" });
};

// Read on to the end without looking: a stream cut off after its last event would count as a failed request.
const drain = async (reader) => {
  while (!(await reader.read()).done);
};

// The events of a server-sent stream, as text, up to and without the last one, "[DONE]".
async function* eventsOf(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  let isWhole = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          const event = data.join("\n");
          data = [];
          if (event === "[DONE]") isWhole = true;
          else yield event;
        }
        if (isWhole) return;
      }
    }
  } finally {
    (isWhole ? drain(reader) : reader.cancel()).catch(() => {});
  }
}

const lost = (answer) => answer.tokens.length
  ? new Problem("The connection broke.", `After ${plural(answer.tokens.length, "token")}; what came is kept.`, "Check that the server still runs, then try again.")
  : new Problem("The server cannot be reached.", "", "Check that the server still runs, then try again.");

const send = async (path, body, signal, onWait) => {
  for (let numWaits = 0; ; numWaits++) {
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal, cache: "no-store" });
    if (response.ok) return response;
    if (response.status !== 429 || numWaits >= MAX_WAITS) throw await problemOf(response);
    for (let left = retryAfter(response); left > 0; left--) {
      onWait(left);
      await sleep(1000, signal);
    }
    onWait(0);
  }
};

// Stream one answer; returns why it ended.
const stream = async (path, body, answer, signal, onWait) => {
  let response;
  try {
    response = await send(path, body, signal, onWait);
  } catch (error) {
    if (signal.aborted || error instanceof Problem) throw error;
    throw lost(answer);
  }
  let reason = null;
  try {
    for await (const data of eventsOf(response.body)) {
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Problem("The server broke off.", String(chunk.error.message ?? ""), "What came is kept. Try again.");
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      answer.add(choice.text ?? choice.delta?.content ?? "", choice.proxytune?.tokens ?? []);
      reason = choice.finish_reason ?? reason;
    }
  } catch (error) {
    if (signal.aborted || error instanceof Problem) throw error;
    if (error instanceof SyntaxError) throw new Problem("The server's answer cannot be read.", error.message, "Is there something between this page and the server that changes its answers?");
    throw lost(answer);
  }
  if (reason) return reason;
  throw lost(answer);
};
