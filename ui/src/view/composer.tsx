// Where a message is written: text, pictures, and the keys that send it. Used for new messages and for edited ones.
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { PICTURE_TYPES, take } from "../lib/pictures";
import * as state from "../state";
import { Icon, IconButton } from "./icons";
import { Pictures } from "./message";

interface Props {
  label: string;
  text?: string;
  images?: string[];
  /** False if it is not sent: then it stays. */
  submit: (text: string, images: string[]) => boolean;
  /** Given for an edited message. */
  cancel?: () => void;
}

export function Composer({ label, text: initial = "", images: given = [], submit, cancel }: Props) {
  const [text, setText] = useState(initial);
  const [images, setImages] = useState(given);
  const area = useRef<HTMLTextAreaElement>(null);
  const picker = useRef<HTMLInputElement>(null);
  const isNew = cancel === undefined;
  const isBusy = isNew && state.isRunning.value;

  // Pictures that were dropped on the page belong to the new message.
  const dropped = isNew ? state.attached.value : [];
  useEffect(() => {
    if (dropped.length === 0) return;
    setImages((before) => [...before, ...dropped]);
    state.attached.value = [];
    area.current?.focus();
  }, [dropped]);

  useEffect(() => area.current?.focus(), []);
  useLayoutEffect(() => {
    const { current } = area;
    if (current === null) return;
    current.style.height = "auto";
    current.style.height = `${current.scrollHeight}px`;
  }, [text]);

  const add = async (files: Iterable<File>): Promise<void> => {
    const taken = await take(files);
    setImages((before) => [...before, ...taken.images]);
    if (taken.refused.length > 0) state.notice.value = taken.refused.join("\n");
  };
  const send = (): void => {
    if (isBusy || (text.trim() === "" && images.length === 0)) return;
    if (!submit(text, images) || !isNew) return;
    setText("");
    setImages([]);
  };
  const onKeyDown = (event: KeyboardEvent): void => {
    // Enter also ends the choice of a character in some input methods.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape" && cancel !== undefined) {
      event.stopPropagation();
      cancel();
    }
  };
  const onPaste = (event: ClipboardEvent): void => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length === 0) return;
    event.preventDefault();
    void add(files);
  };
  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      {images.length > 0 && (
        <Pictures images={images} remove={(index) => setImages(images.filter((_, other) => other !== index))} />
      )}
      <textarea
        ref={area}
        rows={1}
        aria-label={label}
        placeholder={isNew ? "Ask something, or drop a picture" : ""}
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={onKeyDown}
        onPaste={onPaste}
      />
      <div class="composer-bar">
        <input
          ref={picker}
          type="file"
          accept={PICTURE_TYPES.join(",")}
          multiple
          hidden
          aria-label="Picture files"
          onChange={(event) => {
            void add([...(event.currentTarget.files ?? [])]);
            event.currentTarget.value = "";
          }}
        />
        <IconButton icon="image" label="Add pictures" onClick={() => picker.current?.click()} />
        <span class="grow">{isNew && <Reminders />}</span>
        {cancel !== undefined && (
          <button type="button" class="button" onClick={cancel}>
            Cancel
          </button>
        )}
        {isBusy ? (
          <button type="button" class="button primary round" aria-label="Stop" title="Stop (Esc)" onClick={state.stop}>
            <Icon name="stop" />
          </button>
        ) : (
          <button
            type="submit"
            class="button primary round"
            aria-label="Send"
            title="Send (Enter)"
            disabled={text.trim() === "" && images.length === 0}
          >
            <Icon name="send" />
          </button>
        )}
      </div>
    </form>
  );
}

/** What holds the answers to something, so that nobody wonders. */
function Reminders() {
  const settings = state.current.value?.settings;
  if (settings === undefined) return null;
  const reminders = [
    settings.format === "json_schema" && "JSON schema",
    settings.format === "json_object" && "JSON",
    settings.thinking !== "default" && `thinking ${settings.thinking}`,
    settings.system.trim() !== "" && "system prompt",
  ].filter((reminder) => reminder !== false);
  return (
    <>
      {reminders.map((reminder) => (
        <span class="chip" key={reminder}>
          {reminder}
        </span>
      ))}
    </>
  );
}
