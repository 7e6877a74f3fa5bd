// The page: send a section, watch its analysis, look at the domains. Plain browser functions, nothing from elsewhere.

import { drawLosses } from "./drawing.js";
import { $, element, number, problem, size } from "./elements.js";
import { hide, show } from "./result.js";
import { Refusal, ask, upload } from "./server.js";

const POLL_MS = 600;
const LOST_POLL_MS = 2000;
const PARTS = ["counts", "coordinates", "labels"];
const STAGES = { queued: "Waiting for a free machine", running: "Working" };
const state = { limits: null, chosen: [], job: null, losses: [], polls: 0 };

// Choosing files

function guessPart(name, all) {
  if (/\.h5ad$/i.test(name)) return "file";
  if (/coord|position|places|spatial|xy/i.test(name)) return "coordinates";
  if (/label|truth|domain|annot/i.test(name)) return "labels";
  return all.some((other) => other.part === "counts") ? "coordinates" : "counts";
}

function choose(files) {
  $("problem").hidden = true;
  const added = [];
  for (const file of files) added.push({ file, part: guessPart(file.name, added) });
  const whole = added.find(({ part }) => part === "file");
  state.chosen = whole ? [whole] : added;
  showChosen();
}

function showChosen() {
  $("chosen").replaceChildren(
    ...state.chosen.map((entry) => {
      const item = element("li", `${entry.file.name} (${size(entry.file.size)})`);
      if (entry.part !== "file") {
        const select = element("select", "", { ariaLabel: `What ${entry.file.name} holds` });
        select.append(...PARTS.map((part) => element("option", part, { value: part, selected: part === entry.part })));
        select.onchange = () => (entry.part = select.value);
        item.append(select);
      }
      return item;
    }),
  );
  $("start").disabled = !state.chosen.length;
}

// What can be known before anything is sent.
function checkChosen() {
  const total = state.chosen.reduce((sum, { file }) => sum + file.size, 0);
  const errors = [];
  if (state.limits) {
    if (total > state.limits.max_upload_bytes) {
      const most = size(state.limits.max_upload_bytes);
      const message = `${size(total)} chosen, the server takes ${most}. Keep fewer genes or cells.`;
      errors.push({ field: "files", message });
    }
    for (const { file, part } of state.chosen) {
      const endings = state.limits.files[part];
      if (!endings.some((ending) => file.name.toLowerCase().endsWith(ending))) {
        errors.push({ field: file.name, message: `its name must end in ${endings.join(" or ")}.` });
      }
    }
  }
  return errors;
}

function options() {
  const params = {};
  if (document.querySelector("input[name=k]:checked").value === "number") params.n_domains = $("k").valueAsNumber;
  if ($("epochs").value) params.epochs = $("epochs").valueAsNumber;
  if ($("seed").value) params.seed = $("seed").valueAsNumber;
  if ($("refine").value) params.refine = $("refine").value;
  return params;
}

async function start(event) {
  event.preventDefault();
  $("problem").hidden = true;
  if ($("key").value) sessionStorage.setItem("key", $("key").value);
  if (!state.limits) await loadLimits();
  const errors = checkChosen();
  if (errors.length) return problem("This cannot be sent", { errors });
  const form = new FormData();
  form.append("params", JSON.stringify(options()));
  for (const { file, part } of state.chosen) form.append(part, file, file.name);
  working("Sending", 0);
  try {
    const onProgress = (share) => {
      if (share < 1) working("Sending", share, `${Math.round(share * 100)} %`);
      else working("The server checks the section", null);
    };
    const job = await upload(form, onProgress, (stop) => ($("cancel").onclick = stop));
    open(job.job_id);
  } catch (error) {
    $("working").hidden = true;
    $("start").disabled = false;
    if (error.name !== "AbortError") problem("The section was not accepted", error);
  }
}

// Watching a job

function working(stage, share, numbers = "") {
  $("working").hidden = false;
  hide();
  $("start").disabled = true;
  if ($("stage").textContent !== stage) $("stage").textContent = stage;
  if (share === null) $("progress").removeAttribute("value");
  else $("progress").value = share;
  $("numbers").textContent = numbers;
  $("losses").hidden = state.losses.length < 2;
}

