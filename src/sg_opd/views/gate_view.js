"use strict";
// All text comes in as data and is set as text. One listener for each kind of event serves every token.
const blocks = [...document.querySelectorAll("script.rollouts")];
const main = document.getElementById("rollouts"), tip = document.getElementById("tip");
const select = document.getElementById("step");
const CASES = {"+": "consensus", "-": "conflict", "0": "neutral", ".": "untrained"};
const MARKS = {correct: "✓ correct", incorrect: "✗ incorrect", abstained: "– abstained"};
let places = new Map();  // token element -> its rollout, its number, all tokens of it
let current = null;

function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function isolated(text) {
  const element = make("bdi", "", text);
  element.dir = "auto";
  return element;
}

function number(value, digits = 3) {
  return typeof value === "number" ? value.toFixed(digits).replace("-", "−") : String(value).replace("-", "−");
}

function signed(value) {
  return (value > 0 ? "+" : "") + number(value);
}

function sign(value) {
  return (value > 0 ? "+" : "") + String(value).replace("-", "−");
}

function percent(logp) {
  return typeof logp === "number" ? `${(100 * Math.exp(logp)).toPrecision(3)} %` : "";
}

function share(value) {
  return typeof value === "number" ? `${(100 * value).toFixed(1)} %` : "–";
}

function rows(pairs) {
  const list = make("dl");
  for (const [name, ...values] of pairs) {
    list.append(make("dt", "", name), ...values.map((value) => make("dd", "", value)));
  }
  return list;
}

function largest({largest, tokens, cases, delta}, elements) {
  const list = make("ol", "largest");
  list.setAttribute("aria-label", "Largest deltas");
  for (const i of largest) {
    const text = tokens[i] === "" ? make("span", "mark", "⋯") : isolated(tokens[i].replaceAll("↵\n", "↵"));
    const button = make("button", "", make("span", `${CASES[cases[i]]} s3`, text), ` ${signed(delta[i])}`);
    button.type = "button";
    button.addEventListener("click", () => go(elements[i]));
    list.append(make("li", "", button));
  }
  return list;
}

function facts(rollout, elements) {
  const aside = make("aside"), {summary, settings} = rollout;
  const heading = make("h2", rollout.verdict, MARKS[rollout.verdict]);
  const bar = make("div", "shares");
  bar.setAttribute("aria-hidden", "true");
  const list = [["written by", rollout.source], ["tokens", String(rollout.tokens.length)]];
  if (rollout.gold !== null) list.unshift(["reference answer", isolated(rollout.gold)]);
  for (const name of ["consensus", "conflict", "neutral"]) {
    const part = make("span", name);
    part.style.flexGrow = summary[`gate/${name}`];
    bar.append(part);
    list.push([name, share(summary[`gate/${name}`])]);
  }
  list.push(["mean factor", number(summary["gate/factor"], 2)]);
  list.push(["median delta", signed(summary["delta/p50"])]);
  const {count, below} = rollout.faint;
  if (count) list.push(["without a line", `${count} below ${below}`]);
  if (settings.rule === "sign") {
    list.push(["factors", `${settings.extrapolation} / ${settings.interpolation}`]);  // of consensus and conflict
  } else {
    list.push(["rule", settings.rule]);
  }
  if (settings.signal === "group" && rollout.sign !== null) list.push(["sign in its group", sign(rollout.sign)]);
  aside.append(heading, bar, rows(list));
  if (rollout.largest.length) aside.append(make("h3", "", "Largest delta"), largest(rollout, elements));
  if (rollout.prompt !== null) {
    const text = make("pre", "", rollout.prompt), details = make("details", "", make("summary", "", "Prompt"), text);
    text.dir = "auto";
    text.tabIndex = 0;
    details.open = rollout.prompt.length < 2000;
    aside.append(details);
  }
  return aside;
}

function token(text, rollout, i) {
  const name = CASES[rollout.cases[i]];
  const element = make("span", name === "neutral" ? "t neutral" : `t ${name} s${rollout.levels[i]}`);
  if (text === "") {
    element.append(make("span", "mark", "⋯"));  // a part of a character
  } else if (text.includes("\n")) {
    text.split("↵\n").forEach((part, k) => element.append(...(k ? [make("span", "mark", "↵"), "\n"] : []), part));
  } else {
    element.textContent = text;
  }
  return element;
}

function completion(rollout, elements) {
  const region = make("div", "tokens");
  region.setAttribute("role", "group");
  region.setAttribute("aria-label", "Completion: arrow keys go from token to token, with Shift from marked conflict to marked conflict");
  let line = null;
  rollout.tokens.forEach((text, i) => {
    if (line === null) {
      line = make("div", "line");
      line.dir = "auto";
      region.append(line);
    }
    const element = token(text, rollout, i);
    line.append(element);
    elements.push(element);
    places.set(element, {rollout, i, elements});
    if (text.endsWith("\n")) line = null;
  });
  if (elements.length) elements[0].tabIndex = 0;
  return region;
}

