"use strict";

// All that the page shows comes from this one block. Only text and attributes are ever set, never HTML.
const block = document.getElementById("data");
const data = JSON.parse(block.textContent);
block.remove();

const NAME_END = 20; // last letters of a file's name, which are always shown
const BATCH = 24; // cards that are added at a time, before the reader reaches the end
const byId = (id) => document.getElementById(id);
const list = byId("photos");
const sources = new WeakMap(); // a word's button -> {photo, caption, model, index}
let shown = []; // the photos that the filter leaves, in order
let drawn = 0; // how many of them have a card
let order = "given";
let shuffled = [];

for (const photo of data.photos) {
  const captions = photo.captions.filter(Boolean);
  photo.captionText = captions.map((caption) => " " + caption.words.join(" ")).join(" ").toLowerCase();
  photo.referenceText = (" " + photo.references.join(" ")).toLowerCase();
}
const best = data.metrics.map((_, m) => // the longest bar of each metric
  Math.max(1e-9, ...data.photos.flatMap((photo) => photo.captions.map((caption) => caption?.scores[m] ?? 0))));

/* ---- which photos, in which order ---- */

function terms() {
  return byId("words").value.toLowerCase().split(/\s+/).filter(Boolean);
}

function matches(photo, wanted) {
  const scope = byId("scope").value;
  if (scope === "name") return wanted.every((term) => photo.name.toLowerCase().includes(term));
  const text = scope === "captions" ? photo.captionText : photo.referenceText;
  return wanted.every((term) => text.includes(" " + term)); // at the start of a word: dog finds dogs
}

function value(photo) {
  const metric = byId("metric").value;
  const model = byId("model")?.value ?? "0";
  const values = photo.captions.map((c) => (metric === "logProb" ? c?.logProb : c?.scores[metric]) ?? null);
  if (model !== "mean" && model !== "gap") return values[model];
  const known = values.filter((number) => number !== null);
  if (!known.length) return null;
  if (model === "gap") return Math.max(...known) - Math.min(...known);
  return known.reduce((sum, number) => sum + number, 0) / known.length;
}

function arrange(photos) {
  if (order === "given") return photos;
  if (order === "random") {
    const kept = new Set(photos);
    return shuffled.filter((photo) => kept.has(photo));
  }
  const sign = order === "best" ? -1 : 1;
  const keyed = photos.map((photo) => [value(photo), photo]);
  keyed.sort(([a], [b]) => (a === null) - (b === null) || sign * (a - b)); // photos without the score come last
  return keyed.map(([, photo]) => photo);
}

function shuffle() {
  shuffled = [...data.photos];
  for (let i = shuffled.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [shuffled[i], shuffled[j]] = [shuffled[j], shuffled[i]];
  }
}

function update() {
  const wanted = terms();
  shown = arrange(data.photos.filter((photo) => matches(photo, wanted)));
  drawn = 0;
  list.replaceChildren();
  const all = data.photos.length.toLocaleString("en");
  byId("count").textContent = shown.length < data.photos.length
    ? `${shown.length.toLocaleString("en")} of ${all} photos` : `${all} photo${data.photos.length === 1 ? "" : "s"}`;
  summarise();
  addCards();
}

function summarise() {
  document.querySelectorAll(".summary tbody tr").forEach((row, model) => {
    row.querySelectorAll("td").forEach((cell, m) => {
      const values = shown.map((photo) => photo.captions[model]?.scores[m] ?? null).filter((v) => v !== null);
      cell.textContent = values.length ? (values.reduce((a, b) => a + b, 0) / values.length).toFixed(3) : "–";
    });
  });
}

/* ---- cards, made when the reader comes near ---- */

const watcher = new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) addCards();
}, { rootMargin: "1500px" });

function addCards() {
  const wanted = terms();
  const batch = document.createDocumentFragment();
  for (const photo of shown.slice(drawn, drawn + BATCH)) batch.append(makeCard(photo, wanted));
  drawn = Math.min(drawn + BATCH, shown.length);
  list.append(batch);
  byId("end").textContent = shown.length ? "" : "No photo has that. Try fewer letters, or look elsewhere.";
  watcher.disconnect(); // observing anew reports again, also where the end has never left the neighbourhood
  if (drawn < shown.length) watcher.observe(byId("end"));
}

function clone(id) {
  return byId(id).content.firstElementChild.cloneNode(true);
}

function makeCard(photo, wanted) {
  const card = clone("card-template");
  const image = card.querySelector("img");
  image.src = "data:image/jpeg;base64," + photo.jpeg;
  image.alt = "Photo " + photo.name;
  const name = card.querySelector("h2");
  name.title = photo.name;
  name.append(document.createElement("span"), document.createElement("span"));
  name.firstChild.textContent = photo.name.slice(0, -NAME_END); // what is too long loses its middle, not its end
  name.lastChild.textContent = photo.name.slice(-NAME_END);
  const scope = byId("scope").value;
  photo.captions.forEach((caption, model) => {
    if (caption) card.querySelector(".captions").append(makeCaption(photo, caption, model, scope === "captions" ? wanted : []));
  });
  fillReferences(card.querySelector(".references"), photo.references, scope === "references" ? wanted : []);
  return card;
}