function open(jobId) {
  state.losses = [];
  state.job = jobId;
  history.replaceState(null, "", `#job=${jobId}`);
  $("cancel").onclick = () => cancel(jobId);
  working(STAGES.queued, null);
  poll(++state.polls);
}

async function cancel(jobId) {
  try {
    await ask(`jobs/${jobId}`, { method: "DELETE" });
  } catch (error) {
    problem("Not cancelled", error);
  }
}

function close() {
  state.job = null;
  state.polls++;
  history.replaceState(null, "", location.pathname);
  $("working").hidden = true;
  hide();
  $("start").disabled = !state.chosen.length;
}

async function poll(turn) {
  let status;
  try {
    status = await (await ask(`jobs/${state.job}`)).json();
  } catch (error) {
    if (turn !== state.polls) return;
    if (error instanceof Refusal && error.status < 500) {
      close();
      return problem("The analysis cannot be shown", error);
    }
    $("numbers").textContent = "The connection is lost; trying again. The analysis goes on.";
    return setTimeout(() => turn === state.polls && poll(turn), LOST_POLL_MS);
  }
  if (turn !== state.polls) return;
  if (status.status === "queued" || status.status === "running") {
    showProgress(status);
    return setTimeout(() => turn === state.polls && poll(turn), POLL_MS);
  }
  if (status.status === "done") return finish(turn, status);
  close();
  if (status.status === "failed") problem("The analysis failed", status.error);
}

async function finish(turn, status) {
  working("Fetching the result", null);
  try {
    if (!(await show(state.job, status)) || turn !== state.polls) return;
    $("working").hidden = true;
    $("start").disabled = !state.chosen.length;
  } catch (error) {
    if (turn !== state.polls) return;
    close();
    problem("The result cannot be shown", error);
  }
}

function showProgress(status) {
  const { stage, epoch, epochs, loss } = status.progress;
  const again = status.attempt > 1 ? ` (start ${status.attempt}: a machine was lost)` : "";
  const name = stage ? stage[0].toUpperCase() + stage.slice(1) : STAGES[status.status];
  if (Number.isFinite(loss) && Number.isFinite(epoch)) {
    if (state.losses.length && epoch < state.losses.epoch) state.losses = [];
    if (epoch !== state.losses.epoch) state.losses.push(loss);
    state.losses.epoch = epoch;
    if (state.losses.length > 1) drawLosses($("losses"), state.losses);
  }
  const parts = [];
  if (epochs) parts.push(`epoch ${number.format(epoch)} of ${number.format(epochs)}`);
  if (Number.isFinite(loss)) parts.push(`loss ${loss.toPrecision(5)}`);
  const { n_obs: spots, n_vars: genes } = status.summary;
  if (spots) parts.push(`${number.format(spots)} spots, ${number.format(genes)} genes`);
  working(name + again, epochs ? epoch / epochs : null, parts.join("  \u00b7  "));
}

// Beginning

async function loadLimits() {
  try {
    state.limits = await (await ask("limits")).json();
    $("epochs").max = state.limits.max_epochs;
  } catch (error) {
    if (error.status === 401) $("key-row").hidden = false;
  }
}

$("form").addEventListener("submit", start);
$("files").addEventListener("change", () => choose($("files").files));
for (const kind of ["dragenter", "dragover"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) $("drop").addEventListener(kind, () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  choose(event.dataTransfer.files);
});
$("k").addEventListener("focus", () => (document.querySelector("input[name=k][value=number]").checked = true));
$("problem-close").addEventListener("click", () => ($("problem").hidden = true));
$("remove").addEventListener("click", async () => {
  try {
    await ask(`jobs/${state.job}`, { method: "DELETE" });
    close();
  } catch (error) {
    problem("Not deleted", error);
  }
});

const known = /^#job=([0-9a-f]{32})$/.exec(location.hash);
await loadLimits();
if (known) open(known[1]);
