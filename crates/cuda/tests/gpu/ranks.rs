//! Two ranks on two GPUs against one: needs two GPUs, and fails with one. What one GPU can show is in `one_rank.rs`.

use spark_backend::{Dtype, KvDtype, SlotParams, StepInputs, StepOutput};
use spark_comm::nccl::Group;
use spark_cuda::{
    Arena, ArenaPlan, Cubins, CudaBackend, CudaOptions, Device, DeviceSlice, Driver, Kernels, Mailboxes,
    ReduceNorm, Stream, Team, Tensor, bench_team,
};
use spark_testing::Random;

use super::backend::{Run, assert_rows_alike, bits, cuda, decodes, options, pending_steps};
use super::kernel_options;
use super::team::{in_ranks, wait_for_the_first};
use super::tiny::{Chunk, Share, VOCAB, inputs, prompts};
use spark_backend::Backend as _;

const WORLD: usize = 2;

/// This rank's GPU, and its place in the group.
struct Bed {
    device: Device,
    stream: Stream,
    team: Team,
    kernels: Kernels,
}

impl Bed {
    fn new(group: &Group) -> Self {
        let device = Driver::open().unwrap().device(group.rank().index()).unwrap();
        let stream = Stream::new(&device).unwrap();
        let kernels =
            Kernels::load(&device, &Cubins::get(device.arch(), &kernel_options()).unwrap()).unwrap();
        let team = Team::connect(&device, &stream, group).unwrap();
        Self { device, stream, team, kernels }
    }

    fn bytes(&self, num_bytes: u64) -> DeviceSlice {
        let mut plan = ArenaPlan::default();
        let region = plan.add("test", num_bytes).unwrap();
        Arena::new(&self.device, plan).unwrap().region(region).unwrap()
    }

    fn tensor(&self, values: &[f32]) -> Tensor {
        let values: Vec<half::bf16> = values.iter().map(|&v| half::bf16::from_f32(v)).collect();
        let slice = self.bytes(2 * values.len() as u64);
        self.stream.upload(&slice, &values).unwrap();
        Tensor::new(&slice, [1, values.len()], Dtype::Bf16).unwrap()
    }

    fn values(&self, tensor: &Tensor) -> Vec<f32> {
        let values: Vec<half::bf16> = self.stream.download(tensor.slice(), tensor.columns()).unwrap();
        values.into_iter().map(half::bf16::to_f32).collect()
    }
}

/// What a rank brings: whole numbers whose sums bf16 holds.
fn brought(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7 + rank * 31) % 101) as f32 - 50.0).collect()
}

#[test]
fn sums_parts_and_copies_arrive_eager_and_recorded() {
    in_ranks("ranks::sums_parts_and_copies_arrive_eager_and_recorded", WORLD, |group| {
        let (bed, index) = (Bed::new(group), group.rank().index());
        for len in [8, 264, 4096, 100_008, 4 << 20] {
            let mine = brought(index, len);
            let sum: Vec<f32> =
                (0..len).map(|i| brought(0, len)[i..=i][0] + brought(1, len)[i..=i][0]).take(300).collect();
            let x = bed.tensor(&mine);
            bed.team.all_reduce(&bed.stream, &x).unwrap();
            assert_eq!(bed.values(&x)[..sum.len()], sum, "{len}");
            // Recorded, with what it reads put there behind it.
            let x = bed.tensor(&mine);
            let graph = bed.stream.record(|| bed.team.all_reduce(&bed.stream, &x)).unwrap();
            assert_eq!(bed.values(&x), mine, "{len}");
            graph.launch(&bed.stream).unwrap();
            graph.launch(&bed.stream).unwrap();
            let twice: Vec<f32> = sum.iter().map(|v| 2.0 * v).collect();
            assert_eq!(bed.values(&x)[..sum.len()], twice, "{len} recorded");
            for root in 0..WORLD {
                let x = bed.tensor(&mine);
                bed.team.broadcast(&bed.stream, &x, root).unwrap();
                assert_eq!(bed.values(&x), brought(root, len), "{len} from {root}");
            }
            let all: Vec<f32> = (0..WORLD).flat_map(|rank| brought(rank, len)).collect();
            let mut parts = vec![0.0; all.len()];
            parts[index * len..(index + 1) * len].copy_from_slice(&mine);
            let gathered = bed.bytes(4 * all.len() as u64);
            bed.stream.upload(&gathered, &parts).unwrap();
            bed.team.all_gather(&bed.stream, &gathered, len).unwrap();
            let got: Vec<f32> = bed.stream.download(&gathered, all.len()).unwrap();
            assert!(got == all, "gathered {len}");
        }
        String::new()
    });
}

