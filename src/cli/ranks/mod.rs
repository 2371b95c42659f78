//! Flags about ranks: how many, where, and which one this process is. Starts the others where nobody else has; a process that
//! is not rank 0 is told here to follow.

mod copy;
mod environment;
mod processes;

use std::{
    net::{SocketAddr, ToSocketAddrs},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::Args;
use spark_backend::Error as BackendError;
use spark_engine::{
    EngineBuilder, Error, MoeParallel, Rank, Ranks, Role, StartRanks,
    comm::{self, Listener, LossReason, Monitor, nccl},
};
use spark_models::Error as ModelError;
use spark_runtime::Error as RuntimeError;
use spark_weights::Error as WeightsError;

use super::{sharing::SharingArgs, signals::Signals};
use environment::{DEFAULT_PORT, launched};
use processes::{Other, Processes};

/// Exit code of a rank whose group is lost.
pub(crate) const PEER_LOST: i32 = 6;

/// Exit code when the device has failed in a way that only a new process gets out of.
pub(crate) const DEVICE_FAILED: i32 = 42;

/// As shells count: a process that ended by SIGTERM has the exit code 128 + 15.
const SIGTERM: i32 = 15;

/// What a rank may take to end by itself once its group is lost.
const END_WITHIN: Duration = Duration::from_secs(1);

/// `--step-timeout` of a group, in seconds: far above the longest prefill.
const STEP_TIMEOUT: u64 = 300;

/// Which ranks there are.
#[derive(Args)]
#[command(next_help_heading = "Ranks")]
pub(crate) struct RankArgs {
    /// Ranks of tensor parallelism: processes that each hold a share of the model. Those that no launcher has started are
    /// started here: on the GPUs of this machine, on its CPU, or on --nodes.
    #[arg(long, visible_alias = "tp", value_name = "N")]
    tensor_parallel_size: Option<usize>,
    #[command(flatten)]
    sharing: SharingArgs,
    /// Machines to start ranks on by ssh, this one first, by the names under which they reach each other. Where this program is
    /// missing or another one, it is copied to ~/.cache/spark-engine/bin. The model must be there under the same name, unless
    /// --copy-model.
    #[arg(long, value_delimiter = ',', value_name = "HOST,...")]
    nodes: Vec<String>,
    /// Send the other --nodes the files of the model that they lack or have differently, to the same folder or, where that
    /// cannot be, to ~/.cache/spark-engine/models.
    #[arg(long, requires = "nodes")]
    copy_model: bool,
    /// Number of this rank, where ranks are started one by one; torchrun, mpirun, srun and a LeaderWorkerSet say it themselves.
    #[arg(long, env = "SPARK_RANK", value_name = "N")]
    rank: Option<usize>,
    /// Ranks in all, with --rank.
    #[arg(long, env = "SPARK_WORLD", value_name = "N")]
    world: Option<usize>,
    /// Where rank 0 listens for the others: an address of the network between them.
    #[arg(long, env = "SPARK_LEADER", value_name = "HOST[:PORT]")]
    leader: Option<String>,
    /// Secret that all ranks know; rank 0 makes one for ranks that it starts itself.
    #[arg(long, env = "SPARK_TOKEN", value_name = "SECRET", hide_env_values = true)]
    token: Option<String>,
    #[arg(long, env = "SPARK_LOCAL_RANK", hide = true)]
    local_rank: Option<usize>,
    #[arg(long, env = "SPARK_LOCAL_WORLD", hide = true)]
    local_world: Option<usize>,
    /// How long ranks wait for each other at the start, in seconds.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    join_timeout: u64,
    /// How long rank 0 waits for ranks that were lost; 0 ends it with them.
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    rejoin_timeout: u64,
    /// How long a step may take before a rank or the device counts as hung, in seconds; 0 is for ever. By default 300 with
    /// several ranks.
    #[arg(long, value_name = "SECONDS")]
    step_timeout: Option<u64>,
    /// Use an NCCL that is known to hang on this kind of machine.
    #[arg(long)]
    allow_old_nccl: bool,
}

/// What the flags and the environment say.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// The only rank.
    Alone,
    /// Rank 0, which starts the others.
    Start { world: usize, others: Vec<Other>, host: String },
    /// A rank that was started as one.
    Started { rank: usize, world: usize, local_rank: usize, local_world: usize, leader: String },
}

