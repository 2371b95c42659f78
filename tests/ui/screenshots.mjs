// Makes the pictures of the page in docs/images: `node screenshots.mjs`. Not a test; what they show is tested in
// page.test.mjs.
import { browser, open, PICTURE, ROOT, serve } from "./support.mjs";

const IMAGES = `${ROOT}/docs/images`;
const [chrome, server] = await Promise.all([browser(), serve()]);

async function start(options) {
  const { page } = await open(chrome, server, { viewport: { width: 1200, height: 760 }, ...options });
  const settings = JSON.stringify({ temperature: "0" });
  await page.evaluate((settings) => localStorage.setItem("spark-engine.settings", settings), settings);
  await page.reload();
  return page;
}

async function ask(page, text) {
  const messages = page.locator(".message");
  const count = await messages.count();
  await page.getByRole("textbox", { name: "Message", exact: true }).fill(text);
  await page.keyboard.press("Enter");
  await messages
    .nth(count + 1)
    .and(page.locator("[aria-busy=false]"))
    .waitFor();
}

async function askAboutPicture(page, text) {
  await page.getByLabel("Picture files").setInputFiles(PICTURE);
  await page.locator(".composer").getByRole("img").waitFor();
  await ask(page, text);
}

async function shoot(page, name) {
  // Without the caret, which blinks, and the pointer's traces.
  await page.mouse.move(0, 0);
  await page.screenshot({ path: `${IMAGES}/ui-${name}.png`, caret: "hide" });
  await page.context().close();
}

const chat = await start();
for (const question of ["What is 12 times 7?", "Sort 88, 14, 41, 55."]) {
  await ask(chat, question);
  await chat.keyboard.press("Control+k");
}
await askAboutPicture(chat, "Describe the picture.");
await shoot(chat, "chat");

const phone = await start({
  viewport: { width: 390, height: 760 },
  isMobile: true,
  colorScheme: "dark",
  hasTouch: true,
});
await askAboutPicture(phone, "How many rings are there?");
await shoot(phone, "phone");

const engine = await start({ colorScheme: "dark" });
await engine.getByRole("link", { name: "Engine" }).click();
// Some load to look at: a few clients that ask again and again.
const end = Date.now() + 20_000;
const bodies = ["Hello!", "What is 347 + 185?", "Count to twenty."].map((content) => ({
  messages: [{ role: "user", content }],
  max_completion_tokens: 60 + ((80 * content.length) % 200),
  ignore_eos: true,
}));
const client = async (index) => {
  const headers = { "Content-Type": "application/json" };
  while (Date.now() < end) {
    const response = await fetch(`${server.url}/v1/chat/completions`, {
      method: "POST",
      headers,
      body: JSON.stringify(bodies[index % 3]),
    });
    await response.text();
  }
};
const clients = [0, 1, 2, 3, 4].map(client);
await engine.waitForTimeout(19_000);
await shoot(engine, "engine");
await Promise.all(clients);

await chrome.close();
server.end();
