// The page that `spark-engine serve` has at `/`, used in a real browser as a person would use it, with the demo model.
// Every test begins with an empty browser profile and ends with: no error, no violation of the content security policy,
// no request to anybody but the server.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { after, afterEach, before, test } from "node:test";
import { browser, metric, open, PICTURE, serve, streamOf } from "./support.mjs";

const AXE = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

let chrome, server, opened;

before(async () => {
  chrome = await browser();
  server = await serve();
});
after(async () => {
  await chrome?.close();
  server?.end();
});
afterEach(async () => {
  await opened?.context.close();
  const problems = opened?.problems ?? [];
  opened = undefined;
  assert.deepEqual(problems, []);
});

/** A page whose answers are the likeliest ones, so that they are the same every time. */
async function start(options, at = server) {
  opened = await open(chrome, at, options);
  const settings = JSON.stringify({ temperature: "0" });
  await opened.page.evaluate((settings) => localStorage.setItem("spark-engine.settings", settings), settings);
  await opened.page.reload();
  return opened.page;
}

const box = (page) => page.getByRole("textbox", { name: "Message", exact: true });
const answers = (page) => page.locator(".message.assistant .rich");
const questions = (page) => page.locator(".message.user .plain");

/** Sends `text` and returns the answer once it is whole. */
async function ask(page, text) {
  const messages = page.locator(".message");
  const count = await messages.count();
  await box(page).fill(text);
  await box(page).press("Enter");
  await messages
    .nth(count + 1)
    .and(page.locator("[aria-busy=false]"))
    .waitFor();
  return (
    await messages
      .nth(count + 1)
      .locator(".rich")
      .last()
      .innerText()
  ).trim();
}

/** Waits until the last answer is whole and says `text`. */
async function answered(page, text) {
  const last = page.locator(".message.assistant").last().and(page.locator("[aria-busy=false]"));
  await last.locator(".rich").last().getByText(text, { exact: true }).waitFor();
}

/** Makes the next answers endless, so that there is time to stop one. */
async function makeEndless(page) {
  await page.route("**/v1/chat/completions", (route) => {
    const body = { ...route.request().postDataJSON(), ignore_eos: true };
    return route.continue({ postData: JSON.stringify(body) });
  });
}

async function set(page, changes) {
  await page.getByRole("button", { name: "Settings" }).click();
  const dialog = page.getByRole("dialog", { name: "Settings" });
  for (const [label, value] of Object.entries(changes)) {
    const field = dialog.getByLabel(label, { exact: false }).first();
    const isChoice = await field.evaluate((element) => element.tagName === "SELECT");
    await (isChoice ? field.selectOption(value) : field.fill(value));
  }
  return dialog;
}

