// The Prometheus text format, and what follows from two scrapes of it. Pure.

export interface Sample {
  name: string;
  labels: Record<string, string>;
  value: number;
}

export interface Scrape {
  /** Milliseconds, on the page's clock. */
  at: number;
  samples: Sample[];
  help: Map<string, string>;
}

/** Reads the text format; lines that are none of it are skipped. */
export function parse(text: string, at: number): Scrape {
  const samples: Sample[] = [];
  const help = new Map<string, string>();
  for (const line of text.split("\n")) {
    const described = /^# HELP (\S+) (.*)$/.exec(line);
    if (described) help.set(described[1]!, described[2]!);
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: \S+)?$/.exec(line);
    if (!match) continue;
    const labels: Record<string, string> = {};
    for (const [, key, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[key!] = value!.replace(/\\(.)/g, (_, escaped: string) => (escaped === "n" ? "\n" : escaped));
    }
    samples.push({ name: match[1]!, labels, value: number(match[3]!) });
  }
  return { at, samples, help };
}

function number(text: string): number {
  if (text === "+Inf") return Infinity;
  return text === "-Inf" ? -Infinity : Number(text);
}

/** The sum of all samples of a name; `undefined` if there is none, so that a page can leave it out. */
export function total(scrape: Scrape, name: string): number | undefined {
  const found = scrape.samples.filter((sample) => sample.name === name);
  return found.length === 0 ? undefined : found.reduce((sum, sample) => sum + sample.value, 0);
}

/** How fast a counter grew between two scrapes, a second. A restart of the server counts from nothing. */
export function rate(before: Scrape, after: Scrape, name: string): number | undefined {
  const grown = growth(before, after, name);
  const seconds = (after.at - before.at) / 1000;
  return grown === undefined || seconds <= 0 ? undefined : grown / seconds;
}

/** How much a counter grew between two scrapes. */
export function growth(before: Scrape | undefined, after: Scrape, name: string): number | undefined {
  const now = total(after, name);
  if (now === undefined) return undefined;
  const earlier = before === undefined ? 0 : (total(before, name) ?? 0);
  return now >= earlier ? now - earlier : now;
}

/** A quantile of what a histogram saw between two scrapes (or ever), interpolated in its bucket. */
export function quantile(before: Scrape | undefined, after: Scrape, name: string, q: number): number | undefined {
  const counts = buckets(after, name);
  if (before !== undefined) {
    const earlier = new Map(buckets(before, name));
    for (const bucket of counts) bucket[1] -= earlier.get(bucket[0]) ?? 0;
  }
  const all = counts.at(-1)?.[1] ?? 0;
  if (all <= 0) return undefined;
  const wanted = q * all;
  let [low, below] = [0, 0];
  for (const [bound, count] of counts) {
    if (count >= wanted) {
      if (bound === Infinity) return low;
      return low + (bound - low) * ((wanted - below) / Math.max(count - below, 1));
    }
    [low, below] = [bound, count];
  }
  return undefined;
}

/** Cumulative counts by upper bound, over all labels. */
function buckets(scrape: Scrape, name: string): [number, number][] {
  const counts = new Map<number, number>();
  for (const sample of scrape.samples) {
    if (sample.name !== `${name}_bucket`) continue;
    const bound = number(sample.labels["le"] ?? "");
    counts.set(bound, (counts.get(bound) ?? 0) + sample.value);
  }
  return [...counts].sort((a, b) => a[0] - b[0]);
}
