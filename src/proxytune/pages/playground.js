// The playground: what is asked of both models, and how their answers are shown. It follows tokens.js, requests.js and
// examples.js in one scope.

const SIDES = ["base", "steered"];
const NAMES = { base: "Base", steered: "Steered" };
const TOP = 8; // alternatives listed for each model
const STEPS = [Math.log(1.25), Math.log(2), Math.log(8)]; // where the colours change, in nats

const isTouch = matchMedia("(pointer: coarse)").matches; // keys on the screen have no Shift Enter: there Enter is a new line

const state = { info: null, key: "", mode: "text", running: new Map(), afterKey: null };

// What steering did to a token ---------------------------------------------------------------------------

const moved = (token) => {
  const { base, steered } = token.views ?? {};
  return known(base?.logprob) && known(steered?.logprob) ? steered.logprob - base.logprob : null;
};
const level = (nats) => (known(nats) ? Math.sign(nats) * STEPS.filter((step) => Math.abs(nats) >= step).length : 0);
// True if base and steered model would each put another token first; null if that is not known.
const changed = (token) => {
  const { base, steered } = token.views ?? {};
  const [ofBase, ofSteered] = [base?.top?.[0], steered?.top?.[0]];
  if (ofBase && ofSteered) return ofBase.token_id !== ofSteered.token_id;
  return known(base?.rank) && steered?.rank === 1 ? base.rank !== 1 : null;
};
const firstChoice = (token) => token.views?.base?.top?.[0]?.token;

// Drawing: at most once a frame, only what is new --------------------------------------------------------

const unpainted = new Set();
let frame = 0;
const paintAll = () => {
  frame = 0;
  const answers = [...unpainted];
  unpainted.clear();
  for (const answer of answers) answer.paint();
};
const paintSoon = (answer) => {
  unpainted.add(answer);
  if (!frame) frame = requestAnimationFrame(paintAll);
};

let numAnswers = 0;

class Pane {
  constructor(side) {
    this.side = side;
    this.element = $(`pane-${side}`);
    this.scroll = this.element.querySelector(".scroll");
    this.sum = this.element.querySelector(".sum");
    this.flows = { text: make("div", "flow"), chat: make("div", "flow") };
    this.turns = []; // of the chat: {question, answer}
    this.answers = { text: null, chat: null }; // the latest of each mode
    this.scroll.append(this.flows.text, this.flows.chat);
    this.clear("text");
    this.clear("chat");
  }
  clear(mode) {
    if (selected.answer && this.flows[mode].contains(selected.answer.list)) closeDetails();
    const what = this.side === "base" ? "What the base says by itself appears here." : "What the steered model says appears here, each token coloured by how far steering moved it.";
    this.flows[mode].replaceChildren(make("p", "empty", what));
    this.answers[mode] = null;
    if (mode === "chat") this.turns = [];
  }
  show(mode) {
    for (const [name, flow] of Object.entries(this.flows)) flow.hidden = name !== mode;
    this.summarise();
  }
  // Add an answer to the page, below what it answers.
  begin(mode, question, maxTokens) {
    const flow = this.flows[mode];
    if (mode === "text" || this.turns.length === 0) {
      if (mode === "text") this.clear(mode);
      flow.replaceChildren();
    }
    // An earlier question cannot be asked again once the conversation has gone on.
    for (const button of flow.querySelectorAll(".problem button")) button.remove();
    const answer = new Answer(this, mode, maxTokens);
    const turn = make("div", "turn");
    const text = make("div", "text");
    text.dir = "auto";
    if (mode === "text") {
      const given = make("span", "given", question.length > 600 ? `…${question.slice(-600)}` : question);
      given.title = "Your prompt";
      text.append(given);
    } else {
      const said = make("div", "user", question);
      said.dir = "auto";
      turn.append(make("div", "who", "You"), said, make("div", "who", NAMES[this.side]));
    }
    text.append(answer.list);
    turn.append(text, answer.after);
    flow.append(turn);
    this.answers[mode] = answer;
    this.scroll.scrollTop = this.scroll.scrollHeight;
    return answer;
  }
  summarise() {
    const answer = this.answers[state.mode];
    if (answer) answer.summarise();
    else this.sum.replaceChildren();
  }
  get isAtEnd() {
    return this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight < 40;
  }
}

