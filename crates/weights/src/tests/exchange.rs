//! Ranks that read for each other, as threads: they load what they would load alone, read their share, and end together.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Barrier, Condvar, Mutex};

use spark_backend::{LinearWeight, MatrixData, Rank};

use super::files::{folder, open};
use super::layout::{Format, Size, specs, tensors, write_hollow};
use super::stream::{model, text};
use crate::{Error, Exchange, ExchangeError, LoadOptions, LoadProgress, ParamKind, ParamSpec, Params};

/// Messages from one rank to another: at most [`WIRE`] bytes are under way.
#[derive(Default)]
struct Wire {
    state: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    messages: VecDeque<(u32, Vec<u8>)>,
    is_cut: bool,
}

/// Less than most tensors: senders wait for receivers.
const WIRE: usize = 1000;

impl Wire {
    fn send(&self, tag: u32, bytes: &[u8]) -> Result<(), ExchangeError> {
        let state = self.state.lock().unwrap();
        let is_full = |state: &mut Queue| {
            !state.is_cut && state.messages.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() > WIRE
        };
        let mut state = self.changed.wait_while(state, is_full).unwrap();
        if state.is_cut {
            return Err("the wire is cut".into());
        }
        state.messages.push_back((tag, bytes.to_vec()));
        self.changed.notify_all();
        Ok(())
    }

    fn receive(&self) -> Result<(u32, Vec<u8>), ExchangeError> {
        let state = self.state.lock().unwrap();
        let mut state =
            self.changed.wait_while(state, |state| state.messages.is_empty() && !state.is_cut).unwrap();
        self.changed.notify_all();
        state.messages.pop_front().ok_or_else(|| "the wire is cut".into())
    }

    fn cut(&self) {
        self.state.lock().unwrap().is_cut = true;
        self.changed.notify_all();
    }
}

/// One rank's ends of the wires `[from][to]`.
struct End {
    rank: usize,
    wires: Arc<Vec<Vec<Wire>>>,
}

impl Exchange for End {
    fn send(&self, rank: usize, tag: u32, bytes: &[u8]) -> Result<(), ExchangeError> {
        self.wires[self.rank][rank].send(tag, bytes)
    }

    fn receive(&self, rank: usize) -> Result<(u32, Vec<u8>), ExchangeError> {
        self.wires[rank][self.rank].receive()
    }

    fn close(&self) {
        for other in 0..self.wires.len() {
            self.wires[self.rank][other].cut();
            self.wires[other][self.rank].cut();
        }
    }
}

fn ends(world: usize) -> Vec<Arc<End>> {
    let wires = (0..world).map(|_| (0..world).map(|_| Wire::default()).collect()).collect();
    let wires = Arc::new(wires);
    (0..world).map(|rank| Arc::new(End { rank, wires: Arc::clone(&wires) })).collect()
}

fn rank(index: usize, world: usize) -> Rank {
    Rank::new(index, world).unwrap()
}

