// Scatter plots of many spots on a canvas, with the nearest spot under the pointer, zoom, and keys.

// The first seven are Okabe and Ito's. The others were chosen one by one among all colours: each is the farthest in
// OKLab from those before it, as seen with normal vision, protanopia, deuteranopia and tritanopia (Machado 2009).
export const PALETTE = [
  "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#333333", "#96f0f0", "#0000c3",
  "#1e004b", "#5a5a5a", "#870fff", "#690078", "#a5c3a5", "#9678ff", "#2d0f00", "#b41e00", "#c3e1a5", "#c31e96",
  "#87d2ff", "#690f00", "#69b478", "#5a785a",
];
const FADED = "#e3e6ea";
const MARGIN = 14;
const LEVELS = 64;
const ROUND_UP_TO = 20000; // more spots are squares, which are drawn faster
// Viridis at nine equally spaced places; between them colours are mixed.
const VIRIDIS = [
  [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
  [170, 220, 50], [253, 231, 37],
];

export function scaleColour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const part = place - low;
  const mixed = VIRIDIS[low].map((value, index) => Math.round(value + part * (VIRIDIS[low + 1][index] - value)));
  return `rgb(${mixed.join(",")})`;
}

// Colours of all spots: `classes` [N] is an index into `palette`; spots are drawn class by class, in `order`.
// Spots without a domain (-1) are grey, and lie below the others.
export function colourByDomain(domain, shown) {
  const count = domain.reduce((most, value) => Math.max(most, value), 0) + 1;
  const palette = Array.from({ length: count }, (_, index) => PALETTE[index % PALETTE.length]);
  const classes = domain.map((value) => value + 1);
  const colours = palette.map((colour, index) => (shown === null || index === shown ? colour : FADED));
  return ordered(classes, [FADED, ...colours], shown === null ? null : shown + 1);
}

export function colourByValue(values, low, high) {
  const classes = new Int16Array(values.length);
  const range = high > low ? high - low : 1;
  for (let i = 0; i < values.length; i++) {
    const share = (values[i] - low) / range;
    classes[i] = Math.min(LEVELS - 1, Math.max(0, Math.floor(share * LEVELS)));
  }
  return ordered(classes, Array.from({ length: LEVELS }, (_, index) => scaleColour(index / (LEVELS - 1))));
}

function ordered(classes, palette, last = null) {
  // Counting sort. The class that is looked at comes last, so that no other lies over it.
  const rank = palette.map((_, index) => index);
  if (last !== null) rank.push(rank.splice(last, 1)[0]);
  const counts = new Uint32Array(palette.length);
  for (const value of classes) counts[value]++;
  const starts = new Uint32Array(palette.length);
  let sum = 0;
  for (const index of rank) {
    starts[index] = sum;
    sum += counts[index];
  }
  const next = starts.slice();
  const order = new Uint32Array(sum);
  for (let i = 0; i < classes.length; i++) order[next[classes[i]]++] = i;
  return { palette, rank, starts, counts, order };
}

// Finds the nearest spot: spots are sorted into the squares of a grid, about two in each.
class Grid {
  constructor(x, y, bounds) {
    this.x = x;
    this.y = y;
    this.bounds = bounds;
    const area = Math.max(bounds.width * bounds.height, 1e-12);
    this.size = Math.max(Math.sqrt((2 * area) / x.length), Math.max(bounds.width, bounds.height) / 1000, 1e-6);
    this.columns = Math.floor(bounds.width / this.size) + 1;
    this.rows = Math.floor(bounds.height / this.size) + 1;
    const cells = new Uint32Array(x.length);
    this.starts = new Uint32Array(this.columns * this.rows + 1);
    for (let i = 0; i < x.length; i++) {
      cells[i] = this.row(y[i]) * this.columns + this.column(x[i]);
      this.starts[cells[i] + 1]++;
    }
    for (let c = 0; c < this.columns * this.rows; c++) this.starts[c + 1] += this.starts[c];
    const next = this.starts.slice();
    this.members = new Uint32Array(x.length);
    for (let i = 0; i < x.length; i++) this.members[next[cells[i]]++] = i;
  }

  column(x) {
    return Math.min(this.columns - 1, Math.max(0, Math.floor((x - this.bounds.left) / this.size)));
  }

  row(y) {
    return Math.min(this.rows - 1, Math.max(0, Math.floor((y - this.bounds.top) / this.size)));
  }

