// A result: the tissue beside the UMAP, coloured by domain or by a gene.

import { PALETTE, ScatterPlot, colourByDomain, colourByValue, drawScale } from "./drawing.js";
import { $, element, number, problem } from "./elements.js";
import { ask } from "./server.js";

const GENES_SHOWN = 50;
const HOW_TO_LOOK =
  "Point at a spot. The wheel or + and - zoom, dragging moves, 0 shows all; arrow keys go from spot to spot.";

const look = { job: null, view: null, genes: [], gene: null, shown: null };
const plots = {
  tissue: new ScatterPlot($("tissue"), "Map of the tissue; arrows go from spot to spot", pointAt),
  umap: new ScatterPlot($("umap"), "UMAP of the spots; arrows go from spot to spot", pointAt, 8),
};

function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const begin = 4 + length;
  const view = { n: header.n, isYUp: header.y_up };
  for (const [name, { dtype, offset, length: bytes }] of Object.entries(header.arrays)) {
    const type = dtype === "<i2" ? Int16Array : Float32Array;
    view[name] = new type(buffer, begin + offset, bytes / type.BYTES_PER_ELEMENT);
  }
  view.ids = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, begin + header.ids.offset, header.ids.length)));
  return view;
}

// Fetch a result and show it; says whether it did, for the job may have been left in the meantime.
export async function show(job, status) {
  look.job = job;
  const view = unpack(await (await ask(`jobs/${job}/view`)).arrayBuffer());
  if (job !== look.job) return false;
  Object.assign(look, { view, genes: [], gene: null, shown: null });
  $("gene").value = "";
  $("spot").textContent = HOW_TO_LOOK;
  $("result").hidden = false;
  const { x, y, umap, domain, refined } = view;
  plots.tissue.setSpots(x, view.isYUp ? y.map((value) => -value) : y);
  $("umap-figure").hidden = !umap;
  document.querySelector(".plots").classList.toggle("single", !umap);
  if (umap) {
    plots.umap.setSpots(umap.filter((_, i) => i % 2 === 0), umap.filter((_, i) => i % 2 === 1).map((value) => -value));
  }
  $("refined-choice").hidden = !refined;
  document.querySelector("input[name=colour][value=domain]").checked = true;
  const count = new Set(domain.filter((value) => value >= 0)).size;
  const name = Object.values(status.files).join(", ");
  const until = new Date(status.expires * 1000).toLocaleString();
  $("summary").textContent =
    `${name}: ${number.format(view.n)} spots in ${count} domains. Kept on the server until ${until}.`;
  const notes = status.summary.notes || [];
  $("notes").hidden = !notes.length;
  $("note-list").replaceChildren(...notes.map((note) => element("li", note)));
  recolour();
  pointAt(-1);
  $("result").scrollIntoView({ block: "nearest" });
  loadGenes(job);
  return true;
}

export function hide() {
  look.job = null;
  $("result").hidden = true;
}

async function loadGenes(job) {
  try {
    const { genes } = await (await ask(`jobs/${job}/genes`)).json();
    if (job === look.job) look.genes = genes;
  } catch (error) {
    problem("The genes cannot be listed", error);
  }
}

function colourChoice() {
  return document.querySelector("input[name=colour]:checked").value;
}

function labels() {
  return colourChoice() === "refined" ? look.view.refined : look.view.domain;
}

function recolour() {
  const byGene = colourChoice() === "gene" && look.gene;
  $("legend").hidden = Boolean(byGene);
  $("scale").hidden = !byGene;
  let colours;
  if (byGene) {
    colours = colourByValue(look.gene.values, look.gene.low, look.gene.high);
    drawScale($("scale-bar"));
    $("scale-high").textContent = `${look.gene.name} ${look.gene.high.toPrecision(3)}`;
    $("scale-low").textContent = look.gene.low.toPrecision(3);
  } else {
    colours = colourByDomain(labels(), look.shown);
    showLegend();
  }
  for (const plot of Object.values(plots)) plot.setColours(colours);
}

function showLegend() {
  const counts = new Map();
  for (const value of labels()) counts.set(value, (counts.get(value) || 0) + 1);
  const old = [...$("legend").children].findIndex((button) => button === document.activeElement);
  $("legend").replaceChildren(
    ...[...counts.keys()].sort((a, b) => a - b).filter((value) => value >= 0).map((value) => {
      const button = element("button", "", { type: "button" });
      const swatch = element("i");
      swatch.style.backgroundColor = PALETTE[value % PALETTE.length];
      const share = (100 * counts.get(value)) / look.view.n;
      const percent = element("small", `${share.toFixed(share < 10 ? 1 : 0)} %`);
      button.append(swatch, element("span", `Domain ${value}`), percent);
      button.setAttribute("aria-pressed", String(look.shown === value));
      button.onclick = () => {
        look.shown = look.shown === value ? null : value;
        recolour();
      };
      return button;
    }),
  );
  if (old >= 0) $("legend").children[old]?.focus();
}

