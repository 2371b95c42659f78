//! Device, memory, streams, events and graphs; and the measurements.

use half::bf16;
use spark_backend::Dtype;
use spark_cuda::{
    Arena, ArenaPlan, Cubins, Driver, Error, Event, Kernels, Pool, ReduceNorm, Stream, Tensor, bench,
};
use spark_testing::Random;

use super::{Bed, gpu, kernel_options};

#[test]
fn the_device_says_what_it_is() {
    let driver = Driver::open().unwrap();
    let properties = gpu().device.properties().clone();
    assert!(properties.num_sms > 0 && properties.l2_bytes > 0 && !properties.name.is_empty());
    assert!(properties.shared_bytes_per_block >= 98_304, "{properties:?}");
    let memory = gpu().device.memory().unwrap();
    assert!(memory.available > 0 && memory.available <= memory.total, "{memory:?}");
    let count = driver.num_devices().unwrap();
    let error = driver.device(count).unwrap_err();
    assert!(matches!(error, Error::NoDevice { .. }), "{error}");
}

#[test]
fn copies_keep_bytes_and_check_sizes() {
    let (bed, mut random) = (Bed::new(), Random::new(5));
    let bytes = random.bytes(100_001);
    let (a, b) = (bed.upload(&bytes), bed.bytes(100_001));
    bed.stream.copy(&b, &a).unwrap();
    assert_eq!(bed.stream.download::<u8>(&b, 100_001).unwrap(), bytes);
    let part = b.slice(256, 4).unwrap();
    bed.stream.fill(&part, 7).unwrap();
    assert_eq!(bed.stream.download::<u8>(&b, 261).unwrap()[255..], [bytes[255], 7, 7, 7, 7, bytes[260]]);
    assert!(bed.stream.upload(&part, &[0u8; 5]).is_err());
    assert!(bed.stream.download::<u32>(&part, 2).is_err());
    assert!(bed.stream.copy(&part, &a).is_err());
    assert!(b.slice(b.num_bytes(), 1).is_err() && b.slice(u64::MAX, 2).is_err());
}

#[test]
fn more_memory_than_there_is_is_refused_with_both_numbers() {
    let device = &gpu().device;
    let mut plan = ArenaPlan::default();
    plan.add("weights", 1 << 50).unwrap();
    let error = Arena::new(device, plan).unwrap_err();
    assert!(
        matches!(error, Error::Memory { needed, available, .. } if needed == 1 << 50 && available < needed)
    );
}

#[test]
fn a_piece_returns_to_its_pool_with_its_last_clone() {
    let bed = Bed::new();
    let pool = Pool::new(&bed.bytes(4096));
    let piece = pool.take("a", 100).unwrap();
    let tensor = Tensor::new(&piece, [5, 10], Dtype::Bf16).unwrap();
    drop(piece);
    assert!(matches!(pool.expect_empty(), Err(Error::InUse { count: 1 })));
    assert!(pool.take("b", 4096).is_err());
    drop(tensor);
    pool.expect_empty().unwrap();
    assert_eq!(pool.take("b", 4096).unwrap().num_bytes(), 4096);
    assert_eq!(pool.high_water(), 4096);
}

#[test]
fn an_outer_piece_is_held_by_the_pieces_of_a_pool_inside() {
    let bed = Bed::new();
    let outer = Pool::new(&bed.bytes(4096));
    let inner = Pool::new(&outer.take("inner", 1024).unwrap());
    let piece = inner.take("a", 16).unwrap();
    drop(inner);
    assert!(matches!(outer.expect_empty(), Err(Error::InUse { count: 1 })));
    drop(piece);
    outer.expect_empty().unwrap();
}