impl RankArgs {
    /// Whether this process is one that follows rank 0.
    ///
    /// # Errors
    /// Flags that contradict each other or the environment.
    pub(crate) fn is_follower(&self) -> anyhow::Result<bool> {
        Ok(matches!(self.place()?, Place::Started { rank: 1.., .. }))
    }

    /// For what runs on one rank only: `what`, for people.
    ///
    /// # Errors
    /// As for [`is_follower`](Self::is_follower), and when there is more than one rank.
    pub(crate) fn ensure_alone(&self, what: &str) -> anyhow::Result<()> {
        let is_alone = self.place()? == Place::Alone;
        ensure!(is_alone, "--tensor-parallel-size: {what} measures one rank; leave one of them out");
        Ok(())
    }

    /// Settings that must be made while the process has one thread.
    ///
    /// # Errors
    /// As for [`is_follower`](Self::is_follower).
    pub(crate) fn prepare(&self) -> anyhow::Result<()> {
        let peer = match self.place()? {
            Place::Alone => return Ok(()),
            Place::Start { others, .. } => others.iter().find_map(|other| other.node.clone()),
            Place::Started { world, local_world, leader, .. } => (world > local_world).then_some(leader),
        };
        // A name that only ssh knows tells nothing about networks.
        let peer = peer.and_then(|peer| resolve("--nodes", &peer).ok()).map(|address| address.ip());
        let settings = nccl::prepare_environment(peer);
        tracing::debug!("NCCL: {settings}");
        settings.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        Ok(())
    }

    /// Gives `builder` its place in the group, if there is one. Rank 0 listens from now on.
    ///
    /// # Errors
    /// As for [`is_follower`](Self::is_follower); an address that is not this machine's.
    pub(crate) fn apply(&self, builder: EngineBuilder) -> anyhow::Result<EngineBuilder> {
        let ranks = self.ranks(&builder)?;
        let default = if ranks.is_some() { STEP_TIMEOUT } else { 0 };
        let seconds = self.step_timeout.unwrap_or(default);
        let step_timeout = (seconds > 0).then(|| Duration::from_secs(seconds));
        let builder = builder.engine(|options| options.step_timeout = step_timeout);
        let builder = builder.moe_parallel(self.sharing.experts()).encoder_split(self.sharing.encoder());
        Ok(match ranks {
            Some(ranks) => builder.ranks(ranks),
            None => {
                if self.sharing.experts() == MoeParallel::Ep {
                    tracing::warn!("no effect: --moe-parallel ep: the only rank holds all experts");
                }
                builder
            }
        })
    }

    /// Follows rank 0 until it ends.
    ///
    /// # Errors
    /// What ends this rank before that. A lost group ends the process.
    pub(crate) fn follow(&self, builder: EngineBuilder, has_images: bool) -> anyhow::Result<()> {
        match std::env::var("SPARK_PARENT").as_deref() {
            Ok(processes::PARENT_IS_INPUT) => end_with_input()?,
            Ok(parent) => end_with(parent)?,
            Err(_) => {}
        }
        let Err(error) = self.apply(builder)?.follow(has_images) else { return Ok(()) };
        let code = exit_code(&error);
        let error = error.into();
        let Some(code) = code else { return Err(error) };
        super::print_error(&error);
        std::process::exit(code)
    }