class Answer extends TokenText {
  constructor(pane, mode, maxTokens) {
    super(pane, `answer-${numAnswers++}`, `${NAMES[pane.side]} answer, token by token`);
    this.list.setAttribute("aria-busy", "true");
    this.tokens = [];
    this.loose = ""; // text that belongs to no token
    this.text = "";
    this.unsaid = ""; // not yet given to the screen reader
    this.ended = null;
    this.startedAt = this.lastAt = 0;
    this.numKnown = this.numChanged = this.numKl = this.sumKl = this.numThoughts = 0;
    this.after = make("div");
    Object.assign(this, { mode, maxTokens });
  }
  add(text, tokens) {
    const now = performance.now();
    for (const token of tokens) {
      if (this.tokens.length === 0) this.startedAt = now;
      this.tokens.push(token);
      const hasChanged = changed(token);
      if (hasChanged !== null) this.numKnown += 1;
      if (hasChanged) this.numChanged += 1;
      if (known(token.kl)) {
        this.numKl += 1;
        this.sumKl += token.kl;
      }
    }
    this.lastAt = now;
    const own = tokens.map((token) => token.text).join("");
    // A reasoning model's tokens before its answer are shown, and are no part of what it answered.
    if (own && !text) {
      for (const token of tokens) token.isThought = true;
      this.numThoughts += tokens.length;
    }
    if (text.startsWith(own)) this.loose += text.slice(own.length);
    this.text += text;
    this.unsaid += text;
    paintSoon(this);
  }
  end(reason) {
    this.ended = reason;
    this.list.setAttribute("aria-busy", "false");
    if (["stop", "length"].includes(reason) && this.text.trim() === "") this.sayEmpty(reason);
    paintSoon(this);
  }
  // An answer without text looks as if nothing had happened: say what did, and what to try.
  sayEmpty(reason) {
    const isCut = reason === "length";
    const isChat = this.mode === "chat";
    const options = [
      this.pane.side === "base" ? "" : "a strength nearer to 0",
      isChat ? "other words" : "the beginning of a text",
      isChat ? "" : "Chat if it is a question",
      numberOf("temperature") > 0 ? "another seed" : "",
    ].filter(Boolean);
    const next = `Try ${options.join(", ").replace(/, ([^,]*)$/, " or $1")}.`;
    const [what, hint] = this.numThoughts
      ? [`The model ${isCut ? "was still reasoning at its last token" : "ended after its reasoning"}, without an answer.`, isCut ? "Allow more tokens." : next]
      : [isCut || this.tokens.length > 1 ? "The answer is nothing but white space." : "The answer is empty: the first token ended it.", next];
    const box = make("div", "notice");
    box.append(make("strong", "", what), make("p", "", hint));
    this.after.replaceChildren(box);
  }
  // Draw what came since the last frame.
  paint() {
    const { pane } = this;
    const wasAtEnd = pane.isAtEnd;
    const fresh = document.createDocumentFragment();
    for (let i = this.elements.length; i < this.tokens.length; i++) this.place(this.draw(this.tokens[i], i), fresh);
    if (this.loose) {
      fresh.append(this.loose);
      this.loose = "";
    }
    this.list.append(fresh);
    if (this.ended === "stop") this.markEnd();
    this.say();
    this.summarise();
    if (wasAtEnd) pane.scroll.scrollTop = pane.scroll.scrollHeight;
  }
  draw(token, index) {
    const nats = moved(token);
    const baseChoice = changed(token) ? firstChoice(token) ?? "another token" : null;
    return this.drawToken(index, { name: token.token, text: token.text, nats, level: level(nats), baseChoice, ...(token.isThought ? { kind: "thought", more: ["reasoning"] } : {}) });
  }
  // A last token without text is the model's own end of the text.
  markEnd() {
    const last = this.elements.at(-1);
    if (last && last.textContent === "" && last.classList.contains("part")) last.classList.replace("part", "end");
  }
  // Give the screen reader whole sentences, or long pieces of them.
  say() {
    const cut = this.ended ? this.unsaid.length : Math.max(...[". ", "! ", "? ", "\n", "。"].map((end) => this.unsaid.lastIndexOf(end) + 1));
    const length = cut > 0 ? cut : this.unsaid.length > 240 ? this.unsaid.lastIndexOf(" ") : 0;
    if (length <= 0) return;
    const log = $(`log-${this.pane.side}`);
    log.append(make("p", "", this.unsaid.slice(0, length)));
    this.unsaid = this.unsaid.slice(length);
    while (log.childElementCount > 12) log.firstChild.remove();
  }
  summarise() {
    if (this.pane.answers[state.mode] !== this) return;
    const { elements, add } = facts();
    const count = this.tokens.length;
    if (count) {
      add(count === 1 ? "token" : "tokens", String(count));
      if (this.numThoughts) add("of them reasoning", String(this.numThoughts));
      if (this.pane.side === "steered") {
        if (this.numKnown) add("first choices changed", `${Math.round((100 * this.numChanged) / this.numKnown)} %`);
        if (this.numKl) add("nats mean KL", decimal(this.sumKl / this.numKl)).title = "KL(steered ‖ base), averaged over the tokens";
        const place = firstDifference();
        if (place !== null) add(place < 0 ? "same tokens as the base so far" : `parts from the base at token ${place + 1}`);
      }
      const span = (this.lastAt - this.startedAt) / 1000;
      if (count > 1 && span > 0.1) add("tokens/s", ((count - 1) / span).toFixed(1)).title = "From the first token to the last, while both answers run";
    }
    // The server gives fewer tokens than asked for where its own limit, or the models' context, is smaller.
    if (this.ended === "length" && count < this.maxTokens) add("reached the limit of the server or of its models");
    else if (this.ended === "failed" && !count) add("not answered");
    else if (this.ended) add(ENDINGS[this.ended] ?? this.ended);
    this.pane.sum.replaceChildren(...elements);
  }
}