fn of_group(group: &Group, enforce_eager: bool) -> CudaOptions {
    CudaOptions { ordinal: group.rank().index(), group: Some(group.clone()), enforce_eager, ..options() }
}

/// The first steps by themselves, on the GPU of this rank.
fn alone(group: &Group) -> CudaOptions {
    CudaOptions { ordinal: group.rank().index(), enforce_eager: true, ..options() }
}

#[test]
fn logits_are_those_of_one_rank() {
    in_ranks("ranks::logits_are_those_of_one_rank", WORLD, |group| same_logits(group, Share::Slices));
}

#[test]
fn logits_with_whole_experts_are_those_of_one_rank() {
    let name = "ranks::logits_with_whole_experts_are_those_of_one_rank";
    in_ranks(name, WORLD, |group| same_logits(group, Share::Whole));
}

fn same_logits(group: &Group, share: Share) -> String {
    let mut steps = vec![inputs(&prompts(1))];
    let all = &mut steps[0];
    all.logit_rows = (0..all.tokens.len() as u32).collect();
    all.sample_slots = vec![None; all.tokens.len()];
    // Asked for, so that no rank keeps its share of the logits to itself.
    all.prompt_targets = vec![Some((0, 0)); all.tokens.len()];
    steps.extend(decodes(3));
    steps.push(inputs(&[
        Chunk::known(0, 8, &[5]),
        Chunk::known(3, 0, &[9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12, 13, 14, 15, 16, 17, 18]),
        Chunk::known(2, 20, &[6]),
    ]));
    let logits = |options: &CudaOptions| -> Vec<Vec<Vec<f32>>> {
        let mut run = Run::sharing(share, CudaBackend::new(options).unwrap(), 4, KvDtype::Bf16);
        steps.iter().map(|step| run.logits(step, None)).collect()
    };
    let want = logits(&alone(group));
    let got = logits(&of_group(group, true));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert_rows_alike(got, want, &format!("rank {} step {i}", group.rank().index()));
    }
    // The ranks must have the same bits.
    hash(&got.concat())
}

/// Long prompts whose sums run beside other work, against the same step in order and on one GPU: logits.
pub(crate) fn long_prompts(group: &Group, share: Share) -> String {
    let mut random = Random::new(9);
    let mut prompt = |slot: usize, len: usize| {
        let tokens: Vec<u32> = (0..len).map(|_| random.below(VOCAB) as u32).collect();
        Chunk::known(slot, 0, &tokens)
    };
    let mut step = inputs(&[prompt(0, 60), prompt(1, 50), prompt(2, 40)]);
    step.logit_rows = (0..50).map(|row| 3 * row).collect();
    step.sample_slots = vec![None; 50];
    step.prompt_targets = vec![Some((0, 0)); 50];
    let mut of_one = Run::new(CudaBackend::new(&alone(group)).unwrap(), 4, KvDtype::Bf16);
    let want = of_one.logits(&step, None);
    let options = CudaOptions { overlap_rows: Some(130), ..of_group(group, true) };
    let mut run = Run::sharing(share, CudaBackend::new(&options).unwrap(), 4, KvDtype::Bf16);
    let before = run.backend.num_overlaps();
    let got = run.logits(&step, None);
    // Four norms have something to add, in two halves each.
    assert_eq!(run.backend.num_overlaps() - before, 2 * 4);
    assert_rows_alike(&got, &want, "in halves");
    for _ in 0..20 {
        assert!(run.logits(&step, None) == got, "the same bits again");
    }
    // Short steps, and steps after it.
    let short = inputs(&prompts(1));
    run.step(&short);
    assert_eq!(run.backend.num_overlaps() - before, 21 * 2 * 4);
    hash(&got)
}

