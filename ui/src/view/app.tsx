// The frame of the page: sidebar, top bar, the view, dialogs, and the keys that work everywhere.
import { useEffect, useState } from "preact/hooks";
import { apiKey } from "../lib/api";
import * as state from "../state";
import { Chat } from "./chat";
import { Dialog } from "./dialog";
import { Engine } from "./engine";
import { IconButton } from "./icons";
import { SettingsDialog } from "./settings-dialog";
import { Sidebar } from "./sidebar";

export function App() {
  const [open, setOpen] = useState<"settings" | "help" | undefined>();
  const [isDrawn, setDrawn] = useState(false);
  useEffect(() => {
    const onKey = (event: KeyboardEvent): void => {
      const command = event.ctrlKey || event.metaKey;
      if (command && event.key.toLowerCase() === "k") {
        event.preventDefault();
        setOpen(undefined);
        state.newChat();
      } else if (command && event.key === ",") {
        event.preventDefault();
        setOpen("settings");
      } else if (command && event.key === "/") {
        event.preventDefault();
        setOpen("help");
      } else if (event.key === "Escape" && document.querySelector("dialog[open]") === null) {
        if (isDrawn) setDrawn(false);
        else state.stop();
      }
    };
    window.addEventListener("keydown", onKey);
    return () => window.removeEventListener("keydown", onKey);
  }, [isDrawn]);
  const close = (): void => setOpen(undefined);
  return (
    <div class={`app ${isDrawn ? "drawn" : ""}`}>
      <Sidebar showHelp={() => setOpen("help")} done={() => setDrawn(false)} />
      {isDrawn && <div class="shade" onClick={() => setDrawn(false)} />}
      <main>
        <TopBar openSettings={() => setOpen("settings")} draw={() => setDrawn(!isDrawn)} />
        <Notice />
        {state.view.value === "engine" ? <Engine /> : <Chat />}
      </main>
      <div class="hidden" role="status" aria-live="polite">
        {state.spoken.value}
      </div>
      {open === "settings" && <SettingsDialog close={close} />}
      {open === "help" && <Help close={close} />}
      {state.isKeyWanted.value && <KeyDialog />}
    </div>
  );
}

function TopBar({ openSettings, draw }: { openSettings: () => void; draw: () => void }) {
  const models = state.models.value;
  const toggle = (): void => {
    const systemIsDark = matchMedia("(prefers-color-scheme: dark)").matches;
    const dark = state.theme.value === "dark" || (state.theme.value === "system" && systemIsDark);
    state.setTheme(dark ? "light" : "dark");
  };
  return (
    <header class="top">
      <IconButton icon="menu" label="Conversations" class="only-narrow" onClick={draw} />
      {models.length > 1 ? (
        <select
          aria-label="Model"
          value={state.modelId.value}
          onChange={(event) => (state.modelId.value = event.currentTarget.value)}
        >
          {models.map(({ id }) => (
            <option key={id}>{id}</option>
          ))}
        </select>
      ) : (
        <span class="model" title={state.modelId.value}>
          {state.modelId.value}
        </span>
      )}
      <span class={`connection ${state.connection.value}`} role="status">
        {state.connection.value === "failed" && !state.isKeyWanted.value && "Waiting for the server"}
      </span>
      <span class="grow" />
      <IconButton icon="sun" label="Dark or light" onClick={toggle} />
      <IconButton icon="settings" label="Settings" onClick={openSettings} />
    </header>
  );
}

function Notice() {
  if (state.notice.value === "") return null;
  return (
    <div class="notice" role="alert">
      <span>{state.notice.value}</span>
      <IconButton icon="close" label="Dismiss" onClick={() => (state.notice.value = "")} />
    </div>
  );
}

function KeyDialog() {
  const [key, setKey] = useState(apiKey.get());
  const close = (): void => void (state.isKeyWanted.value = false);
  return (
    <Dialog title="API key" close={close}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          close();
          state.setKey(key.trim());
        }}
      >
        <p class="quiet">
          A server with keys answers only to one of them. It is kept until this tab is closed, and sent to no one else.
        </p>
        <label class="field">
          Key
          <input
            type="password"
            autocomplete="off"
            value={key}
            onInput={(event) => setKey(event.currentTarget.value)}
          />
        </label>
        <div class="row end">
          <button type="submit" class="button primary">
            Use this key
          </button>
        </div>
      </form>
    </Dialog>
  );
}

const KEYS: [keys: string[], what: string][] = [
  [["Enter"], "Send"],
  [["Shift", "Enter"], "New line"],
  [["Esc"], "Stop the answer, close a dialog, leave an edit"],
  [["Ctrl", "K"], "New chat"],
  [["Ctrl", ","], "Settings"],
  [["Ctrl", "/"], "This list"],
];

function Help({ close }: { close: () => void }) {
  return (
    <Dialog title="Keyboard shortcuts" close={close}>
      <dl class="keys">
        {KEYS.map(([keys, what]) => (
          <div key={what}>
            <dt>
              {keys.map((key) => (
                <kbd key={key}>{key}</kbd>
              ))}
            </dt>
            <dd>{what}</dd>
          </div>
        ))}
      </dl>
    </Dialog>
  );
}
