// The page at `/`: one chat against this server's /v1/chat/completions, with everything that budget forcing does made visible.
// Text only ever enters the page as text nodes.

const $ = (selector, root = document) => root.querySelector(selector);
const NO_LIMIT = "no limit";

// One row per control: [request field, label, kind, attributes, value at the start]. A value that is `undefined` is not sent.
const PARAMETERS = [
  ["thinking_token_budget", "Most thinking tokens", "steps", {}, NO_LIMIT],
  ["min_thinking_tokens", "Least thinking tokens", "steps", {}, 0],
  ["thinking_n_ignore", "Ends to ignore", "range", { min: 0, max: 8 }, 0],
  ["thinking_n_ignore_str", "Said instead of an end", "text", { placeholder: "Wait" }, ""],
  ["thinking_end_str", "Said at the maximum", "text", { placeholder: "the model's own end" }, ""],
  ["temperature", "Temperature", "range", { min: 0, max: 2, step: 0.05 }, 0],
  ["max_completion_tokens", "Most tokens in all", "steps", {}, NO_LIMIT],
  ["api_key", "API key", "password", { placeholder: "if the server asks for one" }, ""],
];

const history = [];
const controls = {};
let context = 4096;
let running = null;

// Slider positions of a number of tokens: powers of two and what lies between, up to the context.
function tokenSteps(withNoLimit) {
  const steps = [0];
  for (let power = 8; power < context; power *= 2) steps.push(power, power * 1.5);
  return withNoLimit ? [...steps.filter((n) => n < context), NO_LIMIT] : steps.filter((n) => n < context);
}

function addControl([name, text, kind, attributes, start]) {
  const label = document.createElement("label");
  const output = document.createElement("output");
  const input = Object.assign(document.createElement("input"), attributes, { name, type: kind === "steps" ? "range" : kind });
  const steps = kind === "steps" && tokenSteps(start === NO_LIMIT);
  if (steps) Object.assign(input, { min: 0, max: steps.length - 1 });
  input.value = steps ? steps.indexOf(start) : start;
  const value = () => (steps ? steps[input.value] : kind === "range" ? Number(input.value) : input.value);
  const show = () => (output.value = kind === "text" || kind === "password" ? "" : value());
  input.addEventListener("input", show);
  show();
  label.append(text, output, input);
  $("#parameters").append(label);
  controls[name] = { value: () => (value() === NO_LIMIT || value() === "" ? undefined : value()), input, steps };
}

const headers = () => {
  const key = controls.api_key?.value();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
};

async function problemOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || `the server answered ${response.status}`;
  }
}

// The JSON values of a stream of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// What one question shows while its answer arrives.
class Turn {
  constructor(question, most, least) {
    this.root = $("#turn").content.cloneNode(true).firstElementChild;
    $(".question", this.root).textContent = question;
    Object.assign(this, { most, least: least ?? 0, answer: "", ignores: 0, tokens: 0, first: null, last: null });
    $(".enough", this.root).addEventListener("click", () => this.endThinking());
    $("#turns").append(this.root);
    this.scroll();
  }

  scroll() {
    $("#turns").scrollTop = $("#turns").scrollHeight;
  }

  write(where, text, injected) {
    const node = injected ? document.createElement("mark") : document.createTextNode(text);
    if (injected) node.textContent = text;
    $(where, this.root).append(node);
  }

  take(chunk) {
    this.id ??= chunk.id;
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { reasoning_content: reasoning, content } = choice.delta;
    this.first ??= performance.now();
    this.last = performance.now();
    if (reasoning) {
      $(".thinking", this.root).hidden = false;
      this.write(".thinking .text", reasoning, choice.injected);
    }
    if (content) {
      this.answer += content;
      this.write(".answer", content, choice.injected);
    }
    if (choice.thinking?.reasoning_tokens) this.showBudget(choice.thinking, !this.answer && !choice.finish_reason);
    if (choice.finish_reason) this.finish = choice.finish_reason;
    this.scroll();
  }

