// Requests to the server that this page came from. The key stays in this tab.

const KEY = "llmengine.key";

export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(value) {
  sessionStorage.setItem(KEY, value);
}

function headers() {
  return key() ? { authorization: `Bearer ${key()}` } : {};
}

async function refusal(response) {
  const answer = await response.json().catch(() => null);
  const message = answer?.error?.message ?? `the server answered ${response.status}`;
  return Object.assign(new Error(message), { status: response.status });
}

export async function state(signal) {
  const response = await fetch("playground/state", { headers: headers(), signal, cache: "no-store" });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

// Streams an answer; calls onStart(request id) once, then onChunk(chunk). Aborting the signal ends the request.
export async function chat(body, signal, onStart, onChunk) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(), "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  onStart(response.headers.get("x-request-id"));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.startsWith("data: ") ? event.slice(6) : null;
      if (data === null || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message ?? "the stream failed");
      onChunk(chunk);
    }
  }
}
