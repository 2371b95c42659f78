//! The other ranks as processes that this one starts: children on this machine, or commands on other machines. Knows nothing of
//! what they compute.

use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    os::unix::process::CommandExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc::channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use spark_engine::{StartRanks, comm::Stopper};

use super::copy::Node;
use crate::cli::{model_name, ssh};

/// What ranks may take to end by themselves, once rank 0 has told them or is gone.
const END_WITHIN: Duration = Duration::from_secs(5);

/// What another machine's shell does: takes the secret from its input, goes to the folder of this process if it is there, and
/// becomes the rank.
const REMOTE: &str =
    "IFS= read -r SPARK_TOKEN; export SPARK_TOKEN; cd \"$1\" 2>/dev/null; shift; exec \"$@\"";

/// Value of SPARK_PARENT for a rank on another machine: it ends when its standard input does.
pub(super) const PARENT_IS_INPUT: &str = "input";

/// One of the other ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Other {
    pub(super) rank: usize,
    /// Where it runs; `None` is here.
    pub(super) node: Option<String>,
    pub(super) local_rank: usize,
    pub(super) local_world: usize,
}

/// The other ranks of a group whose rank 0 is this process. They end with it.
pub(super) struct Processes {
    others: Vec<Other>,
    /// The other machines.
    nodes: Vec<Node>,
    world: usize,
    token: String,
    /// Ends rank 0's waiting when a rank ends before it has joined.
    stopper: Stopper,
    /// Variables that go to other machines.
    passed_on: Vec<(String, String)>,
    running: Arc<Running>,
}

#[derive(Default)]
struct Running {
    children: Mutex<Vec<Process>>,
    /// One has ended.
    changed: Condvar,
}

struct Process {
    child: Child,
    /// Its output has ended, and so has it, or it is about to.
    is_over: bool,
}

impl Processes {
    pub(super) fn new(
        others: Vec<Other>,
        nodes: Vec<Node>,
        world: usize,
        token: String,
        stopper: Stopper,
    ) -> Self {
        let is_ours = |name: &str| {
            name.starts_with("NCCL_")
                || ["HF_HOME", "HF_HUB_CACHE", "SPARK_CONFIG", "SPARK_KERNEL_DIR", "SPARK_NCCL"]
                    .contains(&name)
        };
        let passed_on = std::env::vars().filter(|(name, _)| is_ours(name)).collect();
        Self { others, nodes, world, token, stopper, passed_on, running: Arc::default() }
    }

    /// Variables that tell a process which rank it is.
    fn variables(&self, other: &Other, leader: SocketAddr) -> Vec<(String, String)> {
        let mut variables = vec![
            ("SPARK_RANK".to_owned(), other.rank.to_string()),
            ("SPARK_WORLD".to_owned(), self.world.to_string()),
            ("SPARK_LOCAL_RANK".to_owned(), other.local_rank.to_string()),
            ("SPARK_LOCAL_WORLD".to_owned(), other.local_world.to_string()),
            ("SPARK_LEADER".to_owned(), leader.to_string()),
        ];
        if other.node.is_some() {
            variables.extend(self.passed_on.iter().cloned());
        }
        let parent = other
            .node
            .as_ref()
            .map_or_else(|| std::process::id().to_string(), |_| PARENT_IS_INPUT.to_owned());
        variables.push(("SPARK_PARENT".to_owned(), parent));
        variables
    }

    /// The command that runs a rank, and what it reads.
    fn command(&self, other: &Other, leader: SocketAddr) -> anyhow::Result<(Command, Option<String>)> {
        let mut variables = self.variables(other, leader);
        let Some(node) = &other.node else {
            let program = std::env::current_exe().context("finding this program's own file")?;
            let mut command = Command::new(program);
            command.args(std::env::args_os().skip(1)).envs(variables).env("SPARK_TOKEN", &self.token);
            // Ctrl-C is for rank 0, which tells the others what to do.
            command.stdin(Stdio::null()).process_group(0);
            return Ok((command, None));
        };
        let there = self.nodes.iter().find(|there| there.name == *node);
        let there = there.with_context(|| format!("{node} was not looked at"))?;
        if let Some(model) = &there.model {
            variables.push((model_name::OF_RANK.to_owned(), model.clone()));
        }
        let folder = std::env::current_dir().context("finding the current folder")?;
        let mut remote = ["sh", "-c", REMOTE, "sh"].map(str::to_owned).to_vec();
        remote.extend([utf8(folder.as_os_str())?, "env".into()]);
        remote.extend(variables.iter().map(|(name, value)| format!("{name}={value}")));
        remote.push(there.program.clone());
        for argument in std::env::args_os().skip(1) {
            remote.push(utf8(&argument)?);
        }
        let words: Vec<&str> = remote.iter().map(String::as_str).collect();
        let mut command = ssh::command(node, &words);
        command.stdin(Stdio::piped()).process_group(0);
        // The secret is in no process list.
        Ok((command, Some(format!("{}\n", self.token))))
    }

