// One message: pictures, thoughts, text, how fast it came, and what can be done with it.
import { useState } from "preact/hooks";
import { siblings, type Message, type Stats } from "../lib/conversation";
import * as state from "../state";
import { Composer } from "./composer";
import { IconButton } from "./icons";
import { copy, RichText } from "./rich-text";

export function MessageView({ message }: { message: Message }) {
  const [isEdited, setEdited] = useState(false);
  const isUser = message.role === "user";
  if (isEdited) {
    const submit = (text: string, images: string[]): boolean => {
      const isSent = state.edit(message, text, images);
      if (isSent) setEdited(false);
      return isSent;
    };
    return (
      <article class="message user editing" aria-label="Your message, being edited">
        <Composer
          label="Edit the message"
          text={message.text}
          images={message.images}
          submit={submit}
          cancel={() => setEdited(false)}
        />
      </article>
    );
  }
  return (
    <article
      class={`message ${message.role}`}
      aria-label={isUser ? "You" : (message.model ?? "Answer")}
      aria-busy={message.status === "streaming"}
    >
      {message.images.length > 0 && <Pictures images={message.images} />}
      {message.reasoning !== "" && <Thoughts message={message} />}
      {isUser ? <p class="plain">{message.text}</p> : <Answer message={message} />}
      <footer>
        <Versions message={message} />
        <Actions message={message} edit={() => setEdited(true)} />
        {message.stats !== undefined && <Speed stats={message.stats} />}
      </footer>
    </article>
  );
}

export function Pictures({ images, remove }: { images: string[]; remove?: (index: number) => void }) {
  return (
    <ul class="pictures" aria-label="Pictures">
      {images.map((url, index) => (
        <li key={`${index} ${url.length}`}>
          <img src={url} alt={`Picture ${index + 1}`} />
          {remove !== undefined && (
            <IconButton icon="close" label={`Remove picture ${index + 1}`} onClick={() => remove(index)} />
          )}
        </li>
      ))}
    </ul>
  );
}

function Thoughts({ message }: { message: Message }) {
  const isThinking = message.status === "streaming" && message.text === "";
  return (
    <details class="thoughts">
      <summary>{isThinking ? <span class="busy">Thinking</span> : "Thoughts"}</summary>
      <RichText text={message.reasoning} />
    </details>
  );
}

function Answer({ message }: { message: Message }) {
  const { text, status, json, reasoning, promptShare } = message;
  // A fence that no JSON text contains.
  const shown = json === true && text.trim() !== "" ? "~~~~~~json\n" + text + "\n~~~~~~" : text;
  const isReading = promptShare !== undefined && promptShare < 1;
  const waiting = isReading ? `Reading the prompt: ${(100 * promptShare).toFixed(0)} %` : "Waiting for the first token";
  return (
    <>
      {status === "streaming" && text === "" && reasoning === "" && <p class="busy waiting">{waiting}</p>}
      {text !== "" && <RichText text={shown} />}
      {status === "stopped" && <p class="remark">Stopped.</p>}
      {status === "length" && <p class="remark">Cut off: the most tokens allowed were reached.</p>}
      {status === "error" && (
        <p class="error" role="alert">
          {message.error}
        </p>
      )}
    </>
  );
}

function Versions({ message }: { message: Message }) {
  const conversation = state.current.value;
  if (conversation === undefined) return null;
  const all = siblings(conversation, message);
  if (all.length < 2) return null;
  const index = all.findIndex(({ id }) => id === message.id);
  const go = (to: number) => () => all[to] !== undefined && state.choose(all[to]);
  return (
    <span class="versions" role="group" aria-label="Versions">
      <IconButton icon="left" label="Version before" disabled={index === 0} onClick={go(index - 1)} />
      <span>
        {index + 1} / {all.length}
      </span>
      <IconButton icon="right" label="Next version" disabled={index === all.length - 1} onClick={go(index + 1)} />
    </span>
  );
}

function Actions({ message, edit }: { message: Message; edit: () => void }) {
  const [isCopied, setCopied] = useState(false);
  const isBusy = state.isRunning.value;
  if (message.status === "streaming") return null;
  const copyText = (): void => void copy(message.text).then(setCopied);
  return (
    <span class="actions">
      <IconButton icon={isCopied ? "check" : "copy"} label={isCopied ? "Copied" : "Copy"} onClick={copyText} />
      {message.role === "user" ? (
        <IconButton icon="edit" label="Edit" disabled={isBusy} onClick={edit} />
      ) : (
        <IconButton icon="again" label="Regenerate" disabled={isBusy} onClick={() => state.regenerate(message)} />
      )}
      <IconButton icon="branch" label="Branch into a new chat" onClick={() => void state.fork(message)} />
    </span>
  );
}

function Speed({ stats }: { stats: Stats }) {
  const { outputTokens, tokensPerSecond, firstTokenMs, promptTokens, cachedTokens } = stats;
  const first = firstTokenMs < 1000 ? `${firstTokenMs.toFixed(0)} ms` : `${(firstTokenMs / 1000).toFixed(1)} s`;
  const cached = cachedTokens > 0 ? `, ${cachedTokens} of them from the cache` : "";
  const detail = `Prompt: ${promptTokens} tokens${cached}. First token after ${first}.`;
  return (
    <span class="speed" title={detail}>
      {outputTokens} tokens{tokensPerSecond > 0 && ` · ${tokensPerSecond.toFixed(1)} tokens/s`} · first after {first}
    </span>
  );
}