function show(index) {
  hide();
  places = new Map();
  const rollouts = JSON.parse(blocks[index].textContent);
  main.replaceChildren(...rollouts.map((rollout) => {
    const elements = [];  // of the tokens
    return make("article", "", facts(rollout, elements), completion(rollout, elements));
  }));
  select.selectedIndex = index;
  document.getElementById("earlier").disabled = index === 0;
  document.getElementById("later").disabled = index === blocks.length - 1;
}

function describe({rollout, i}) {
  const text = rollout.tokens[i], name = CASES[rollout.cases[i]];
  const what = text === "" ? ["part of a character that a later token completes"] : ["“", isolated(text), "”"];
  const id = rollout.ids === null ? "" : `, id ${rollout.ids[i]}`;
  if (name === "untrained") return [make("p", "", ...what), make("p", "", "not trained on"), make("p", "quiet", `token ${i + 1}${id}`)];
  const numbers = [
    ["student", number(rollout.student[i]), percent(rollout.student[i])],
    ["teacher", number(rollout.teacher[i]), percent(rollout.teacher[i])],
  ];
  if (rollout.reference) numbers.push(["reference", number(rollout.reference[i]), percent(rollout.reference[i])]);
  numbers.push(["delta", signed(rollout.delta[i]), ""], ["factor", number(rollout.factor[i], 2), ""]);
  if (rollout.advantage) numbers.push(["advantage", signed(rollout.advantage[i]), ""]);
  const delta = rollout.delta[i];  // what is infinite is text, "inf" or "-inf"
  const side = delta === 0 ? "leaves" : String(delta).startsWith("-") ? "lowers" : "raises";
  const group = rollout.settings.signal === "group" && rollout.sign !== null ? `, sign ${sign(rollout.sign)} in its group` : "";
  const words = `${name}: the teacher ${side} it, verdict ${rollout.verdict}${group}`;
  return [make("p", "", ...what), make("p", "", words), rows(numbers), make("p", "quiet", `token ${i + 1}${id}`)];
}

function point(element) {
  if (element === current) return;
  hide();
  current = element;
  element.classList.add("here");
  element.setAttribute("aria-describedby", "tip");
  tip.replaceChildren(...describe(places.get(element)));
  tip.hidden = false;
  place();
}

function place() {
  if (current === null) return;
  const box = current.getClientRects()[0];
  if (!box) return hide();
  const below = box.bottom + 8 + tip.offsetHeight <= innerHeight;
  const top = below ? box.bottom + 8 : Math.max(8, box.top - 8 - tip.offsetHeight);
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8));
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
}

function hide() {
  if (current !== null) {
    current.classList.remove("here");
    current.removeAttribute("aria-describedby");
  }
  current = null;
  tip.hidden = true;
}

function go(element) {
  const {elements} = places.get(element);
  elements.forEach((other) => other.tabIndex === 0 && other.removeAttribute("tabindex"));
  element.tabIndex = 0;
  element.focus();
}

function target(event) {
  const element = event.target instanceof Element ? event.target.closest(".tokens .t") : null;
  return places.has(element) ? element : null;
}

function next({rollout, i, elements}, event) {
  if (event.key === "Home") return elements[0];
  if (event.key === "End") return elements.at(-1);
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return undefined;
  let j = i + step;
  while (event.shiftKey && j in elements && !(rollout.cases[j] === "-" && rollout.levels[j] > 0)) j += step;
  return elements[j];
}

main.addEventListener("pointerover", (event) => {
  const element = target(event);
  if (element) point(element);
  else if (document.activeElement !== current) hide();
});
main.addEventListener("pointerleave", () => document.activeElement !== current && hide());
main.addEventListener("focusin", (event) => target(event) && point(target(event)));
main.addEventListener("focusout", hide);
main.addEventListener("click", (event) => target(event) && go(target(event)));
main.addEventListener("keydown", (event) => {
  const element = target(event);
  if (element === null) return;
  if (event.key === "Escape") hide();
  const other = next(places.get(element), event);
  if (other === undefined) return;
  event.preventDefault();
  go(other);
});
addEventListener("scroll", place, {passive: true});
addEventListener("resize", place);
select.addEventListener("change", () => show(select.selectedIndex));
document.getElementById("earlier").addEventListener("click", () => show(select.selectedIndex - 1));
document.getElementById("later").addEventListener("click", () => show(select.selectedIndex + 1));

select.append(...blocks.map((block) => make("option", "", block.dataset.step)));
document.getElementById("steps").hidden = blocks.length < 2;
if (blocks.length) show(blocks.length - 1);