/// Runs `work` for each rank of a group on a thread of its own; what each returns, by rank.
fn together<T: Send>(world: usize, work: impl Fn(Rank, LoadOptions) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = ends(world)
            .into_iter()
            .enumerate()
            .map(|(index, end)| {
                let rank = rank(index, world);
                let options = LoadOptions { rank, exchange: Some(end), threads: 4, ..LoadOptions::default() };
                scope.spawn(move || work(rank, options))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A hash of all numbers of a parameter and of their layout.
fn digest(params: &mut Params, spec: &ParamSpec) -> Result<blake3::Hash, Error> {
    let mut hash = blake3::Hasher::new();
    let mut linear = |weight: LinearWeight| {
        hash.update(format!("{:?}", weight.bias).as_bytes());
        for part in &weight.parts {
            hash.update(format!("{} {}", part.n, part.k).as_bytes());
            match &part.data {
                MatrixData::Dense { values, .. } => hash.update(values),
                MatrixData::Int4 { codes, zeros, scales, .. } => {
                    hash.update(codes).update(zeros.as_deref().unwrap_or_default()).update(scales)
                }
                MatrixData::Nvfp4 { codes, scales, alpha } => {
                    hash.update(codes).update(scales).update(&alpha.to_le_bytes())
                }
                MatrixData::Fp8 { values, scales, .. } => {
                    hash.update(values).update(format!("{scales:?}").as_bytes())
                }
            };
        }
    };
    match spec.kind {
        ParamKind::Linear { .. } => linear(params.linear(&spec.name)?),
        ParamKind::Experts { .. } => {
            for (gate_up, down) in params.experts(&spec.name)?.experts {
                linear(gate_up);
                linear(down);
            }
        }
        ParamKind::Vector { .. } => {
            hash.update(format!("{:?}", params.vector(&spec.name)?).as_bytes());
        }
    }
    Ok(hash.finalize())
}

fn stream(dir: &Path, specs: &[ParamSpec], options: &LoadOptions) -> Result<Vec<blake3::Hash>, Error> {
    let mut params = open(dir)?.stream(specs, options)?;
    let all = specs.iter().map(|spec| digest(&mut params, spec)).collect::<Result<_, _>>()?;
    params.finish()?;
    Ok(all)
}

#[test]
fn ranks_load_what_they_would_load_alone_from_their_share_of_the_bytes() {
    let size = Size { layers: 1, experts: 5, vocab: 1001, has_vision: false };
    for format in [Format::Awq, Format::Nvfp4, Format::Fp8] {
        let (dir, specs) = (folder(&tensors(format, size)), specs(size));
        let whole = open(dir.path()).unwrap().summary(&specs, 1).unwrap().file_bytes;
        for world in [2, 4] {
            let summary = open(dir.path()).unwrap().summary(&specs, world).unwrap();
            let alone: Vec<_> = (0..world)
                .map(|index| LoadOptions { rank: rank(index, world), ..LoadOptions::default() })
                .map(|options| stream(dir.path(), &specs, &options).unwrap())
                .collect();
            let loaded = together(world, |rank, mut options| {
                let seen = Arc::new(Mutex::new(None));
                let last = Arc::clone(&seen);
                options.progress = Some(Arc::new(move |now: LoadProgress| {
                    let mut last = last.lock().unwrap();
                    if last.is_none_or(|last: LoadProgress| last.bytes_read <= now.bytes_read) {
                        *last = Some(now);
                    }
                }));
                let loaded = stream(dir.path(), &specs, &options).unwrap();
                let now = seen.lock().unwrap().expect("progress is told");
                assert_eq!(now.bytes_read, now.bytes_total);
                let from_disk = now.bytes_read - now.bytes_from_peers;
                assert!(from_disk <= summary.ranks[rank.index()].bytes_read_in_exchange);
                loaded
            });
            assert!(loaded == alone, "{format:?} on {world} ranks");
            for rank in &summary.ranks {
                let share = rank.bytes_read_in_exchange as f64 / whole as f64;
                // A rank of four holds one and a half groups or blocks of the experts' features, and reads two.
                let limit = if world == 2 { 0.55 } else { 0.38 };
                assert!(share < limit && share > 0.8 / world as f64, "{format:?} on {world} ranks: {share}");
            }
        }
    }
}

#[test]
fn two_ranks_read_halves_of_a_published_checkpoint() {
    for format in [Format::Awq, Format::Nvfp4, Format::Fp8] {
        let dir = tempfile::tempdir().unwrap();
        write_hollow(dir.path(), format, Size::WHOLE);
        let summary = open(dir.path()).unwrap().summary(&specs(Size::WHOLE), 2).unwrap();
        for rank in summary.ranks {
            let share = rank.bytes_read_in_exchange as f64 / summary.file_bytes as f64;
            assert!((0.49..0.52).contains(&share), "{format:?}: {share}");
        }
    }
}

#[test]
fn parameters_may_be_taken_in_any_order_by_ranks_of_any_speed() {
    let (tensors, specs) = model();
    let dir = folder(&tensors);
    for world in [2, 4] {
        let alone: Vec<Vec<String>> = (0..world)
            .map(|index| LoadOptions { rank: rank(index, world), ..LoadOptions::default() })
            .map(|options| open(dir.path()).unwrap().load(&specs, &options).unwrap())
            .map(|mut params| specs.iter().map(|spec| text(&mut params, spec)).collect())
            .collect();
        let forward: Vec<usize> = (0..specs.len()).collect();
        let backward: Vec<usize> = forward.iter().rev().copied().collect();
        for order in [&forward, &backward] {
            together(world, |rank, options| {
                let mut params = open(dir.path()).unwrap().stream(&specs, &options).unwrap();
                for &index in order {
                    (0..1000 * rank.index()).for_each(|_| std::thread::yield_now());
                    assert_eq!(text(&mut params, &specs[index]), alone[rank.index()][index]);
                }
                params.finish().unwrap();
            });
        }
    }
}

#[test]
fn a_rank_that_gives_up_ends_the_others_with_its_reason() {
    let (tensors, specs) = model();
    let dir = folder(&tensors);
    let all_have_agreed = Barrier::new(4);
    let ends = together(4, |rank, options| {
        let mut params = open(dir.path()).unwrap().stream(&specs, &options).unwrap();
        all_have_agreed.wait();
        let count = if rank.index() == 1 { 1 } else { specs.len() };
        specs[..count].iter().try_for_each(|spec| digest(&mut params, spec).map(drop))
    });
    assert!(ends[1].is_ok(), "{ends:?}");
    for other in [0, 2, 3] {
        match &ends[other] {
            Err(Error::Exchange { rank: 1, reason }) => assert!(reason.contains("given up"), "{reason}"),
            // All of it may have come before.
            Ok(()) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_damaged_file_ends_all_ranks_and_a_lost_rank_too() {
    let (mut tensors, specs) = model();
    let broken =
        tensors.iter_mut().find(|tensor| tensor.name.contains("layers.1.mlp.experts.3.up_proj.scales"));
    broken.unwrap().bytes[..2].copy_from_slice(&[0, 0x7e]);
    let dir = folder(&tensors);
    let ends = together(2, |_, options| stream(dir.path(), &specs, &options).map(drop));
    for end in ends {
        let error = end.unwrap_err().to_string();
        assert!(error.contains("layers.1.mlp.experts.3.up_proj"), "{error}");
    }
    let ends = together(2, |rank, options| {
        if rank.index() == 1 {
            options.exchange.unwrap().close();
            return None;
        }
        stream(dir.path(), &specs, &options).err()
    });
    let Some(Error::Exchange { rank: 1, reason }) = &ends[0] else { panic!("{ends:?}") };
    assert!(reason.contains("the wire is cut"), "{reason}");
}

#[test]
fn other_files_are_noticed_before_anything_is_read() {
    let (tensors, specs) = model();
    let mut others = tensors.clone();
    others.swap(1, 2);
    let dirs = [folder(&tensors), folder(&others)];
    let ends = together(2, |rank, options| stream(dirs[rank.index()].path(), &specs, &options).map(drop));
    for (end, other) in ends.into_iter().zip([1, 0]) {
        let Err(Error::Exchange { rank, reason }) = end else { panic!("{end:?}") };
        assert!(rank == other && reason.contains("same files"), "{reason}");
    }
}

#[test]
fn ranks_with_a_cache_read_for_themselves() {
    let (tensors, specs) = model();
    let dir = folder(&tensors);
    let caches = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let load = |who: &[usize]| {
        together(2, |rank, mut options| {
            if who.contains(&rank.index()) {
                options.cache = Some(caches[rank.index()].path().to_owned());
            }
            stream(dir.path(), &specs, &options).unwrap()
        })
    };
    let alone = [0, 1].map(|index| {
        stream(dir.path(), &specs, &LoadOptions { rank: rank(index, 2), ..LoadOptions::default() }).unwrap()
    });
    // Rank 0 makes its cache, uses it beside a rank that has none, and then both have one.
    for who in [&[0][..], &[0], &[0, 1], &[0, 1]] {
        assert!(load(who) == alone, "{who:?}");
    }
    // A cache that is broken at a later look is made up for without the others.
    let cache = std::fs::read_dir(caches[1].path()).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&cache).unwrap();
    bytes[4096 + 3] ^= 1;
    std::fs::write(&cache, bytes).unwrap();
    assert!(load(&[0, 1]) == alone);
    assert!(!cache.exists());
}

/// What a rank says to one that misbehaves: rank 1 sends `messages` in place of what it should.
fn misbehave(messages: &[(u32, Vec<u8>)]) -> String {
    let (tensors, specs) = model();
    let dir = folder(&tensors);
    let ends = together(2, |rank, options| {
        if rank.index() == 0 {
            return stream(dir.path(), &specs, &options).err();
        }
        let end = options.exchange.unwrap();
        let (hello, bytes) = end.receive(0).unwrap();
        end.send(0, hello, &bytes).unwrap();
        for (tag, bytes) in messages {
            // It may have closed already.
            let _ = end.send(0, *tag, bytes);
        }
        while end.receive(0).is_ok() {}
        None
    });
    ends.into_iter().flatten().next().unwrap().to_string()
}

#[test]
fn what_is_not_of_the_protocol_ends_the_load() {
    let number = |number: u64| number.to_le_bytes().to_vec();
    let too_many = [number(0), number(1000)].concat();
    let backwards = [number(2), number(1)].concat();
    let begins = u32::MAX - 1;
    for (messages, said) in [
        (vec![(1 << 30, vec![0; 9])], "not its to send"),
        (vec![(begins, too_many)], "parameters that there are not"),
        (vec![(begins, backwards)], "parameters that there are not"),
        (vec![(begins, vec![7; 3])], "parameters that there are not"),
        ((0..2000).map(|number| (number, vec![0; 1])).collect(), "range"),
    ] {
        let error = misbehave(&messages);
        assert!(error.contains("rank 1") && error.contains(said), "{error}");
    }
}
