// The live numbers and charts: kappa, tokens a second, the share of drafts.

const WINDOW = 1500; // milliseconds that a point of a chart is a mean of
const APART = 200; // milliseconds between points, and the least that one is a mean of
const POINTS = 300;
const SVG = "http://www.w3.org/2000/svg";

export class Meters {
  constructor(find) {
    this.numbers = { kappa: find("kappa"), speed: find("speed"), share: find("share") };
    this.kappa = new Chart(find("kappa-chart"), "kappa", 1);
    this.speed = new Chart(find("speed-chart"), "tokens a second", 0);
    this.begin();
  }

  // A new answer; the charts go on beside the one before.
  begin() {
    this.samples = [];
    this.drawn = 0;
    for (const chart of [this.kappa, this.speed]) chart.push(null);
  }

  // Takes the usage of the answer so far.
  take({ completion_tokens: tokens, steps, kappa, accepted_tokens: accepted }) {
    const now = performance.now();
    const { samples, numbers } = this;
    if (!samples.length) this.start = { now, tokens };
    samples.push({ now, tokens, steps });
    while (samples.length > 2 && samples[1].now < now - WINDOW) samples.shift();
    numbers.kappa.textContent = kappa.toFixed(2);
    numbers.share.textContent = Math.round((100 * accepted) / tokens) + " %";
    const mean = (tokens - this.start.tokens) / ((now - this.start.now) / 1000);
    if (mean > 0 && Number.isFinite(mean)) numbers.speed.textContent = mean.toFixed(1);
    if (now - Math.max(this.drawn, samples[0].now) >= APART) this.draw();
  }

  // The answer has ended; a short one has a point, too.
  end() {
    if (!this.drawn) this.draw();
  }

  draw() {
    const { 0: first, length, [length - 1]: last } = this.samples;
    if (!last || last.steps === first.steps) return;
    this.drawn = last.now;
    this.kappa.push((last.tokens - first.tokens) / (last.steps - first.steps));
    this.speed.push((last.tokens - first.tokens) / ((last.now - first.now) / 1000));
  }
}

// A line over time in an SVG element; null leaves a gap.
class Chart {
  constructor(svg, name, floor) {
    Object.assign(this, { svg, name, floor, values: [] });
    const make = (tag, kind) => {
      const part = document.createElementNS(SVG, tag);
      part.setAttribute("class", kind);
      svg.append(part);
      return part;
    };
    [this.axis, this.line, this.top] = [make("path", "axis"), make("path", "line"), make("text", "top")];
  }

  push(value) {
    if (value === null && (this.values.at(-1) ?? null) === null) return; // one gap is enough
    this.values.push(Number.isFinite(value) ? value : null);
    this.values.splice(0, this.values.length - POINTS);
    this.draw();
  }

  draw() {
    const { floor, values } = this;
    const known = values.filter((value) => value !== null);
    if (!known.length) return;
    const { clientWidth: width, clientHeight: height } = this.svg;
    const top = Math.max(...known, floor + 0.5);
    const x = (i) => ((i * (width - 4)) / Math.max(values.length - 1, 30) + 2).toFixed(1);
    const y = (value) => (height - 3 - ((value - floor) / (top - floor)) * (height - 18)).toFixed(1);
    let path = "";
    values.forEach((value, i) => {
      const begins = (values[i - 1] ?? null) === null; // with a dot, should it stay alone
      if (value !== null) path += begins ? `M${x(i)} ${y(value)}h0` : `L${x(i)} ${y(value)}`;
    });
    this.line.setAttribute("d", path);
    this.axis.setAttribute("d", `M2 ${y(floor)}H${width - 2}`);
    this.top.setAttribute("x", 2);
    this.top.setAttribute("y", 9);
    this.top.textContent = `up to ${top.toFixed(1)}`;
    const [now, least] = [known.at(-1), Math.min(...known)].map((value) => value.toFixed(1));
    this.svg.setAttribute("aria-label", `${this.name} over time: now ${now}, least ${least}, most ${top.toFixed(1)}`);
  }
}
