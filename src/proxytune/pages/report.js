// A steering report: its numbers, which are in the page as JSON, shown. It follows tokens.js in one scope.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SHADES = [0.02, 0.1, 0.3, 0.6]; // where the lanes' colour changes

const draw = (tag, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};

// Words for numbers --------------------------------------------------------------------------------------

const share = (number) => `${(100 * number).toFixed(number > 0 && number < 0.1 ? 1 : 0)} %`;
const strengths = (alphas) => {
  const used = Object.entries(alphas);
  return used.some(([, alpha]) => alpha) ? used.map(([name, alpha]) => `${name} α ${strength(alpha)}`).join(" + ") : "α 0";
};

// A run: its steps unpacked ------------------------------------------------------------------------------

const unpack = (run) => {
  if (run.steps) return run;
  run.steps = run.rows.map(([id, piece, partOf, flags, level, shift, kl, baseChoice, offsets, weights, views, terms], index) => ({
    index, id, piece, partOf, level, shift, kl, baseChoice, offsets, weights, views, terms,
    isSpecial: Boolean(flags & 1), isGiven: Boolean(flags & 2), isChanged: Boolean(flags & 4), hasConflict: Boolean(flags & 8),
  }));
  return run;
};
const nameOf = (run, id) => run.tokens[id] ?? `⟨token ${id}⟩`;

// The text of a run, token by token ----------------------------------------------------------------------

class Answer extends TokenText {
  constructor(pane, run, prompt) {
    super(pane, `${pane.id}-list`, `${pane.querySelector("h2").textContent}, token by token`);
    this.run = unpack(run);
    const fresh = document.createDocumentFragment();
    for (const step of this.run.steps) this.place(this.draw(step), fresh);
    this.list.append(fresh);
    const text = make("div", "text");
    text.dir = "auto";
    const given = make("span", "given", prompt.length > 1200 ? `…${prompt.slice(-1200)}` : prompt);
    given.title = "The prompt";
    text.append(given, this.list);
    pane.querySelector(".flow").replaceChildren(text);
  }
  draw(step) {
    const name = nameOf(this.run, step.id);
    const element = this.drawToken(step.index, {
      name,
      text: step.isSpecial ? "" : step.piece,
      nats: step.shift,
      level: step.level,
      baseChoice: step.isChanged ? nameOf(this.run, step.baseChoice) : null,
      kind: step.isSpecial ? "end" : "",
      more: step.partOf ? [`part of ${step.partOf}`] : [],
    });
    if (step.isSpecial) element.dataset.name = name;
    if (this.run.isForked && step.index === this.run.numGiven - 1) element.classList.add("forced");
    return element;
  }
}

// What each model gave one token -------------------------------------------------------------------------

// Pairs of a model's name and what it gave a step; a run holds first choices as ids and logprobs, one after the other.
const viewsOf = (run, step) => run.views.map((view, i) => {
  const [logprob, rank, entropy, top] = step.views[i];
  const choices = [];
  for (let at = 0; at < top.length; at += 2) choices.push({ id: top[at], name: nameOf(run, top[at]), logprob: top[at + 1] });
  return [view, { logprob, rank, entropy, top: choices }];
});

// What an offset consists of where its expert has weights or an output bias.
const termWords = (terms) => {
  if (!terms) return "";
  const [pair, base, bias] = terms;
  const parts = [`its models ${signed(pair)}`];
  if (base) parts.push(`the base's weight ${signed(base)}`);
  if (bias) parts.push(`its output bias ${signed(bias)}`);
  return ` (${parts.join(", ")})`;
};

