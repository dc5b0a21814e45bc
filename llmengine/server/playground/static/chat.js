// The chat: one conversation, one answer at a time.

import { Answer, element } from "./answer.js";
import { settings, withSystem } from "./settings.js";

const at = (id) => document.getElementById(id);
let messages = [];
let stopping = null;

async function send() {
  const text = at("message").value.trim();
  if (text === "" || stopping !== null) return;
  at("message").value = "";
  at("chat-hint").hidden = true;
  messages.push({ role: "user", content: text });
  at("conversation").append(turn("user", "You", element("div", { className: "text", textContent: text })));
  const answer = new Answer();
  const shown = turn("assistant", "Model", answer.node);
  at("conversation").append(shown);
  shown.scrollIntoView({ block: "nearest" });
  stopping = new AbortController();
  setRunning(true);
  const mine = messages;
  const succeeded = await answer.run({ ...settings(), messages: withSystem(mine) }, stopping.signal);
  if (succeeded && answer.text !== "") {
    mine.push({ role: "assistant", content: answer.text });
  } else {
    mine.pop(); // an answer is missing, so the question is not part of what the model is told
  }
  stopping = null;
  setRunning(false);
}

function turn(kind, who, content) {
  return element("article", { className: `turn ${kind}` }, element("p", { className: "who", textContent: who }), content);
}

function setRunning(running) {
  at("send").disabled = running;
  at("stop").disabled = !running;
  if (!running) at("message").focus({ preventScroll: true });
}

at("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("stop").addEventListener("click", stopChat);
at("clear").addEventListener("click", () => {
  stopping?.abort();
  messages = [];
  at("conversation").replaceChildren(at("chat-hint"));
  at("chat-hint").hidden = false;
});

export function stopChat() {
  stopping?.abort();
}
