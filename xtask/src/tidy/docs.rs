//! Documents against the code: every crate has its paragraph and every dependency its reason in ARCHITECTURE.md, the
//! changelog is at the version of the workspace, and what a document names exists.

use super::Problem;
use super::manifest::{Manifest, Table};
use super::tree::File;

const ARCHITECTURE: &str = "ARCHITECTURE.md";
/// Shortest text that can say what a crate does and does not do.
const PARAGRAPH_CHARS: usize = 120;
/// Heading of the table of third-party crates in ARCHITECTURE.md.
const THIRD_PARTY: &str = "## Third-party crates";
/// A path in backticks that starts with one of these must exist.
const TOP_FOLDERS: [&str; 8] =
    ["crates/", "models/", "src/", "tests/", "xtask/", "docs/", "examples/", ".ci/"];

/// Runs all document checks.
pub(crate) fn check(manifests: &[Manifest], files: &[File], problems: &mut Vec<Problem>) {
    let text = |path: &str| {
        files.iter().find(|f| f.path == path).and_then(|f| f.text.as_deref()).unwrap_or_default()
    };
    let architecture = text(ARCHITECTURE);
    for manifest in manifests.iter().filter(|manifest| !manifest.name.is_empty()) {
        problems.extend(check_paragraph(&manifest.name, architecture));
    }
    check_third_party(manifests, architecture, problems);
    if let Some(version) = manifests.iter().find_map(|manifest| manifest.workspace_version.as_deref()) {
        problems.extend(check_changelog(version, text("CHANGELOG.md")));
    }
    for file in files.iter().filter(|file| file.path.ends_with(".md")) {
        check_paths(file, files, problems);
    }
}

/// A crate's paragraph starts with its name in bold: ``**`spark-api`**``.
fn check_paragraph(name: &str, architecture: &str) -> Option<Problem> {
    let start = format!("**`{name}`**");
    let paragraph = architecture.split("\n\n").find(|paragraph| paragraph.trim_start().starts_with(&start));
    let message = match paragraph {
        None => format!("no paragraph starts with {start}: say what the crate does and what it does not"),
        Some(paragraph) if paragraph.trim().len() < PARAGRAPH_CHARS => {
            format!(
                "the paragraph of `{name}` has under {PARAGRAPH_CHARS} characters: say what it does not do, too"
            )
        }
        Some(_) => return None,
    };
    Some(Problem::new("architecture", ARCHITECTURE, message))
}

/// Every third-party crate has a row with a reason, and every row has its crate.
fn check_third_party(manifests: &[Manifest], architecture: &str, problems: &mut Vec<Problem>) {
    let section = architecture.split(THIRD_PARTY).nth(1).unwrap_or_default();
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows: Vec<(&str, &str)> = section.lines().filter_map(row).collect();
    let dependencies: Vec<&str> = manifests
        .iter()
        .flat_map(|manifest| &manifest.dependencies)
        .filter(|dependency| dependency.table == Table::Workspace && !dependency.name.starts_with("spark-"))
        .map(|dependency| dependency.name.as_str())
        .collect();
    for name in &dependencies {
        if !rows.iter().any(|(crate_name, reason)| crate_name == name && reason.len() > 10) {
            let message = format!("`{name}` has no row with a reason under \"{THIRD_PARTY}\"");
            problems.push(Problem::new("architecture", ARCHITECTURE, message));
        }
    }
    for (name, _) in rows {
        if !dependencies.contains(&name) {
            let message =
                format!("`{name}` has a row under \"{THIRD_PARTY}\", but the workspace does not use it");
            problems.push(Problem::new("architecture", ARCHITECTURE, message));
        }
    }
}

/// First cell (a name in backticks) and last cell of a table row.
fn row(line: &str) -> Option<(&str, &str)> {
    let cells = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    let (first, last) = (cells.split('|').next()?, cells.split('|').next_back()?);
    Some((first.trim().strip_prefix('`')?.strip_suffix('`')?, last.trim()))
}

/// The first entry of the changelog is the version of the workspace.
fn check_changelog(version: &str, changelog: &str) -> Option<Problem> {
    let top =
        changelog.lines().find_map(|line| line.strip_prefix("## [")).and_then(|rest| rest.split(']').next());
    let message =
        format!("the top entry is {top:?}, but the workspace is at {version}: add `## [{version}]`");
    (top != Some(version)).then(|| Problem::new("changelog", "CHANGELOG.md", message))
}

