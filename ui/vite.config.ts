// Builds the page into crates/server/assets/ui and writes the Rust list of its files, so that cargo needs no node.
import { defineConfig } from "vite";
import { embed, licenses, woff2Only } from "./embed.ts";

export default defineConfig({
  // Relative addresses: the page also works below a path of a reverse proxy.
  base: "./",
  plugins: [woff2Only(), licenses(), embed()],
  build: {
    outDir: process.env["SPARK_UI_OUT"] ?? "../crates/server/assets/ui",
    emptyOutDir: true,
    // Inlined files would be `data:` addresses, which the content security policy allows for pictures only.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: ["chrome123", "firefox121", "safari17.5"],
    // KaTeX with highlight.js is a chunk of its own, loaded when a message needs it.
    chunkSizeWarningLimit: 800,
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8000", "/metrics": "http://127.0.0.1:8000" } },
});
