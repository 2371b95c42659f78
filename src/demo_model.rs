//! Where the demo model is: the one that commands use when none is named. Looks at paths; opens no checkpoint.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Name of the demo model.
pub const DEMO_MODEL: &str = "spark-tiny-vl";
/// Folder of its 4-bit checkpoint, in the folder of the model.
const FORMAT: &str = "awq";
/// How far above a program the root of its source tree can be: `target/TRIPLE/debug/deps`.
const TREE_LEVELS: usize = 4;

/// The folder of the demo model's AWQ checkpoint: beside the program (`models/spark-tiny-vl/awq`), where packages put it
/// (`../share/spark-engine/spark-tiny-vl/awq`), or in the source tree that the program was built in.
///
/// # Errors
/// [`Error::NoDemoModel`] with the places that were looked at.
pub fn find_demo_model() -> Result<PathBuf> {
    let program = std::env::current_exe().ok().and_then(|path| path.canonicalize().ok());
    find_from(program.as_deref())
}

/// The search for a program at `program`.
fn find_from(program: Option<&Path>) -> Result<PathBuf> {
    let places = program.map(places).unwrap_or_default();
    match places.iter().find(|place| place.join("config.json").is_file()) {
        Some(place) => Ok(place.clone()),
        None => Err(Error::NoDemoModel { places }),
    }
}

/// All places, the nearest first.
fn places(program: &Path) -> Vec<PathBuf> {
    let Some(folder) = program.parent() else { return Vec::new() };
    let in_models = Path::new("models").join(DEMO_MODEL).join(FORMAT);
    let in_share = Path::new("share/spark-engine").join(DEMO_MODEL).join(FORMAT);
    let mut places = vec![folder.join(&in_models)];
    places.extend(folder.parent().map(|prefix| prefix.join(in_share)));
    places.extend(folder.ancestors().skip(1).take(TREE_LEVELS).map(|ancestor| ancestor.join(&in_models)));
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a folder that looks like a checkpoint.
    fn checkpoint(root: &Path, folder: &str) -> PathBuf {
        let folder = root.join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("config.json"), "{}").unwrap();
        folder
    }

    #[test]
    fn the_nearest_place_wins() {
        let root = tempfile::tempdir().unwrap();
        let program = root.path().join("target/release/spark-engine");
        assert!(find_from(Some(&program)).is_err());
        for place in [
            "models/spark-tiny-vl/awq",
            "target/models/spark-tiny-vl/awq",
            "target/share/spark-engine/spark-tiny-vl/awq",
            "target/release/models/spark-tiny-vl/awq",
        ] {
            let folder = checkpoint(root.path(), place);
            assert_eq!(find_from(Some(&program)).unwrap(), folder, "it is before those further away");
        }
    }

    #[test]
    fn a_test_program_finds_the_source_tree_too() {
        let root = tempfile::tempdir().unwrap();
        let folder = checkpoint(root.path(), "models/spark-tiny-vl/awq");
        assert_eq!(find_from(Some(&root.path().join("target/debug/deps/integration-1"))).unwrap(), folder);
        assert_eq!(
            find_from(Some(&root.path().join("target/aarch64/release/spark-engine"))).unwrap(),
            folder
        );
    }

    #[test]
    fn a_folder_without_a_configuration_is_no_model() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("bin/models/spark-tiny-vl/awq")).unwrap();
        let message = find_from(Some(&root.path().join("bin/spark-engine"))).unwrap_err().to_string();
        assert!(message.contains("bin/models/spark-tiny-vl/awq"), "{message}");
        assert!(message.contains("share/spark-engine/spark-tiny-vl/awq"), "{message}");
        assert!(message.contains("SPARK_MODEL"), "it says what to do: {message}");
        assert!(find_from(None).is_err());
    }
}