const firstDifference = () => {
  const [ofBase, ofSteered] = SIDES.map((side) => panes[side].answers[state.mode]?.tokens ?? []);
  const count = Math.min(ofBase.length, ofSteered.length);
  if (!count) return null;
  for (let i = 0; i < count; i++) if (ofBase[i].token_id !== ofSteered[i].token_id) return i;
  return -1;
};

// What is behind a token ----------------------------------------------------------------------------------

const openDetails = (answer, index) => {
  const token = answer.tokens[index];
  const order = (name) => (name === "base" ? 0 : name === "steered" ? 2 : 1);
  const named = ({ token_id, token: name, logprob }) => ({ id: token_id, name, logprob });
  const views = Object.entries(token.views ?? {})
    .map(([name, view]) => [name, { ...view, top: (view.top ?? []).map(named) }])
    .sort(([a], [b]) => order(a) - order(b));
  const nats = moved(token);
  const words = [movedWords(nats) + (known(nats) ? ` (${signed(nats)} nats)` : "")];
  if (known(token.kl)) words.push(`KL(steered ‖ base) ${decimal(token.kl)} nats`);
  if (changed(token)) words.push(firstChoice(token) ? `base's first choice: “${visible(firstChoice(token))}”` : "base's first choice is another token");
  if (token.token.includes("\ufffd")) words.push("part of a character");
  words.push("before temperature and top-p");
  showDetails(answer, index, {
    token: { id: token.token_id, name: token.token },
    place: ` ${NAMES[answer.pane.side].toLowerCase()} token ${index + 1} of ${answer.tokens.length}`,
    words,
    sum: views.length ? undefined : "The server sent no details of this token.",
    views,
    isOnly: views.length <= 4,
    chosenWord: "chosen",
  });
};

