// The page: its tabs, its key, and what Escape does.

import { key, setKey } from "./api.js";
import { stopChat } from "./chat.js";
import { stopLanes } from "./lanes.js";
import { restart, startLiveView } from "./live.js";

const at = (id) => document.getElementById(id);
const tabs = [...document.querySelectorAll("[role=tab]")];

function select(tab) {
  for (const one of tabs) {
    const chosen = one === tab;
    one.setAttribute("aria-selected", String(chosen));
    one.tabIndex = chosen ? 0 : -1;
    at(one.getAttribute("aria-controls")).hidden = !chosen;
  }
}

tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    const next = tabs[(index + 1) % tabs.length];
    select(next);
    next.focus();
  });
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  stopChat();
  stopLanes();
});
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("key").value = key();
at("key-form").addEventListener("submit", (event) => event.preventDefault());
at("key").addEventListener("change", () => {
  setKey(at("key").value.trim());
  restart();
});
if (matchMedia("(max-width: 56rem)").matches) at("sampling").open = false;
startLiveView();
