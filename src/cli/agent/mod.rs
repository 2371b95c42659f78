//! This program on another machine, started over ssh for the length of a question: what `doctor` asks there and what `--nodes`
//! brings there. One request a line on its standard input, one answer a line on its output, both JSON; it ends with its input.
//!
//! Requests carry secrets and names of folders, so the pipe of ssh is the only way in. Never a rank: it computes nothing for a model.

mod files;
mod reach;
mod sums;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, SocketAddr},
    process::{Child, ChildStdin, ChildStdout, Stdio},
};

use anyhow::{Context, bail};
use clap::Args;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub(crate) use files::{Bytes, FileOf, Held, Packet, Wanted, hello};
pub(crate) use reach::{Reached, Target};
pub(crate) use sums::{Sums, Times};

use super::ssh;

/// Work for another machine of `--nodes`; started by this program over ssh.
#[derive(Args)]
pub(crate) struct AgentArgs {
    /// Print the hash of this program and end.
    #[arg(long)]
    hash: bool,
    /// Where another node is reached: decides which network NCCL takes.
    #[arg(long, value_name = "ADDRESS")]
    peer: Option<IpAddr>,
}

/// What an agent does.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Echoes at these addresses of its machine until it ends. Answer: a port for each, or why not.
    Listen { addresses: Vec<IpAddr> },
    /// Goes to the echoes of other machines. Answer: a [`Reached`] for each.
    Reach { targets: Vec<Target> },
    /// Adds with other machines. Answers: where it listens (rank 0 only), then [`Times`].
    Sums(Sums),
    /// Looks for a model. Answer: [`Held`].
    Look(Wanted),
    /// Joins a group of two at `leader` and writes the files that come to `folder`. Answer: how many.
    Receive { folder: String, leader: SocketAddr, token: String, num_files: usize },
}

/// What is printed for a request.
type Answer<T> = Result<T, String>;

/// An agent on another machine. It ends when this is dropped.
pub(crate) struct Agent {
    node: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Agent {
    /// Starts `program` on `node`, with variables in its environment.
    ///
    /// # Errors
    /// ssh cannot be started. That it could not log in shows at the first answer.
    pub(crate) fn start(
        node: &str,
        program: &str,
        peer: Option<IpAddr>,
        variables: &[(&str, String)],
    ) -> anyhow::Result<Self> {
        let variables: Vec<String> =
            variables.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let peer = peer.map(|peer| format!("--peer={peer}"));
        let mut words = vec!["env"];
        words.extend(variables.iter().map(String::as_str));
        words.extend([program, "agent", "--log-level=warn"]);
        words.extend(peer.as_deref());
        let mut command = ssh::command(node, &words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("ssh cannot be started")?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("ssh was started without pipes");
        };
        Ok(Self { node: node.to_owned(), child, input, output: BufReader::new(output) })
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The agent has ended.
    pub(crate) fn send(&mut self, request: &Request) -> anyhow::Result<()> {
        let line = format!("{}\n", serde_json::to_string(request)?);
        let sent = self.input.write_all(line.as_bytes());
        sent.map_err(|_| self.ended())
    }

    /// Waits for the next answer.
    ///
    /// # Errors
    /// What the agent says went wrong, or that it has ended.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let mut line = String::new();
        // NCCL, too, writes to the output when it is told to say what it does.
        while !line.starts_with('{') {
            line.clear();
            if self.output.read_line(&mut line).unwrap_or(0) == 0 {
                return Err(self.ended());
            }
        }
        let answer: Answer<T> = serde_json::from_str(&line)
            .with_context(|| format!("{}: an answer that this version does not know", self.node))?;
        answer.map_err(|problem| anyhow::anyhow!("{}: {problem}", self.node))
    }

    /// [`send`](Self::send), then [`receive`](Self::receive).
    ///
    /// # Errors
    /// Theirs.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> anyhow::Result<T> {
        self.send(request)?;
        self.receive()
    }

    fn ended(&mut self) -> anyhow::Error {
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            // Whatever could be read is shown.
            let _ = stderr.read_to_string(&mut said);
        }
        let last = said.lines().last().unwrap_or("it said nothing");
        anyhow::anyhow!("{}: the program there has ended: {last}", self.node)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It ends with its input, too; this also ends one that waits for others.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl AgentArgs {
    /// Settings that must be made while the process has one thread.
    pub(crate) fn prepare(&self) {
        if let Some(peer) = self.peer {
            spark_engine::comm::nccl::prepare_environment(Some(peer));
        }
    }
}

/// Hash of the running program, in hexadecimal digits.
///
/// # Errors
/// Its file cannot be read.
pub(crate) fn program_hash() -> anyhow::Result<String> {
    Ok(hex(spark_engine::fingerprint::program().context("reading this program's own file")?))
}

pub(crate) fn hex(hash: [u8; 32]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Answers requests until the input ends.
pub(crate) fn run(args: &AgentArgs) -> anyhow::Result<()> {
    if args.hash {
        print(&program_hash()?)?;
        return Ok(());
    }
    for line in std::io::stdin().lock().lines() {
        let line = line.context("reading a request")?;
        let request = serde_json::from_str(&line).context("a request that this version does not know")?;
        match request {
            Request::Listen { addresses } => answer(&Ok(reach::listen(&addresses)))?,
            Request::Reach { targets } => answer(&Ok(reach::reach(&targets)))?,
            Request::Sums(sums) => {
                let times = sums.measure(&mut |address| answer(&Ok(address)));
                answer(&times.map_err(|error| format!("{error:#}")))?;
            }
            Request::Look(wanted) => answer(&wanted.look().map_err(|error| format!("{error:#}")))?,
            Request::Receive { folder, leader, token, num_files } => {
                let received = files::receive(&folder, leader, token, num_files);
                answer(&received.map_err(|error| format!("{error:#}")))?;
            }
        }
    }
    Ok(())
}

fn answer<T: Serialize>(answer: &Answer<T>) -> anyhow::Result<()> {
    print(&serde_json::to_string(answer)?)
}

fn print(line: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    Ok(stdout.flush()?)
}