// Experts and settings -----------------------------------------------------------------------------------

const numberOf = (id) => Number($(id).value);
const chosen = () => [...$("experts").querySelectorAll("input[name=expert]:checked")].map((input) => input.value);
const weightOf = (name) => Number(weights.get(name)?.value ?? 1);
const weights = new Map();
const fields = {
  max_tokens: "max-tokens", temperature: "temperature", top_p: "top-p", seed: "seed", prompt: "prompt", messages: "prompt",
  alpha: "alpha-number", "proxytune.alpha": "alpha-number",
};

const readSettings = () => {
  const temperature = numberOf("temperature");
  const names = chosen();
  return {
    alpha: numberOf("alpha-number"),
    names,
    weights: Object.fromEntries(names.map((name) => [name, names.length > 1 ? weightOf(name) : 1])),
    isMix: $("mix").checked && names.length > 1,
    sampling: {
      max_tokens: numberOf("max-tokens"), temperature, seed: numberOf("seed"),
      ...(temperature > 0 ? { top_p: numberOf("top-p") } : {}),
    },
  };
};

const steering = (side, { alpha, names, weights: own, isMix }) => {
  const used = side === "base" ? 0 : alpha;
  const top = Math.min(TOP, state.info.limits?.max_explain_top ?? TOP);
  const experts = isMix
    ? { experts: Object.fromEntries(names.map((name) => [name, Number((used * own[name]).toFixed(6))])) }
    : { alpha: used, expert: names[0] };
  return { ...experts, explain: true, explain_top: top };
};

const strengthWords = ({ alpha, names, weights: own, isMix }) => isMix
  ? `α = ${strength(alpha)} · ${names.map((name) => `${strength(own[name])} ${name}`).join(" + ")}`
  : `α = ${strength(alpha)} · ${names[0]}`;

const ownAlpha = () => {
  const names = chosen();
  return names.length === 1 ? state.info?.experts.find((expert) => expert.name === names[0])?.alpha : undefined;
};

const setAlpha = (alpha) => {
  $("alpha-number").value = String(alpha);
  showAlpha();
};

// What is set, on one line: in a narrow window the settings are folded away below it.
const showSettings = () => {
  if (!state.info) return;
  const settings = readSettings();
  const { max_tokens: count, temperature, seed } = settings.sampling;
  const drawn = temperature === 0 ? "greedy" : `temperature ${temperature} · seed ${seed}`;
  $("settings-sum").textContent = `${settings.names.length ? strengthWords(settings) : "no expert"} · ${plural(count, "token")} · ${drawn}`;
};

const showAlpha = () => {
  const slider = $("alpha");
  const alpha = numberOf("alpha-number");
  if (Number.isFinite(alpha)) slider.value = String(alpha);
  // Between 0 and the value, measured from the middle of the thumb.
  const place = (value) => `calc(10px + ${(value + 1) / 4} * (100% - 20px))`;
  const at = Number(slider.value);
  slider.style.setProperty("--low", place(Math.min(0, at)));
  slider.style.setProperty("--high", place(Math.max(0, at)));
  slider.setAttribute("aria-valuetext", at === 0 ? "0, the base alone" : at === 1 ? "1, the published method" : strength(at));
  const own = ownAlpha();
  $("alpha-own").hidden = !known(own) || own === alpha;
  if (known(own)) $("alpha-own").textContent = `Back to the recipe's ${strength(own)}`;
  showSettings();
};

const showSampling = () => {
  $("top-p").disabled = numberOf("temperature") === 0;
  showSettings();
};

