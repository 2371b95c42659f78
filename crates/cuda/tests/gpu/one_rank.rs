//! A group of one: everything that ranks do together, on one GPU, must change nothing. Several are in `ranks.rs`.

use spark_backend::{Backend as _, Dtype, KvDtype, Rank, VectorWeight};
use spark_comm::nccl::Group;
use spark_cuda::{CudaBackend, CudaOptions, Driver, Stream, Team};

use super::backend::{bits, cuda, options, pending_steps};
use super::team::in_ranks;
use super::tiny::{Share, state};

#[test]
fn a_group_of_one_changes_no_bit() {
    in_ranks("one_rank::a_group_of_one_changes_no_bit", 1, changes_no_bit);
}

#[test]
fn long_prompts_in_halves_are_those_without_a_group() {
    in_ranks("one_rank::long_prompts_in_halves_are_those_without_a_group", 1, |group| {
        super::ranks::long_prompts(group, Share::Slices)
    });
}

fn changes_no_bit(group: &Group) -> String {
    let run = |options: &CudaOptions| {
        let mut run = cuda(9, options);
        let outputs: Vec<_> = pending_steps().iter().map(|step| bits(&run.step(step))).collect();
        (outputs, run.backend.num_replays())
    };
    let (want, _) = run(&options());
    let (got, replays) = run(&CudaOptions { group: Some(group.clone()), ..options() });
    assert_eq!((got, replays), (want, 6));
    String::new()
}

#[test]
fn a_given_up_group_ends_the_backend() {
    in_ranks("one_rank::a_given_up_group_ends_the_backend", 1, |group| {
        let mut run = cuda(9, &CudaOptions { group: Some(group.clone()), ..options() });
        assert_eq!(run.backend.rank(), Rank::SINGLE);
        let steps = pending_steps();
        run.step(&steps[0]);
        run.begin(&steps[1]).unwrap();
        assert!(group.aborter().abort("rank 7 is gone"));
        let error = run.backend.output().unwrap_err().to_string();
        assert!(error.ends_with("rank 7 is gone"), "{error}");
        assert!(run.begin(&steps[2]).unwrap_err().to_string().ends_with("rank 7 is gone"));
        assert!(CudaBackend::new(&CudaOptions { group: Some(group.clone()), ..options() }).is_err());
        String::new()
    });
}

#[test]
fn broadcasts_need_the_roots_tensor() {
    in_ranks("one_rank::broadcasts_need_the_roots_tensor", 1, |group| {
        let mut backend = CudaBackend::new(&CudaOptions { group: Some(group.clone()), ..options() }).unwrap();
        let x = backend.vector(VectorWeight { values: vec![1.5; 32], shape: [2, 16] }).unwrap();
        // Weights are in place from here on.
        backend.allocate_state(state(1, KvDtype::Bf16)).unwrap();
        let got = backend.broadcast(Some(x.clone()), [2, 16], 0).unwrap();
        assert_eq!(backend.to_host(&got).unwrap(), (vec![1.5; 32], [2, 16]));
        assert!(backend.broadcast(Some(x.clone()), [4, 8], 0).is_err());
        assert!(backend.broadcast(Some(x), [2, 16], 1).is_err());
        assert!(backend.broadcast(None, [2, 16], 0).is_err());
        String::new()
    });
}

#[test]
fn sizes_are_checked_before_the_library_sees_them() {
    in_ranks("one_rank::sizes_are_checked_before_the_library_sees_them", 1, |group| {
        let device = Driver::open().unwrap().device(0).unwrap();
        let stream = Stream::new(&device).unwrap();
        let team = Team::connect(&device, &stream, group).unwrap();
        let mut plan = spark_cuda::ArenaPlan::default();
        let region = plan.add("test", 64).unwrap();
        let slice = spark_cuda::Arena::new(&device, plan).unwrap().region(region).unwrap();
        let tensor = spark_cuda::Tensor::new(&slice, [1, 16], Dtype::F32).unwrap();
        assert!(team.all_reduce(&stream, &tensor).is_err());
        let slice = slice.slice(0, 64).unwrap();
        assert!(team.all_gather(&stream, &slice, 17).is_err());
        assert!(team.all_gather(&stream, &slice, usize::MAX).is_err());
        assert!(team.broadcast(&stream, &tensor, 1).is_err());
        team.all_gather(&stream, &slice, 16).unwrap();
        stream.synchronize().unwrap();
        team.check().unwrap();
        String::new()
    });
}