  nearest(x, y, radius) {
    let best = -1;
    let least = radius * radius;
    for (let row = this.row(y - radius); row <= this.row(y + radius); row++) {
      const first = this.starts[row * this.columns + this.column(x - radius)];
      const end = this.starts[row * this.columns + this.column(x + radius) + 1];
      for (let k = first; k < end; k++) {
        const i = this.members[k];
        const distance = (this.x[i] - x) ** 2 + (this.y[i] - y) ** 2;
        if (distance <= least) {
          least = distance;
          best = i;
        }
      }
    }
    return best;
  }
}

export class ScatterPlot {
  // `holder`: element to fill. `onPoint(index)`: called with the spot that is pointed at, -1 for none.
  // `widest`: largest width of a spot in CSS pixels; where spots are not a lattice, large ones would hide each other.
  constructor(holder, label, onPoint, widest = 60) {
    this.holder = holder;
    this.onPoint = onPoint;
    this.widest = widest;
    this.base = document.createElement("canvas");
    this.over = document.createElement("canvas");
    this.over.tabIndex = 0;
    this.over.setAttribute("role", "application");
    this.over.setAttribute("aria-label", label);
    holder.replaceChildren(this.base, this.over);
    this.spotSize = 1;
    this.marked = -1;
    this.listen();
    new ResizeObserver(() => this.resize()).observe(holder);
  }

  setSpots(x, y) {
    let left = Infinity, right = -Infinity, top = Infinity, bottom = -Infinity;
    for (let i = 0; i < x.length; i++) {
      if (x[i] < left) left = x[i];
      if (x[i] > right) right = x[i];
      if (y[i] < top) top = y[i];
      if (y[i] > bottom) bottom = y[i];
    }
    this.x = x;
    this.y = y;
    this.bounds = { left, top, width: Math.max(right - left, 1e-6), height: Math.max(bottom - top, 1e-6) };
    this.grid = new Grid(x, y, this.bounds);
    this.marked = -1;
    this.resize();
  }

  setColours(colours) {
    this.colours = colours;
    this.draw();
  }

  setSize(size) {
    this.spotSize = size;
    this.draw();
  }

  resize() {
    const { width, height } = this.holder.getBoundingClientRect();
    if (!width || !this.x) return;
    this.width = width;
    this.height = height;
    this.ratio = Math.min(window.devicePixelRatio || 1, 2);
    for (const canvas of [this.base, this.over]) {
      canvas.width = Math.round(width * this.ratio);
      canvas.height = Math.round(height * this.ratio);
    }
    this.reset();
  }

  reset() {
    const { left, top, width, height } = this.bounds;
    this.whole = Math.min((this.width - 2 * MARGIN) / width, (this.height - 2 * MARGIN) / height);
    this.scale = this.whole;
    this.originX = left + width / 2 - this.width / 2 / this.scale;
    this.originY = top + height / 2 - this.height / 2 / this.scale;
    this.draw();
  }

  zoom(factor, atX = this.width / 2, atY = this.height / 2) {
    const scale = Math.min(Math.max(this.scale * factor, this.whole * 0.8), this.whole * 200);
    this.originX += atX / this.scale - atX / scale;
    this.originY += atY / this.scale - atY / scale;
    this.scale = scale;
    this.draw();
  }

  // Width of a spot in CSS pixels: spots of a full plot nearly touch.
  spotWidth() {
    const { width, height } = this.bounds;
    const spacing = Math.sqrt((width * height) / this.x.length) * this.scale;
    return Math.max(Math.min(spacing * 0.8, this.widest) * this.spotSize, 1.2);
  }