const showExperts = (only = null) => {
  const { info } = state;
  const isMix = $("mix").checked;
  const before = only === null ? chosen() : [only];
  const wanted = before.length ? before : info.default_experts?.length ? info.default_experts : [info.experts[0]?.name];
  const isOn = (name) => (isMix ? wanted.includes(name) : wanted[0] === name);
  $("experts").replaceChildren(...info.experts.map((expert) => {
    const item = make("li");
    const label = make("label");
    const input = make("input");
    Object.assign(input, { type: isMix ? "checkbox" : "radio", name: "expert", value: expert.name, checked: isOn(expert.name) });
    input.setAttribute("form", "ask");
    label.append(input, make("bdi", "", expert.name));
    item.append(label);
    if (isMix) {
      const weight = weights.get(expert.name) ?? make("input");
      if (!weights.has(expert.name)) {
        Object.assign(weight, { type: "number", step: "any", value: "1", required: true, inputMode: "decimal" });
        weight.setAttribute("aria-label", `Weight of ${expert.name}`);
        weight.setAttribute("form", "ask");
        weights.set(expert.name, weight);
      }
      weight.disabled = !isOn(expert.name);
      item.append(weight);
    } else {
      item.append(make("span", "own", `α ${strength(expert.alpha)}`));
    }
    return item;
  }));
  $("expert-card").hidden = false;
  $("mix-note").hidden = !isMix;
  showAlpha();
};

const onExpert = (event) => {
  const input = event.target;
  if (input.name !== "expert") return;
  if (input.type === "checkbox") weights.get(input.value).disabled = !input.checked;
  else setAlpha(Math.min(3, Math.max(-1, ownAlpha() ?? 1)));
  input.closest("ul").querySelectorAll("input").forEach((other) => other.setCustomValidity(""));
  showAlpha();
};

// Examples -----------------------------------------------------------------------------------------------

const openExamples = (isOpen) => {
  $("examples-open").setAttribute("aria-expanded", String(isOpen));
  $("examples").hidden = !isOpen;
};

const tryExample = ({ prompt, expert }) => {
  if (state.running.size) return;
  if (expert !== null) {
    $("mix").checked = false;
    showExperts(expert);
    setAlpha(Math.min(3, Math.max(-1, ownAlpha() ?? 1)));
  }
  $("prompt").value = prompt;
  run();
};

const showExamples = () => {
  if (!state.info) return;
  $("examples").replaceChildren(...examplesFor(state.info, state.mode).map((example) => {
    const button = make("button", "example");
    button.type = "button";
    const prompt = make("span", "", example.prompt.replace(/\s+/g, " "));
    prompt.dir = "auto";
    button.append(...(example.expert === null ? [] : [make("bdi", "", example.expert), " "]), prompt);
    button.addEventListener("click", () => tryExample(example));
    return button;
  }));
  $("examples-open").hidden = false;
  openExamples(panes.base.answers[state.mode] === null);
};

// Running ------------------------------------------------------------------------------------------------

const alarm = (text) => { if ($("alert").textContent !== text) $("alert").textContent = text; };

const showBusy = () => {
  const isBusy = state.running.size > 0;
  const hadFocus = [$("run"), $("stop")].includes(document.activeElement);
  $("stop").hidden = !isBusy;
  $("run").hidden = isBusy;
  $("run").disabled = !state.info;
  $("new").hidden = state.mode !== "chat" || isBusy || panes.base.turns.length === 0;
  // Its reader is where the answers are.
  if (hadFocus) (isBusy ? $("stop") : $("run")).focus({ preventScroll: true });
  document.body.classList.toggle("busy", isBusy);
  for (const button of $("examples").children) button.disabled = isBusy;
  for (const side of SIDES) panes[side].element.classList.toggle("busy", state.running.has(side));
};

const invalidField = () => {
  const form = $("ask");
  const boxes = [...$("experts").querySelectorAll("input[name=expert]")];
  if (boxes[0]) boxes[0].setCustomValidity(chosen().length ? "" : "Choose at least one expert.");
  $("prompt").setCustomValidity($("prompt").value.trim() ? "" : state.mode === "chat" ? "Write a message first." : "Write a prompt first.");
  return [...form.elements].find((field) => field.willValidate && !field.checkValidity() && !(field.id === "system")) ?? null;
};