async function accessible(page) {
  await page.evaluate(AXE);
  const found = await page.evaluate(() =>
    window.axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"] }),
  );
  return found.violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(" ")}`);
}

test("a text is answered, with its speed and the use of the context", async () => {
  const page = await start();
  assert.equal(await ask(page, "What is 347 + 185?"), "532");
  const [speed] = await page.locator(".speed").allInnerTexts();
  assert.match(speed, /^\d+ tokens (· [\d.]+ tokens\/s )?· first after \d+/);
  assert.match(await page.locator(".context").innerText(), /Context\s+\d+ of [\d,]+ tokens/);
  assert.equal(await page.locator("[role=status].hidden").innerText(), "532", "the whole answer is announced once");
  // The second question goes with the first and its answer.
  const [request] = await Promise.all([page.waitForRequest("**/v1/chat/completions"), ask(page, "Hello!")]);
  const contents = request.postDataJSON().messages.map(({ role, content }) => `${role}: ${content}`);
  assert.deepEqual(contents, ["user: What is 347 + 185?", "assistant: 532", "user: Hello!"]);
  assert.deepEqual(await accessible(page), []);
});

test("a picture is selected, pasted and dropped, and looked at", async () => {
  const page = await start();
  await page.getByLabel("Picture files").setInputFiles(PICTURE);
  await page.getByRole("img", { name: "Picture 1" }).waitFor();
  assert.equal(await ask(page, "How many rings are there?"), "Two.");
  const bytes = [...(await readFile(PICTURE))];
  for (const [index, kind] of ["paste", "drop"].entries()) {
    await page.keyboard.press("Control+k");
    await page.evaluate(
      ({ bytes, kind }) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "demo.png", { type: "image/png" }));
        const target = document.querySelector(".composer textarea");
        const init = { bubbles: true, cancelable: true };
        const event =
          kind === "paste"
            ? new ClipboardEvent("paste", { ...init, clipboardData: data })
            : new DragEvent("drop", { ...init, dataTransfer: data });
        target.dispatchEvent(event);
      },
      { bytes, kind },
    );
    await page.locator(".composer").getByRole("img", { name: "Picture 1" }).waitFor();
    const wanted = [
      ["What colour is the hexagon?", "Black."],
      ["Where is the green ring?", "At the centre."],
    ][index];
    assert.equal(await ask(page, wanted[0]), wanted[1], kind);
  }
  await page
    .getByLabel("Picture files")
    .setInputFiles({ name: "a.svg", mimeType: "image/svg+xml", buffer: Buffer.from("<svg/>") });
  await page.getByRole("alert").getByText("a.svg: only PNG").waitFor();
});

test("an answer is stopped by button and by key, and the server stops too", async () => {
  const page = await start();
  await makeEndless(page);
  const stops = [() => page.getByRole("button", { name: "Stop" }).click(), () => page.keyboard.press("Escape")];
  for (const [index, stop] of stops.entries()) {
    await box(page).fill("Hello!");
    await box(page).press("Enter");
    const answer = page.locator(".message.assistant").nth(index);
    // Its first tokens come too close together to say a speed.
    await answer.locator(".speed").getByText("tokens/s").waitFor();
    await stop();
    await answer.getByText("Stopped.").waitFor();
    await page.getByRole("button", { name: "Send" }).waitFor();
    assert.match(await answer.locator(".speed").innerText(), /^\d+ tokens · [\d.]+ tokens\/s · first after \d+/);
  }
  const end = Date.now() + 10_000;
  while ((await metric(server, "vllm:num_requests_running")) > 0)
    assert.ok(Date.now() < end, "the sequence still runs");
});

test("messages are edited, answered again, and branched", async () => {
  const page = await start();
  await ask(page, "What is 12 times 7?");
  await page.locator(".message.user").getByRole("button", { name: "Edit" }).click();
  const editor = page.getByRole("textbox", { name: "Edit the message" });
  assert.equal(await editor.inputValue(), "What is 12 times 7?");
  await editor.fill("What is 347 + 185?");
  await editor.press("Enter");
  await answered(page, "532");
  const versions = page.getByRole("group", { name: "Versions" });
  assert.equal((await versions.innerText()).trim(), "2 / 2");
  await page.getByRole("button", { name: "Version before" }).click();
  await answered(page, "84");
  await page.getByRole("button", { name: "Next version" }).click();

  await page.getByRole("button", { name: "Regenerate" }).click();
  await versions.nth(1).waitFor();
  await answered(page, "532");
  assert.deepEqual(
    (await versions.allInnerTexts()).map((text) => text.trim()),
    ["2 / 2", "2 / 2"],
  );

  await page.locator(".message.assistant").getByRole("button", { name: "Branch into a new chat" }).click();
  const heads = page.getByRole("navigation").getByRole("listitem");
  await heads.nth(1).waitFor();
  // Only the shown messages are copied.
  await versions.first().waitFor({ state: "detached" });
  assert.deepEqual(await questions(page).allInnerTexts(), ["What is 347 + 185?"]);
  await ask(page, "Hello!");
  await heads.nth(1).getByRole("link").click();
  await versions.first().waitFor();
  assert.equal(await questions(page).count(), 1, "the first conversation is as it was");
});

test("answers are held to a JSON schema", async () => {
  const page = await start();
  const schema = {
    type: "object",
    properties: { answer: { type: "string", enum: ["yes", "no"] } },
    required: ["answer"],
    additionalProperties: false,
  };
  const dialog = await set(page, { Form: "json_schema" });
  const field = dialog.getByLabel("JSON schema");
  await field.fill("{");
  await dialog.getByRole("alert").getByText("The JSON schema is not JSON").waitFor();
  await page.keyboard.press("Escape");
  await box(page).fill("Hello!");
  await box(page).press("Enter");
  await page.getByRole("alert").getByText("The JSON schema is not JSON").waitFor();
  assert.equal(await questions(page).count(), 0, "nothing is sent");

  await set(page, { "JSON schema": JSON.stringify(schema) });
  await page.keyboard.press("Escape");
  await page.locator(".chip", { hasText: "JSON schema" }).waitFor();
  await box(page).press("Enter");
  await page.locator(".message.assistant[aria-busy=false]").waitFor();
  const { answer: word } = JSON.parse(await page.locator(".message.assistant code").innerText());
  assert.ok(["yes", "no"].includes(word), word);
});

test("settings reach the server, and its refusals reach the page", async () => {
  const page = await start();
  await set(page, {
    "Top k": "5",
    Seed: "7",
    "Most tokens": "1",
    "Stop strings": "stop\nend",
    Thinking: "off",
    "System prompt": "Be kind.",
  });
  await page.keyboard.press("Escape");
  const [request] = await Promise.all([page.waitForRequest("**/v1/chat/completions"), ask(page, "What is 347 + 185?")]);
  const { messages, model, stream, stream_options, return_progress, ...fields } = request.postDataJSON();
  assert.deepEqual(fields, {
    temperature: 0,
    top_k: 5,
    seed: 7,
    max_completion_tokens: 1,
    stop: ["stop", "end"],
    chat_template_kwargs: { enable_thinking: false },
  });
  assert.deepEqual(messages[0], { role: "system", content: "Be kind." });
  assert.deepEqual([model, stream, stream_options.include_usage, return_progress], ["spark-tiny-vl", true, true, true]);
  await page.getByText("Cut off: the most tokens allowed were reached.").waitFor();

  await set(page, { "Most tokens": "9999999", "Stop strings": "" });
  await page.keyboard.press("Escape");
  await box(page).fill("Hello!");
  await box(page).press("Enter");
  await page.locator(".message .error").getByText("max_").waitFor();
});

test("thoughts are folded", async () => {
  const page = await start();
  await set(page, { Thinking: "on" });
  await page.keyboard.press("Escape");
  assert.equal(await ask(page, "What is 347 + 185?"), "532");
  const thoughts = page.locator("details.thoughts");
  assert.equal(await thoughts.getAttribute("open"), null);
  await thoughts.getByText("Thoughts").click();
  await thoughts.getByText("Result: 532").waitFor();
});

test("conversations outlive the page, and are searched, renamed and deleted", async () => {
  const page = await start();
  await ask(page, "What is 12 times 7?");
  await page.keyboard.press("Control+k");
  await ask(page, "Hello!");
  await page.reload();
  assert.equal(await answers(page).innerText(), "Hello! How can I help you?", "the same conversation is shown");
  await page.getByRole("link", { name: "What is 12 times 7?" }).click();
  await answered(page, "84");
  await page.getByRole("link", { name: "What is 12 times 7?" }).hover();
  await page.getByRole("button", { name: "Rename What is 12 times 7?" }).click();
  await page.getByRole("textbox", { name: "Title" }).fill("Tables");
  await page.keyboard.press("Enter");
  page.once("dialog", (dialog) => dialog.accept());
  await page.getByRole("link", { name: "Hello!" }).hover();
  await page.getByRole("button", { name: "Delete Hello!" }).click();
  await page.getByRole("link", { name: "Hello!" }).waitFor({ state: "detached" });
  await page.reload();
  // The list is read from the browser's store after the page is there.
  await page.getByRole("link", { name: "Tables" }).waitFor();
  assert.deepEqual(await page.getByRole("navigation").getByRole("listitem").allInnerTexts(), ["Tables"]);
});

test("conversations are exported and imported", async () => {
  const page = await start();
  await page.getByLabel("Picture files").setInputFiles(PICTURE);
  await ask(page, "What colour is the hexagon?");
  const [download] = await Promise.all([
    page.waitForEvent("download"),
    page.getByRole("button", { name: "Export all conversations" }).click(),
  ]);
  const file = await readFile(await download.path());
  const [{ messages }] = JSON.parse(file).conversations;
  assert.deepEqual(
    messages.map(({ text }) => text),
    ["What colour is the hexagon?", "Black."],
  );

  await opened.context.close();
  const other = await start();
  const input = other.getByLabel("File of conversations");
  for (const [name, buffer, notice] of [
    ["a.json", Buffer.from("{}"), "this is not a file that was exported here"],
    ["b.json", file, "1 conversation imported"],
    ["b.json", file, "0 conversations imported"],
  ]) {
    await input.setInputFiles({ name, mimeType: "application/json", buffer });
    await other.getByRole("alert").getByText(notice).waitFor();
  }
  await other.getByRole("link", { name: "What colour is the hexagon?" }).click();
  await other.getByRole("img", { name: "Picture 1" }).waitFor();
  await answered(other, "Black.");
});

test("Markdown, formulas and code are shown, and a hostile answer does nothing", async () => {
  const page = await start();
  const text = [
    "# Title\n\nA **bold** word, `code`, [a link](https://example.com/a) and [none](javascript:alert(1)).",
    "| a | b |\n|:-:|--:|\n| 1 | 2 |",
    '```rust\nfn main() { println!("<b>"); }\n```',
    "Euler: $e^{i\\pi} = -1$, \\(a^2\\), and it costs $5 and $6.",
    "$$\n\\sqrt{\\frac{x}{y}} \\fcolorbox{red}{blue}{z} \\pmb{w} \\overbrace{abc}^{n} \\cancel{q}\n$$",
    "\\[ \\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix} \\]",
    "$\\href{javascript:alert(1)}{x}$ $\\includegraphics{https://example.com/b.png}$ $\\notacommand$",
    "![spy](https://example.com/spy.png) <img src=https://example.com/c.png onerror=alert(1)>",
    "<script>alert(1)</script><style>*{display:none}</style><iframe src=https://example.com></iframe>",
  ].join("\n\n");
  await page.route("**/v1/chat/completions", (route) =>
    route.fulfill({ contentType: "text/event-stream", body: streamOf(text) }),
  );
  page.on("dialog", (dialog) => assert.fail(`a script ran: ${dialog.message()}`));
  await ask(page, "Show me.");
  const shown = answers(page);
  await shown.locator(".katex").nth(3).waitFor();
  assert.equal(await shown.locator("strong").innerText(), "bold");
  assert.equal(await shown.locator("td.align-right").innerText(), "2");
  assert.equal(await shown.locator("pre .hljs-keyword").first().innerText(), "fn");
  assert.equal(await shown.locator(".math.display .katex").count(), 2);
  assert.match(await shown.innerText(), /it costs \$5 and \$6\./);
  const links = await shown.locator("a").evaluateAll((all) => all.map((link) => [link.href, link.rel]));
  assert.deepEqual(links, [
    ["https://example.com/a", "noopener noreferrer nofollow"],
    ["https://example.com/spy.png", "noopener noreferrer nofollow"],
    ["https://example.com/c.png", "noopener noreferrer nofollow"],
    ["https://example.com/", "noopener noreferrer nofollow"],
  ]);
  assert.equal(await shown.locator("img, script, style, iframe").count(), 0);
  await shown.getByRole("button", { name: "Copy" }).click();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), 'fn main() { println!("<b>"); }\n');
});

test("a long prompt shows how far it has been read", async () => {
  const page = await start();
  const chunk = {
    choices: [{ index: 0, delta: { role: "assistant", content: null } }],
    prompt_progress: { total: 800, processed: 344 },
  };
  const body = `data: ${JSON.stringify(chunk)}\n\n`;
  // The rest of the answer never comes.
  await page.evaluate((body) => {
    const { fetch } = window;
    const endless = () => new ReadableStream({ start: (out) => out.enqueue(new TextEncoder().encode(body)) });
    window.fetch = (path, init) =>
      init.method === "POST" ? Promise.resolve(new Response(endless())) : fetch(path, init);
  }, body);
  await box(page).fill("Hello!");
  await box(page).press("Enter");
  await page.getByText("Reading the prompt: 43 %").waitFor();
});

test("an answer that breaks off is kept and said to be broken", async () => {
  const page = await start();
  const whole = streamOf("Half an");
  const bodies = [
    [whole.slice(0, whole.lastIndexOf("data: {")), "The connection was closed before the answer ended."],
    [
      `data: ${JSON.stringify({ error: { message: "the engine has stopped", code: 500 } })}\n\n`,
      "the engine has stopped",
    ],
  ];
  for (const [body, reason] of bodies) {
    await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream", body }), {
      times: 1,
    });
    await box(page).fill("Hello!");
    await box(page).press("Enter");
    await page.getByRole("alert").getByText(reason).waitFor();
  }
  await page.getByText("Half an").waitFor();
  // What broke off before its first word is not sent again.
  const [request] = await Promise.all([page.waitForRequest("**/v1/chat/completions"), ask(page, "Hello!")]);
  assert.deepEqual(
    request.postDataJSON().messages.map(({ role }) => role),
    ["user", "assistant", "user", "user"],
  );
});

test("keys: new line, new chat, settings, help", async () => {
  const page = await start();
  await box(page).pressSequentially("one");
  await page.keyboard.press("Shift+Enter");
  await box(page).pressSequentially("two");
  assert.equal(await box(page).inputValue(), "one\ntwo");
  await page.keyboard.press("Enter");
  await page.locator(".message.assistant[aria-busy=false]").waitFor();
  assert.deepEqual(await questions(page).allInnerTexts(), ["one\ntwo"]);
  await page.keyboard.press("Control+k");
  await page.getByRole("heading", { name: "What shall we look at?" }).waitFor();
  assert.ok(await box(page).evaluate((element) => element === document.activeElement), "the composer has the focus");
  for (const [key, title] of [
    ["Control+,", "Settings"],
    ["Control+/", "Keyboard shortcuts"],
  ]) {
    await page.keyboard.press(key);
    await page.getByRole("dialog", { name: title }).waitFor();
    assert.deepEqual(await accessible(page), []);
    await page.keyboard.press("Escape");
    await page.getByRole("dialog").waitFor({ state: "detached" });
  }
});

test("dark and light: by the system, by choice, and kept", async () => {
  const page = await start({ colorScheme: "dark" });
  const brightness = () =>
    page.evaluate(() => {
      const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number);
      return r + g + b;
    });
  await box(page).waitFor();
  assert.ok((await brightness()) < 200, "dark, as the system");
  await ask(page, "Hello!");
  assert.deepEqual(await accessible(page), []);
  await page.getByRole("button", { name: "Dark or light" }).click();
  assert.ok((await brightness()) > 600, "light, by choice");
  await page.reload();
  await box(page).waitFor();
  assert.ok((await brightness()) > 600, "the choice is kept");
});

test("a phone: nothing is cut off, and the list slides in", async () => {
  const page = await start({ viewport: { width: 360, height: 740 }, hasTouch: true, isMobile: true });
  await ask(page, "Sort these words: brown, rule, problem, custom, select.");
  const overflow = () => page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  assert.ok((await overflow()) <= 0);
  const list = page.getByRole("navigation", { name: "Conversations" });
  assert.equal(await list.isVisible(), false);
  await page.getByRole("button", { name: "Conversations" }).tap();
  await list.getByRole("link", { name: "Engine" }).tap();
  await page.getByRole("heading", { name: "Running" }).waitFor();
  await list.waitFor({ state: "hidden" });
  assert.ok((await overflow()) <= 0);
});

test("the engine is watched only while somebody looks", async () => {
  const page = await start();
  await page.clock.install();
  await page.reload();
  await ask(page, "What is 12 times 7?");
  let scrapes = 0;
  page.on("request", (request) => (scrapes += request.url().endsWith("/metrics") ? 1 : 0));
  await page.getByRole("link", { name: "Engine" }).click();
  for (const title of ["Running", "Waiting", "KV cache", "Generated", "Prompts"])
    await page.getByRole("heading", { name: title }).waitFor();
  await page.getByRole("img", { name: /^Generated: now/ }).waitFor();
  const total = await page
    .getByRole("row", { name: /^Generated tokens/ })
    .getByRole("cell")
    .innerText();
  assert.equal(Number(total.replaceAll(",", "")), await metric(server, "vllm:generation_tokens_total"));
  assert.deepEqual(await accessible(page), []);
  const see = (state) =>
    page.evaluate((state) => {
      Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }, state);
  await page.waitForResponse("**/metrics");
  await see("hidden");
  // One more may be under way.
  const seen = scrapes + 1;
  await page.clock.runFor(10_000);
  assert.ok(scrapes <= seen, "hidden: no scrapes");
  await Promise.all([page.waitForRequest("**/metrics"), see("visible")]);
  await page.getByRole("button", { name: "New chat" }).click();
  const left = scrapes + 1;
  await page.clock.runFor(10_000);
  assert.ok(scrapes <= left, "another view: no scrapes");
});

test("a server with keys asks for one and keeps it in the tab", async () => {
  const locked = await serve("--api-key", "open-sesame");
  try {
    const page = await start({}, locked);
    const dialog = page.getByRole("dialog", { name: "API key" });
    for (const key of ["wrong", "open-sesame"]) {
      await dialog.getByLabel("Key", { exact: true }).fill(key);
      await dialog.getByRole("button", { name: "Use this key" }).click();
    }
    await page.getByText("spark-tiny-vl").waitFor();
    assert.equal(await ask(page, "What is 12 times 7?"), "84");
    assert.equal(await page.evaluate(() => JSON.stringify(localStorage).includes("sesame")), false);
    await page.getByRole("link", { name: "Engine" }).click();
    await page.getByRole("heading", { name: "Running" }).waitFor();
  } finally {
    locked.end();
  }
});
