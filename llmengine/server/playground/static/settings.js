// What the settings say of a request.

const at = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];

// The fields of a request that the settings ask for; what is left empty is the model's.
export function settings() {
  const body = {};
  for (const name of NUMBERS) {
    if (at(name).value.trim() !== "") body[name] = Number(at(name).value);
  }
  if (at("stop_text").value !== "") body.stop = [at("stop_text").value];
  if (at("logprobs").checked) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  return body;
}

export function withSystem(messages) {
  const text = at("system").value.trim();
  return text === "" ? messages : [{ role: "system", content: text }, ...messages];
}