const openDetails = (answer, index) => {
  const { run } = answer;
  const step = run.steps[index];
  const words = [movedWords(step.shift) + (known(step.shift) ? ` (${signed(step.shift)} nats)` : "")];
  if (known(step.kl)) words.push(`KL(steered ‖ base) ${decimal(step.kl)} nats`);
  if (step.isChanged) words.push(`base's first choice: ${visible(nameOf(run, step.baseChoice))}`);
  if (step.partOf) words.push(`part of ${step.partOf}`);
  if (step.isGiven) words.push("given, not chosen");
  if (step.hasConflict) words.push("the experts, each alone, would disagree");
  const offsets = Object.entries(step.offsets);
  if (offsets.length && !run.isBase) {
    const parts = offsets.map(([name, nats]) => `${name} ${signed(nats)}${termWords(step.terms?.[name])}`);
    const common = known(step.shift) ? step.shift - offsets.reduce((sum, [, nats]) => sum + nats, 0) : null;
    words.push(`offset ${parts.join(", ")} nats${known(common) && !step.weights ? `, all tokens ${signed(common)}` : ""}`);
    if (step.weights) words.push(`the policy's weight: ${Object.entries(step.weights).map(([name, weight]) => `${name} × ${decimal(weight)}`).join(", ")}`);
  }
  showDetails(answer, index, {
    token: { id: step.id, name: nameOf(run, step.id) },
    place: ` at position ${index} ${run.isBase ? "of the base's own text" : ""}`,
    words,
    views: viewsOf(run, step),
    chosenWord: "this token",
  });
  moveCursor(answer === state.steered ? index : null);
};

const closeToken = (isFocusKept = false) => {
  moveCursor(null);
  closeDetails(isFocusKept);
};

// Along the text: one path for all bars of a colour, so that length costs nothing ------------------------

const moveCursor = (index) => {
  for (const cursor of document.querySelectorAll(".cursor")) {
    cursor.hidden = index === null;
    if (index !== null) cursor.style.left = `${(100 * (index + 0.5)) / state.steered.run.steps.length}%`;
  }
};

const plot = (className, width, height, children) => {
  const box = make("div", `plot ${className}`);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(...children);
  const cursor = make("span", "cursor");
  cursor.hidden = true;
  box.append(svg, cursor);
  box.addEventListener("click", (event) => {
    const rect = box.getBoundingClientRect();
    const index = Math.floor(((event.clientX - rect.left) / rect.width) * width);
    if (index < 0 || index >= width) return;
    openDetails(state.steered, index);
    box.scrollIntoView({ block: "nearest", inline: "nearest" }); // its reader is here, however far off the token is
  });
  return box;
};
const bars = (items) => items.map(([x, y, height]) => `M${x} ${y}h1v${height}h-1z`).join("");

const drawAlong = (run) => {
  const { steps } = run;
  const count = Math.max(1, steps.length);
  const shifts = steps.map((step) => (known(step.shift) ? step.shift : 0));
  const limit = Math.max(1, ...shifts.map(Math.abs));
  const tall = (shift) => (50 * Math.abs(shift)) / limit;
  const name = (text, sign = "") => {
    const element = make("div", "name");
    if (sign) element.append(make("span", "sign", sign));
    element.append(make("bdi", "", text));
    return element;
  };
  const up = shifts.flatMap((shift, x) => (shift > 0 ? [[x, 50 - tall(shift), tall(shift)]] : []));
  const down = shifts.flatMap((shift, x) => (shift < 0 ? [[x, 50, tall(shift)]] : []));
  const line = run.runningShare.flatMap((value, x) => (known(value) ? [`${x + 0.5} ${100 - 100 * value}`] : []));
  const axisY = make("div", "scale-y");
  const axisNear = make("div", "scale-y near");
  axisNear.append(make("span", "", "100 %"), make("span", "", "0"));
  axisY.append(make("span", "", signed(limit, 1)), make("span", "", "0 nats"), make("span", "", signed(-limit, 1)));
  const rows = [
    name("Shift"),
    plot("shift", count, 100, [
      draw("path", { d: bars(up), class: "up" }),
      draw("path", { d: bars(down), class: "down" }),
      draw("path", { d: `M0 50H${count}`, class: "zero", "vector-effect": "non-scaling-stroke" }),
    ]),
    axisY,
    make("div", "gap"),
    name("First choices changed"),
    plot("near", count, 100, [
      draw("polygon", { points: line.length ? `0.5 100 ${line.join(" ")} ${count - 0.5} 100` : "", class: "share-area" }),
      draw("polyline", { points: line.join(" "), class: "share-line", "vector-effect": "non-scaling-stroke" }),
    ]),
    axisNear,
    name(""),
    plot("ticks", count, 10, [draw("path", { d: bars(steps.filter((step) => step.isChanged).map((step) => [step.index, 2, 8])), class: "tick" })]),
    make("div", "mean", known(run.summary.share_changed) ? share(run.summary.share_changed) : ""),
    make("div", "gap"),
  ];
  run.views.forEach((view, place) => {
    const shades = [[], [], [], [], []];
    let sum = 0;
    let number = 0;
    for (const step of steps) {
      const logprob = step.views[place][0];
      if (!known(logprob)) continue;
      const prob = Math.exp(logprob);
      sum += prob;
      number += 1;
      shades[SHADES.filter((edge) => prob >= edge).length].push([step.index, 0, 10]);
    }
    const [sign, title] = viewTitle(view);
    const mean = make("div", "mean", number ? `∅ ${share(sum / number)}` : "");
    mean.title = "Mean probability that it gave the tokens";
    rows.push(name(title, sign), plot("lane", count, 10, shades.map((items, i) => draw("path", { d: bars(items), class: `p${i + 1}` }))), mean, make("div", "gap"));
  });
  const axis = make("div", "axis");
  const last = steps.length - 1;
  const places = [...new Set([0, 0.25, 0.5, 0.75, 1].map((part) => Math.round(part * last)))];
  axis.append(...places.map((place) => make("span", "", String(place))));
  rows.push(name("position"), axis, make("div"));
  $("rows").replaceChildren(...rows);
};

