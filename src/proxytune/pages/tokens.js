// What both pages know of tokens: words for them, a text whose tokens can be walked with the keys, and what
// each model gave one of them. The page's own script follows in the same scope. It makes its texts of
// TokenText and defines openDetails(answer, index), which shows what is behind a token of such a text.

const $ = (id) => document.getElementById(id);
const make = (tag, className = "", text = "") => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
};
// How a text ended, by its finish reason; the playground's own "stopped" is a text that its reader ended.
const ENDINGS = {
  stop: "ended by itself", length: "reached the maximum number of tokens", given: "a given text", cancelled: "stopped", stopped: "stopped",
  uncertified: "ended before an uncertified token", failed: "broken off",
};
// Facts beside each other, each a number or word in bold and what it counts; add() returns its element.
const facts = () => {
  const elements = [];
  const add = (text, strong = "") => {
    const element = make("span");
    if (strong) element.append(make("b", "", strong), " ");
    element.append(text);
    elements.push(element);
    return element;
  };
  return { elements, add };
};
const tell = (text) => { $("status").textContent = text; };

// Words for numbers ----------------------------------------------------------------------------------------

const known = (number) => typeof number === "number" && Number.isFinite(number);
const decimal = (number, digits = 2) => number.toFixed(digits).replace("-", "−");
const signed = (number, digits = 2) => `${number >= 0 ? "+" : ""}${decimal(number, digits)}`;
const strength = (number) => String(Number(number.toFixed(3))).replace("-", "−");
const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  if (value >= 99.95) return "100 %";
  if (value >= 9.95) return `${value.toFixed(0)} %`;
  if (value >= 0.95) return `${value.toFixed(1)} %`;
  return value >= 0.005 ? `${value.toFixed(2)} %` : "< 0.01 %";
};
const times = (nats) => {
  const factor = Math.exp(Math.abs(nats));
  return factor >= 1000 ? "over 1000" : factor.toFixed(factor >= 10 ? 0 : 1);
};
const movedWords = (nats) => {
  if (!known(nats)) return "how far it moved is not known";
  if (Math.abs(nats) < 0.05) return "as likely as under the base";
  return nats > 0 ? `${times(nats)} times as likely as under the base` : `${times(nats)} times less likely than under the base`;
};

// Words for tokens -----------------------------------------------------------------------------------------

