//! What another machine needs before a rank can be started on it: this very program, and with `--copy-model` the files of the model.
//! What is there already is not sent. The other side is `cli/agent`.

use std::{
    fs::File,
    io::Read,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Output, Stdio},
    sync::mpsc::{Receiver, sync_channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use spark_engine::comm::{Leader, Listener};

use crate::cli::{
    agent::{self, Agent, Bytes, FileOf, Held, Packet, Request, Wanted, hello},
    progress::ByteBar,
    ssh,
};

/// Says which machine it is, and where the program with hash $2 is: in the same place as here ($1), or where an earlier start put it.
const FIND: &str = r#"uname -m
for p in "$1" "$HOME/.cache/spark-engine/bin/$2/spark-engine"; do
    if [ -x "$p" ] && [ "$("$p" agent --hash </dev/null 2>/dev/null)" = "$2" ]; then echo "$p"; exit; fi
done
echo missing"#;

/// Takes the program with hash $1 from its input. It gets its name when it says itself that it is whole.
const TAKE: &str = r#"set -e
d="$HOME/.cache/spark-engine/bin/$1"
mkdir -p "$d"
cat >"$d/.new.$$"
chmod 755 "$d/.new.$$"
if [ "$("$d/.new.$$" agent --hash </dev/null)" = "$1" ]; then mv "$d/.new.$$" "$d/spark-engine"; echo "$d/spark-engine"
else rm -f "$d/.new.$$"; echo "the copied program does not run or is not whole" >&2; exit 1; fi"#;

/// Bytes of a file that are sent at once.
const PIECE: usize = 4 << 20;
/// Pieces that are read ahead.
const AHEAD: usize = 4;
/// How long the other machine may take to come for its files.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A machine that ranks can be started on.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) name: String,
    /// Where the program is there.
    pub(super) program: String,
    /// Where the model is there, if it was looked for.
    pub(super) model: Option<String>,
}

/// Makes sure that all of `names` have this program, and the model in `folder` if there is one; `interface` is this machine's
/// address on the network between them.
///
/// # Errors
/// A machine that cannot be reached or runs other programs, a full disk, a lost connection: with its name.
pub(super) fn prepare(
    names: &[String],
    folder: Option<&Path>,
    interface: IpAddr,
) -> anyhow::Result<Vec<Node>> {
    let (path, hash) =
        (std::env::current_exe().context("finding this program's own file")?, agent::program_hash()?);
    let find = |name: &String| program(name, &path, &hash);
    let programs: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = names.iter().map(|name| scope.spawn(move || find(name))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("looking for a program does not panic"))
            .collect()
    });
    let mut nodes = Vec::new();
    for (name, program) in names.iter().zip(programs) {
        let program = program?;
        let model = folder.map(|folder| model(name, &program, folder, interface)).transpose()?;
        nodes.push(Node { name: name.clone(), program, model });
    }
    Ok(nodes)
}

/// Where `node` has the program with `hash`, which is at `path` here; copies it if it has none.
fn program(node: &str, path: &Path, hash: &str) -> anyhow::Result<String> {
    let here = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    let answer =
        said(node, ssh::command(node, &["sh", "-c", FIND, "sh", here, hash]).stdin(Stdio::null()).output())?;
    let mut lines = answer.lines();
    let (arch, found) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    if found != "missing" {
        ensure!(!found.is_empty(), "{node}: an answer that is none: {answer:?}");
        return Ok(found.to_owned());
    }
    let ours = std::env::consts::ARCH;
    ensure!(
        arch == ours,
        "{node} is {arch}, and this program is built for {ours}: all ranks run the same program, so all machines must be of one kind"
    );
    let begin = Instant::now();
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let bytes = file.metadata()?.len();
    let copied = said(node, ssh::command(node, &["sh", "-c", TAKE, "sh", hash]).stdin(file).output())
        .with_context(|| format!("copying this program to {node}"))?;
    let seconds = begin.elapsed().as_secs_f64();
    tracing::info!(
        "copied this program to {node} ({} MB in {seconds:.1} s): {}",
        bytes / 1_000_000,
        copied.trim()
    );
    Ok(copied.trim().to_owned())
}

/// What a command on `node` printed.
fn said(node: &str, output: std::io::Result<Output>) -> anyhow::Result<String> {
    let output = output.context("ssh cannot be started")?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let last = stderr.lines().last().unwrap_or("it said nothing").to_owned();
    match output.status.code() {
        Some(255) => bail!("--nodes {node}: {last} (ssh could not log in; it must not ask for a password)"),
        _ => bail!("--nodes {node}: {last}"),
    }
}

