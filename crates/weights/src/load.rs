//! Loading: reads what a plan names, converts each item as soon as its bytes are there, gives out each parameter as
//! soon as its items are. At no time is more than a few tensors held beside the result. All in one go, or some parameters
//! at a time for `stream.rs`.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use spark_backend::{ExpertsWeight, LinearWeight, Matrix, Rank, VectorWeight};

use crate::checkpoint::Checkpoint;
use crate::convert::{Output, convert};
use crate::error::{Error, Result};
use crate::exchange::table::Table;
use crate::exchange::{Exchange, Exchanging};
use crate::params::Param;
use crate::plan::{Item, Plan};
use crate::read::{Progress, Reader, Request, num_threads};
use crate::shard::{cut, shard_bias, shard_vector};
use crate::spec::{ParamKind, ParamSpec};
use crate::stream::{Give, Source};
use crate::zeros::Findings;

/// How files are read (`--safetensors-load-strategy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadStrategy {
    /// Large sequential reads of the needed ranges by several threads, past the page cache where the file system
    /// allows.
    #[default]
    Eager,
    /// Memory maps; dense tensors stay backed by the files, which must not be truncated while the engine runs.
    Lazy,
}

/// How far a load is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes that are here.
    pub bytes_read: u64,
    /// Those of them that another rank has read ([`LoadOptions::exchange`]).
    pub bytes_from_peers: u64,
    /// Bytes that will be here.
    pub bytes_total: u64,
}

/// Called from loading threads after each read.
pub type ProgressFn = Arc<dyn Fn(LoadProgress) + Send + Sync>;

/// How to load.
#[derive(Clone)]
pub struct LoadOptions {
    /// How files are read.
    pub strategy: LoadStrategy,
    /// Which rank of the group that shares the model this process is: it reads and gets its shards.
    pub rank: Rank,
    /// Told about progress.
    pub progress: Option<ProgressFn>,
    /// Reading and converting threads; 0 chooses by the number of cores.
    pub threads: usize,
    /// A folder of caches ([`Checkpoint::stream`] alone uses them): what this rank holds is kept there as it is in memory, and
    /// read from there the next time.
    pub cache: Option<PathBuf>,
    /// Lets the ranks read for each other ([`Checkpoint::stream`] alone does): what several want, one of them reads and sends to the
    /// others. All ranks of the group have one, or none. Where a rank has its weights in a cache, or maps its files, all
    /// read for themselves.
    pub exchange: Option<Arc<dyn Exchange>>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            strategy: LoadStrategy::Eager,
            rank: Rank::SINGLE,
            progress: None,
            threads: 0,
            cache: None,
            exchange: None,
        }
    }
}

impl fmt::Debug for LoadOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadOptions")
            .field("strategy", &self.strategy)
            .field("rank", &self.rank)
            .field("progress", &self.progress.is_some())
            .field("threads", &self.threads)
            .field("cache", &self.cache)
            .field("exchange", &self.exchange.is_some())
            .finish()
    }
}

/// Locks; a thread that panicked has already failed the load.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The segments of an item that have come.
struct Arrivals {
    segments: Vec<Option<Bytes>>,
    missing: usize,
}

/// The outputs of a parameter that have come.
struct Assembly {
    matrices: Vec<Option<Matrix>>,
    floats: Vec<Option<Vec<f32>>>,
    missing: usize,
}

/// Loads what `plan` found for `specs` and gives each parameter to `sink`.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    plan: &Plan,
    specs: &[ParamSpec],
    options: &LoadOptions,
    sink: Give<'_>,
) -> Result<()> {
    let findings = Findings::default();
    let reading = Reading { checkpoint, specs, rank: options.rank, findings: &findings };
    let reader = Reader::open(&checkpoint.files, options.strategy)?;
    let num_bytes = reader.num_bytes(&mut requests(checkpoint, &plan.items));
    let progress = Progress::new(options.progress.clone(), num_bytes);
    let from = Origin { reader: &reader, threads: num_threads(options), exchange: None };
    reading.run(&plan.items, from, &progress, sink)?;
    findings.tell();
    Ok(())
}