/// A device of its own: its counter sees no other test.
#[test]
fn nothing_is_allocated_after_the_start() {
    let device = Driver::open().unwrap().device(0).unwrap();
    let cubins = Cubins::get(device.arch(), &kernel_options()).unwrap();
    let kernels = Kernels::load(&device, &cubins).unwrap();
    let stream = Stream::new(&device).unwrap();
    let mut plan = ArenaPlan::default();
    let region = plan.add("pool", 1 << 20).unwrap();
    let arena = Arena::new(&device, plan).unwrap();
    let pool = Pool::new(&arena.region(region).unwrap());
    let start = device.num_allocations();
    device.seal();

    for _ in 0..3 {
        let take = |rows: usize| {
            let tensor = pool.tensor("tensor", [rows, 2048], Dtype::Bf16).unwrap();
            stream.fill(tensor.slice(), 0).unwrap();
            tensor
        };
        let (residual, out, weight) = (take(4), take(4), take(1));
        let step = || {
            let args = ReduceNorm { partial: None, residual: &residual, weight: &weight, eps: 1e-6 };
            kernels.reduce_norm(&stream, args, &out)
        };
        step().unwrap();
        let graph = stream.record(step).unwrap();
        graph.launch(&stream).unwrap();
        stream.synchronize().unwrap();
        drop((residual, out, weight));
        pool.expect_empty().unwrap();
    }
    assert_eq!(device.num_allocations(), start);
    let mut plan = ArenaPlan::default();
    plan.add("late", 1).unwrap();
    let error = Arena::new(&device, plan).unwrap_err();
    assert!(matches!(error, Error::AllocationAfterStart { .. }), "{error}");
}

/// Kernels that overlap with their predecessors, launched one by one and as a graph, many times: each reads what the one
/// before has written, so a missing wait gives other numbers.
#[test]
fn a_graph_repeats_a_chain_of_dependent_kernels_bit_by_bit() {
    let (bed, mut random) = (Bed::new(), Random::new(6));
    let (rows, columns, links) = (16, 2048, 24);
    let start = random.normals(rows * columns, 1.0);
    let weight = bed.tensor(&vec![1.0; columns], [1, columns], Dtype::Bf16);
    let source = bed.tensor(&start, [rows, columns], Dtype::Bf16);
    let residual = bed.empty([rows, columns], Dtype::Bf16);
    let halves = [bed.empty([rows, columns], Dtype::Bf16), bed.empty([rows, columns], Dtype::Bf16)];
    let chain = || {
        bed.stream.copy(residual.slice(), source.slice())?;
        bed.stream.copy(halves[0].slice(), source.slice())?;
        for i in 0..links {
            let (partial, out) = (&halves[i % 2], &halves[(i + 1) % 2]);
            let args = ReduceNorm { partial: Some(partial), residual: &residual, weight: &weight, eps: 1e-6 };
            bed.kernels.reduce_norm(&bed.stream, args, out)?;
        }
        Ok::<_, Error>(())
    };
    chain().unwrap();
    let want = bed.values(&residual);
    assert!(want.iter().all(|v| v.is_finite()) && want != bed.values(&source));
    let graph = bed.stream.record(chain).unwrap();
    assert_eq!(graph.num_nodes(), links + 2);
    graph.upload(&bed.stream).unwrap();
    for _ in 0..50 {
        bed.stream.fill(residual.slice(), 0xff).unwrap();
        graph.launch(&bed.stream).unwrap();
        assert_eq!(bed.values(&residual), want);
    }
}

/// Nothing but the graph holds the memory in which it begins and that it writes between.
#[test]
fn a_graph_keeps_the_memory_that_it_uses() {
    let bed = Bed::new();
    let (source, target) = (bed.upload(&[7u8; 256]), bed.bytes(256));
    let between = bed.bytes(256);
    let graph = bed
        .stream
        .record(|| {
            bed.stream.copy(&between, &source)?;
            bed.stream.copy(&target, &between)
        })
        .unwrap();
    drop((source, between));
    // Would take the place of freed memory.
    let others: Vec<_> = (0..8).map(|_| bed.bytes(256)).collect();
    graph.launch(&bed.stream).unwrap();
    assert_eq!(bed.stream.download::<u8>(&target, 256).unwrap(), [7; 256]);
    for other in &others {
        assert_eq!(bed.stream.download::<u8>(other, 256).unwrap(), [0xff; 256]);
    }
}