  showBudget({ reasoning_tokens: tokens, ignores_used: ignores }, open) {
    $(".budget", this.root).hidden = false;
    // Without a maximum the bar doubles its range when it is full.
    const range = this.most ?? Math.max(64, 2 ** Math.ceil(Math.log2(tokens + 1)));
    const percent = (n) => `${range ? Math.min(100, (100 * n) / range) : 100}%`;
    const bar = $(".bar", this.root);
    if (ignores > this.ignores) {
      const tick = Object.assign(document.createElement("i"), { className: "ignored", title: "an end was ignored here" });
      tick.dataset.at = tokens;
      bar.append(tick);
      this.ignores = ignores;
    }
    $(".used", bar).style.width = percent(tokens);
    for (const tick of bar.querySelectorAll(".ignored")) tick.style.left = percent(Number(tick.dataset.at));
    const least = $(".least", bar);
    least.hidden = !this.least;
    least.style.left = percent(this.least);
    bar.setAttribute("aria-valuenow", tokens);
    bar.setAttribute("aria-valuemax", range);
    const most = this.most === undefined ? "" : ` of ${this.most}`;
    const ignored = ignores ? `, ${ignores} ${ignores === 1 ? "end" : "ends"} ignored` : "";
    $(".count", this.root).textContent = `${tokens}${most} thinking tokens${ignored}`;
    $(".enough", this.root).hidden = !open;
  }

  async endThinking() {
    const body = JSON.stringify({ id: this.id, action: "reasoning_end" });
    const response = await fetch("v1/chat/completions/control", { method: "POST", headers: headers(), body });
    if (!response.ok) this.fail(await problemOf(response));
    $(".enough", this.root).hidden = true;
  }

  end(joules) {
    $(".enough", this.root).hidden = true;
    const figures = [];
    const tokens = this.usage?.completion_tokens;
    if (tokens) {
      figures.push(`${tokens} tokens`);
      const seconds = (this.last - this.first) / 1000;
      if (tokens > 1 && seconds > 0) figures.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    }
    if (joules !== null) figures.push(`${joules.toFixed(1)} J`);
    if (this.finish === "length") figures.push("cut at the most tokens");
    $(".figures", this.root).textContent = figures.join(" · ");
  }

  fail(message) {
    const line = $(".figures", this.root);
    line.textContent = message;
    line.classList.add("failed");
  }
}

// Energy of all GPUs since the start, or null where none is measured.
async function joules() {
  const response = await fetch("metrics", { headers: headers() });
  const line = response.ok && (await response.text()).match(/^ponder:energy_joules_total(?:\{.*\})? (\S+)$/m);
  return line ? Number(line[1]) : null;
}

async function ask(question) {
  const fields = Object.fromEntries(PARAMETERS.map(([name]) => [name, controls[name].value()]));
  delete fields.api_key;
  const turn = new Turn(question, fields.thinking_token_budget, fields.min_thinking_tokens);
  const messages = [...history, { role: "user", content: question }];
  running = new AbortController();
  $("#send").hidden = true;
  $("#stop").hidden = false;
  try {
    const before = await joules();
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        ...fields, messages, model: $("#model").textContent || undefined, stream: true,
        stream_options: { include_usage: true, continuous_usage_stats: true },
      }),
    });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const chunk of events(response.body)) turn.take(chunk);
    const after = before === null ? null : await joules();
    turn.end(after === null ? null : after - before);
    history.push(messages.at(-1), { role: "assistant", content: turn.answer });
  } catch (error) {
    turn.end(null);
    turn.fail(error.name === "AbortError" ? "stopped" : error.message);
  }
  running = null;
  $("#send").hidden = false;
  $("#stop").hidden = true;
}

$("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("#question").value.trim();
  if (!question || running) return;
  $("#question").value = "";
  if (!wide.matches) $("#settings").open = false;
  ask(question);
});
$("#question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("#ask").requestSubmit();
  }
});
$("#stop").addEventListener("click", () => running?.abort());
$("#clear").addEventListener("click", () => {
  running?.abort();
  history.length = 0;
  $("#turns").replaceChildren();
});

const wide = matchMedia("(min-width: 46rem)");
$("#settings").open = wide.matches;

// Name and context of the model. A server that wants a key tells them with it.
async function meetModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return;
  const model = (await response.json()).data[0];
  $("#model").textContent = model.id;
  context = model.max_model_len;
}

try {
  await meetModel();
} finally {
  PARAMETERS.forEach(addControl);
  controls.api_key.input.addEventListener("change", meetModel);
}
