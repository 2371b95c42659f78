// The settings of a conversation, and of the page: every field is saved as it is typed.
import { NUMBER_FIELDS, problem, DEFAULTS, type Settings } from "../lib/settings";
import * as state from "../state";
import { Dialog } from "./dialog";

export function SettingsDialog({ close }: { close: () => void }) {
  const settings = state.current.value?.settings ?? DEFAULTS;
  const set = <K extends keyof Settings>(key: K, value: Settings[K]): void =>
    state.changeSettings({ ...settings, [key]: value });
  const wrong = problem(settings);
  return (
    <Dialog title="Settings" close={close}>
      <p class="quiet">They hold for this chat and for new ones. What is left empty, the server decides.</p>
      <label class="field">
        System prompt
        <textarea rows={3} value={settings.system} onInput={(event) => set("system", event.currentTarget.value)} />
      </label>
      <fieldset>
        <legend>Sampling</legend>
        <div class="grid">
          {NUMBER_FIELDS.map(({ key, label, hint, min, max, step }) => (
            <label class="field" key={key} title={hint}>
              {label}
              <input
                type="number"
                inputMode="decimal"
                placeholder="default"
                min={min}
                max={max}
                step={step}
                value={settings[key]}
                onInput={(event) => set(key, event.currentTarget.value as never)}
              />
              <small>{hint}</small>
            </label>
          ))}
        </div>
        <label class="field">
          Stop strings
          <textarea
            rows={2}
            placeholder="one a line"
            value={settings.stop}
            onInput={(event) => set("stop", event.currentTarget.value)}
          />
        </label>
      </fieldset>
      <fieldset>
        <legend>Answers</legend>
        <label class="field">
          Thinking
          <select
            value={settings.thinking}
            onChange={(event) => set("thinking", event.currentTarget.value as Settings["thinking"])}
          >
            <option value="default">As the model does by itself</option>
            <option value="on">On</option>
            <option value="off">Off</option>
          </select>
        </label>
        <label class="field">
          Form
          <select
            value={settings.format}
            onChange={(event) => set("format", event.currentTarget.value as Settings["format"])}
          >
            <option value="text">Text</option>
            <option value="json_object">A JSON object</option>
            <option value="json_schema">JSON of a schema</option>
          </select>
        </label>
        {settings.format === "json_schema" && (
          <label class="field">
            JSON schema
            <textarea
              class="code"
              rows={7}
              spellcheck={false}
              placeholder={'{"type": "object", "properties": {"answer": {"type": "string"}}}'}
              value={settings.schema}
              onInput={(event) => set("schema", event.currentTarget.value)}
            />
          </label>
        )}
      </fieldset>
      <fieldset>
        <legend>Page</legend>
        <label class="field">
          Colours
          <select
            value={state.theme.value}
            onChange={(event) => state.setTheme(event.currentTarget.value as state.Theme)}
          >
            <option value="system">As the system</option>
            <option value="light">Light</option>
            <option value="dark">Dark</option>
          </select>
        </label>
      </fieldset>
      {wrong !== "" && (
        <p class="error" role="alert">
          {wrong}
        </p>
      )}
      <div class="row end">
        <button type="button" class="button" onClick={() => state.changeSettings(DEFAULTS)}>
          Reset
        </button>
      </div>
    </Dialog>
  );
}