    fn ranks(&self, builder: &EngineBuilder) -> anyhow::Result<Option<Ranks>> {
        let (rank, world, local_rank, local_world, role, token) = match self.place()? {
            Place::Alone => return Ok(None),
            Place::Start { world, others, host } => {
                let address = match &self.leader {
                    Some(leader) => resolve("--leader", leader)?,
                    None => SocketAddr::new(resolve("--nodes", &host)?.ip(), 0),
                };
                let listener = Arc::new(Listener::bind(address)?);
                let local_world = others.first().map_or(1, |other| other.local_world);
                let token = self.token.clone().map_or_else(random_token, Ok)?;
                let mut names: Vec<String> = others.iter().filter_map(|other| other.node.clone()).collect();
                names.dedup();
                let model = self.copy_model.then(|| builder.model_folder()).transpose()?;
                let nodes = copy::prepare(&names, model.as_deref(), address.ip())?;
                let others = Processes::new(others, nodes, world, token.clone(), listener.stopper());
                let others: Option<Arc<dyn StartRanks>> = Some(Arc::new(others));
                (0, world, 0, local_world, self.lead(listener, others), token)
            }
            Place::Started { rank, world, local_rank, local_world, leader } => {
                // A launcher may have said it.
                let named = if self.leader.is_some() { "--leader" } else { "rank 0 is at" };
                let leader = resolve(named, &leader)?;
                let role = match rank {
                    0 => self.lead(Arc::new(Listener::bind(leader)?), None),
                    _ => Role::Follower { leader },
                };
                let token = self.token.clone().filter(|token| !token.is_empty()).context(
                    "--token: ranks that are started one by one need a secret; set SPARK_TOKEN to the same text for all",
                )?;
                (rank, world, local_rank, local_world, role, token)
            }
        };
        Ok(Some(Ranks {
            rank: Rank::new(rank, world)
                .with_context(|| format!("--rank {rank} is not below --world {world}"))?,
            local_rank,
            local_world,
            token,
            join_timeout: Duration::from_secs(self.join_timeout),
            allow_old_nccl: self.allow_old_nccl,
            role,
            on_joined: Some(if rank == 0 { Arc::new(stop_on_request) } else { Arc::new(follow_in_order) }),
        }))
    }

    fn lead(&self, listener: Arc<Listener>, others: Option<Arc<dyn StartRanks>>) -> Role {
        Role::Leader { listener, others, rejoin_timeout: Duration::from_secs(self.rejoin_timeout) }
    }

    fn place(&self) -> anyhow::Result<Place> {
        self.place_in(&|name| std::env::var(name).ok())
    }