/// The byte ranges of `items`.
pub(crate) fn requests(checkpoint: &Checkpoint, items: &[Item]) -> Vec<Request> {
    let mut requests = Vec::new();
    for (number, item) in items.iter().enumerate() {
        for (position, segment) in item.segments.iter().enumerate() {
            let file = checkpoint.tensors[segment.tensor].file;
            let (offset, len, stays) = (segment.offset, segment.len, item.stays(position));
            requests.push(Request { file, offset, len, item: number, position, stays });
        }
    }
    requests
}

/// Where bytes come from.
#[derive(Clone, Copy)]
struct Origin<'a> {
    reader: &'a Reader,
    threads: usize,
    exchange: Option<&'a Exchanging>,
}

/// What is loaded, for whom.
#[derive(Clone, Copy)]
struct Reading<'a> {
    checkpoint: &'a Checkpoint,
    specs: &'a [ParamSpec],
    rank: Rank,
    findings: &'a Findings,
}

impl Reading<'_> {
    /// Loads `items`, all items of some neighbouring parameters.
    fn run(self, items: &[Item], from: Origin<'_>, progress: &Progress, sink: Give<'_>) -> Result<()> {
        let (Some(first), Some(last)) = (items.first(), items.last()) else { return Ok(()) };
        let first = first.spec;
        let assemblies = assemblies(items, &self.specs[first..=last.spec]);
        let arrivals: Vec<Mutex<Arrivals>> = items
            .iter()
            .map(|item| item.segments.len())
            .map(|count| Mutex::new(Arrivals { segments: vec![None; count], missing: count }))
            .collect();
        let deliver = |request: &Request, bytes: Bytes| {
            let segments = {
                let mut arrival = lock(&arrivals[request.item]);
                arrival.segments[request.position] = Some(bytes);
                arrival.missing -= 1;
                if arrival.missing > 0 {
                    return Ok(());
                }
                std::mem::take(&mut arrival.segments)
            };
            let item = &items[request.item];
            let output = convert(self.checkpoint, item, segments.into_iter().flatten().collect())?;
            match self.place(&assemblies[item.spec - first], item, output)? {
                Some(param) => sink(item.spec, param),
                None => Ok(()),
            }
        };
        let requests = requests(self.checkpoint, items);
        let Origin { reader, threads, exchange } = from;
        match exchange {
            None => reader.read(requests, threads, progress, &deliver),
            Some(exchange) => {
                let spec_of = |request: &Request| items[request.item].spec;
                exchange.read(requests, &spec_of, (reader, threads), progress, &deliver)
            }
        }
    }

    /// Cuts an output to the rank's part and puts it in its place; the parameter, if this was the last.
    fn place(self, assembly: &Mutex<Assembly>, item: &Item, output: Output) -> Result<Option<Param>> {
        let spec = &self.specs[item.spec];
        let output = match output {
            Output::Floats(values) => Output::Floats(values),
            Output::Matrices(matrices) => {
                let kept = matrices.into_iter().zip(&item.keep);
                let kept =
                    kept.map(|(matrix, [rows, columns])| cut(spec, matrix, rows.clone(), columns.clone()));
                Output::Matrices(kept.collect::<Result<_>>()?)
            }
        };
        if let Output::Matrices(matrices) = &output {
            for (i, matrix) in matrices.iter().enumerate() {
                self.findings.look_at(spec, item.slot + i, matrix);
            }
        }
        let mut assembly = lock(assembly);
        match output {
            Output::Floats(values) => assembly.floats[item.slot] = Some(values),
            Output::Matrices(matrices) => {
                for (i, matrix) in matrices.into_iter().enumerate() {
                    assembly.matrices[item.slot + i] = Some(matrix);
                }
            }
        }
        assembly.missing -= 1;
        if assembly.missing > 0 {
            return Ok(None);
        }
        let matrices = std::mem::take(&mut assembly.matrices).into_iter().flatten().collect();
        let floats = std::mem::take(&mut assembly.floats).into_iter().flatten().collect();
        drop(assembly);
        let param = build(spec, matrices, floats, self.rank)?;
        if let Param::Vector(vector) = &param {
            self.findings.look_at_vector(spec, vector);
        }
        Ok(Some(param))
    }
}