// Tables -------------------------------------------------------------------------------------------------

const drawTypes = (run) => {
  $("types").replaceChildren(...run.types.map(([token, count, changed, probChange, shift, context, numContext]) => {
    const row = make("tr");
    const cell = (text, className = "") => {
      const element = make("td", className, text);
      row.append(element);
      return element;
    };
    cell("").append(make("bdi", "", visible(token)));
    cell(String(count));
    cell(String(changed));
    cell(known(probChange) ? signed(100 * probChange, 1) : "");
    cell(known(shift) ? signed(shift) : "");
    const words = cell("", "words");
    words.append(make("bdi", "", context.replace(/\n/g, "↵").trim()), ...(numContext > 1 ? [make("span", "soft small", ` × ${numContext}`)] : []));
    return row;
  }));
};

const drawPaths = (report) => {
  $("paths").hidden = report.runs.length < 3 && !report.runs.some((run) => run.isForked);
  if ($("paths").hidden) return;
  $("path-list").replaceChildren(...report.runs.map((run) => {
    unpack(run);
    const item = make("li");
    const head = make("div");
    head.append(make("bdi", "", run.name));
    const where = run.isBase || !known(run.parts)
      ? (run.isBase ? "the base by itself" : "the same as the base's")
      : `parts from the base at position ${run.parts}`;
    head.append(make("div", "small soft", where));
    const text = make("div", "text");
    text.dir = "auto";
    const at = run.isBase || !known(run.parts) ? run.steps.length : run.parts;
    const join = (steps) => steps.map((step) => (step.isSpecial ? "" : step.piece)).join("");
    text.append(join(run.steps.slice(0, at)).trimStart());
    if (at < run.steps.length) text.append(make("b", "", join(run.steps.slice(at))));
    item.append(head, text);
    return item;
  }));
};