/// The bits of all values.
fn hash(rows: &[Vec<f32>]) -> String {
    let bits = rows.iter().flatten().map(|v| v.to_bits());
    format!("{:016x}", bits.fold(0u64, |hash, bits| (hash ^ u64::from(bits)).wrapping_mul(0x100_0000_01b3)))
}

#[test]
fn long_prompts_in_halves_are_those_of_one_rank() {
    let name = "ranks::long_prompts_in_halves_are_those_of_one_rank";
    in_ranks(name, WORLD, |group| long_prompts(group, Share::Slices));
}

#[test]
fn long_prompts_in_halves_with_whole_experts_are_those_of_one_rank() {
    let name = "ranks::long_prompts_in_halves_with_whole_experts_are_those_of_one_rank";
    in_ranks(name, WORLD, |group| long_prompts(group, Share::Whole));
}

fn outputs(run: &mut Run<CudaBackend>, steps: &[StepInputs]) -> Vec<StepOutput> {
    steps.iter().map(|step| run.step(step)).collect()
}

#[test]
fn recorded_steps_equal_eager_ones_bit_by_bit() {
    in_ranks("ranks::recorded_steps_equal_eager_ones_bit_by_bit", WORLD, equal_eager);
}

fn equal_eager(group: &Group) -> String {
    let mut run = cuda(9, &of_group(group, false));
    let steps = pending_steps();
    let recorded: Vec<_> = outputs(&mut run, &steps).iter().map(bits).collect();
    assert_eq!(run.backend.num_replays(), 6);
    // The same steps again, not recorded: with media, as far as the backend knows.
    for slot in 0..9 {
        run.backend.admit(slot, SlotParams { logprobs: Some(3), ..SlotParams::greedy() }).unwrap();
    }
    let eager: Vec<StepInputs> =
        steps.iter().map(|step| StepInputs { has_media: true, ..step.clone() }).collect();
    let eager: Vec<_> = outputs(&mut run, &eager).iter().map(bits).collect();
    assert_eq!(run.backend.num_replays(), 6);
    assert_eq!(eager, recorded);
    format!("{recorded:?}")
}

/// Greedy and random rows, with penalties, biases, masks and without, with filters and log-probabilities among them or not: all
/// ranks draw the same tokens, and mostly those of one rank.
#[test]
fn tokens_are_the_same_on_all_ranks() {
    in_ranks("ranks::tokens_are_the_same_on_all_ranks", WORLD, |group| {
        let mut of_one = cuda(9, &alone(group));
        let mut of_group = cuda(9, &of_group(group, false));
        let (mut all, mut same, mut count) = (Vec::new(), 0, 0);
        for round in 0..4 {
            for slot in 0..6 {
                let params = params(round, slot);
                of_one.backend.admit(slot, params.clone()).unwrap();
                of_group.backend.admit(slot, params).unwrap();
            }
            let mut random = Random::new(round as u64);
            for i in 0..8 {
                let chunks: Vec<Chunk> =
                    (0..6).map(|slot| Chunk::known(slot, i, &[random.below(VOCAB) as u32])).collect();
                let mut step = inputs(&chunks);
                if i % 3 == 1 {
                    // Tokens of the first share only, of the second only, and none at all.
                    let mask = |allowed: std::ops::Range<usize>| -> Vec<u32> {
                        let bit = |token: usize| u32::from(allowed.contains(&token));
                        (0..VOCAB.div_ceil(32))
                            .map(|word| (0..32).map(|i| bit(32 * word + i) << i).sum())
                            .collect()
                    };
                    step.masks =
                        vec![(0, mask(3..9)), (1, mask(200..205)), (2, mask(0..0)), (3, mask(140..160))];
                }
                let [want, got] = [&mut of_one, &mut of_group].map(|run| run.step(&step));
                let tokens =
                    |output: &StepOutput| -> Vec<u32> { output.sampled.iter().map(|s| s.token).collect() };
                for (want, got) in want.sampled.iter().zip(&got.sampled) {
                    assert_eq!(got.named.len(), if round == 3 && got.slot == 2 { 3 } else { 0 });
                    if want.token == got.token {
                        let is_near = |(want, got): (&f32, &f32)| (want - got).abs() < 0.1;
                        assert!(want.named.iter().zip(&got.named).all(is_near), "{want:?} {got:?}");
                    }
                    all.push(got.named.iter().map(|value| value.to_bits()).collect());
                }
                let (want, got) = (tokens(&want), tokens(&got));
                if i % 3 == 1 {
                    assert!((3..9).contains(&got[0]) && (200..205).contains(&got[1]), "{got:?}");
                    assert!((140..160).contains(&got[3]), "{got:?}");
                }
                same += want.iter().zip(&got).filter(|(want, got)| want == got).count();
                count += want.len();
                all.push(got);
            }
        }
        // Roundings of the sums change a few.
        assert!(same * 10 >= count * 8, "{same} of {count} tokens are those of one rank");
        println!("{same} of {count} tokens are those of one rank");
        format!("{all:?}")
    });
}

