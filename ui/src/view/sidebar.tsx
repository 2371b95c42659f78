// The list of conversations, and the ways to the other view, to files and to help.
import { useRef, useState } from "preact/hooks";
import type { Head } from "../lib/conversation";
import * as state from "../state";
import { Icon, IconButton } from "./icons";

export function Sidebar({ showHelp, done }: { showHelp: () => void; done: () => void }) {
  const [filter, setFilter] = useState("");
  const picker = useRef<HTMLInputElement>(null);
  const wanted = filter.trim().toLowerCase();
  const heads = state.heads.value.filter(({ title }) => title.toLowerCase().includes(wanted));
  return (
    <nav class="sidebar" id="sidebar" aria-label="Conversations">
      <div class="brand">
        <Icon name="chat" /> spark-engine
      </div>
      <button
        type="button"
        class="button wide"
        onClick={() => {
          state.newChat();
          done();
        }}
      >
        <Icon name="plus" /> New chat <kbd>Ctrl K</kbd>
      </button>
      {state.heads.value.length > 4 && (
        <input
          type="search"
          aria-label="Search conversations"
          placeholder="Search"
          value={filter}
          onInput={(event) => setFilter(event.currentTarget.value)}
        />
      )}
      <ul class="heads">
        {heads.map((head) => (
          <HeadRow key={head.id} head={head} done={done} />
        ))}
      </ul>
      <div class="tools">
        <a
          class="button wide"
          href="#/engine"
          onClick={done}
          aria-current={state.view.value === "engine" ? "page" : undefined}
        >
          <Icon name="chart" /> Engine
        </a>
        <div class="row">
          <IconButton icon="download" label="Export all conversations" onClick={() => void state.exportFile()} />
          <IconButton icon="upload" label="Import conversations" onClick={() => picker.current?.click()} />
          <IconButton icon="key" label="API key" onClick={() => (state.isKeyWanted.value = true)} />
          <IconButton icon="help" label="Keyboard shortcuts" onClick={showHelp} />
          <input
            ref={picker}
            type="file"
            accept="application/json,.json"
            hidden
            aria-label="File of conversations"
            onChange={(event) => {
              const file = event.currentTarget.files?.[0];
              if (file !== undefined) void state.importFile(file);
              event.currentTarget.value = "";
            }}
          />
        </div>
      </div>
    </nav>
  );
}

function HeadRow({ head, done }: { head: Head; done: () => void }) {
  const [title, setTitle] = useState<string | undefined>();
  const isCurrent = state.view.value === "chat" && state.current.value?.id === head.id;
  const ask = (): void => {
    if (confirm(`Delete "${head.title}"?`)) void state.remove(head);
  };
  if (title !== undefined) {
    const end = (): void => {
      void state.rename(head, title);
      setTitle(undefined);
    };
    return (
      <li>
        <input
          aria-label="Title"
          value={title}
          ref={(input) => input?.focus()}
          onInput={(event) => setTitle(event.currentTarget.value)}
          onBlur={end}
          onKeyDown={(event) => {
            if (event.key === "Enter") end();
            if (event.key === "Escape") setTitle(undefined);
          }}
        />
      </li>
    );
  }
  return (
    <li class={isCurrent ? "current" : ""}>
      <a href={`#/chat/${head.id}`} aria-current={isCurrent ? "page" : undefined} title={head.title} onClick={done}>
        {head.title}
      </a>
      <IconButton icon="edit" label={`Rename ${head.title}`} onClick={() => setTitle(head.title)} />
      <IconButton icon="trash" label={`Delete ${head.title}`} onClick={ask} />
    </li>
  );
}
