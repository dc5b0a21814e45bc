// Prompts side by side, which run at the same time.

import { Answer, element } from "./answer.js";
import { settings, withSystem } from "./settings.js";

const at = (id) => document.getElementById(id);
const lanes = new Set();
let stoppingLanes = null;

function addLane(text) {
  const answer = new Answer();
  const number = ++addLane.count;
  const prompt = element("textarea", { rows: 3, value: text, id: `prompt-${number}` });
  const label = element("label", { htmlFor: prompt.id, textContent: `Prompt ${number}` });
  const remove = element("button", { type: "button", textContent: "Remove" });
  remove.setAttribute("aria-label", `Remove prompt ${number}`);
  const node = element("article", { className: "card lane" }, element("div", { className: "lane-head" }, label, remove), prompt, answer.node);
  const lane = { prompt, answer, node };
  remove.addEventListener("click", () => {
    node.remove();
    lanes.delete(lane);
  });
  lanes.add(lane);
  at("lanes").append(node);
}
addLane.count = 0;

async function runAll() {
  const asked = [...lanes].filter((lane) => lane.prompt.value.trim() !== "");
  if (stoppingLanes !== null || asked.length === 0) return;
  stoppingLanes = new AbortController();
  at("run-all").disabled = true;
  at("stop-all").disabled = false;
  await Promise.all(asked.map((lane) => {
    const body = { ...settings(), messages: withSystem([{ role: "user", content: lane.prompt.value }]) };
    return lane.answer.run(body, stoppingLanes.signal);
  }));
  stoppingLanes = null;
  at("run-all").disabled = false;
  at("stop-all").disabled = true;
}

at("run-all").addEventListener("click", runAll);
at("stop-all").addEventListener("click", stopLanes);
at("add-lane").addEventListener("click", () => addLane(""));
["Why is the sky blue?", "Why are sunsets red?", "What is a rainbow?"].forEach(addLane);

export function stopLanes() {
  stoppingLanes?.abort();
}