function makeCaption(photo, caption, model, wanted) {
  const section = clone("caption-template");
  const bar = section.querySelector(".words");
  section.style.setProperty("--model", `var(--model-${model % 4})`);
  section.querySelector("h3").textContent = data.models[model];
  section.querySelector("h3").hidden = data.models.length === 1;
  const sentence = caption.words.join(" ") || "(no words)";
  const walkable = caption.attention !== null && caption.words.length > 0;
  if (walkable) bar.setAttribute("aria-label", `Caption by ${data.models[model]}: ${sentence}`);
  else bar.removeAttribute("role");
  if (!caption.words.length) bar.textContent = sentence;
  caption.words.forEach((text, index) => {
    const word = document.createElement(walkable ? "button" : "span");
    word.className = "word";
    word.append(document.createElement("span"));
    word.firstChild.textContent = text;
    word.classList.toggle("hit", wanted.some((term) => text.toLowerCase().startsWith(term)));
    if (walkable) {
      word.type = "button";
      word.tabIndex = index ? -1 : 0; // one stop a caption; the arrow keys go on from there
      word.setAttribute("aria-pressed", "false");
      sources.set(word, { photo, caption, model, index });
      if (caption.attention.betas) {
        const beta = document.createElement("small");
        beta.textContent = "β " + caption.attention.betas[index].toFixed(2);
        word.append(beta);
      }
    }
    bar.append(word, " ");
  });
  fillScores(section.querySelector(".scores"), photo, caption);
  section.querySelector(".unroll").hidden = !walkable;
  return section;
}

function fillScores(scores, photo, caption) {
  const add = (name, text, share, wins) => {
    const pair = document.createElement("div");
    const [term, number] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    number.textContent = text;
    if (share !== null) pair.style.setProperty("--share", Math.max(0, share));
    pair.classList.toggle("bar", share !== null);
    pair.classList.toggle("wins", wins);
    if (wins) pair.title = "the best of the models on this photo";
    pair.append(term, number);
    scores.append(pair);
  };
  data.metrics.forEach((metric, m) => {
    const score = caption.scores[m];
    if (score === null) return;
    const rivals = photo.captions.map((other) => other?.scores[m] ?? -Infinity);
    const wins = rivals.length > 1 && Math.max(...rivals) === score && Math.min(...rivals) < score;
    add(metric, score.toFixed(2), score / best[m], wins);
  });
  if (caption.logProb !== null) add("log p", caption.logProb.toFixed(1).replace("-", "−"), null, false);
}

function fillReferences(details, references, wanted) {
  details.hidden = references.length === 0;
  details.open = matchMedia("(min-width: 48rem)").matches || wanted.length > 0;
  details.querySelector("summary").textContent = references.length === 1 ? "1 reference" : `${references.length} references`;
  for (const reference of references) {
    const item = document.createElement("li");
    item.dir = "auto";
    for (const text of reference.split(" ")) {
      const hit = wanted.some((term) => text.toLowerCase().startsWith(term));
      const word = hit ? document.createElement("mark") : document.createTextNode(text);
      if (hit) word.textContent = text;
      item.append(word, " ");
    }
    details.querySelector("ul").append(item);
  }
}

/* ---- attention ---- */