#[test]
fn what_a_graph_would_not_keep_is_not_recorded() {
    let (bed, event) = (Bed::new(), Event::new(&gpu().device).unwrap());
    let slice = bed.bytes(256);
    let graph = bed.stream.record(|| bed.stream.fill(&slice, 1)).unwrap();
    let is_refused = |work: &dyn Fn() -> Result<(), Error>| {
        let error = bed.stream.record(work).unwrap_err();
        assert!(error.to_string().contains("one whose work is recorded"), "{error}");
    };
    is_refused(&|| event.record(&bed.stream));
    is_refused(&|| graph.launch(&bed.stream));
    is_refused(&|| bed.stream.upload(&slice, &[1u8]));
    is_refused(&|| bed.stream.record(|| Ok(())).map(drop));
    graph.launch(&bed.stream).unwrap();
    assert_eq!(bed.stream.download::<u8>(&slice, 1).unwrap(), [1]);
}

/// A device that is opened twice counts as two: memory, events and graphs of one are refused by the other's streams.
#[test]
fn objects_of_another_device_are_refused() {
    let (bed, other) = (Bed::new(), Driver::open().unwrap().device(0).unwrap());
    let (stream, slice) = (Stream::new(&other).unwrap(), bed.bytes(256));
    assert!(stream.upload(&slice, &[1u8]).is_err() && stream.download::<u8>(&slice, 1).is_err());
    assert!(stream.copy(&slice, &slice).is_err() && stream.fill(&slice, 1).is_err());
    let event = Event::new(bed.stream.device()).unwrap();
    assert!(event.record(&stream).is_err() && stream.wait(&event).is_err());
    let graph = bed.stream.record(|| bed.stream.fill(&slice, 1)).unwrap();
    assert!(graph.upload(&stream).is_err() && graph.launch(&stream).is_err());
}

#[test]
fn a_failed_recording_leaves_the_stream_usable() {
    let bed = Bed::new();
    let slice = bed.bytes(256);
    let error = bed.stream.record(|| Err(Error::InUse { count: 1 })).unwrap_err();
    assert!(matches!(error, Error::InUse { .. }));
    // Waiting cannot be recorded.
    let error = bed.stream.record(|| bed.stream.synchronize()).unwrap_err();
    assert!(matches!(error, Error::Driver { .. }), "{error}");
    bed.stream.fill(&slice, 1).unwrap();
    assert_eq!(bed.stream.download::<u8>(&slice, 2).unwrap(), [1, 1]);
}

#[test]
fn streams_wait_for_events() {
    let (first, second) = (Bed::new(), Bed::new());
    let (large, small) = (first.bytes(64 << 20), first.bytes(2));
    let event = Event::new(&gpu().device).unwrap();
    for round in 0..10u8 {
        first.stream.fill(&large, round).unwrap();
        first.stream.fill(&small, round).unwrap();
        event.record(&first.stream).unwrap();
        second.stream.wait(&event).unwrap();
        let got = second.stream.download::<bf16>(&small, 1).unwrap();
        assert_eq!(got[0].to_bits(), u16::from_le_bytes([round; 2]));
    }
    let later = Event::new(&gpu().device).unwrap();
    later.record(&first.stream).unwrap();
    later.synchronize().unwrap();
    assert!(later.micros_since(&event).unwrap() >= 0.0);
}

/// Not a bound on speed, which is the reader's: every kernel must have run and moved something.
#[test]
fn measurements() {
    let gpu = gpu();
    let report = bench::run(&gpu.device, &gpu.kernels).unwrap();
    println!("{}\n{report}", gpu.device.properties().name);
    assert!(report.copy.gb_per_second() > 10.0, "{report}");
    for timing in &report.kernels {
        assert!(timing.micros > 0.0 && timing.gb_per_second() > 0.1, "{timing:?}");
    }
}
