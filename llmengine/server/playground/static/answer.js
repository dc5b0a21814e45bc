// One answer as it streams: its text, the probabilities of its tokens, and what it cost. All text is set as text.

import { chat } from "./api.js";

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export const ownIds = new Set();

export class Answer {
  constructor() {
    this.thought = element("div", { className: "thought", hidden: true });
    this.body = element("div", { className: "text", tabIndex: 0 });
    this.body.setAttribute("aria-label", "Answer");
    this.facts = element("p", { className: "facts" });
    this.error = element("p", { className: "error", hidden: true });
    this.error.setAttribute("role", "alert");
    this.node = element("div", {}, this.thought, this.body, this.error, this.facts);
    this.text = "";
    watchTokens(this.body);
  }

  // Resolves when the answer has ended, was stopped, or failed, which it shows; true unless it failed.
  async run(body, signal) {
    this.text = "";
    this.body.replaceChildren();
    this.thought.replaceChildren();
    this.thought.hidden = this.error.hidden = true;
    this.facts.textContent = "";
    this.body.classList.add("running");
    const times = { began: performance.now(), first: null };
    let id = null;
    let ending = "stopped";
    try {
      await chat(body, signal, (given) => ownIds.add((id = given)), (chunk) => {
        for (const choice of chunk.choices) {
          this.#add(choice, times);
          ending = choice.finish_reason ?? ending;
        }
        if (chunk.usage) this.usage = chunk.usage;
      });
      return true;
    } catch (error) {
      if (signal.aborted) return true;
      ending = "failed";
      this.error.textContent = error.message;
      this.error.hidden = false;
      return false;
    } finally {
      ownIds.delete(id);
      this.body.classList.remove("running");
      this.#describe(times, ending);
    }
  }

  #add(choice, times) {
    const delta = choice.delta ?? {};
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (thought) {
      this.thought.hidden = false;
      this.thought.append(thought);
    }
    const tokens = choice.logprobs?.content ?? [];
    if (delta.content || thought || tokens.length) times.first ??= performance.now();
    if (tokens.length) {
      this.body.append(...tokens.map(tokenNode));
    } else if (delta.content) {
      this.body.append(delta.content);
    }
    this.text += delta.content ?? "";
  }

  #describe(times, ending) {
    const parts = [ending === "length" ? "most tokens reached" : ending === "stop" ? "finished" : ending];
    const seconds = (performance.now() - (times.first ?? performance.now())) / 1000;
    if (times.first !== null) parts.push(`first token after ${Math.round(times.first - times.began)} ms`);
    if (this.usage && ending !== "stopped" && ending !== "failed") {
      const count = this.usage.completion_tokens;
      parts.push(`${this.usage.prompt_tokens} + ${count} tokens`);
      if (seconds > 0 && count > 1) parts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
    }
    this.facts.textContent = parts.join(" · ");
  }
}

function tokenNode(entry) {
  const chance = Math.exp(entry.logprob);
  const level = chance > 0.8 ? 3 : chance > 0.4 ? 2 : chance > 0.1 ? 1 : 0;
  const node = element("span", { className: `token p${level}`, textContent: entry.token });
  node.entry = entry;
  return node;
}

const card = document.getElementById("token-card");
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "(nothing)";
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(2)} %`;

function showCard(node) {
  const entry = node.entry;
  const others = (entry.top_logprobs ?? []).filter((other) => other.token !== entry.token);
  const rows = [entry, ...others].sort((a, b) => b.logprob - a.logprob).map((other) => {
    const row = element("tr", {}, element("td", { textContent: visible(other.token) }));
    row.append(element("td", { textContent: percent(other.logprob) }), element("td", { textContent: other.logprob.toFixed(3) }));
    if (other === entry) row.className = "chosen";
    return row;
  });
  card.replaceChildren(element("table", {}, element("tbody", {}, ...rows)));
  card.hidden = false;
  const box = node.getBoundingClientRect();
  const size = card.getBoundingClientRect();
  card.style.left = `${Math.max(4, Math.min(box.left, innerWidth - size.width - 4))}px`;
  card.style.top = `${box.bottom + size.height + 8 < innerHeight ? box.bottom + 6 : box.top - size.height - 6}px`;
}

// Hovering, touching, or the arrow keys choose a token.
function watchTokens(body) {
  let chosen = null;
  const choose = (node) => {
    chosen?.classList.remove("chosen");
    chosen = node;
    if (node === null) {
      card.hidden = true;
    } else {
      node.classList.add("chosen");
      showCard(node);
    }
  };
  body.addEventListener("pointerover", (event) => choose(event.target.entry ? event.target : null));
  body.addEventListener("pointerleave", () => choose(null));
  body.addEventListener("blur", () => choose(null));
  body.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    const forward = event.key === "ArrowRight";
    const next = chosen === null ? body.querySelector(".token") : forward ? chosen.nextElementSibling : chosen.previousElementSibling;
    if (next?.entry) {
      event.preventDefault();
      choose(next);
      next.scrollIntoView({ block: "nearest" });
    }
  });
}