/// Where `node` has the model that is in `folder` here; sends what it lacks.
fn model(node: &str, program: &str, folder: &Path, interface: IpAddr) -> anyhow::Result<String> {
    let folder = folder.canonicalize().with_context(|| folder.display().to_string())?;
    let files = FileOf::all(&folder)?;
    let path = folder.to_str().with_context(|| format!("{} is not UTF-8", folder.display()))?.to_owned();
    let last = folder.file_name().map_or("model".into(), |name| name.to_string_lossy());
    let name = format!("{last}-{}", &blake3::hash(path.as_bytes()).to_hex()[..8]);
    let mut agent = Agent::start(node, program, None, &[])?;
    let wanted = Wanted { folder: path, name, files: files.clone() };
    let held: Held = agent.ask(&Request::Look(wanted))?;
    let missing: Vec<&FileOf> = files.iter().filter(|file| held.missing.contains(&file.name)).collect();
    if missing.is_empty() {
        tracing::info!("{node} has the model in {}", held.folder);
        return Ok(held.folder);
    }
    let total: u64 = missing.iter().map(|file| file.bytes).sum();
    if let Some(free) = held.free_bytes {
        ensure!(
            free > total,
            "{node}: {} has {:.1} GB free, and {:.1} GB are missing there of the model",
            held.folder,
            free as f64 / 1e9,
            total as f64 / 1e9
        );
    }
    let begin = Instant::now();
    send(&mut agent, &folder, &held.folder, &missing, interface)
        .with_context(|| format!("sending the model to {node}"))?;
    let rate = total as f64 / begin.elapsed().as_secs_f64() / 1e9;
    tracing::info!(
        "sent {} of {} files ({:.3} GB) to {node} at {rate:.2} GB/s: {}",
        missing.len(),
        files.len(),
        total as f64 / 1e9,
        held.folder
    );
    Ok(held.folder)
}

/// Over a connection of our own on the network between the machines, not through ssh.
fn send(
    agent: &mut Agent,
    from: &Path,
    to: &str,
    files: &[&FileOf],
    interface: IpAddr,
) -> anyhow::Result<()> {
    let token = super::random_token()?;
    let listener = Listener::bind(SocketAddr::new(interface, 0))?;
    agent.send(&Request::Receive {
        folder: to.to_owned(),
        leader: listener.local_addr(),
        token: token.clone(),
        num_files: files.len(),
    })?;
    let mut team = listener.gather(2, &hello(token), TIMEOUT, &mut |_| ())?;
    let bar = ByteBar::new("copying");
    let (total, mut sent) = (files.iter().map(|file| file.bytes).sum(), 0);
    for file in files {
        let mut progress = |bytes: usize| {
            sent += bytes as u64;
            bar.update(sent, total);
        };
        send_file(&mut team, &from.join(&file.name), &file.name, &mut progress)?;
    }
    bar.finish();
    let _: usize = agent.receive()?;
    Ok(())
}

fn send_file(
    team: &mut Leader,
    path: &Path,
    name: &str,
    progress: &mut dyn FnMut(usize),
) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    team.send_bulk(&Packet::Begin { name: name.to_owned() })?;
    // Reading and hashing on one thread, sending on this one.
    let hash = thread::scope(|scope| -> anyhow::Result<_> {
        let (pieces, read) = sync_channel(AHEAD);
        let reader = scope.spawn(move || read_pieces(file, &|piece| pieces.send(piece).is_ok()));
        send_pieces(team, read, progress)?;
        let hash = reader.join().expect("reading a file does not panic");
        hash.with_context(|| path.display().to_string())
    })?;
    team.send_bulk(&Packet::End(*hash.as_bytes()))?;
    let mut answers: Vec<Result<(), String>> = team.gather("that the file is whole")?;
    answers.pop().unwrap_or(Ok(())).map_err(|problem| anyhow::anyhow!("{problem}"))
}

fn send_pieces(
    team: &mut Leader,
    pieces: Receiver<Vec<u8>>,
    progress: &mut dyn FnMut(usize),
) -> anyhow::Result<()> {
    for piece in pieces {
        let length = piece.len();
        team.send_bulk(&Packet::Bytes(Bytes(piece)))?;
        progress(length);
    }
    Ok(())
}

/// Gives the file away piece by piece, as long as `give` takes them; returns the hash of all of it.
fn read_pieces(mut file: File, give: &dyn Fn(Vec<u8>) -> bool) -> std::io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        file.by_ref().take(PIECE as u64).read_to_end(&mut piece)?;
        if piece.is_empty() {
            return Ok(hasher.finalize());
        }
        hasher.update(&piece);
        if !give(piece) {
            // The connection is gone; the sender says so.
            return Ok(hasher.finalize());
        }
    }
}