const pointAt = (field) => {
  if ($("settings").contains(field)) $("settings").open = true;
  field.focus();
};

const messagesFor = (pane, turn) => {
  const messages = [];
  if ($("system").value.trim()) messages.push({ role: "system", content: $("system").value });
  for (const { question, answer } of pane.turns) {
    if (turn.answer === answer) break;
    // A question without an answer is left out: models expect the two to alternate.
    if (answer.text.trim()) messages.push({ role: "user", content: question }, { role: "assistant", content: answer.text });
  }
  return [...messages, { role: "user", content: turn.question }];
};

const showProblem = (answer, problem, again) => {
  const box = make("div", "problem");
  box.append(make("strong", "", problem.title));
  const { mode, pane } = answer;
  const isOld = problem.isTooLong && mode === "chat" && pane.turns.length > 1;
  const next = isOld ? "The conversation counts too: a new chat begins without it." : problem.next;
  const text = [problem.message !== problem.title ? problem.message : "", next].filter(Boolean).join("\n");
  if (text) box.append(make("p", "", text));
  const button = make("button", "", "Try again");
  button.type = "button";
  button.addEventListener("click", () => {
    answer.list.focus({ preventScroll: true });
    again();
  });
  box.append(button);
  answer.after.replaceChildren(box);
  const { scroll } = pane;
  scroll.scrollTop = scroll.scrollHeight;
  alarm([problem.title, text].join(" "));
  const field = $(fields[problem.param] ?? "");
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.addEventListener("input", () => field.removeAttribute("aria-invalid"), { once: true });
    pointAt(field);
  }
};

// Ask for one side's answer, from the start or again.
const startSide = async (side, question, settings, mode) => {
  const pane = panes[side];
  const answer = pane.begin(mode, question, settings.sampling.max_tokens);
  const turn = { question, answer };
  if (mode === "chat") pane.turns.push(turn);
  const controller = new AbortController();
  state.running.set(side, controller);
  pane.element.querySelector(".with").textContent = side === "base" ? "α = 0" : strengthWords(settings);
  showBusy();
  const body = {
    model: state.info.name,
    ...(mode === "chat" ? { messages: messagesFor(pane, turn) } : { prompt: question }),
    ...settings.sampling,
    stream: true,
    proxytune: steering(side, settings),
  };
  const again = () => {
    if (state.running.has(side)) return;
    if (selected.answer === answer) closeDetails();
    answer.list.closest(".turn").remove();
    pane.turns = pane.turns.filter((other) => other.answer !== answer);
    startSide(side, question, settings, mode);
  };
  const onWait = (seconds) => {
    const text = seconds ? `The server is full. Trying again in ${seconds} s.` : "";
    answer.after.replaceChildren(...(text ? [make("p", "notice", text)] : []));
    if (text && !$("status").textContent.startsWith("The server is full")) tell(text);
  };
  try {
    const reason = await stream(mode === "chat" ? "/v1/chat/completions" : "/v1/completions", body, answer, controller.signal, onWait);
    answer.end(reason);
  } catch (error) {
    if (controller.signal.aborted) {
      answer.end("stopped");
      answer.after.replaceChildren();
    } else if (error instanceof Problem) {
      answer.end("failed");
      showProblem(answer, error, again);
      if (error.isKeyMissing) askForKey(state.key ? "The server did not accept this key." : "This server answers only with its API key.", () => SIDES.forEach((other) => retries.get(other)?.()));
    } else {
      answer.end("failed");
      throw error;
    }
  } finally {
    if (answer.ended === "failed") retries.set(side, again);
    else retries.delete(side);
    if (state.running.get(side) === controller) state.running.delete(side);
    showBusy();
    if (state.running.size === 0) {
      panes.steered.summarise();
      tell(SIDES.map((name) => `${NAMES[name]}: ${panes[name].sum.textContent}`).join(". "));
    }
  }
};
const retries = new Map();