/// Threads that load ahead: while one waits for its last reads and conversions, the other's are under way.
pub(crate) const NUM_WORKERS: usize = 2;

/// The parameters of a checkpoint, loaded some at a time.
pub(crate) struct Parts {
    checkpoint: Checkpoint,
    plan: Plan,
    specs: Vec<ParamSpec>,
    rank: Rank,
    reader: Reader,
    threads: usize,
    progress: Progress,
    exchange: Option<Exchanging>,
    findings: Findings,
    /// Parameters that have not been loaded.
    missing: AtomicUsize,
    /// Parameters that have not been given.
    owed: AtomicUsize,
}

impl Parts {
    /// Opens the files of `checkpoint`.
    pub(crate) fn new(
        checkpoint: Checkpoint,
        plan: Plan,
        specs: &[ParamSpec],
        options: &LoadOptions,
    ) -> Result<Self> {
        let reader = Reader::open(&checkpoint.files, options.strategy)?;
        let num_bytes = reader.num_bytes(&mut requests(&checkpoint, &plan.items));
        Ok(Self {
            rank: options.rank,
            threads: num_threads(options).div_ceil(NUM_WORKERS),
            progress: Progress::new(options.progress.clone(), num_bytes),
            exchange: None,
            findings: Findings::default(),
            missing: AtomicUsize::new(specs.len()),
            owed: AtomicUsize::new(specs.len()),
            specs: specs.to_vec(),
            reader,
            checkpoint,
            plan,
        })
    }

    /// Agrees with the other ranks to read for each other, if `options` say so. `takes_part` is whether this rank reads the
    /// checkpoint at all.
    ///
    /// # Errors
    /// A rank is lost, or has another checkpoint.
    pub(crate) fn join(&mut self, options: &LoadOptions, takes_part: bool) -> Result<()> {
        let Some(way) = options.exchange.clone().filter(|_| self.rank.world() > 1) else { return Ok(()) };
        let Self { checkpoint, specs, rank, .. } = self;
        let table = (takes_part && options.strategy == LoadStrategy::Eager)
            .then(|| Table::new(checkpoint, specs, rank.world()))
            .transpose()?;
        self.exchange = Exchanging::agree(way, *rank, table, specs.len())?;
        if let Some(exchange) = &self.exchange {
            let items = &self.plan.items;
            let (mut own, others): (Vec<_>, Vec<_>) =
                requests(checkpoint, items).into_iter().partition(|request| {
                    exchange.table().is_read_by(rank.index(), items[request.item].spec, request)
                });
            let own = self.reader.num_bytes(&mut own);
            let others: u64 = others.iter().map(|request| request.len as u64).sum();
            tracing::info!(
                "{:.3} GB of weights are read here, {:.3} GB come from other ranks",
                own as f64 / 1e9,
                others as f64 / 1e9
            );
            self.progress = Progress::new(options.progress.clone(), own + others);
        }
        Ok(())
    }

