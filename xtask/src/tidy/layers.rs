//! Dependency arrows: which crate of the workspace may depend on which, and who may use which third-party crate. What
//! is not listed is forbidden.

use super::Problem;
use super::manifest::{Dependency, Manifest, Table};

/// Allowed arrows. `spark-testing` may be a dev-dependency of every crate and is not listed.
const ARROWS: &[(&str, &[&str])] = &[
    (
        "spark-engine",
        &[
            "spark-api",
            "spark-backend",
            "spark-comm",
            "spark-cpu",
            "spark-cuda",
            "spark-models",
            "spark-quantize",
            "spark-runtime",
            "spark-server",
            "spark-suite",
            "spark-text",
            "spark-vision",
            "spark-weights",
        ],
    ),
    ("spark-server", &["spark-api", "spark-text", "spark-vision"]),
    ("spark-text", &["spark-api"]),
    ("spark-vision", &[]),
    (
        "spark-runtime",
        &["spark-api", "spark-backend", "spark-comm", "spark-models", "spark-scheduler", "spark-weights"],
    ),
    ("spark-scheduler", &["spark-api"]),
    ("spark-models", &["spark-backend", "spark-weights"]),
    ("spark-weights", &["spark-backend"]),
    ("spark-quantize", &["spark-backend", "spark-cpu", "spark-models", "spark-weights"]),
    ("spark-cpu", &["spark-backend"]),
    ("spark-cuda", &["spark-backend", "spark-comm"]),
    ("spark-comm", &["spark-backend"]),
    ("spark-suite", &[]),
    ("spark-api", &[]),
    ("spark-backend", &[]),
    ("spark-testing", &["spark-backend"]),
    ("xtask", &[]),
];

/// Arrows that tests may use besides those above: a test may drive a crate with the reference backend.
const DEV_ARROWS: &[(&str, &[&str])] =
    &[("spark-models", &["spark-cpu"]), ("spark-runtime", &["spark-cpu"]), ("spark-cuda", &["spark-cpu"])];

/// Third-party crates that only some crates may use; an empty list forbids the crate everywhere.
const RESTRICTED: &[(&str, &[&str], &str)] = &[
    ("axum", &["spark-server"], "only spark-server knows HTTP"),
    ("tower", &["spark-server"], "only spark-server knows HTTP"),
    ("tower-http", &["spark-server"], "only spark-server knows HTTP"),
    ("ureq", &["spark-engine", "spark-weights"], "only `pull` and `eval` are clients of others"),
    ("candle-core", &[], "its results depend on how a batch is cut; see ARCHITECTURE.md"),
    ("candle-nn", &[], "its results depend on how a batch is cut; see ARCHITECTURE.md"),
    ("pyo3", &[], "no Python in the program"),
    ("openssl", &[], "no system library is needed to build"),
];

/// `spark-*` crates that the workspace may have: the sixteen of the engine, and the suite, which is apart from them
/// because training, `eval` and tests must share one generator that knows no engine.
const CRATES_LIMIT: usize = 17;

/// Checks all manifests.
pub(crate) fn check(manifests: &[Manifest], problems: &mut Vec<Problem>) {
    let num_crates = manifests.iter().filter(|manifest| manifest.name.starts_with("spark-")).count();
    if num_crates > CRATES_LIMIT {
        let message = format!(
            "{num_crates} crates; the limit is {CRATES_LIMIT}: make it a module of an existing crate"
        );
        problems.push(Problem::new("crates", "Cargo.toml", message));
    }
    for manifest in manifests {
        if !manifest.features.is_empty() {
            let message = format!("declares the features {:?}; the workspace has none", manifest.features);
            problems.push(Problem::new("features", &manifest.path, message));
        }
        if !ARROWS.iter().any(|(name, _)| *name == manifest.name) {
            let message = format!(
                "crate `{}` is unknown: give it its arrows in xtask/src/tidy/layers.rs",
                manifest.name
            );
            problems.push(Problem::new("arrows", &manifest.path, message));
        }
        for dependency in
            manifest.dependencies.iter().filter(|dependency| dependency.table != Table::Workspace)
        {
            problems.extend(check_dependency(manifest, dependency));
        }
    }
    problems.extend(unused(manifests));
}

