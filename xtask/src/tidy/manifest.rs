//! The parts of a `Cargo.toml` that the checks need. Reads the plain style of this repository (one key a line), which
//! is all that a manifest here may use; not a TOML parser.

use super::tree::File;

/// Which table a dependency stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    /// `[dependencies]` and `[build-dependencies]`, of any target.
    Normal,
    /// `[dev-dependencies]`.
    Dev,
    /// `[workspace.dependencies]`.
    Workspace,
}

/// One dependency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dependency {
    pub(crate) table: Table,
    pub(crate) name: String,
    /// What stands right of the `=` (and, for `name.workspace = true`, the key too).
    pub(crate) spec: String,
}

/// A `Cargo.toml`.
#[derive(Debug, Default)]
pub(crate) struct Manifest {
    /// Path from the root.
    pub(crate) path: String,
    /// `package.name`; empty if there is no package.
    pub(crate) name: String,
    /// `workspace.package.version`.
    pub(crate) workspace_version: Option<String>,
    pub(crate) dependencies: Vec<Dependency>,
    /// Names of Cargo features that it declares.
    pub(crate) features: Vec<String>,
}

impl Manifest {
    /// Reads the manifest in `file`.
    pub(crate) fn parse(file: &File) -> Self {
        let mut manifest = Self { path: file.path.clone(), ..Self::default() };
        let mut section = String::new();
        for line in file.text.as_deref().unwrap_or_default().lines() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(header) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                section = header.trim_matches(['[', ']']).to_owned();
                // `[dependencies.name]` opens a table for one dependency.
                if let Some((table, name)) =
                    section.rsplit_once('.').filter(|(table, _)| table_of(table).is_some())
                {
                    manifest.add(table, name, String::new());
                }
                continue;
            }
            let Some((key, value)) = line.split_once('=') else { continue };
            manifest.set(&section, key.trim(), value.trim());
        }
        manifest
    }

    /// The folder that it lies in, with a trailing `/`; empty for the root.
    pub(crate) fn folder(&self) -> &str {
        self.path.strip_suffix("Cargo.toml").unwrap_or(&self.path)
    }

    fn set(&mut self, section: &str, key: &str, value: &str) {
        let plain = value.trim_matches('"').to_owned();
        match (section, key) {
            ("package", "name") => self.name = plain,
            ("workspace.package", "version") => self.workspace_version = Some(plain),
            ("features", feature) => self.features.push(feature.to_owned()),
            _ => {
                let (name, inner) = key.split_once('.').unwrap_or((key, ""));
                self.add(section, name, format!("{inner} = {value}"));
            }
        }
    }

    fn add(&mut self, section: &str, name: &str, spec: String) {
        if let Some(table) = table_of(section) {
            let name = name.trim_matches('"').to_owned();
            self.dependencies.push(Dependency { table, name, spec });
        }
    }
}

fn table_of(section: &str) -> Option<Table> {
    match section.rsplit('.').next()? {
        _ if section == "workspace.dependencies" => Some(Table::Workspace),
        "dependencies" | "build-dependencies" => Some(Table::Normal),
        "dev-dependencies" => Some(Table::Dev),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tree::file;
    use super::*;

    #[test]
    fn reads_every_way_to_name_a_dependency() {
        let text = "[package]\nname = \"spark-cpu\"\n\n[dependencies]\n# why\nhalf.workspace = true\nrayon = { workspace = true }\n\n[target.'cfg(unix)'.dependencies]\nlibc = \"0.2\"\n[dev-dependencies.proptest]\nworkspace = true\n[workspace.dependencies]\nbytes = \"1\"\n[features]\ncuda = []\n[workspace.package]\nversion = \"0.1.0\"\n";
        let manifest = Manifest::parse(&file("crates/cpu/Cargo.toml", text));
        let found: Vec<_> = manifest.dependencies.iter().map(|d| (d.table, d.name.as_str())).collect();
        assert_eq!(
            found,
            [
                (Table::Normal, "half"),
                (Table::Normal, "rayon"),
                (Table::Normal, "libc"),
                (Table::Dev, "proptest"),
                (Table::Workspace, "bytes")
            ]
        );
        assert!(manifest.dependencies[0].spec.contains("workspace"));
        assert_eq!(manifest.name, "spark-cpu");
        assert_eq!(manifest.folder(), "crates/cpu/");
        assert_eq!(manifest.features, ["cuda"]);
        assert_eq!(manifest.workspace_version.as_deref(), Some("0.1.0"));
    }
}
