"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // Maps: the slider of a section shows the map and the words of one layer.
  for (const range of document.querySelectorAll("input[data-layers]")) {
    const layers = range.dataset.layers.split(" ");
    const maps = document.querySelector(`[data-maps="${range.id.replace("-layer", "")}"]`);
    range.addEventListener("input", () => {
      for (const part of maps.querySelectorAll("[data-at]")) part.hidden = part.dataset.at !== range.value;
      range.setAttribute("aria-valuetext", `layer ${layers[range.value]}`);
      document.querySelector(`output[for="${range.id}"]`).textContent = layers[range.value];
    });
  }

  // Routing: one table per kind.
  const kind = byId("kind");
  if (kind) kind.addEventListener("change", () => {
    for (const table of byId("weights").children) table.hidden = table.dataset.kind !== kind.value;
  });

  // Contexts: a scatter whose points show their sample under the pointer, or by number.
  const source = byId("context-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const svg = byId("scatter"), shown = byId("shown"), legend = byId("legend");
  const layer = byId("context-layer"), colour = byId("context-colour"), number = byId("context-sample");
  const make = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);
  const circles = data.texts.map((_, sample) => {
    const circle = make("circle");
    circle.setAttribute("r", 4.5);
    circle.dataset.sample = sample;
    svg.append(circle);
    return circle;
  });
  const ring = make("circle");
  ring.setAttribute("class", "ring");
  ring.setAttribute("r", 8);
  svg.append(ring);
  let current = 0;

  const thumb = (box, sample) => {
    const { address, columns, rows } = data.sheet, size = box.clientWidth || 64;
    box.style.backgroundImage = `url(${address})`;
    box.style.backgroundSize = `${columns * size}px ${rows * size}px`;
    box.style.backgroundPosition = `${-size * (sample % columns)}px ${-size * Math.floor(sample / columns)}px`;
  };
  const groupOf = (by, sample) => data.groups[by][data.members[by][sample]];
  const show = (sample) => {
    current = sample;
    number.value = sample + 1;
    ring.setAttribute("cx", circles[sample].getAttribute("cx"));
    ring.setAttribute("cy", circles[sample].getAttribute("cy"));
    shown.replaceChildren();
    if (data.sheet) {
      const box = document.createElement("span");
      box.className = "thumb";
      box.setAttribute("role", "img");
      box.setAttribute("aria-label", `Image of sample ${sample + 1}`);
      shown.append(box);
      thumb(box, sample);
    }
    const words = document.createElement("div"), groups = Object.keys(data.groups).map((by) => groupOf(by, sample));
    words.textContent = `Sample ${sample + 1} (${groups.join(", ")}): ${data.texts[sample] || "no text"}`;
    shown.append(words);
  };
  const place = () => {
    const points = data.points[layer.value];
    circles.forEach((circle, sample) => {
      circle.setAttribute("cx", (20 + 600 * points[sample][0]).toFixed(1));
      circle.setAttribute("cy", (400 - 380 * points[sample][1]).toFixed(1));
    });
    const [one, two] = data.explained[layer.value].map((share) => Math.round(100 * share));
    byId("axes").textContent = `Across: component 1, ${one} % of the variance. Up: component 2, ${two} %.`;
    show(current);
  };
  const paint = () => {
    const by = colour.value, names = data.groups[by] || [], used = new Set(data.members[by] || []);
    legend.replaceChildren();
    circles.forEach((circle, sample) => {
      circle.style.fill = `var(--c${names.length ? data.members[by][sample] % 8 : 7})`;
      circle.classList.remove("off");
    });
    names.forEach((name, group) => {
      if (!used.has(group)) return;
      const item = document.createElement("li"), button = document.createElement("button");
      const dot = document.createElement("i");
      dot.style.background = `var(--c${group % 8})`;
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.append(dot, name);
      button.addEventListener("click", () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(on));
        circles.forEach((c, sample) => data.members[by][sample] === group && c.classList.toggle("off", !on));
      });
      item.append(button);
      legend.append(item);
    });
  };
  svg.addEventListener("pointerover", (event) => {
    const sample = event.target.dataset && event.target.dataset.sample;
    if (sample !== undefined) show(Number(sample));
  });
  number.addEventListener("input", () => {
    const sample = Math.round(Number(number.value)) - 1;
    if (number.value !== "" && sample >= 0 && sample < circles.length) show(sample);
  });
  layer.addEventListener("change", place);
  colour.addEventListener("change", paint);
  place();
  paint();
  for (const box of document.querySelectorAll(".near .thumb")) thumb(box, Number(box.dataset.sample));
})();
