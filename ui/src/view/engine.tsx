// What the engine does right now, from /metrics. Asks only while it is looked at.
import { useEffect, useState } from "preact/hooks";
import { metricsText } from "../lib/api";
import { growth, parse, quantile, rate, total, type Sample, type Scrape } from "../lib/metrics";
import * as state from "../state";
import { Chart } from "./chart";

const EVERY_MS = 1000;
/** Two minutes. */
const CAPACITY = 120;
/** Quantiles and shares are those of the last half minute. */
const WINDOW = 30;

export function Engine() {
  const [scrapes, setScrapes] = useState<Scrape[]>([]);
  const [failure, setFailure] = useState("");
  useEffect(() => poll((scrape) => setScrapes((before) => [...before, scrape].slice(-CAPACITY - 1)), setFailure), []);
  const now = scrapes.at(-1);
  return (
    <section class="engine" aria-label="Engine">
      <h1>Engine</h1>
      {failure !== "" && (
        <p class="error" role="alert">
          {failure}
        </p>
      )}
      {now === undefined ? <p class="quiet">Waiting for numbers</p> : <Cards scrapes={scrapes} now={now} />}
    </section>
  );
}

/** Scrapes every second while the page is visible; returns how to end it. */
function poll(report: (scrape: Scrape) => void, fail: (reason: string) => void): () => void {
  const controller = new AbortController();
  let timer: ReturnType<typeof setTimeout> | undefined;
  const scrape = async (): Promise<void> => {
    clearTimeout(timer);
    if (document.visibilityState !== "visible" || controller.signal.aborted) return;
    try {
      report(parse(await metricsText(controller.signal), performance.now()));
      fail("");
    } catch (error) {
      if (!controller.signal.aborted) fail(error instanceof Error ? error.message : String(error));
    }
    if (!controller.signal.aborted) timer = setTimeout(() => void scrape(), EVERY_MS);
  };
  const wake = (): void => void scrape();
  document.addEventListener("visibilitychange", wake);
  void scrape();
  return () => {
    controller.abort();
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", wake);
  };
}

const count = (value: number): string => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
const percent = (value: number): string => `${(100 * value).toFixed(1)} %`;
const seconds = (value: number): string => (value < 1 ? `${(1000 * value).toFixed(0)} ms` : `${value.toFixed(2)} s`);
const bytes = (value: number): string =>
  value < 1 << 30 ? `${(value / 2 ** 20).toFixed(0)} MiB` : `${(value / 2 ** 30).toFixed(1)} GiB`;

function Cards({ scrapes, now }: { scrapes: Scrape[]; now: Scrape }) {
  const gauge = (name: string) => scrapes.map((scrape) => total(scrape, name));
  const speed = (name: string) => scrapes.slice(1).map((scrape, index) => rate(scrapes[index]!, scrape, name));
  const ends = now.samples.filter(({ name }) => name === "vllm:request_success_total");
  return (
    <>
      <div class="cards">
        <Card title="Running" values={gauge("vllm:num_requests_running")} show={count} note="sequences" />
        <Card title="Waiting" values={gauge("vllm:num_requests_waiting")} show={count} note="sequences" />
        <Card
          title="KV cache"
          values={gauge("vllm:kv_cache_usage_perc")}
          show={percent}
          max={1}
          note="of its blocks in use"
        />
        <Card title="Generated" values={speed("vllm:generation_tokens_total")} show={count} note="tokens a second" />
        <Card title="Prompts" values={speed("vllm:prompt_tokens_total")} show={count} note="tokens a second" />
        <Card title="Memory" values={gauge("process_resident_memory_bytes")} show={bytes} note="of this process" />
      </div>
      <div class="tables">
        <Facts title={`Last ${WINDOW} seconds`} rows={recent(scrapes, now)} />
        <Facts title="Since the start" rows={overall(now)} />
        {ends.length > 0 && (
          <Facts
            title="Answers by end"
            rows={ends.map(({ labels, value }) => [labels["finished_reason"] ?? "", count(value)])}
          />
        )}
        <Own samples={now.samples} />
      </div>
      <All now={now} />
    </>
  );
}