/// Rounds 0 and 1 need only the best of every rank, 2 and 3 all logits.
fn params(round: usize, slot: usize) -> SlotParams {
    let mut params = SlotParams::greedy();
    if slot % 2 == 1 {
        (params.temperature, params.seed) = (0.7, 100 + slot as u64);
    }
    if round % 2 == 1 && slot > 1 {
        (params.presence_penalty, params.repetition_penalty) = (0.5, 1.2);
        params.logit_bias = vec![(7, 3.0), (149, 2.0), (151, 2.0), (280, -4.0)];
    }
    if round == 2 && slot == 3 {
        (params.top_k, params.top_p) = (20, 0.8);
    }
    if round == 3 && slot == 0 {
        params.logprobs = Some(2);
    }
    if round == 3 && slot == 2 {
        // Of both shares.
        (params.logprobs, params.named_tokens) = (Some(0), vec![1, 150, 280]);
    }
    params
}

#[test]
fn giving_up_ends_a_step_that_waits_for_a_rank() {
    in_ranks("ranks::giving_up_ends_a_step_that_waits_for_a_rank", WORLD, |group| {
        let bed = Bed::new(group);
        if !group.rank().is_first() {
            // Never sends its part.
            wait_for_the_first();
            assert!(group.aborter().abort("rank 0 gave up"));
            return "ended".to_owned();
        }
        let x = bed.tensor(&[1.0; 4096]);
        bed.team.all_reduce(&bed.stream, &x).unwrap();
        let aborter = group.aborter();
        let other = std::thread::spawn(move || aborter.abort("rank 1 hangs"));
        bed.stream.synchronize().unwrap();
        assert!(other.join().unwrap());
        let error = bed.team.check().unwrap_err().to_string();
        assert!(error.ends_with("rank 1 hangs"), "{error}");
        assert!(bed.team.all_reduce(&bed.stream, &x).is_err());
        "ended".to_owned()
    });
}

