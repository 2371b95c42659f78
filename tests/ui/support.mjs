// A server of the demo model and a browser for the tests of the page. Checks nothing by itself, but collects what every
// page must be free of: violations of the content security policy, requests to anybody else, and errors.
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

export const ROOT = fileURLToPath(new URL("../..", import.meta.url));
export const PICTURE = `${ROOT}/tests/fixtures/media/demo.png`;

const PROGRAM = process.env.SPARK_ENGINE ?? `${ROOT}/target/debug/spark-engine`;
const BROWSERS = [
  process.env.SPARK_TEST_CHROMIUM,
  "/usr/bin/chromium",
  "/usr/bin/chromium-browser",
  "/usr/bin/google-chrome",
];

/** Serves the demo model on a free port; resolves once it listens. */
export async function serve(...flags) {
  const small = ["--threads", "2", "--kv-cache-memory-bytes", "67108864", "--device", "cpu"];
  const child = spawn(PROGRAM, ["serve", "--port", "0", ...small, ...flags], { stdio: ["ignore", "ignore", "pipe"] });
  let log = "";
  const url = await new Promise((resolve, reject) => {
    child.on("error", (error) => reject(new Error(`${PROGRAM}: ${error.message}; cargo build makes it`)));
    // All of its output has been read by then.
    child.on("close", (code) => reject(new Error(`the server ended with ${code}:\n${log}`)));
    child.stderr.on("data", (data) => {
      log += data;
      const match = /listening on (http:\/\/\S+)/.exec(log);
      if (match) resolve(match[1]);
    });
  });
  return { url, log: () => log, end: () => child.kill("SIGKILL") };
}

/** Chromium as Debian has it. */
export function browser() {
  const executablePath = BROWSERS.find((path) => path && existsSync(path));
  if (executablePath === undefined)
    throw new Error("no Chromium: apt-get install chromium, or set SPARK_TEST_CHROMIUM");
  return chromium.launch({ executablePath, args: ["--no-sandbox"] });
}

/** A page in a browser profile of its own, at the address of `server`. */
export async function open(chrome, server, options = {}) {
  const context = await chrome.newContext({ viewport: { width: 1280, height: 800 }, locale: "en-US", ...options });
  await context.grantPermissions(["clipboard-read", "clipboard-write"], { origin: server.url });
  const page = await context.newPage();
  page.setDefaultTimeout(20_000);
  const problems = [];
  page.on("pageerror", (error) => problems.push(`error: ${error.stack ?? error}`));
  page.on("console", (message) => {
    // What the server refuses is logged by the browser too; the page shows it to its user.
    const isRefusal = message.text().startsWith("Failed to load resource");
    if (message.type() === "error" && !isRefusal) problems.push(`console: ${message.text()}`);
  });
  page.on("request", (request) => {
    const { protocol, origin } = new URL(request.url());
    if (!["data:", "blob:"].includes(protocol) && origin !== server.url) problems.push(`outside: ${request.url()}`);
  });
  await page.exposeFunction("reportViolation", (text) => problems.push(`policy: ${text}`));
  await page.addInitScript(() => {
    document.addEventListener("securitypolicyviolation", (event) => {
      window.reportViolation(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`);
    });
  });
  await page.goto(server.url);
  return { page, context, problems };
}

/** The value of a metric, summed over its labels. */
export async function metric(server, name) {
  const text = await (await fetch(`${server.url}/metrics`)).text();
  const lines = text.split("\n").filter((line) => line.startsWith(`${name}{`) || line.startsWith(`${name} `));
  return lines.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

/** The body of a streamed chat answer, as the server writes it. */
export function streamOf(text) {
  const chunk = (delta, finish) => ({ choices: [{ index: 0, delta, finish_reason: finish }] });
  const chunks = [chunk({ role: "assistant", content: "" }, null), chunk({ content: text }, null), chunk({}, "stop")];
  return `${chunks.map((value) => `data: ${JSON.stringify(value)}\n\n`).join("")}data: [DONE]\n\n`;
}