    /// Loads some parameters, those first that the other ranks have begun with too.
    fn run(&self, indices: Range<usize>, give: Give<'_>) -> Result<()> {
        let Self { checkpoint, specs, rank, findings, exchange, .. } = self;
        let reading = Reading { checkpoint, specs, rank: *rank, findings };
        let from = Origin { reader: &self.reader, threads: self.threads, exchange: exchange.as_ref() };
        let give: Give<'_> = &|index, param| {
            // What is given may be taken, and be the last, before this thread goes on.
            self.owed.fetch_sub(1, Ordering::Relaxed);
            give(index, param)
        };
        let run = |indices| reading.run(self.items(indices), from, &self.progress, give);
        let Some(exchange) = exchange else { return run(indices) };
        exchange.begin(&indices)?;
        let mut left: Vec<usize> = indices.collect();
        while !left.is_empty() {
            run(exchange.next_ready(&mut left)?)?;
        }
        Ok(())
    }

    /// The items of some parameters: a plan has them in the order of the parameters.
    fn items(&self, specs: Range<usize>) -> &[Item] {
        let items = &self.plan.items;
        let before = |spec: usize| items.partition_point(|item| item.spec < spec);
        &items[before(specs.start)..before(specs.end)]
    }
}

impl Source for Parts {
    fn sizes(&self) -> Vec<u64> {
        let size = |spec| -> u64 {
            let segments = self.items(spec..spec + 1).iter().flat_map(|item| &item.segments);
            segments.map(|segment| segment.len as u64).sum()
        };
        (0..self.specs.len()).map(size).collect()
    }

    fn make(&self, indices: Range<usize>, give: Give<'_>) -> Result<()> {
        let count = indices.len();
        self.run(indices, give)?;
        if self.missing.fetch_sub(count, Ordering::Relaxed) == count {
            self.progress.finish();
            self.findings.tell();
            self.exchange.as_ref().map_or(Ok(()), Exchanging::finish)?;
        }
        Ok(())
    }

    fn stop(&self) {
        if let Some(exchange) = self.exchange.as_ref().filter(|_| self.owed.load(Ordering::Relaxed) > 0) {
            exchange.give_up("its load was given up");
        }
    }
}

/// Empty ones for `specs`, which `items` belong to.
fn assemblies(items: &[Item], specs: &[ParamSpec]) -> Vec<Mutex<Assembly>> {
    let mut counts = vec![0; specs.len()];
    for item in items {
        counts[item.spec - items[0].spec] += 1;
    }
    let slots = |spec: &ParamSpec| match &spec.kind {
        ParamKind::Vector { .. } => 1,
        ParamKind::Linear { parts, .. } => parts.len() * spec.shard.matrices(),
        ParamKind::Experts { num_experts, .. } => 3 * num_experts,
    };
    let empty = |(spec, &missing): (&ParamSpec, &usize)| {
        let slots = slots(spec);
        Mutex::new(Assembly { matrices: vec![None; slots], floats: vec![None; slots], missing })
    };
    specs.iter().zip(&counts).map(empty).collect()
}

/// A parameter from its matrices and float values, all in slot order.
pub(crate) fn build(
    spec: &ParamSpec,
    matrices: Vec<Matrix>,
    floats: Vec<Vec<f32>>,
    rank: Rank,
) -> Result<Param> {
    match &spec.kind {
        &ParamKind::Vector { shape } => {
            let values = floats.into_iter().flatten().collect();
            shard_vector(spec, VectorWeight { values, shape }, rank).map(Param::Vector)
        }
        ParamKind::Linear { bias, .. } => {
            let bias = if *bias { shard_bias(spec, floats, rank)? } else { None };
            Ok(Param::Linear(LinearWeight { parts: matrices, bias }))
        }
        ParamKind::Experts { .. } => {
            let mut experts = Vec::with_capacity(matrices.len() / 3);
            let mut matrices = matrices.into_iter();
            while let (Some(gate), Some(up), Some(down)) = (matrices.next(), matrices.next(), matrices.next())
            {
                let gate_up = LinearWeight { parts: vec![gate, up], bias: None };
                experts.push((gate_up, LinearWeight { parts: vec![down], bias: None }));
            }
            Ok(Param::Experts(ExpertsWeight { experts }))
        }
    }
}

/// Options that a caller got wrong.
pub(crate) fn option(option: &'static str, reason: impl Into<String>) -> Error {
    Error::Option { option, reason: reason.into() }
}