    fn place_in(&self, variable: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<Place> {
        let asked = self.tensor_parallel_size;
        ensure!(asked != Some(0), "--tensor-parallel-size 0: at least one rank is needed");
        ensure!(
            asked.is_none_or(|asked| asked <= comm::MAX_WORLD),
            "--tensor-parallel-size {}: at most {} ranks are possible",
            asked.unwrap_or_default(),
            comm::MAX_WORLD
        );
        let place = if self.rank.is_some() || self.world.is_some() {
            let (Some(rank), Some(world)) = (self.rank, self.world.or(asked)) else {
                bail!("--rank and --world belong together: give both (or SPARK_RANK and SPARK_WORLD)");
            };
            let leader = self.leader.clone();
            let (local_rank, local_world) = (self.local_rank.unwrap_or(0), self.local_world.unwrap_or(1));
            started("--world", [rank, world, local_rank, local_world], leader)?
        } else if let Some(found) = launched(variable)? {
            ensure!(self.nodes.is_empty(), "--nodes: {} has started the ranks already", found.by);
            let leader = self.leader.clone().or(found.leader);
            started(found.by, [found.rank, found.world, found.local_rank, found.local_world], leader)?
        } else {
            return self.place_of_starter();
        };
        if let (Place::Started { world, .. }, Some(asked)) = (&place, asked) {
            ensure!(*world == asked, "--tensor-parallel-size {asked}, but {world} ranks were started");
        }
        Ok(place)
    }

    /// Of a process that nobody has started as a rank.
    fn place_of_starter(&self) -> anyhow::Result<Place> {
        let num_nodes = self.nodes.len().max(1);
        let world = self.tensor_parallel_size.unwrap_or(num_nodes);
        if world == 1 {
            return Ok(Place::Alone);
        }
        ensure!(
            world.is_multiple_of(num_nodes),
            "--tensor-parallel-size {world} over {num_nodes} machines: each must get as many ranks as the others"
        );
        let per_node = world / num_nodes;
        let other = |rank: usize| Other {
            rank,
            node: self.nodes.get(rank / per_node).filter(|_| rank >= per_node).cloned(),
            local_rank: rank % per_node,
            local_world: per_node,
        };
        let host = self.nodes.first().cloned().unwrap_or_else(|| "127.0.0.1".into());
        Ok(Place::Start { world, others: (1..world).map(other).collect(), host })
    }
}

fn started(
    by: &str,
    [rank, world, local_rank, local_world]: [usize; 4],
    leader: Option<String>,
) -> anyhow::Result<Place> {
    if world == 1 {
        return Ok(Place::Alone);
    }
    ensure!(rank < world, "rank {rank} of {world}: ranks count from 0");
    let leader = leader.with_context(|| {
        format!("{by}: {world} ranks, but not where rank 0 is; give --leader HOST:PORT (or SPARK_LEADER) to all of them")
    })?;
    Ok(Place::Started { rank, world, local_rank, local_world, leader })
}

/// `HOST`, `HOST:PORT` or an address; IPv4 before IPv6, as NCCL takes them. `named` says in errors who gave it.
fn resolve(named: &str, host: &str) -> anyhow::Result<SocketAddr> {
    let with_port = (host, DEFAULT_PORT).to_socket_addrs().or_else(|_| host.to_socket_addrs());
    let all: Vec<SocketAddr> = with_port
        .with_context(|| {
            format!("{named} {host}: no such host; give a name or an address that this machine knows")
        })?
        .collect();
    let first = all.iter().find(|address| address.is_ipv4()).or(all.first());
    first.copied().with_context(|| format!("{named} {host}: the name has no address"))
}

/// A secret for one group.
///
/// # Errors
/// The system gives no random bytes.
pub(crate) fn random_token() -> anyhow::Result<String> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("asking the system for random bytes: {e}"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A rank that rank 0 has started does not outlive it, whatever it is doing.
fn end_with(parent: &str) -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // It may have ended before that was set.
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    ensure!(now.as_deref() == Some(parent), "rank 0 (process {parent}) has ended");
    Ok(())
}

/// A rank that rank 0 has started over ssh ends with its connection: nothing else tells one that has not joined yet.
fn end_with_input() -> anyhow::Result<()> {
    let wait = || {
        // Nothing comes: rank 0 only holds the other end.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        thread::sleep(END_WITHIN);
        tracing::error!("rank 0 is gone: this rank ends");
        std::process::exit(PEER_LOST)
    };
    thread::Builder::new().name("input".into()).spawn(wait).context("starting a thread")?;
    Ok(())
}

/// Rank 0 does what it does when it is told itself: a server drains.
fn stop_on_request(monitor: &Monitor) {
    monitor.watch_for_stop(|rank| {
        tracing::info!("rank {rank} is told to stop, so all of them do");
        // This process is there to get it.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM);
    });
}

/// Any other rank ends with its group; told to stop, it leaves that to rank 0, whose clients it computes for.
fn follow_in_order(monitor: &Monitor) {
    monitor.watch(|lost| {
        let code = if lost.reason == LossReason::Left { 0 } else { PEER_LOST };
        if code != 0 {
            tracing::error!("{lost}: this rank ends");
        }
        // It ends by itself, unless it hangs in its device.
        thread::spawn(move || {
            thread::sleep(END_WITHIN);
            std::process::exit(code)
        });
    });
    let monitor = monitor.clone();
    thread::spawn(move || {
        if let Err(error) = pass_on_signals(&monitor) {
            tracing::warn!("SIGTERM will end this rank at once: {error}");
        }
    });
}

/// Passes the first signal on; the second one ends the process.
fn pass_on_signals(monitor: &Monitor) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut signals = Signals::take()?;
        for is_first in [true, false] {
            signals.next().await;
            if is_first {
                tracing::info!("told to stop: asking rank 0 to finish");
                monitor.ask_to_stop();
            }
        }
        std::process::exit(128 + SIGTERM)
    })
}