  draw() {
    if (this.pending || !this.colours || !this.width) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.paint();
    });
  }

  paint() {
    const begin = performance.now();
    const context = this.base.getContext("2d");
    const { palette, rank, starts, counts, order } = this.colours;
    const k = this.scale * this.ratio;
    const size = this.spotWidth() * this.ratio;
    const round = size > 3 * this.ratio && this.x.length <= ROUND_UP_TO;
    const half = size / 2;
    const right = this.base.width + size;
    const bottom = this.base.height + size;
    context.clearRect(0, 0, this.base.width, this.base.height);
    for (const index of rank) {
      if (!counts[index]) continue;
      context.fillStyle = palette[index];
      context.beginPath();
      for (let n = starts[index]; n < starts[index] + counts[index]; n++) {
        const i = order[n];
        const px = (this.x[i] - this.originX) * k;
        const py = (this.y[i] - this.originY) * k;
        if (px < -size || py < -size || px > right || py > bottom) continue;
        if (round) {
          context.moveTo(px + half, py);
          context.arc(px, py, half, 0, 2 * Math.PI);
        } else {
          context.fillRect(px - half, py - half, size, size);
        }
      }
      if (round) context.fill();
    }
    this.paintedIn = performance.now() - begin;
    this.mark(this.marked);
  }

  mark(index) {
    this.marked = index;
    if (!this.width) return;
    const context = this.over.getContext("2d");
    context.clearRect(0, 0, this.over.width, this.over.height);
    if (index < 0) return;
    const k = this.scale * this.ratio;
    context.beginPath();
    const radius = Math.max(this.spotWidth() / 2 + 2, 6) * this.ratio;
    context.arc((this.x[index] - this.originX) * k, (this.y[index] - this.originY) * k, radius, 0, 2 * Math.PI);
    context.lineWidth = 4 * this.ratio;
    context.strokeStyle = "#fff";
    context.stroke();
    context.lineWidth = 2 * this.ratio;
    context.strokeStyle = "#000";
    context.stroke();
  }

  spotAt(px, py) {
    const reach = Math.max(this.spotWidth() / 2, 8) / this.scale;
    return this.grid.nearest(this.originX + px / this.scale, this.originY + py / this.scale, reach);
  }

  // The nearest spot in a direction, within 45 degrees of it.
  neighbour(dx, dy) {
    if (this.marked < 0) {
      const middleX = this.originX + this.width / 2 / this.scale;
      const middleY = this.originY + this.height / 2 / this.scale;
      return this.grid.nearest(middleX, middleY, this.bounds.width + this.bounds.height);
    }
    let best = this.marked;
    let least = Infinity;
    const fromX = this.x[this.marked];
    const fromY = this.y[this.marked];
    for (let i = 0; i < this.x.length; i++) {
      const along = (this.x[i] - fromX) * dx + (this.y[i] - fromY) * dy;
      const across = Math.abs((this.x[i] - fromX) * dy) + Math.abs((this.y[i] - fromY) * dx);
      const distance = along + across;
      if (along > 0 && across <= along && distance < least) {
        least = distance;
        best = i;
      }
    }
    return best;
  }

  listen() {
    let from = null;
    this.over.addEventListener("pointerdown", (event) => {
      from = { x: event.offsetX, y: event.offsetY };
      this.over.setPointerCapture(event.pointerId);
    });
    this.over.addEventListener("pointerup", () => (from = null));
    this.over.addEventListener("pointermove", (event) => {
      if (from) {
        this.originX -= (event.offsetX - from.x) / this.scale;
        this.originY -= (event.offsetY - from.y) / this.scale;
        from = { x: event.offsetX, y: event.offsetY };
        this.draw();
      } else {
        this.onPoint(this.spotAt(event.offsetX, event.offsetY));
      }
    });
    this.over.addEventListener("pointerleave", () => this.onPoint(-1));
    this.over.addEventListener("dblclick", () => this.reset());
    this.over.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
    }, { passive: false });
    const keys = {
      "+": () => this.zoom(1.4), "=": () => this.zoom(1.4), "-": () => this.zoom(1 / 1.4), 0: () => this.reset(),
      ArrowLeft: () => this.onPoint(this.neighbour(-1, 0)), ArrowRight: () => this.onPoint(this.neighbour(1, 0)),
      ArrowUp: () => this.onPoint(this.neighbour(0, -1)), ArrowDown: () => this.onPoint(this.neighbour(0, 1)),
      Escape: () => this.onPoint(-1),
    };
    this.over.addEventListener("keydown", (event) => {
      if (!(event.key in keys) || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      keys[event.key]();
    });
  }
}

export function drawLosses(canvas, losses) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const high = Math.max(...losses);
  const low = Math.min(...losses);
  context.lineWidth = 3;
  context.strokeStyle = "#0063a6";
  context.beginPath();
  losses.forEach((loss, index) => {
    const x = 4 + (index / Math.max(losses.length - 1, 1)) * (canvas.width - 8);
    const y = canvas.height - 6 - ((loss - low) / (high - low || 1)) * (canvas.height - 12);
    if (index) context.lineTo(x, y);
    else context.moveTo(x, y);
  });
  context.stroke();
}

export function drawScale(canvas) {
  const context = canvas.getContext("2d");
  for (let row = 0; row < canvas.height; row++) {
    context.fillStyle = scaleColour(1 - row / (canvas.height - 1));
    context.fillRect(0, row, canvas.width, 1);
  }
}
