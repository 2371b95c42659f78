//! Which rank a process is, told by the environment of what launched it: torchrun, a Kubernetes LeaderWorkerSet, Open MPI, MPICH
//! and its kin, or Slurm. A pure function of variables; our own `SPARK_*` are flags and not here.

use anyhow::Context;

/// Where ranks meet unless said.
pub(crate) const DEFAULT_PORT: u16 = 29_600;

/// What a launcher says about a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Launched {
    /// Who launched it, for messages.
    pub(crate) by: &'static str,
    pub(crate) rank: usize,
    pub(crate) world: usize,
    /// Number among the ranks of this machine, and how many there are.
    pub(crate) local_rank: usize,
    pub(crate) local_world: usize,
    /// `HOST:PORT` of rank 0, where the launcher says it.
    pub(crate) leader: Option<String>,
}

/// The first launcher that has more than one rank.
///
/// # Errors
/// A variable that is not the number it should be.
pub(crate) fn launched(variable: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<Option<Launched>> {
    let env = Environment { variable };
    for launcher in [torchrun, leader_worker_set, open_mpi, pmi, slurm] {
        match launcher(&env)? {
            Some(launched) if launched.world > 1 => {
                anyhow::ensure!(
                    launched.rank < launched.world,
                    "{} says that this is rank {} of {}",
                    launched.by,
                    launched.rank,
                    launched.world
                );
                return Ok(Some(launched));
            }
            _ => {}
        }
    }
    Ok(None)
}

struct Environment<'a> {
    variable: &'a dyn Fn(&str) -> Option<String>,
}

impl Environment<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.variable)(name).filter(|text| !text.is_empty())
    }

    fn number(&self, name: &str) -> anyhow::Result<Option<usize>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        text.trim().parse().map(Some).with_context(|| format!("{name}={text}: expected a number"))
    }

    /// Rank and world; `None` unless both are there.
    fn place(&self, rank: &str, world: &str) -> anyhow::Result<Option<(usize, usize)>> {
        Ok(self.number(rank)?.zip(self.number(world)?))
    }
}

/// Its store listens on MASTER_PORT itself, so the ranks meet one above.
fn torchrun(env: &Environment<'_>) -> anyhow::Result<Option<Launched>> {
    let Some((rank, world)) = env.place("RANK", "WORLD_SIZE")? else { return Ok(None) };
    let port = match env.number("MASTER_PORT")? {
        None => DEFAULT_PORT,
        Some(port) => u16::try_from(port).ok().and_then(|port| port.checked_add(1)).with_context(|| {
            format!("MASTER_PORT={port}: ranks meet one port above it, so it must be below {}", u16::MAX)
        })?,
    };
    Ok(Some(Launched {
        by: "torchrun",
        rank,
        world,
        local_rank: env.number("LOCAL_RANK")?.unwrap_or(0),
        local_world: env.number("LOCAL_WORLD_SIZE")?.unwrap_or(1),
        leader: env.text("MASTER_ADDR").map(|host| format!("{host}:{port}")),
    }))
}

fn leader_worker_set(env: &Environment<'_>) -> anyhow::Result<Option<Launched>> {
    let Some((rank, world)) = env.place("LWS_WORKER_INDEX", "LWS_GROUP_SIZE")? else { return Ok(None) };
    Ok(Some(Launched {
        by: "the LeaderWorkerSet",
        rank,
        world,
        local_rank: 0,
        local_world: 1,
        leader: env.text("LWS_LEADER_ADDRESS").map(|host| format!("{host}:{DEFAULT_PORT}")),
    }))
}

fn open_mpi(env: &Environment<'_>) -> anyhow::Result<Option<Launched>> {
    let Some((rank, world)) = env.place("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")? else {
        return Ok(None);
    };
    let local_world = env.number("OMPI_COMM_WORLD_LOCAL_SIZE")?.unwrap_or(1);
    Ok(Some(Launched {
        by: "mpirun",
        rank,
        world,
        local_rank: env.number("OMPI_COMM_WORLD_LOCAL_RANK")?.unwrap_or(0),
        local_world,
        leader: on_one_machine(local_world, world),
    }))
}

fn pmi(env: &Environment<'_>) -> anyhow::Result<Option<Launched>> {
    let Some((rank, world)) = env.place("PMI_RANK", "PMI_SIZE")? else { return Ok(None) };
    let local_world = env.number("MPI_LOCALNRANKS")?.unwrap_or(1);
    Ok(Some(Launched {
        by: "mpirun",
        rank,
        world,
        local_rank: env.number("MPI_LOCALRANKID")?.unwrap_or(0),
        local_world,
        leader: on_one_machine(local_world, world),
    }))
}