const run = () => {
  if (state.running.size || !state.info) return;
  const field = invalidField();
  if (field) {
    pointAt(field);
    field.reportValidity();
    return;
  }
  const question = $("prompt").value;
  const settings = readSettings();
  const { mode } = state;
  if (mode === "chat") $("prompt").value = "";
  $("alert").textContent = "";
  openExamples(false);
  tell("Both answers are being written.");
  for (const side of SIDES) startSide(side, question, settings, mode);
  // Where the answers are below the fold, on a phone, go to them.
  const answers = document.querySelector(".panes");
  if (answers.getBoundingClientRect().top > innerHeight * 0.6) answers.scrollIntoView({ block: "start", behavior: "instant" });
};

const stop = () => {
  for (const controller of [...state.running.values()]) controller.abort();
};

// How the base reads a conversation, where that is not what people expect of a chat.
const showChatNote = () => {
  const { has_chat: hasChat = true, has_turns: hasTurns = true } = state.info ?? {};
  $("chat-note").textContent = !hasChat
    ? "This recipe's base has no chat template, so it reads a conversation as plain text: “User: …”, “Assistant: …”."
    : "This recipe's template holds a single question: the base reads the last message, without what was said before.";
  $("chat-note").hidden = state.mode !== "chat" || (hasChat && hasTurns);
};

const setMode = (mode) => {
  stop();
  state.mode = mode;
  closeDetails();
  const isChat = mode === "chat";
  $("prompt").placeholder = isChat ? "Write a message. Both models answer, each in a conversation of its own." : "Write the beginning of a text. Both answers continue it.";
  $("prompt-label").textContent = isChat ? "Message" : "Beginning of a text";
  showChatNote();
  $("hint").replaceChildren(...(isChat && !isTouch
    ? [make("kbd", "", "Enter"), " sends, ", make("kbd", "", "Shift Enter"), " is a new line"]
    : [make("kbd", "", "Ctrl Enter"), " runs"]));
  $("run").textContent = isChat ? "Send" : "Run";
  $("system-field").hidden = !isChat;
  for (const side of SIDES) panes[side].show(mode);
  showExamples();
  showBusy();
};

// The server's name and key ------------------------------------------------------------------------------

const askForKey = (why, after) => {
  state.afterKey = after;
  $("key-why").textContent = why;
  $("key").hidden = false;
  $("key-field").focus();
  alarm(why);
};

const showTrouble = (title, text) => {
  const box = make("div", "problem");
  const button = make("button", "", "Try again");
  button.type = "button";
  button.addEventListener("click", load);
  box.append(make("strong", "", title), make("p", "", text), button);
  $("trouble").replaceChildren(box);
  $("trouble").hidden = false;
  alarm(`${title} ${text}`);
};

const load = async () => {
  $("trouble").hidden = true;
  let response;
  try {
    response = await fetch("/v1/proxytune", { headers: headers(), cache: "no-store" });
  } catch {
    showTrouble("The server cannot be reached.", "Check that it still runs, then try again.");
    return;
  }
  if (response.status === 401) {
    askForKey(state.key ? "The server did not accept this key." : "This server answers only with its API key.", null);
    return;
  }
  if (!response.ok) {
    const problem = await problemOf(response);
    showTrouble(problem.title, `${problem.message}\n${problem.next}`);
    return;
  }
  const isFirst = !state.info;
  try {
    state.info = await response.json();
  } catch {
    showTrouble("The server's answer cannot be read.", "Is there something between this page and the server that changes its answers?");
    return;
  }
  const { info } = state;
  $("recipe").textContent = info.name;
  $("base").textContent = `on ${info.base}`;
  document.title = `${info.name} · proxytune playground`;
  $("version").textContent = info.version;
  $("mix-label").hidden = info.experts.length < 2;
  const limit = Math.min(...[info.limits?.max_tokens, info.limits?.max_context].filter(known));
  if (known(limit)) {
    $("max-tokens").max = String(limit);
    if (numberOf("max-tokens") > limit) $("max-tokens").value = String(limit);
  }
  showChatNote();
  // A recipe that sums several experts by default begins as it is: alpha 1, its own strengths as weights.
  const isSum = isFirst && info.default_experts?.length > 1;
  if (isSum) $("mix").checked = true;
  showExperts();
  if (isSum) {
    for (const { name, alpha } of info.experts) if (info.default_experts.includes(name)) weights.get(name).value = String(alpha);
    setAlpha(1);
  }
  const own = ownAlpha();
  if (isFirst && known(own)) setAlpha(Math.min(3, Math.max(-1, own)));
  showSampling();
  showExamples();
  showBusy();
  tell(`Ready: ${info.name}.`);
};