function look(word) {
  const { photo, caption, model, index } = sources.get(word);
  const card = word.closest(".card");
  const stage = card.querySelector(".stage");
  const canvas = stage.querySelector("canvas") ?? stage.appendChild(document.createElement("canvas"));
  const text = caption.words[index];
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Where ${data.models[model]} looked for “${text}” in ${photo.name}`);
  draw(canvas, stage.querySelector("img"), caption.attention, index);
  for (const other of card.querySelectorAll(".word.seen")) other.classList.remove("seen");
  word.classList.add("seen");
  const { peaks, betas, side } = caption.attention;
  const percent = (share) => Math.round(100 * share) + " %";
  const reading = betas
    ? `${percent(1 - betas[index])} from the photo, β ${percent(betas[index])}`
    : `peak ${(peaks[index] * side ** 2).toFixed(1)} × the mean`;
  const line = card.querySelector(".reading");
  line.replaceChildren(document.createElement("b"), " " + reading);
  line.firstChild.textContent = text;
}

function rest(card) {
  const kept = card.querySelector('.word[aria-pressed="true"]');
  if (kept) return look(kept);
  card.querySelector(".stage canvas")?.remove();
  card.querySelector(".reading").replaceChildren();
  for (const word of card.querySelectorAll(".word.seen")) word.classList.remove("seen");
}

function keep(word) {
  const card = word.closest(".card");
  const kept = word.getAttribute("aria-pressed") !== "true";
  for (const other of card.querySelectorAll('.word[aria-pressed="true"]')) other.setAttribute("aria-pressed", "false");
  word.setAttribute("aria-pressed", String(kept));
  if (kept) look(word);
  else rest(card);
}

function unroll(button) {
  const card = button.closest(".card");
  const words = [...button.closest(".caption").querySelectorAll(".word")];
  const { model } = sources.get(words[0]);
  const open = button.getAttribute("aria-expanded") !== "true";
  button.setAttribute("aria-expanded", String(open));
  if (!open) return card.querySelector(`[data-model="${model}"]`).remove();
  const strip = document.createElement("section");
  strip.className = "strip";
  strip.dataset.model = model;
  strip.setAttribute("aria-label", `Where ${data.models[model]} looked for each word`);
  strip.style.setProperty("--model", `var(--model-${model % 4})`);
  const strips = [...card.querySelectorAll(".strip")];
  card.querySelector(".strips").insertBefore(strip, strips.find((other) => Number(other.dataset.model) > model) ?? null);
  for (const word of words) {
    const { caption, index } = sources.get(word);
    const frame = document.createElement("figure");
    const label = document.createElement("figcaption");
    const canvas = document.createElement("canvas");
    label.textContent = caption.words[index];
    canvas.setAttribute("aria-hidden", "true");
    frame.append(canvas, label);
    strip.append(frame);
    draw(canvas, card.querySelector("img"), caption.attention, index);
  }
}

/* ---- what the reader does ---- */

const wordAt = (event) => {
  const word = event.target.closest(".word");
  return word && sources.has(word) ? word : null;
};

list.addEventListener("pointerover", (event) => {
  if (event.pointerType === "mouse" && wordAt(event)) look(wordAt(event));
});
list.addEventListener("pointerout", (event) => {
  if (event.pointerType === "mouse" && wordAt(event)) rest(event.target.closest(".card"));
});
list.addEventListener("focusin", (event) => {
  const word = wordAt(event);
  if (!word) return;
  for (const other of word.parentElement.querySelectorAll(".word")) other.tabIndex = other === word ? 0 : -1;
  look(word);
});
list.addEventListener("focusout", (event) => {
  if (wordAt(event)) rest(event.target.closest(".card"));
});
list.addEventListener("click", (event) => {
  const button = event.target.closest(".unroll");
  if (button) unroll(button);
  else if (wordAt(event)) keep(wordAt(event));
});

list.addEventListener("keydown", (event) => {
  const word = wordAt(event);
  if (!word || event.altKey || event.ctrlKey || event.metaKey) return;
  const bar = word.parentElement;
  const words = [...bar.querySelectorAll(".word")];
  const at = words.indexOf(word);
  const bars = () => [...list.querySelectorAll(".words[role]")];
  const [back, on] = getComputedStyle(bar).direction === "rtl" ? ["ArrowRight", "ArrowLeft"] : ["ArrowLeft", "ArrowRight"];
  const target = {
    [back]: () => words[Math.max(0, at - 1)],
    [on]: () => words[Math.min(words.length - 1, at + 1)],
    Home: () => words[0],
    End: () => words.at(-1),
    ArrowUp: () => bars()[bars().indexOf(bar) - 1]?.querySelector(".word"),
    ArrowDown: () => bars()[bars().indexOf(bar) + 1]?.querySelector(".word"),
  }[event.key]?.();
  if (target) {
    event.preventDefault();
    target.focus();
  } else if (event.key === "Escape") {
    for (const kept of list.querySelectorAll('.word[aria-pressed="true"]')) keep(kept);
  }
});

new ResizeObserver(() => { // what sticks below the controls must know their height
  document.documentElement.style.setProperty("--controls", byId("controls").offsetHeight + "px");
}).observe(byId("controls"));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("controls").addEventListener("click", (event) => {
  const button = event.target.closest("[data-order]");
  if (!button) return;
  order = button.dataset.order;
  if (order === "random") shuffle();
  for (const other of document.querySelectorAll("[data-order]")) other.setAttribute("aria-pressed", String(other === button));
  update();
});
for (const id of ["metric", "model"]) {
  byId(id)?.addEventListener("change", () => { // choosing a score asks for an order by it
    if (order === "best" || order === "worst") update();
    else document.querySelector('[data-order="best"]').click();
  });
}
byId("words").addEventListener("input", update);
byId("scope").addEventListener("change", update);
byId("look")?.addEventListener("change", () => {
  for (const canvas of list.querySelectorAll("canvas")) redraws.get(canvas)();
});

update();