fn check_dependency(manifest: &Manifest, dependency: &Dependency) -> Option<Problem> {
    let name = dependency.name.as_str();
    let is_dev = dependency.table == Table::Dev;
    let allowed = |arrows: &[(&str, &[&str])]| {
        arrows.iter().any(|(from, to)| *from == manifest.name && to.contains(&name))
    };
    if name.starts_with("spark-") {
        let is_allowed = allowed(ARROWS) || (is_dev && (name == "spark-testing" || allowed(DEV_ARROWS)));
        let message =
            format!("`{}` must not depend on `{name}`: the arrow is not in ARCHITECTURE.md", manifest.name);
        return (!is_allowed).then(|| Problem::new("arrows", &manifest.path, message));
    }
    if let Some((_, users, reason)) = RESTRICTED.iter().find(|(restricted, ..)| *restricted == name) {
        let is_allowed = users.contains(&manifest.name.as_str()) || (is_dev && !users.is_empty());
        let message = format!("`{}` must not use `{name}`: {reason}", manifest.name);
        return (!is_allowed).then(|| Problem::new("arrows", &manifest.path, message));
    }
    // `[dependencies.name]` has an empty spec here; only the one-line forms are used.
    (!dependency.spec.contains("workspace")).then(|| {
        let message =
            format!("`{name}` must be `workspace = true` on one line: versions stand in the root only");
        Problem::new("arrows", &manifest.path, message)
    })
}

/// Dependencies that the root lists and no crate uses.
fn unused(manifests: &[Manifest]) -> Vec<Problem> {
    let used = |name: &str| {
        manifests.iter().flat_map(|m| &m.dependencies).any(|d| d.table != Table::Workspace && d.name == name)
    };
    manifests
        .iter()
        .flat_map(|manifest| manifest.dependencies.iter().map(move |dependency| (manifest, dependency)))
        .filter(|(_, dependency)| dependency.table == Table::Workspace && !used(&dependency.name))
        .map(|(manifest, dependency)| {
            let message =
                format!("no crate uses `{}`: remove it from [workspace.dependencies]", dependency.name);
            Problem::new("arrows", &manifest.path, message)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::tree::file;
    use super::*;

    fn problems(name: &str, rest: &str) -> Vec<String> {
        let manifest =
            Manifest::parse(&file("x/Cargo.toml", &format!("[package]\nname = \"{name}\"\n{rest}")));
        let mut problems = Vec::new();
        check(&[manifest], &mut problems);
        problems.into_iter().map(|problem| problem.message).collect()
    }

    #[test]
    fn an_arrow_that_is_not_listed_fails() {
        assert!(problems("spark-server", "[dependencies]\nspark-text.workspace = true\n").is_empty());
        let found = problems("spark-server", "[dependencies]\nspark-runtime.workspace = true\n");
        assert!(found[0].contains("`spark-server` must not depend on `spark-runtime`"), "{found:?}");
        assert_eq!(problems("spark-engine", "[dependencies]\nspark-scheduler.workspace = true\n").len(), 1);
    }

    #[test]
    fn tests_may_use_testing_and_the_reference_backend() {
        assert!(problems("spark-text", "[dev-dependencies]\nspark-testing.workspace = true\n").is_empty());
        assert!(problems("spark-models", "[dev-dependencies]\nspark-cpu.workspace = true\n").is_empty());
        assert_eq!(problems("spark-models", "[dependencies]\nspark-cpu.workspace = true\n").len(), 1);
        assert_eq!(problems("spark-text", "[dependencies]\nspark-testing.workspace = true\n").len(), 1);
    }

    #[test]
    fn restricted_crates_fail_outside_their_users() {
        assert!(problems("spark-server", "[dependencies]\naxum.workspace = true\n").is_empty());
        assert_eq!(problems("spark-runtime", "[dependencies]\naxum.workspace = true\n").len(), 1);
        assert_eq!(problems("spark-cpu", "[dev-dependencies]\ncandle-core.workspace = true\n").len(), 1);
    }

    #[test]
    fn versions_stand_in_the_root_only() {
        assert_eq!(problems("spark-cpu", "[dependencies]\nrayon = \"1\"\n").len(), 1);
        assert!(problems("spark-cpu", "[dependencies]\nrayon = { workspace = true }\n").is_empty());
    }

    #[test]
    fn unknown_crates_features_and_unused_dependencies_fail() {
        assert!(problems("spark-misc", "")[0].contains("unknown"));
        assert!(problems("spark-cpu", "[features]\ncuda = []\n")[0].contains("features"));
        assert!(
            problems("spark-engine", "[workspace.dependencies]\nlibc = \"0.2\"\n")[0]
                .contains("no crate uses")
        );
    }

    #[test]
    fn the_number_of_crates_is_limited() {
        let crates = |num: usize| {
            let text = "[package]\nname = \"spark-cpu\"\n";
            (0..num)
                .map(|i| Manifest::parse(&file(&format!("crates/{i}/Cargo.toml"), text)))
                .collect::<Vec<_>>()
        };
        let mut problems = Vec::new();
        check(&crates(CRATES_LIMIT), &mut problems);
        assert!(problems.is_empty());
        check(&crates(CRATES_LIMIT + 1), &mut problems);
        assert_eq!(problems.len(), 1);
    }
}
