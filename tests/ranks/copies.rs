//! Machines that have neither this program nor the model where rank 0 has them: both are sent, once, and what differs again.

use std::{fs, path::PathBuf};

use spark_testing::{Network, model_dir};
use tempfile::TempDir;

use super::{CPU, fake_ssh, folder};
use crate::{
    server::{MODEL, check_canaries},
    support::server::{Server, program, program_in},
};

/// A second machine: another home, and neither the folder of this program nor that of the models.
struct Bare {
    network: Network,
    home: TempDir,
    ssh: String,
    names: String,
    _scripts: TempDir,
}

impl Bare {
    fn new() -> Self {
        let network = Network::new(2, 1).unwrap();
        let (home, scripts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let program = PathBuf::from(env!("CARGO_BIN_EXE_spark-engine"));
        let hidden = [program.parent().unwrap().to_owned(), model_dir(MODEL).parent().unwrap().to_owned()];
        let mounts = hidden.map(|folder| format!("mount -t tmpfs -o ro none {}", folder.display()));
        let first = format!("{}\nexport HOME={}", mounts.join("\n"), home.path().display());
        let ssh = network.ssh(scripts.path(), &first).unwrap().display().to_string();
        Self { names: network.addresses(), network, home, ssh, _scripts: scripts }
    }

    fn serve(&self) -> Server {
        let arguments = [&CPU[..], &["--nodes", &self.names, "--copy-model"]].concat();
        let server =
            Server::serve_in(&self.network, Some(&model_dir(MODEL)), &arguments, &[("SPARK_SSH", &self.ssh)]);
        check_canaries(&server);
        server
    }

    /// The one folder below this folder of the machine's home.
    fn only(&self, below: &str) -> PathBuf {
        let below = self.home.path().join(".cache/spark-engine").join(below);
        let entries: Vec<PathBuf> =
            fs::read_dir(&below).unwrap().map(|entry| entry.unwrap().path()).collect();
        let [only] = &entries[..] else { panic!("one in {}: {entries:?}", below.display()) };
        only.clone()
    }
}

#[test]
fn program_and_model_are_sent_where_they_are_missing_and_only_there() {
    let bare = Bare::new();
    let log = bare.serve().wait_for_log("listening on");
    let files: Vec<String> = fs::read_dir(model_dir(MODEL))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(log.contains("copied this program to"), "{log}");
    assert!(log.contains(&format!("sent {0} of {0} files", files.len())), "{log}");
    let there = bare.only("models");
    for name in &files {
        assert_eq!(
            fs::read(there.join(name)).unwrap(),
            fs::read(model_dir(MODEL).join(name)).unwrap(),
            "{name}"
        );
    }
    assert!(bare.only("bin").join("spark-engine").is_file());

    // An interrupted copy, and one that was changed.
    let weights = files.iter().find(|name| name.ends_with(".safetensors")).unwrap();
    fs::rename(there.join(weights), there.join(format!(".{weights}.unfinished"))).unwrap();
    fs::write(there.join("config.json"), "{}").unwrap();
    let log = bare.serve().wait_for_log("listening on");
    assert!(log.contains(&format!("sent 2 of {} files", files.len())), "{log}");
    assert!(!log.contains("copied this program"), "{log}");
    assert_eq!(
        fs::read(there.join("config.json")).unwrap(),
        fs::read(model_dir(MODEL).join("config.json")).unwrap()
    );

    let log = bare.serve().wait_for_log("listening on");
    assert!(log.contains("has the model in") && !log.contains(" files ("), "{log}");
}

#[test]
fn a_model_that_is_missing_is_named_by_the_rank_that_misses_it() {
    let bare = Bare::new();
    let mut command =
        program_in(&bare.network, 0, &["generate", &folder(MODEL), "Hi", "--nodes", &bare.names]);
    let output = command.args(CPU).env("SPARK_SSH", &bare.ssh).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let said = text.lines().find(|line| line.starts_with("[rank 1]") && line.contains(MODEL));
    assert!(said.is_some() && text.contains("rank 1 on"), "{text}");
}

#[test]
fn a_machine_of_another_kind_is_refused_before_anything_is_sent() {
    let scripts = tempfile::tempdir().unwrap();
    let ssh = fake_ssh(&scripts, "echo riscv64; echo missing");
    let mut command = program(&["serve", &folder(MODEL), "--port", "0", "--nodes", "127.0.0.1,other"]);
    let output = command.args(CPU).env("SPARK_SSH", ssh).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("other is riscv64") && text.contains("built for"), "{text}");
}
