// The build steps of our own: fonts in one format, the licences of what is bundled, the list of files for
// `include_bytes!`.
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { extname, join } from "node:path";
import type { Plugin } from "vite";

const TYPES: Record<string, string> = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".svg": "image/svg+xml",
  ".txt": "text/plain; charset=utf-8",
  ".woff2": "font/woff2",
};

/** KaTeX names every font in three formats; every browser that can run this page reads the first. */
export function woff2Only(): Plugin {
  return {
    name: "woff2-only",
    enforce: "pre",
    transform(code, id) {
      if (!/katex.*\.css/.test(id)) return null;
      return { code: code.replace(/,\s*url\([^)]*\.(woff|ttf)\)\s*format\([^)]*\)/g, ""), map: null };
    },
  };
}

/** Adds `licenses.txt`: name, version and licence of every package that has code in the page. */
export function licenses(): Plugin {
  return {
    name: "licenses",
    generateBundle() {
      const folders = new Set<string>();
      for (const id of this.getModuleIds()) {
        const folder = /^.*\/node_modules\/(?:@[^/]+\/)?[^/]+/.exec(id)?.[0];
        if (folder !== undefined && !folder.includes("\0")) folders.add(folder);
      }
      const texts = [...folders].sort().map((folder) => {
        const { name, version } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8")) as Record<
          string,
          string
        >;
        const file = ["LICENSE", "LICENSE.md", "LICENSE.txt", "LICENSE-MIT.txt"]
          .map((leaf) => join(folder, leaf))
          .find(existsSync);
        if (file === undefined) throw new Error(`${name}: its package has no licence file`);
        return `${name} ${version}\n\n${readFileSync(file, "utf8").replace(/\r/g, "").trim()}\n`;
      });
      this.emitFile({ type: "asset", fileName: "licenses.txt", source: texts.join(`\n${"-".repeat(80)}\n\n`) });
    },
  };
}

/** Writes `assets.rs` beside the built page: the files, in order, with their types. */
export function embed(): Plugin {
  return {
    name: "embed",
    writeBundle(options, bundle) {
      const rows = Object.keys(bundle)
        .sort()
        .map((name) => {
          const type = TYPES[extname(name)];
          if (type === undefined) throw new Error(`${name}: what is its content type? Add it to TYPES in embed.ts`);
          return `    Asset { path: "/${name}", content_type: "${type}", bytes: include_bytes!("${name}") },\n`;
        });
      const text =
        "//! The files of the built page. Written by `vite build` in `ui/`; not to be edited by hand.\n\n" +
        "use super::Asset;\n\n" +
        "/// Every file, by path.\n" +
        `#[rustfmt::skip]\npub(super) const ASSETS: &[Asset] = &[\n${rows.join("")}];\n`;
      writeFileSync(join(options.dir ?? ".", "assets.rs"), text);
    },
  };
}
