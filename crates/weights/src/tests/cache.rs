//! The cache of what a rank holds: equal to what it was made of, made anew when that changes, and never trusted blindly.

use std::fs::{File, FileTimes};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use spark_backend::Rank;

use super::files::{Tensor, folder, open};
use super::ranks::stacked;
use super::stream::{model, text};
use crate::{LoadOptions, LoadProgress, ParamSpec, Shard};

/// Everything of a model through the cache in `cache`, and the bytes that were read for it.
fn load(dir: &Path, specs: &[ParamSpec], cache: &Path, rank: Rank) -> (Vec<String>, u64) {
    let read = Arc::new(Mutex::new(0));
    let progress = Arc::clone(&read);
    let options = LoadOptions {
        rank,
        cache: Some(cache.to_owned()),
        progress: Some(Arc::new(move |now: LoadProgress| *progress.lock().unwrap() = now.bytes_total)),
        ..LoadOptions::default()
    };
    let mut params = open(dir).unwrap().stream(specs, &options).unwrap();
    let all = specs.iter().map(|spec| text(&mut params, spec)).collect();
    params.finish().unwrap();
    let read = *read.lock().unwrap();
    (all, read)
}

/// The caches in a folder.
fn caches(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Models of every scheme.
fn models() -> Vec<(Vec<Tensor>, Vec<ParamSpec>)> {
    let experts = |kind: &str| {
        let name = "model.layers.0.mlp.experts";
        let tensors = stacked(kind).into_iter();
        let tensors =
            tensors.map(|tensor| Tensor { name: tensor.name.replace("e.", &format!("{name}.")), ..tensor });
        (tensors.collect(), vec![ParamSpec::experts(name, 2, 64, 192)])
    };
    let mut all = vec![model(), experts("fp8 by block"), experts("nvfp4")];
    let bias = super::files::f32s("o.bias", &[2], &[0.5, -1.0]);
    let weight = super::files::bf16s("o.weight", &[2, 4], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    all.push((vec![weight, bias], vec![ParamSpec::linear("o", 2, 4, Shard::Columns).with_bias()]));
    let (tensors, spec) = qkv();
    all.push((tensors, vec![spec]));
    all
}

/// Three layers that are stored as one, and split.
fn qkv() -> (Vec<Tensor>, ParamSpec) {
    let values: Vec<f32> = (0..12u8).map(f32::from).collect();
    let weight = super::files::bf16s("visual.qkv.weight", &[6, 2], &values);
    let bias = super::files::f32s("visual.qkv.bias", &[6], &values[..6]);
    let spec = ParamSpec::linear("visual.qkv", 6, 2, Shard::Stacked { count: 3 }).with_bias();
    (vec![weight, bias], spec)
}

#[test]
fn a_cache_is_of_one_way_to_split() {
    let (tensors, split) = qkv();
    let whole = ParamSpec { shard: Shard::Replicated, ..split.clone() };
    let (dir, cache) = (folder(&tensors), tempfile::tempdir().unwrap());
    let rank = Rank::new(1, 2).unwrap();
    let both = [whole, split].map(|spec| {
        let [first, second] =
            [(); 2].map(|()| load(dir.path(), std::slice::from_ref(&spec), cache.path(), rank).0);
        assert_eq!(first, second, "from the checkpoint and from the cache");
        first
    });
    assert_ne!(both[0], both[1]);
}

#[test]
fn what_comes_from_the_cache_is_what_went_in() {
    for (tensors, specs) in models() {
        let (dir, cache) = (folder(&tensors), tempfile::tempdir().unwrap());
        for (number, rank) in [Rank::new(1, 2).unwrap(), Rank::SINGLE].into_iter().enumerate() {
            let mut plain = open(dir.path())
                .unwrap()
                .load(&specs, &LoadOptions { rank, ..LoadOptions::default() })
                .unwrap();
            let want: Vec<String> = specs.iter().map(|spec| text(&mut plain, spec)).collect();
            let (first, _) = load(dir.path(), &specs, cache.path(), rank);
            assert_eq!(caches(cache.path()).len(), number + 1, "one a rank, and nothing unfinished");
            // The tensors are gone, the files still look the same: what comes now comes from the cache.
            let path = dir.path().join("model.safetensors");
            let (bytes, time) =
                (std::fs::read(&path).unwrap(), std::fs::metadata(&path).unwrap().modified().unwrap());
            let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(&vec![0x11; bytes.len() - header], header as u64).unwrap();
            file.set_times(FileTimes::new().set_modified(time)).unwrap();
            let (second, read) = load(dir.path(), &specs, cache.path(), rank);
            assert!(first == want && second == want, "{rank:?}: {specs:?}");
            assert!(read > 0, "progress is told");
            file.write_all_at(&bytes, 0).unwrap();
            file.set_times(FileTimes::new().set_modified(time)).unwrap();
        }
    }
}

#[test]
fn a_cache_of_something_else_or_a_broken_one_is_made_anew() {
    let (tensors, specs) = model();
    let (dir, cache) = (folder(&tensors), tempfile::tempdir().unwrap());
    let load = || load(dir.path(), &specs, cache.path(), Rank::SINGLE).0;
    let want = load();
    let path = caches(cache.path()).remove(0);
    let whole = std::fs::read(&path).unwrap();
    // A bit of the parameters, which come first: the cache goes, and the next start makes it again.
    // (What fills the space between two of them is zero.)
    let other = (9000..).find(|&at| whole[at] != 0).unwrap();
    for at in [4096 + 3, other] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(load() == want, "byte {at}");
        assert!(!path.exists(), "byte {at}");
        assert!(load() == want && path.exists());
    }
    // What is wrong at a glance is replaced at once: lengths, the name of the format, the key, index and trailer.
    let broken = [whole[..100].to_vec(), whole[..whole.len() - 1].to_vec(), Vec::new()].into_iter();
    let flipped = [0, 20, whole.len() - 200, whole.len() - 60, whole.len() - 1].map(|at| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        bytes
    });
    for bytes in broken.chain(flipped) {
        std::fs::write(&path, &bytes).unwrap();
        assert!(load() == want);
        assert!(std::fs::read(&path).unwrap() != bytes, "made anew");
    }
    // Another checkpoint in the same place, and what a killed process left.
    std::fs::write(path.with_extension("unfinished-4000000000"), "half").unwrap();
    let file = File::options().write(true).open(dir.path().join("model.safetensors")).unwrap();
    file.set_times(FileTimes::new().set_modified(SystemTime::now() + Duration::from_secs(9))).unwrap();
    assert!(load() == want);
    let now = caches(cache.path());
    assert!(now.len() == 1 && now[0] != path, "{now:?}");
}