$("key").addEventListener("submit", async (event) => {
  event.preventDefault();
  state.key = $("key-field").value.trim();
  $("key-field").value = "";
  $("key").hidden = true;
  $("key-open").hidden = !state.key;
  $("alert").textContent = "";
  const after = state.afterKey;
  $("prompt").focus();
  if (after) after();
  else await load();
});
$("key-open").addEventListener("click", () => {
  if ($("key").hidden) askForKey("Another key takes the place of the one in use.", null);
  else $("key").hidden = true;
});

// Wiring -------------------------------------------------------------------------------------------------

const panes = { base: new Pane("base"), steered: new Pane("steered") };

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  if (event.ctrlKey || event.metaKey || (state.mode === "chat" && !isTouch && !event.shiftKey && !event.altKey)) {
    event.preventDefault();
    run();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented) return;
  if (!$("details").hidden) closeDetails(true);
  else if (state.running.size) stop();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => {
  for (const side of SIDES) {
    panes[side].clear("chat");
    panes[side].show("chat");
  }
  openExamples(true);
  showBusy();
  $("prompt").focus();
});
document.querySelectorAll("input[name=mode]").forEach((input) => input.addEventListener("change", () => setMode(input.value)));
$("alpha").addEventListener("input", () => setAlpha(numberOf("alpha")));
$("alpha-number").addEventListener("input", showAlpha);
$("alpha-own").addEventListener("click", () => {
  setAlpha(ownAlpha());
  $("alpha-number").focus();
});
$("experts").addEventListener("change", onExpert);
$("mix").addEventListener("change", () => showExperts());
$("settings").addEventListener("input", showSettings);
$("examples-open").addEventListener("click", () => openExamples($("examples").hidden));
$("sampling").addEventListener("input", showSampling);
$("colours").addEventListener("change", () => {
  panes.steered.scroll.classList.toggle("plain", !$("colours").checked);
  $("legend").hidden = !$("colours").checked; // without colours there is nothing to explain
});
for (const side of SIDES) {
  const pane = panes[side];
  pane.scroll.addEventListener("click", onTokenClick);
  pane.scroll.addEventListener("keydown", onTokenKey);
  pane.element.querySelector(".copy").addEventListener("click", async () => {
    const answer = pane.answers[state.mode];
    if (!answer?.text) {
      tell("There is no answer to copy yet.");
      return;
    }
    try {
      await navigator.clipboard.writeText(answer.text);
      tell("Copied.");
    } catch { // Not allowed, or not a secure context: leave it selected for Ctrl C.
      getSelection().selectAllChildren(answer.list);
      tell("The answer is selected; copy it with Ctrl C.");
    }
  });
}
$("close").addEventListener("click", () => closeDetails(true));

// In a wide window the settings stand beside the answers; in a narrow one they fold away above them.
const wide = matchMedia("(min-width: 960px)");
const foldSettings = () => { $("settings").open = wide.matches; };
wide.addEventListener("change", foldSettings);
foldSettings();
setMode("text");
showSampling();
load();