    /// Starts a rank, follows its messages, and reports its end: all in one thread, because a child on this machine ends when
    /// the thread that started it does.
    fn run(&self, other: &Other, leader: SocketAddr) -> anyhow::Result<()> {
        let (mut command, input) = self.command(other, leader)?;
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let (rank, running, stopper) = (other.rank, self.running.clone(), self.stopper.clone());
        let place = other.node.as_ref().map_or(String::new(), |node| format!(" on {node}"));
        let (started, start) = channel();
        thread::Builder::new().name(format!("rank {rank}")).spawn(move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => return drop(started.send(Err(error))),
            };
            if let (Some(stdin), Some(input)) = (&mut child.stdin, input) {
                // A command that does not read it ends, which is reported.
                let _ = stdin.write_all(input.as_bytes());
            }
            let (pid, stderr) = (child.id(), child.stderr.take());
            lock(&running.children).push(Process { child, is_over: false });
            // Whoever waits for it does so in the function that started this thread.
            let _ = started.send(Ok(()));
            for line in stderr.into_iter().flat_map(|stderr| BufReader::new(stderr).split(b'\n')) {
                let Ok(line) = line else { break };
                // Messages that nobody reads are no reason to end.
                let line = labelled(rank, &String::from_utf8_lossy(&line));
                let _ = writeln!(std::io::stderr().lock(), "{line}");
            }
            running.wait_for(pid, |status| {
                if !status.success() {
                    stopper.stop(format!("rank {rank}{place} has ended ({status}){}", hint(status)));
                }
            });
        })?;
        start
            .recv()
            .context("the thread that starts a rank has ended")?
            .with_context(|| format!("starting rank {rank}"))
    }
}

/// A message of another rank: its number in front, or as a field of a message in JSON (`--log-json`).
fn labelled(rank: usize, line: &str) -> String {
    match line.strip_prefix("{\"") {
        Some(fields) => format!("{{\"rank\":{rank},\"{fields}"),
        None => format!("[rank {rank}] {line}"),
    }
}

/// What a shell or ssh means by its exit code.
fn hint(status: ExitStatus) -> &'static str {
    match status.code() {
        Some(127) => ": the program is not there any more",
        Some(255) => ": ssh could not log in; it must not ask for a password",
        _ => "; its messages are above",
    }
}

impl StartRanks for Processes {
    fn start(&self, leader: SocketAddr) -> std::io::Result<()> {
        self.running.end_all(Duration::ZERO);
        self.stopper.reset();
        for other in &self.others {
            self.run(other, leader).map_err(std::io::Error::other)?;
        }
        Ok(())
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.running.end_all(END_WITHIN);
    }
}

impl Running {
    /// Waits for the end of a rank whose output has ended, and tells `ended` of it if it was not ended from here: before ranks can be
    /// started again, whose start would be stopped by the end of an earlier one.
    fn wait_for(&self, pid: u32, ended: impl FnOnce(ExitStatus)) {
        let mut children = lock(&self.children);
        let Some(process) = children.iter_mut().find(|process| process.child.id() == pid) else { return };
        process.is_over = true;
        if let Ok(status) = process.child.wait() {
            ended(status);
        }
        drop(children);
        self.changed.notify_all();
    }

    /// Waits for the end of all ranks; those that run on after `patience` are killed, stopped ones, too.
    fn end_all(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let mut children = lock(&self.children);
        while children.iter().any(|process| !process.is_over) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            children = self.changed.wait_timeout(children, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        for mut process in children.drain(..) {
            // It may have ended meanwhile.
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
    }
}

fn utf8(word: &std::ffi::OsStr) -> anyhow::Result<String> {
    let text =
        word.to_str().with_context(|| format!("{word:?} is not UTF-8, so no other machine can be told"))?;
    Ok(text.to_owned())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_rank_is_told_before_ranks_are_started_again() {
        let running = Running::default();
        let child = Command::new("sh").args(["-c", "exit 3"]).spawn().unwrap();
        let pid = child.id();
        lock(&running.children).push(Process { child, is_over: false });
        let mut told = None;
        running.wait_for(pid, |status| {
            assert!(running.children.try_lock().is_err(), "a start would go on without having heard of it");
            told = status.code();
        });
        assert_eq!(told, Some(3));
        running.end_all(Duration::ZERO);
        running.wait_for(pid, |_| panic!("it was ended from here"));
    }

    #[test]
    fn messages_say_whose_they_are_and_stay_json() {
        assert_eq!(labelled(1, "INFO ready"), "[rank 1] INFO ready");
        assert_eq!(labelled(2, "{}"), "[rank 2] {}");
        let line = labelled(3, r#"{"level":"INFO","fields":{"message":"ready"}}"#);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&value["rank"], &value["level"]), (&3.into(), &"INFO".into()));
    }
}