/// Ranks with slices of experts and ranks with whole ones never use each other's caches.
#[test]
fn a_cache_is_of_one_way_to_share_experts() {
    let (tensors, slices) = models().remove(1);
    let whole: Vec<_> = slices.iter().map(|spec| spec.clone().sharded(Shard::WholeExperts)).collect();
    let (dir, cache) = (folder(&tensors), tempfile::tempdir().unwrap());
    let rank = Rank::new(1, 2).unwrap();
    for specs in [&slices, &whole, &whole, &slices] {
        let options = LoadOptions { rank, ..LoadOptions::default() };
        let mut plain = open(dir.path()).unwrap().load(specs, &options).unwrap();
        let want: Vec<String> = specs.iter().map(|spec| text(&mut plain, spec)).collect();
        assert!(load(dir.path(), specs, cache.path(), rank).0 == want, "{specs:?}");
        assert_eq!(caches(cache.path()).len(), 1);
    }
}

#[test]
fn a_folder_that_cannot_be_written_does_not_stop_a_start() {
    let (tensors, specs) = model();
    let dir = folder(&tensors);
    let no_folder = dir.path().join("config.json");
    let (all, _) = load(dir.path(), &specs, &no_folder, Rank::SINGLE);
    assert_eq!(all.len(), specs.len());
}