/// Sums in the launch of the norm against those of the library: the same bits, over and over, eager and recorded, for any order of
/// numbers of rows. Where GPUs must not reach each other, there are none.
#[test]
fn sums_in_the_norm_are_those_of_the_library() {
    in_ranks("ranks::sums_in_the_norm_are_those_of_the_library", WORLD, |group| {
        let (bed, index) = (Bed::new(group), group.rank().index());
        let is_allowed = std::env::var("NCCL_P2P_DISABLE").is_err();
        let mut hash = 0u64;
        for columns in [256, 4096, 8192, 72] {
            let mailboxes = Mailboxes::open(&bed.device, &bed.stream, &bed.team, columns).unwrap();
            assert_eq!(mailboxes.is_some(), is_allowed);
            let Some(mailboxes) = mailboxes else { continue };
            let mut random = Random::new(10 + index as u64);
            let mut same = Random::new(3);
            let weight = bed.tensor(&same.normals(columns, 1.0));
            for round in 0..60 {
                let rows = [1, 2, 128, 64, 1, 7][round % 6];
                let matrix = |values: &[f32]| {
                    Tensor::new(bed.tensor(values).slice(), [rows, columns], Dtype::Bf16).unwrap()
                };
                let (mine, residual) =
                    (random.normals(rows * columns, 1.0), same.normals(rows * columns, 1.0));
                let [partial, sum] = [matrix(&mine), matrix(&mine)];
                let [got, want] = [matrix(&residual), matrix(&residual)];
                let zeros = vec![0.0; rows * columns];
                let [got_out, want_out] = [matrix(&zeros), matrix(&zeros)];
                let args = |partial, residual| ReduceNorm {
                    partial: Some(partial),
                    residual,
                    weight: &weight,
                    eps: 1e-6,
                };
                bed.team.all_reduce(&bed.stream, &sum).unwrap();
                bed.kernels.reduce_norm(&bed.stream, args(&sum, &want), &want_out).unwrap();
                let norm =
                    || bed.kernels.reduce_norm_ranks(&bed.stream, &mailboxes, args(&partial, &got), &got_out);
                if round % 2 == 0 {
                    norm().unwrap();
                } else {
                    bed.stream.record(norm).unwrap().launch(&bed.stream).unwrap();
                }
                let bits =
                    |x: &Tensor| -> Vec<u16> { bed.stream.download(x.slice(), rows * columns).unwrap() };
                let (got, want) = ([bits(&got), bits(&got_out)], [bits(&want), bits(&want_out)]);
                let first = (0..rows * columns).find(|&i| got[0][i] != want[0][i] || got[1][i] != want[1][i]);
                assert!(got == want, "{columns} columns, round {round}, {rows} rows: first at {first:?}");
                hash = got
                    .concat()
                    .iter()
                    .fold(hash, |hash, &v| (hash ^ u64::from(v)).wrapping_mul(0x100_0000_01b3));
                // One rank is late now and then.
                if round % 5 == index {
                    bed.values(&bed.tensor(&vec![1.0; 1 << 20]));
                }
            }
            // Many in a row, as in a step: the ranks run into each other's exchanges.
            let (x, out) = (bed.tensor(&vec![0.5; columns]), bed.tensor(&vec![0.0; columns]));
            let residual = bed.tensor(&vec![0.0; columns]);
            let args = ReduceNorm { partial: Some(&x), residual: &residual, weight: &weight, eps: 1e-6 };
            let norm = |_| bed.kernels.reduce_norm_ranks(&bed.stream, &mailboxes, args, &out);
            let graph = bed.stream.record(|| (0..50).try_for_each(norm)).unwrap();
            for _ in 0..4 {
                graph.launch(&bed.stream).unwrap();
            }
            // Two ranks bring a half each: whole numbers, which bf16 holds up to 256.
            assert_eq!(bed.values(&residual), vec![200.0; columns]);
        }
        format!("{hash:x}")
    });
}

#[test]
fn giving_up_ends_a_norm_that_waits_for_a_rank() {
    in_ranks("ranks::giving_up_ends_a_norm_that_waits_for_a_rank", WORLD, |group| {
        let bed = Bed::new(group);
        let mailboxes = Mailboxes::open(&bed.device, &bed.stream, &bed.team, 256).unwrap();
        if !group.rank().is_first() {
            wait_for_the_first();
            assert!(group.aborter().abort("rank 0 gave up"));
            return "ended".to_owned();
        }
        if let Some(mailboxes) = mailboxes {
            let [x, residual, weight, out] = [(); 4].map(|()| bed.tensor(&[1.0; 256]));
            let args = ReduceNorm { partial: Some(&x), residual: &residual, weight: &weight, eps: 1e-6 };
            bed.kernels.reduce_norm_ranks(&bed.stream, &mailboxes, args, &out).unwrap();
            let aborter = group.aborter();
            let other = std::thread::spawn(move || aborter.abort("rank 1 hangs"));
            bed.stream.synchronize().unwrap();
            assert!(other.join().unwrap());
        } else {
            assert!(std::env::var("NCCL_P2P_DISABLE").is_ok());
            assert!(group.aborter().abort("rank 1 hangs"));
        }
        assert!(bed.team.check().is_err());
        "ended".to_owned()
    });
}

#[test]
fn measurements_of_collectives() {
    in_ranks("ranks::measurements_of_collectives", WORLD, |group| {
        let bed = Bed::new(group);
        let report = bench_team::run(&bed.device, &bed.team, &bed.kernels).unwrap();
        if group.rank().is_first() {
            println!("{report}");
        }
        assert!(report.sums.iter().all(|sum| sum.eager > 0.0 && sum.in_graph > 0.0));
        String::new()
    });
}
