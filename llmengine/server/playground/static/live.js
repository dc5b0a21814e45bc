// The live view of the batch: asks for the engine's state four times a second while it is visible.

import { state } from "./api.js";
import { element, ownIds } from "./answer.js";

const INTERVAL_MS = 250;
const MOST_ROWS = 16;
const MOST_SQUARES = 60;
const HISTORY = 120;

const at = (id) => document.getElementById(id);
const rates = [];
let previous = null;
let timer = null;

export function startLiveView() {
  document.addEventListener("visibilitychange", restart);
  at("live").addEventListener("toggle", restart);
  restart();
}

export function restart() {
  clearTimeout(timer);
  poll();
}

async function poll() {
  clearTimeout(timer);
  try {
    const found = await state(AbortSignal.timeout(10000));
    at("live-error").hidden = true;
    show(found);
  } catch (error) {
    previous = null;
    const needsKey = error.status === 401;
    setEngine(needsKey ? "needs a key" : "no answer", "bad");
    at("live-error").textContent = needsKey ? "This server needs an API key: enter it above." : error.message;
    at("live-error").hidden = false;
  }
  if (!document.hidden) timer = setTimeout(poll, at("live").open ? INTERVAL_MS : 8 * INTERVAL_MS);
}

function setEngine(text, kind) {
  at("engine").className = `state ${kind}`;
  if (at("engine-state").textContent !== text) at("engine-state").textContent = text;
}

function show(found) {
  setEngine(found.engine, found.engine === "ready" ? "ready" : "bad");
  at("model").textContent = found.model;
  at("description").textContent = `${found.description}; context of ${found.max_model_len} tokens`;
  at("num-running").textContent = found.num_running;
  at("num-waiting").textContent = found.num_waiting;
  at("step-ms").textContent = (1000 * found.last_step_s).toFixed(1);
  showRate(found);
  showRows(found);
  showQueue(found);
  showBlocks(found);
}

function showRate(found) {
  if (previous !== null && found.time > previous.time) {
    const rate = (found.num_generated_tokens - previous.num_generated_tokens) / (found.time - previous.time);
    rates.push(rate);
    if (rates.length > HISTORY) rates.shift();
    at("tokens-per-s").textContent = rate.toFixed(rate < 100 ? 1 : 0);
    const most = Math.max(...rates, 1);
    const points = rates.map((value, index) => `${120 - rates.length + index},${(26 - (24 * value) / most).toFixed(1)}`);
    at("spark").firstElementChild.setAttribute("points", points.join(" "));
  }
  previous = found;
}

function showRows(found) {
  const rows = found.requests.filter((request) => request.state !== "queued");
  at("rows").replaceChildren(...rows.slice(0, MOST_ROWS).map((request) => row(request, found.max_model_len)));
  if (rows.length === 0) at("rows").append(element("li", { className: "quiet", textContent: "idle" }));
  const hidden = found.num_running - Math.min(rows.length, MOST_ROWS);
  at("rows-more").textContent = hidden > 0 ? `and ${hidden} more` : "";
}

function row(request, maxLength) {
  const own = ownIds.has(request.id);
  const prompt = element("i", { className: "cached" });
  const generated = element("i", { className: "used" });
  // Short contexts would not show on a scale of the whole context.
  const total = request.num_prompt_tokens + request.num_tokens;
  const scale = Math.min(maxLength, Math.max(256, 2 ** Math.ceil(Math.log2(total + 1))));
  prompt.style.width = `${(100 * request.num_prompt_tokens) / scale}%`;
  generated.style.width = `${(100 * request.num_tokens) / scale}%`;
  const bar = element("span", { className: "stack" }, prompt, generated);
  const name = element("span", { className: "name", textContent: own ? "yours" : request.state });
  const numbers = element("span", { textContent: `${request.num_prompt_tokens} + ${request.num_tokens}` });
  const item = element("li", { className: own ? "own" : "" }, name, bar, numbers);
  item.title = `${request.num_prompt_tokens} prompt tokens, ${request.num_cached_tokens} of them cached; ${request.num_tokens} generated`;
  return item;
}

function showQueue(found) {
  const squares = Array.from({ length: Math.min(found.num_waiting, MOST_SQUARES) }, () => element("i"));
  at("queue").replaceChildren(...squares);
  if (found.num_waiting === 0) at("queue").append("empty");
  if (found.num_waiting > MOST_SQUARES) at("queue").append(`+${found.num_waiting - MOST_SQUARES}`);
}

function showBlocks(found) {
  const { used, cached, free } = found.blocks;
  const total = Math.max(1, used + cached + free);
  const parts = { used, cached, free };
  for (const part of at("blocks").children) part.style.width = `${(100 * parts[part.className]) / total}%`;
  for (const [name, count] of Object.entries(parts)) at(`blocks-${name}`).textContent = count;
  at("blocks").setAttribute("aria-label", `KV blocks: ${used} used, ${cached} cached, ${free} free`);
  at("hit-rate").textContent = `${(100 * found.cache_hit_rate).toFixed(0)} %`;
}