// Every character is shown as something that can be seen and cannot turn its neighbours around.
const HIDDEN = /[\u0000-\u0009\u000b\u000c\u000e-\u001f\u007f-\u00a0\u00ad\u061c\u115f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\ufff9-\ufffb]/g;
const visible = (text) => text === ""
  ? "(nothing)"
  : text.replace(/\r?\n/g, "↵").replace(/\r/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣")
    .replace(HIDDEN, (character) => `U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
const spoken = (text) => {
  if (text.trim() !== "") return text.replace(HIDDEN, " ").trim();
  if (text === "") return "nothing";
  return text.includes("\n") ? "new line" : "space";
};

// A text, token by token -----------------------------------------------------------------------------------

class TokenText {
  constructor(pane, id, label) {
    this.pane = pane;
    this.elements = [];
    this.index = -1; // of the active token
    this.list = make("span", "tokens");
    this.list.id = id;
    this.list.tabIndex = 0;
    this.list.setAttribute("role", "listbox");
    this.list.setAttribute("aria-label", label);
    this.list.answer = this;
  }
  // Add a token's element to the text, and its leading space before it.
  place(element, fragment) {
    this.elements.push(element);
    // The space before a word stays uncoloured: it is what keeps coloured words apart.
    if (element.textContent.startsWith(" ") && element.textContent.trim() !== "") {
      element.textContent = element.textContent.slice(1);
      fragment.append(" ");
    }
    fragment.append(element);
  }
  // Return a token's element. `level` is the colour of how far it moved, -3 to 3; `baseChoice` is the token that
  // the base would have put first, if that is another one; `kind` and `more` are a class and words of the page's own.
  drawToken(index, { name, text, nats, level, baseChoice = null, kind = "", more = [] }) {
    const element = make("span", "tok", text);
    if (level) element.classList.add(`${level > 0 ? "more" : "less"}-${Math.abs(level)}`);
    if (kind) element.classList.add(kind);
    else if (text === "") element.classList.add("part");
    else if (/^\s*\n\s*$/.test(text)) element.classList.add("nl");
    const words = [movedWords(nats)];
    if (baseChoice !== null) {
      element.classList.add("changed");
      words.push(`base's first choice: ${spoken(baseChoice)}`);
    }
    words.push(...more);
    element.id = `${this.list.id}-${index}`;
    element.setAttribute("role", "option");
    element.setAttribute("aria-selected", "false");
    element.setAttribute("aria-label", `${spoken(name)}, ${words.join(", ")}`);
    element.title = `${visible(name)}: ${words.join("; ")}`;
    return element;
  }
  // Make a token the active one; the text keeps the focus.
  activate(index) {
    this.elements[this.index]?.classList.remove("on");
    this.elements[this.index]?.setAttribute("aria-selected", "false");
    this.index = index;
    const element = this.elements[index];
    if (!element) return;
    element.classList.add("on");
    element.setAttribute("aria-selected", "true");
    this.list.setAttribute("aria-activedescendant", element.id);
    element.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  // The token nearest to the active one on the line above (-1) or below (1).
  onNextLine(direction) {
    const box = (i) => this.elements[i].getBoundingClientRect();
    const from = box(this.index);
    const middle = (rect) => (rect.left + rect.right) / 2;
    let best = this.index;
    let least = Infinity;
    let line = null;
    for (let i = this.index + direction; i >= 0 && i < this.elements.length; i += direction) {
      const rect = box(i);
      if (Math.abs(rect.bottom - from.bottom) < from.height / 2) continue;
      line ??= rect.bottom;
      if (Math.abs(rect.bottom - line) > from.height / 2) break;
      const distance = Math.abs(middle(rect) - middle(from));
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }
}

// What each model gave one token ---------------------------------------------------------------------------

const selected = { answer: null };

// In a narrow window the details lie over the page's lower end. `--dock` is their height there: the page is that
// much longer, and whatever is scrolled into view stops above them.
const fitDock = () => {
  const panel = $("details");
  const isOver = !panel.hidden && ["fixed", "sticky"].includes(getComputedStyle(panel).position);
  document.documentElement.style.setProperty("--dock", `${isOver ? panel.offsetHeight : 0}px`);
};
new ResizeObserver(fitDock).observe($("details"));

// A view's sign in the formula and its name; the only expert needs no name.
const viewTitle = (name, isOnly = false) => {
  if (name === "base") return ["", "Base"];
  if (name === "steered") return ["= ", "Steered"];
  const at = name.lastIndexOf(".");
  const [expert, kind] = [name.slice(0, at), name.slice(at + 1)];
  const label = isOnly ? "" : ` ${expert}`;
  return kind === "expert" ? ["+ α ", `Expert${label}`] : ["− α ", `Anti-expert${label}`];
};

const drawView = (name, { logprob, rank, entropy, top }, token, { greatest, isOnly = false, chosenWord }) => {
  const figure = make("section", `view ${name === "steered" ? "steered" : ""}`);
  const heading = make("h3");
  const [sign, title] = viewTitle(name, isOnly);
  const mark = make("span", "sign", sign);
  mark.setAttribute("aria-hidden", "true");
  heading.append(mark, make("bdi", "", title));
  const facts = [known(logprob) ? percent(logprob) : "not shown"];
  if (known(rank)) facts.push(`rank ${rank}`);
  if (known(entropy)) facts.push(`entropy ${decimal(entropy)} nats`);
  const rows = make("ol");
  const row = (item, extra = "") => {
    const isChosen = item.id === token.id;
    const line = make("li", `row ${isChosen ? "chosen" : ""} ${extra}`);
    const text = make("bdi", "", visible(item.name));
    text.title = `${visible(item.name)}, token ${item.id}`;
    const meter = make("span", "meter");
    const fill = make("i");
    fill.style.width = `${100 * Math.min(1, Math.exp(item.logprob) / greatest)}%`;
    meter.setAttribute("aria-hidden", "true");
    meter.append(fill);
    line.append(text, make("span", "share", percent(item.logprob)), meter);
    if (isChosen) line.append(make("span", "unseen", chosenWord));
    rows.append(line);
  };
  for (const item of top) row(item);
  if (known(logprob) && !top.some((item) => item.id === token.id)) row({ ...token, logprob }, "beyond");
  figure.append(heading, make("p", "facts", facts.join(" · ")), rows);
  return figure;
};

// Show what is behind a token {id, name}: `place` says where it stands, `words` what is said of it, and `views` holds
// pairs of a model's name and {logprob, rank, entropy, top}. `sum` takes the place of the words on the page.
const showDetails = (answer, index, { token, place, words, sum = words.join(" · "), views, isOnly, chosenWord }) => {
  if (selected.answer && selected.answer !== answer) selected.answer.activate(-1);
  selected.answer = answer;
  const isNew = $("details").hidden;
  $("details").hidden = false;
  document.body.classList.add("open");
  $("details-title").replaceChildren(make("bdi", "", visible(token.name)), place);
  $("details-sum").textContent = sum;
  const greatest = Math.max(1e-9, ...views.flatMap(([, { logprob, top }]) => [logprob, top[0]?.logprob].filter(known).map(Math.exp)));
  $("views").replaceChildren(...views.map(([name, view]) => drawView(name, view, token, { greatest, isOnly, chosenWord })));
  $("previous").disabled = index === 0;
  $("next").disabled = index >= answer.elements.length - 1;
  fitDock();
  answer.activate(index);
  if (isNew) $("details").scrollTop = 0;
  tell(`${spoken(token.name)}: ${words.join(", ")}`);
};

const closeDetails = (isFocusKept = false) => {
  $("details").hidden = true;
  document.body.classList.remove("open");
  $("views").replaceChildren();
  const { answer } = selected;
  selected.answer = null;
  if (!answer) return;
  if (isFocusKept) answer.list.focus({ preventScroll: true });
  else answer.activate(-1);
};

const go = (answer, index) => {
  const place = Math.max(0, Math.min(answer.elements.length - 1, index));
  if (!answer.elements.length) return;
  if ($("details").hidden) answer.activate(place);
  else openDetails(answer, place);
};

const onTokenKey = (event) => {
  const { answer } = event.target;
  if (!answer || event.ctrlKey || event.metaKey || event.altKey) return;
  const isRtl = getComputedStyle(answer.list).direction === "rtl";
  const at = answer.index;
  const moves = {
    ArrowRight: () => go(answer, at + (isRtl && at >= 0 ? -1 : 1)),
    ArrowLeft: () => go(answer, at + (isRtl ? 1 : -1)),
    ArrowDown: () => go(answer, at < 0 ? 0 : answer.onNextLine(1)),
    ArrowUp: () => go(answer, at < 0 ? 0 : answer.onNextLine(-1)),
    Home: () => go(answer, 0),
    End: () => go(answer, answer.elements.length - 1),
    Enter: () => answer.elements.length && openDetails(answer, Math.max(0, at)),
    " ": () => answer.elements.length && openDetails(answer, Math.max(0, at)),
  };
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  move();
};

const onTokenClick = (event) => {
  const element = event.target.closest(".tok");
  if (!element || !getSelection().isCollapsed) return; // the click ended a selection
  const { answer } = element.parentNode;
  answer.list.focus({ preventScroll: true });
  openDetails(answer, answer.elements.indexOf(element));
};

$("previous").addEventListener("click", () => go(selected.answer, selected.answer.index - 1));
$("next").addEventListener("click", () => go(selected.answer, selected.answer.index + 1));