/// How a supervisor is told what it can do about `error`; `None` for an ordinary one.
fn exit_code(error: &Error) -> Option<i32> {
    match error {
        Error::Comm(comm::Error::Lost(_))
        | Error::Runtime(RuntimeError::Comm(comm::Error::Lost(_)))
        | Error::Weights(WeightsError::Exchange { .. })
        | Error::Model(ModelError::Weights(WeightsError::Exchange { .. })) => Some(PEER_LOST),
        Error::Backend(BackendError::Device { .. })
        | Error::Runtime(RuntimeError::Backend(BackendError::Device { .. })) => Some(DEVICE_FAILED),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        ranks: RankArgs,
    }

    fn place(flags: &str, variables: &[(&str, &str)]) -> anyhow::Result<Place> {
        let flags = Flags::try_parse_from(std::iter::once("x").chain(flags.split_whitespace()))?;
        let find = |name: &str| {
            variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned())
        };
        flags.ranks.place_in(&find)
    }

    fn other(rank: usize, node: Option<&str>, local_rank: usize, local_world: usize) -> Other {
        Other { rank, node: node.map(str::to_owned), local_rank, local_world }
    }

    #[test]
    fn one_rank_needs_nobody() {
        assert_eq!(place("", &[]).unwrap(), Place::Alone);
        assert_eq!(place("--tp 1", &[]).unwrap(), Place::Alone);
        assert_eq!(place("--nodes spark-1", &[]).unwrap(), Place::Alone);
    }

    #[test]
    fn ranks_of_this_machine_are_started_here() {
        let Place::Start { world, others, host } = place("--tp 3", &[]).unwrap() else { panic!() };
        assert_eq!((world, host.as_str()), (3, "127.0.0.1"));
        assert_eq!(others, [other(1, None, 1, 3), other(2, None, 2, 3)]);
    }

    #[test]
    fn ranks_are_spread_over_machines_in_blocks() {
        let Place::Start { world, others, host } = place("--nodes a,b", &[]).unwrap() else { panic!() };
        assert_eq!((world, host.as_str()), (2, "a"));
        assert_eq!(others, [other(1, Some("b"), 0, 1)]);
        let Place::Start { others, .. } = place("--nodes a,b --tp 4", &[]).unwrap() else { panic!() };
        assert_eq!(others, [other(1, None, 1, 2), other(2, Some("b"), 0, 2), other(3, Some("b"), 1, 2)]);
        assert!(place("--nodes a,b --tp 3", &[]).is_err());
    }

    #[test]
    fn launchers_and_flags_say_which_rank_this_is() {
        let torchrun = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1000")];
        let expected =
            Place::Started { rank: 1, world: 2, local_rank: 0, local_world: 1, leader: "a:1001".into() };
        assert_eq!(place("--tp 2", &torchrun).unwrap(), expected);
        assert_eq!(place("", &torchrun).unwrap(), expected);
        assert!(place("--tp 4", &torchrun).unwrap_err().to_string().contains("2 ranks were started"));
        let Place::Started { rank, leader, .. } =
            place("--rank 3 --world 4 --leader b:7", &torchrun).unwrap()
        else {
            panic!()
        };
        assert_eq!((rank, leader.as_str()), (3, "b:7"), "flags count more");
    }

    #[test]
    fn what_is_missing_is_named() {
        for (flags, variables, named) in [
            ("--rank 1", &[][..], "--world"),
            ("--rank 1 --world 2", &[], "--leader"),
            ("--rank 2 --world 2 --leader a", &[], "rank 2 of 2"),
            ("--tp 0", &[], "--tensor-parallel-size 0"),
            ("", &[("PMI_RANK", "0"), ("PMI_SIZE", "2")], "--leader"),
        ] {
            let message = place(flags, variables).unwrap_err().to_string();
            assert!(message.contains(named), "{flags}: {message}");
        }
    }
}