interface CardProps {
  title: string;
  values: (number | undefined)[];
  show: (value: number) => string;
  note: string;
  max?: number;
}

/** Left out where the server does not have the metric. */
function Card({ title, values, show, note, max }: CardProps) {
  const last = values.at(-1);
  if (last === undefined) return null;
  return (
    <article class="card">
      <h2>{title}</h2>
      <p>
        <strong>{show(last)}</strong> <span class="quiet">{note}</span>
      </p>
      <Chart label={title} values={values} capacity={CAPACITY} max={max} show={show} />
    </article>
  );
}

type Row = [name: string, value: string];

function Facts({ title, rows }: { title: string; rows: Row[] }) {
  if (rows.length === 0) return null;
  return (
    <table class="facts">
      <caption>{title}</caption>
      <tbody>
        {rows.map(([name, value]) => (
          <tr key={name}>
            <th scope="row">{name}</th>
            <td>{value}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function recent(scrapes: Scrape[], now: Scrape): Row[] {
  const before = scrapes.at(-1 - WINDOW) ?? scrapes[0];
  const times = (name: string): string => {
    const [median, p99] = [0.5, 0.99].map((q) => quantile(before, now, name, q));
    return median === undefined || p99 === undefined ? "none" : `${seconds(median)} / ${seconds(p99)}`;
  };
  return [
    ["Time to first token, median / p99", times("vllm:time_to_first_token_seconds")],
    ["Between tokens, median / p99", times("vllm:inter_token_latency_seconds")],
    ["Whole answer, median / p99", times("vllm:e2e_request_latency_seconds")],
    ["Waiting in the queue, median / p99", times("vllm:request_queue_time_seconds")],
    ["Prefix cache hits", share(before, now, "vllm:prefix_cache")],
  ];
}

function overall(now: Scrape): Row[] {
  const rows: Row[] = [
    ["Prefix cache hits", share(undefined, now, "vllm:prefix_cache")],
    ["Picture cache hits", share(undefined, now, "vllm:mm_cache")],
  ];
  for (const [name, metric] of [
    ["Prompt tokens", "vllm:prompt_tokens_total"],
    ["Generated tokens", "vllm:generation_tokens_total"],
    ["Preemptions", "vllm:num_preemptions_total"],
  ] as const) {
    const value = total(now, metric);
    if (value !== undefined) rows.push([name, count(value)]);
  }
  return rows;
}

/** `hits of queries`, as a share. */
function share(before: Scrape | undefined, now: Scrape, name: string): string {
  const queries = growth(before, now, `${name}_queries_total`) ?? 0;
  const hits = growth(before, now, `${name}_hits_total`) ?? 0;
  return queries === 0 ? "none asked" : `${percent(hits / queries)} of ${count(queries)}`;
}

/** This engine's own gauges: ranks, memory, devices. */
function Own({ samples }: { samples: Sample[] }) {
  const own = samples.filter(({ name }) => name.startsWith("spark_") && !/_(bucket|sum|count)$/.test(name));
  const rows = own.map(({ name, labels, value }): Row => {
    const of = Object.entries(labels).filter(([key]) => key !== "model_name" && key !== "engine");
    const where = of.map(([key, label]) => `${key} ${label}`).join(", ");
    const words = name.replace(/^spark_/, "").replaceAll("_", " ");
    return [where === "" ? words : `${words} (${where})`, name.endsWith("_bytes") ? bytes(value) : count(value)];
  });
  return <Facts title="spark-engine" rows={rows} />;
}

function All({ now }: { now: Scrape }) {
  const samples = now.samples.filter(({ name }) => !name.endsWith("_bucket"));
  return (
    <details class="all">
      <summary>All metrics of {state.modelId.value}</summary>
      <table class="facts">
        <tbody>
          {samples.map(({ name, labels, value }, index) => (
            <tr key={index} title={now.help.get(name)}>
              <th scope="row">
                {name}
                <small>{Object.entries(labels).map(([key, label]) => ` ${key}=${label}`)}</small>
              </th>
              <td>{String(value)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </details>
  );
}