const drawFigures = (run) => {
  const { summary } = run;
  const items = [];
  const figure = (value, unit, words) => {
    const box = make("div");
    const number = make("dd", "", value);
    if (unit) number.append(" ", make("small", "", unit));
    box.append(make("dt", "", words), number);
    items.push(box);
  };
  if (known(summary.share_changed)) figure(share(summary.share_changed), "", `of first choices changed, ${summary.num_changed} of ${summary.num_known}`);
  if (known(summary.mean_prob_change)) figure(signed(100 * summary.mean_prob_change, 1), "points", "mean change in a token's probability, in percentage points");
  if (known(summary.mean_shift)) figure(signed(summary.mean_shift), "nats", `mean shift of a token, a factor of ${decimal(Math.exp(summary.mean_shift))}`);
  if (known(summary.mean_kl)) figure(decimal(summary.mean_kl), "nats", "mean KL(steered ‖ base)");
  if (known(summary.early_share_of_log_odds_change) && summary.num_tokens > summary.early_tokens) {
    figure(share(summary.early_share_of_log_odds_change), "", `of the log-odds change is in the first ${summary.early_tokens} tokens, ${share(summary.early_share_if_uniform)} of the text`);
  }
  const experts = Object.entries(summary.expert_shares_of_offsets);
  if (experts.length > 1) for (const [name, value] of experts) figure(share(value), "", `of all offsets is ${name}'s`);
  if (known(summary.conflict_rate)) figure(share(summary.conflict_rate), "", "of tokens: the experts, each alone, would disagree");
  $("figures").replaceChildren(...items);
  $("figures").parentNode.hidden = items.length === 0;
};

// Choosing what is shown ---------------------------------------------------------------------------------

const state = { report: null, steered: null, base: null };

const sumUp = (pane, run) => {
  const { elements, add } = facts();
  add(run.steps.length === 1 ? "token" : "tokens", String(run.steps.length));
  if (run.numGiven && run.numGiven < run.steps.length) add("given", String(run.numGiven));
  if (!run.isBase && state.report.runs.some((other) => other.isBase)) add(known(run.parts) ? `parts from the base at position ${run.parts}` : "the same tokens as the base");
  if (known(run.seed)) add(`seed ${run.seed}`);
  add(ENDINGS[run.finish] ?? run.finish);
  pane.querySelector(".sum").replaceChildren(...elements);
};

const showRun = (run) => {
  closeToken();
  const { prompt } = state.report;
  const pane = $("pane-steered");
  $("title-steered").textContent = run.isBase ? "Base" : run.numGiven === run.rows.length ? "Given text" : "Steered";
  pane.querySelector(".with").textContent = run.isForked ? `${strengths(run.alphas)} · ${run.name}` : strengths(run.alphas);
  state.steered = new Answer(pane, run, prompt);
  sumUp(pane, run);
  const base = state.report.runs.find((other) => other.isBase && other !== run);
  $("pane-base").hidden = !base;
  $("text").classList.toggle("two", Boolean(base));
  if (base) {
    state.base = new Answer($("pane-base"), base, prompt);
    sumUp($("pane-base"), base);
  }
  drawFigures(run);
  drawAlong(run);
  drawTypes(run);
};

const showCase = (index) => {
  const report = DATA.reports[index];
  state.report = report;
  const choices = report.runs.map((run, i) => {
    const label = make("label");
    const input = make("input");
    Object.assign(input, { type: "radio", name: "run", value: String(i), checked: i === 0 });
    label.append(input, make("bdi", "", run.name));
    return label;
  });
  $("runs").replaceChildren($("runs").querySelector("legend"), ...choices);
  $("runs").hidden = report.runs.length < 3;
  $("picks").hidden = DATA.reports.length < 2 && $("runs").hidden;
  showRun(report.runs[0]);
  drawPaths(report);
};

$("recipe").textContent = DATA.recipe;
$("made").textContent = DATA.made;
const shorten = (text) => {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 90 ? `${line.slice(0, 89)}…` : line;
};
$("case").replaceChildren(...DATA.reports.map((report, i) => new Option(`${i + 1} of ${DATA.reports.length}: ${shorten(report.prompt)}`, String(i))));
$("case-label").hidden = DATA.reports.length < 2;
$("case").addEventListener("change", () => showCase(Number($("case").value)));
$("runs").addEventListener("change", (event) => showRun(state.report.runs[Number(event.target.value)]));
$("colours").addEventListener("change", () => {
  $("pane-steered").classList.toggle("plain", !$("colours").checked);
  $("legend").hidden = !$("colours").checked; // without colours there is nothing to explain
});
for (const pane of document.querySelectorAll(".pane")) {
  pane.addEventListener("click", onTokenClick);
  pane.addEventListener("keydown", onTokenKey);
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented && !$("details").hidden) closeToken(true);
});
$("close").addEventListener("click", () => closeToken(true));
showCase(0);
