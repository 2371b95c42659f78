// The shown conversation: its messages, how full the context is, and the composer.
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { take } from "../lib/pictures";
import * as state from "../state";
import { Composer } from "./composer";
import { MessageView } from "./message";

/** How near to its end a list counts as read to the end, in pixels. */
const NEAR = 80;

export function Chat() {
  const conversation = state.current.value;
  const messages = state.shown.value;
  const log = useRef<HTMLDivElement>(null);
  const isAtEnd = useRef(true);
  const last = messages.at(-1);

  useLayoutEffect(() => {
    isAtEnd.current = true;
  }, [conversation?.id, messages.length]);
  // Follows a growing answer, unless the reader has scrolled up.
  useLayoutEffect(() => {
    const { current } = log;
    if (current !== null && isAtEnd.current) current.scrollTop = current.scrollHeight;
  }, [last]);

  if (conversation === undefined) return null;
  return (
    <DropZone>
      <div
        class="log"
        ref={log}
        role="log"
        aria-label="Conversation"
        aria-live="off"
        tabIndex={0}
        onScroll={({ currentTarget: { scrollTop, scrollHeight, clientHeight } }) => {
          isAtEnd.current = scrollHeight - scrollTop - clientHeight < NEAR;
        }}
      >
        {messages.length === 0 ? <Welcome /> : <h1 class="hidden">{conversation.title}</h1>}
        {messages.map((message) => (
          <MessageView key={message.id} message={message} />
        ))}
      </div>
      <div class="below">
        <Composer key={conversation.id} label="Message" submit={(text, images) => state.send(text, images)} />
        <ContextUse />
      </div>
    </DropZone>
  );
}

function Welcome() {
  return (
    <div class="welcome">
      <h1>What shall we look at?</h1>
      <p>Write a message, or drop, paste or select a picture and ask about it.</p>
      <p class="quiet">Conversations stay in this browser.</p>
    </div>
  );
}

/** Tokens of prompt and answer against what the model holds. */
function ContextUse() {
  const stats = state.shown.value.findLast(({ stats }) => stats !== undefined)?.stats;
  const limit = state.model.value?.maxModelLen ?? null;
  const used = (stats?.promptTokens ?? 0) + (stats?.outputTokens ?? 0);
  if (stats === undefined || used === 0) return <p class="context quiet">Answers may be wrong.</p>;
  if (limit === null) return <p class="context quiet">Context: {used} tokens</p>;
  return (
    <p class="context quiet">
      <label>
        Context <meter min={0} max={limit} high={limit * 0.9} value={used} /> {used.toLocaleString("en")} of{" "}
        {limit.toLocaleString("en")} tokens
      </label>
    </p>
  );
}

function DropZone({ children }: { children: preact.ComponentChildren }) {
  const [isOver, setOver] = useState(false);
  useEffect(() => {
    const hasFiles = (event: DragEvent): boolean => event.dataTransfer?.types.includes("Files") ?? false;
    const over = (event: DragEvent): void => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      setOver(true);
    };
    const leave = (event: DragEvent): void => {
      if (event.relatedTarget === null) setOver(false);
    };
    const drop = (event: DragEvent): void => {
      setOver(false);
      if (!hasFiles(event)) return;
      // Else the browser would leave the page and show the picture.
      event.preventDefault();
      void take([...(event.dataTransfer?.files ?? [])]).then(({ images, refused }) => {
        state.attached.value = images;
        if (refused.length > 0) state.notice.value = refused.join("\n");
      });
    };
    window.addEventListener("dragover", over);
    window.addEventListener("dragleave", leave);
    window.addEventListener("drop", drop);
    return () => {
      window.removeEventListener("dragover", over);
      window.removeEventListener("dragleave", leave);
      window.removeEventListener("drop", drop);
    };
  }, []);
  return (
    <section class={`chat ${isOver ? "dropping" : ""}`} aria-label="Chat">
      {children}
      {isOver && <div class="drop-hint">Drop pictures to add them</div>}
    </section>
  );
}