/// Relative links, and paths in backticks that start at the root, lead to a file or folder.
fn check_paths(file: &File, files: &[File], problems: &mut Vec<Problem>) {
    let Some(text) = &file.text else { return };
    let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let exists = |path: &str| {
        let path = path.trim_end_matches('/');
        files
            .iter()
            .any(|file| file.path == path || file.path.strip_prefix(path).is_some_and(|p| p.starts_with('/')))
    };
    for (line_idx, line) in text.lines().enumerate() {
        let links = line.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        let links =
            links.filter(|link| !link.is_empty() && !link.contains(':')).map(|link| resolve(folder, link));
        let named = line.split('`').skip(1).step_by(2);
        let named = named.filter(|name| TOP_FOLDERS.iter().any(|top| name.starts_with(top)));
        let named = named.filter(|name| !name.contains(['<', '*', '{', ' ', '…'])).map(str::to_owned);
        for path in links.chain(named).filter(|path| !exists(path)) {
            let message = format!("`{path}` does not exist");
            problems.push(Problem::new("links", format!("{}:{}", file.path, line_idx + 1), message));
        }
    }
}

/// `link` as seen from `folder`, from the root.
fn resolve(folder: &str, link: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::super::tree::file;
    use super::*;

    const PARAGRAPH: &str = "**`spark-api`** (`crates/api`). Plain data between the front ends and the engine. It knows no text, no JSON, no device and does no IO at all.\n\n";

    fn problems(files: &[File]) -> Vec<String> {
        let manifests: Vec<_> =
            files.iter().filter(|f| f.path.ends_with("Cargo.toml")).map(Manifest::parse).collect();
        let mut problems = Vec::new();
        check(&manifests, files, &mut problems);
        problems.into_iter().map(|problem| format!("{}: {}", problem.place, problem.message)).collect()
    }

    #[test]
    fn every_crate_has_a_paragraph() {
        let manifest = || file("crates/api/Cargo.toml", "[package]\nname = \"spark-api\"\n");
        assert!(problems(&[manifest(), file(ARCHITECTURE, PARAGRAPH)]).is_empty());
        assert_eq!(problems(&[manifest()]).len(), 1);
        assert_eq!(problems(&[manifest(), file(ARCHITECTURE, "**`spark-api`** Data.\n")]).len(), 1);
        assert_eq!(problems(&[manifest(), file(ARCHITECTURE, "Here is **`spark-api`**.\n")]).len(), 1);
    }

    #[test]
    fn every_third_party_crate_has_a_reason_and_every_row_its_crate() {
        let manifest =
            || file("Cargo.toml", "[workspace.dependencies]\nhalf = \"2\"\nspark-x = { path = \"x\" }\n");
        let table = |rows: &str| {
            file(ARCHITECTURE, &format!("{THIRD_PARTY}\n\n| crate | why |\n|---|---|\n{rows}\n## Next\n"))
        };
        assert!(problems(&[manifest(), table("| `half` | bfloat16 on the host |\n")]).is_empty());
        assert_eq!(problems(&[manifest(), table("| `half` | |\n")]).len(), 1);
        assert_eq!(problems(&[manifest(), table("")]).len(), 1);
        assert_eq!(
            problems(&[
                manifest(),
                table("| `half` | bfloat16 on the host |\n| `ndarray` | was used once |\n")
            ])
            .len(),
            1
        );
    }

    #[test]
    fn the_changelog_is_at_the_version() {
        let manifest = || file("Cargo.toml", "[workspace.package]\nversion = \"0.2.0\"\n");
        assert!(
            problems(&[manifest(), file("CHANGELOG.md", "# Changelog\n\n## [0.2.0] - unreleased\n")])
                .is_empty()
        );
        assert_eq!(problems(&[manifest(), file("CHANGELOG.md", "## [0.1.0]\n\n## [0.2.0]\n")]).len(), 1);
        assert_eq!(problems(&[manifest()]).len(), 1);
    }

    #[test]
    fn what_a_document_names_exists() {
        let text = "[a](../README.md#top), `src/lib.rs`, [b](https://example.com), `src/<op>.rs`\n[c](gone.md)\n`src/gone.rs`\n";
        let found = problems(&[file("docs/x.md", text), file("README.md", ""), file("src/lib.rs", "")]);
        assert_eq!(
            found,
            ["docs/x.md:2: `docs/gone.md` does not exist", "docs/x.md:3: `src/gone.rs` does not exist"]
        );
    }
}