function pointAt(index) {
  for (const plot of Object.values(plots)) if (plot.x && plot.marked !== index) plot.mark(index);
  if (index < 0 || !look.view) return;
  const { ids, x, y, domain, refined, probability } = look.view;
  const parts = [ids[index], domain[index] < 0 ? "no domain" : `domain ${domain[index]}`];
  if (probability && domain[index] >= 0) parts.push(`probability ${probability[index].toFixed(2)}`);
  if (refined && refined[index] >= 0) parts.push(`refined ${refined[index]}`);
  parts.push(`x ${x[index].toPrecision(6)}, y ${y[index].toPrecision(6)}`);
  if (look.gene) parts.push(`${look.gene.name} ${look.gene.values[index].toPrecision(3)}`);
  $("spot").textContent = parts.join("  \u00b7  ");
}

// Genes

function matches(text) {
  const wanted = text.trim().toLowerCase();
  const first = [];
  const later = [];
  for (const gene of look.genes) {
    const place = gene.toLowerCase().indexOf(wanted);
    if (place === 0) first.push(gene);
    else if (place > 0 && later.length < GENES_SHOWN) later.push(gene);
    if (first.length >= GENES_SHOWN) break;
  }
  return [...first, ...later].slice(0, GENES_SHOWN);
}

function showGenes() {
  const found = matches($("gene").value);
  const items = found.map((gene, index) => {
    const item = element("li", gene, { id: `gene-${index}` });
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    item.onpointerdown = (event) => {
      event.preventDefault();
      chooseGene(gene);
    };
    return item;
  });
  if (!items.length) items.push(element("li", "no such gene", { className: "none" }));
  $("gene-list").replaceChildren(...items);
  listOpen(true);
}

function listOpen(isOpen) {
  $("gene-list").hidden = !isOpen;
  $("gene").setAttribute("aria-expanded", String(isOpen));
  if (!isOpen) $("gene").removeAttribute("aria-activedescendant");
}

function moveInGenes(step) {
  const items = [...$("gene-list").querySelectorAll("[role=option]")];
  if (!items.length) return;
  const now = items.findIndex((item) => item.getAttribute("aria-selected") === "true");
  const next = (now + step + items.length + (now < 0 && step < 0 ? 1 : 0)) % items.length;
  items.forEach((item, index) => item.setAttribute("aria-selected", String(index === next)));
  items[next].scrollIntoView({ block: "nearest" });
  $("gene").setAttribute("aria-activedescendant", items[next].id);
}

async function chooseGene(name) {
  listOpen(false);
  $("gene").value = name;
  const job = look.job;
  try {
    const answer = await ask(`jobs/${job}/genes/${encodeURIComponent(name)}`);
    const values = new Float32Array(await answer.arrayBuffer());
    if (job !== look.job) return;
    // The highest percent would hide the rest.
    const sorted = values.slice().sort();
    const high = sorted[Math.floor(0.99 * (sorted.length - 1))];
    look.gene = { name, values, low: sorted[0], high: high > sorted[0] ? high : sorted[sorted.length - 1] };
    document.querySelector("input[name=colour][value=gene]").checked = true;
    recolour();
    pointAt(plots.tissue.marked);
  } catch (error) {
    problem("The gene cannot be shown", error);
  }
}

$("gene").addEventListener("input", showGenes);
$("gene").addEventListener("focus", showGenes);
$("gene").addEventListener("blur", () => listOpen(false));
$("gene").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if ($("gene-list").hidden) showGenes();
    moveInGenes(event.key === "ArrowDown" ? 1 : -1);
  } else if (event.key === "Enter") {
    event.preventDefault();
    const picked = $("gene-list").querySelector("[aria-selected=true]")?.textContent || matches($("gene").value)[0];
    if (picked) chooseGene(picked);
  } else if (event.key === "Escape") {
    listOpen(false);
  }
});

// Downloads

async function download(format) {
  const colour = colourChoice() === "gene" && look.gene ? look.gene.name : colourChoice();
  const path = format === "png" ? `plot.png?color=${encodeURIComponent(colour)}&dpi=200` : `result?format=${format}`;
  try {
    const blob = await (await ask(`jobs/${look.job}/${path}`)).blob();
    const name = `domains-${look.job.slice(0, 8)}.${format}`;
    const link = element("a", "", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  } catch (error) {
    problem("The download failed", error);
  }
}

$("size").addEventListener("input", () => {
  for (const plot of Object.values(plots)) if (plot.x) plot.setSize($("size").valueAsNumber);
});
for (const radio of document.querySelectorAll("input[name=colour]")) {
  radio.addEventListener("change", () => {
    look.shown = null;
    if (radio.value === "gene" && !look.gene) $("gene").focus();
    recolour();
  });
}
for (const button of document.querySelectorAll("[data-format]")) {
  button.addEventListener("click", () => download(button.dataset.format));
}

// For tests, and for the curious at the browser's console.
window.tissue = { look, plots };