/// Inside `srun` only: a batch script has the numbers of its job, and is one process.
fn slurm(env: &Environment<'_>) -> anyhow::Result<Option<Launched>> {
    if env.text("SLURM_STEP_ID").is_none() {
        return Ok(None);
    }
    let Some((rank, world)) = env.place("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")? else { return Ok(None) };
    let nodes = env.text("SLURM_STEP_NODELIST").or(env.text("SLURM_JOB_NODELIST"));
    let num_nodes = env.number("SLURM_STEP_NUM_NODES")?.unwrap_or(world);
    Ok(Some(Launched {
        by: "srun",
        rank,
        world,
        local_rank: env.number("SLURM_LOCALID")?.unwrap_or(0),
        local_world: world.div_ceil(num_nodes.max(1)),
        leader: nodes.map(|nodes| format!("{}:{DEFAULT_PORT}", first_node(&nodes))),
    }))
}

/// MPI does not tell where rank 0 is, but on a single machine it is here.
fn on_one_machine(local_world: usize, world: usize) -> Option<String> {
    (local_world == world).then(|| format!("127.0.0.1:{DEFAULT_PORT}"))
}

/// The first host of Slurm's `a,b`, `spark-[1-2]` or `rack[07,12-14]-x`.
fn first_node(list: &str) -> String {
    let end = |text: &str, stops: &[char]| text.find(stops).unwrap_or(text.len());
    let head = &list[..end(list, &[',', '['])];
    let Some(range) = list[head.len()..].strip_prefix('[') else { return head.to_owned() };
    let number = &range[..end(range, &['-', ',', ']'])];
    let after = range.find(']').map_or("", |close| &range[close + 1..]);
    format!("{head}{number}{}", &after[..end(after, &[','])])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> anyhow::Result<Option<Launched>> {
        let find = |name: &str| {
            variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned())
        };
        launched(&find)
    }

    #[test]
    fn torchrun_says_everything() {
        let found = of(&[
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "spark-1"),
            ("MASTER_PORT", "29500"),
        ]);
        let expected = Launched {
            by: "torchrun",
            rank: 3,
            world: 4,
            local_rank: 1,
            local_world: 2,
            leader: Some("spark-1:29501".into()),
        };
        assert_eq!(found.unwrap(), Some(expected));
    }

    #[test]
    fn other_launchers() {
        let lws = of(&[
            ("LWS_WORKER_INDEX", "1"),
            ("LWS_GROUP_SIZE", "2"),
            ("LWS_LEADER_ADDRESS", "sparks-0.sparks.default"),
        ]);
        let lws = lws.unwrap().unwrap();
        assert_eq!((lws.rank, lws.world, lws.local_world), (1, 2, 1));
        assert_eq!(lws.leader.as_deref(), Some("sparks-0.sparks.default:29600"));
        let mpi = |local_size| {
            of(&[
                ("OMPI_COMM_WORLD_RANK", "1"),
                ("OMPI_COMM_WORLD_SIZE", "2"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", local_size),
            ])
        };
        assert_eq!(mpi("1").unwrap().unwrap().leader, None, "it must be given");
        assert_eq!(mpi("2").unwrap().unwrap().leader.as_deref(), Some("127.0.0.1:29600"));
        let srun = [
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "1"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_STEP_NUM_NODES", "2"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_STEP_NODELIST", "spark-[07-08]"),
        ];
        let found = of(&srun).unwrap().unwrap();
        assert_eq!((found.rank, found.local_rank, found.local_world), (1, 0, 1));
        assert_eq!(found.leader.as_deref(), Some("spark-07:29600"));
        assert_eq!(of(&srun[1..]).unwrap(), None, "a batch script is no rank");
    }

    #[test]
    fn one_rank_is_no_group() {
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap(), None);
        assert_eq!(of(&[("RANK", "0")]).unwrap(), None);
    }

    #[test]
    fn nonsense_is_named() {
        let message = of(&[("RANK", "one"), ("WORLD_SIZE", "2")]).unwrap_err().to_string();
        assert!(message.contains("RANK=one"), "{message}");
        for port in ["65535", "18446744073709551615"] {
            let message =
                of(&[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", port)]).unwrap_err().to_string();
            assert!(
                message.contains(&format!("MASTER_PORT={port}")) && message.contains("65535"),
                "{message}"
            );
        }
        let message = of(&[("PMI_RANK", "2"), ("PMI_SIZE", "2")]).unwrap_err().to_string();
        assert!(message.contains("rank 2 of 2"), "{message}");
    }

    #[test]
    fn the_first_node_of_a_list() {
        for (list, first) in [
            ("spark-1,spark-2", "spark-1"),
            ("spark-1", "spark-1"),
            ("spark-[1-2]", "spark-1"),
            ("rack[07,12-14]-x,other", "rack07-x"),
            ("a[3", "a3"),
            ("", ""),
        ] {
            assert_eq!(first_node(list), first, "{list}");
        }
    }
}
