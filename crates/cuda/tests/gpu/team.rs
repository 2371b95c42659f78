//! Ranks for tests: each is a process of this program that runs the same test, with its own GPU. The first process starts
//! them, passes on what they say, and ends them all when one fails. No tests here.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use spark_backend::Rank;
use spark_comm::nccl::{Group, Machine, Nccl, UniqueId, defaults};

const RANK: &str = "SPARK_TEST_RANK";
const ID: &str = "SPARK_TEST_ID";
/// What begins the lines that are meant for the first process.
const ID_LINE: &str = "the id of the group: ";
const RESULT_LINE: &str = "the result of the rank: ";
/// For the others to come.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs `body` as every rank of a group of `world`, in processes that run the test `name` (with its module). Fails unless all ranks
/// return the same.
pub(crate) fn in_ranks(name: &str, world: usize, body: impl FnOnce(&Group) -> String) {
    match std::env::var(RANK) {
        Ok(index) => {
            let rank = Rank::new(index.parse().unwrap(), world).unwrap();
            // On a line of its own: the harness has begun one.
            println!("\n{RESULT_LINE}{}", body(&group(rank)).replace('\n', " "));
        }
        Err(_) => start_all(name, world),
    }
}

fn group(rank: Rank) -> Group {
    let nccl = Nccl::open(false).unwrap();
    let id = match rank.is_first() {
        true => {
            let id = nccl.unique_id().unwrap();
            let hex: String = id.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            println!("\n{ID_LINE}{hex}");
            id
        }
        false => {
            let hex = std::env::var(ID).unwrap();
            let byte = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
            UniqueId::from(std::array::from_fn(byte))
        }
    };
    Group::new(&nccl, id, rank, TIMEOUT)
}

/// Waits until the first process says that rank 0 has ended, or is gone.
pub(crate) fn wait_for_the_first() {
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

fn spawn(name: &str, index: usize, id: Option<&str>) -> Child {
    let program: PathBuf = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.args(["--exact", name, "--nocapture", "--test-threads", "1"]);
    command.env(RANK, index.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
    // What the program would set at its start.
    for (name, value) in defaults(&Machine::default()) {
        if std::env::var_os(name).is_none() {
            command.env(name, value);
        }
    }
    if let Some(id) = id {
        command.env(ID, id);
    }
    command.spawn().unwrap()
}

/// What a rank says: a line, or that it says no more.
enum Said {
    Line(String),
    End,
}

fn listen(child: &mut Child, index: usize, said: mpsc::Sender<(usize, Said)>) {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let _ = said.send((index, Said::Line(line)));
        }
        let _ = said.send((index, Said::End));
    });
}

/// Ends the processes when the test ends, however that is.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start_all(name: &str, world: usize) {
    let (sender, said) = mpsc::channel();
    let mut ranks = Ranks(vec![spawn(name, 0, None)]);
    listen(&mut ranks.0[0], 0, sender.clone());
    let mut results = vec![None; world];
    let mut num_ended = 0;
    while num_ended < ranks.0.len() {
        let (index, what) = said.recv().unwrap();
        match what {
            Said::Line(line) => {
                if let Some(id) = line.strip_prefix(ID_LINE) {
                    for index in 1..world {
                        ranks.0.push(spawn(name, index, Some(id)));
                        listen(&mut ranks.0[index], index, sender.clone());
                    }
                } else if let Some(result) = line.strip_prefix(RESULT_LINE) {
                    results[index] = Some(result.to_owned());
                } else if !line.is_empty() {
                    println!("[{index}] {line}");
                }
            }
            Said::End => {
                num_ended += 1;
                let status = ranks.0[index].wait().unwrap();
                assert!(status.success(), "rank {index} of {world} failed: {status}");
                if index == 0 {
                    ranks.0.iter_mut().for_each(|child| drop(child.stdin.take()));
                }
            }
        }
    }
    let results: Vec<String> =
        results.into_iter().map(|result| result.expect("every rank has a result")).collect();
    assert!(results.iter().all(|result| *result == results[0]), "the ranks differ: {results:#?}");
}
