//! Parameters that are loaded while they are taken: the same as loaded at once, in any order.

use std::sync::{Arc, Mutex};

use crate::tests::files::{Tensor, f16s, f32s, folder, i32s, open};
use crate::{Error, LoadOptions, LoadProgress, LoadStrategy, Param, ParamKind, ParamSpec, Params, Shard};

const LAYERS: usize = 3;
const EXPERTS: usize = 5;
const HIDDEN: usize = 32;
const INTER: usize = 16;

/// An AWQ module `[n, k]` with one group, whose numbers depend on its name.
fn awq(name: &str, n: usize, k: usize) -> [Tensor; 3] {
    let hash = name.bytes().fold(7u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte)));
    let words =
        |len: usize| (0..len as u32).map(|i| (i ^ hash).wrapping_mul(2_654_435_761)).collect::<Vec<_>>();
    let scales: Vec<f32> = (0..n).map(|i| 1.0 + (i % 7) as f32).collect();
    [
        i32s(&format!("{name}.qweight"), &[k, n / 8], &words(k * n / 8)),
        i32s(&format!("{name}.qzeros"), &[1, n / 8], &words(n / 8)),
        f16s(&format!("{name}.scales"), &[1, n], &scales),
    ]
}

/// A small mixture of experts: many tensors a parameter.
pub(super) fn model() -> (Vec<Tensor>, Vec<ParamSpec>) {
    let mut tensors = vec![f32s("model.embed_tokens.weight", &[8, HIDDEN], &[0.5; 8 * HIDDEN])];
    let mut specs = vec![ParamSpec::linear("model.embed_tokens", 8, HIDDEN, Shard::Vocab)];
    for layer in 0..LAYERS {
        let prefix = format!("model.layers.{layer}");
        let norm: Vec<f32> = (0..HIDDEN).map(|i| (i + 100 * layer) as f32).collect();
        tensors.push(f32s(&format!("{prefix}.input_layernorm.weight"), &[HIDDEN], &norm));
        specs.push(ParamSpec::vector(format!("{prefix}.input_layernorm.weight"), [1, HIDDEN]));
        for expert in 0..EXPERTS {
            let expert = format!("{prefix}.mlp.experts.{expert}");
            tensors.extend(awq(&format!("{expert}.gate_proj"), INTER, HIDDEN));
            tensors.extend(awq(&format!("{expert}.up_proj"), INTER, HIDDEN));
            tensors.extend(awq(&format!("{expert}.down_proj"), HIDDEN, INTER));
        }
        specs.push(ParamSpec::experts(format!("{prefix}.mlp.experts"), EXPERTS, HIDDEN, INTER));
    }
    (tensors, specs)
}

/// All numbers of a parameter.
pub(super) fn text(params: &mut Params, spec: &ParamSpec) -> String {
    let param = match spec.kind {
        ParamKind::Vector { .. } => params.vector(&spec.name).map(Param::Vector),
        ParamKind::Linear { .. } => params.linear(&spec.name).map(Param::Linear),
        ParamKind::Experts { .. } => params.experts(&spec.name).map(Param::Experts),
    };
    format!("{:?}", param.unwrap())
}

#[test]
fn what_is_loaded_bit_by_bit_is_what_is_loaded_at_once() {
    let (tensors, specs) = model();
    let dir = folder(&tensors);
    let checkpoint = open(dir.path()).unwrap();
    let mut whole = checkpoint.load(&specs, &LoadOptions::default()).unwrap();
    let want: Vec<String> = specs.iter().map(|spec| text(&mut whole, spec)).collect();
    let forward: Vec<usize> = (0..specs.len()).collect();
    let backward: Vec<usize> = forward.iter().rev().copied().collect();
    for strategy in [LoadStrategy::Eager, LoadStrategy::Lazy] {
        for order in [&forward, &backward] {
            let seen = Arc::new(Mutex::new(Vec::new()));
            let progress = Arc::clone(&seen);
            let options = LoadOptions {
                strategy,
                progress: Some(Arc::new(move |now: LoadProgress| progress.lock().unwrap().push(now))),
                ..LoadOptions::default()
            };
            let mut params = checkpoint.stream(&specs, &options).unwrap();
            assert!(params.num_bytes() > 0);
            for &index in order {
                assert_eq!(text(&mut params, &specs[index]), want[index], "{strategy:?}");
            }
            assert!(matches!(params.vector(&specs[1].name), Err(Error::Param { .. })), "taken before");
            assert_eq!(params.num_bytes(), 0);
            params.finish().unwrap();
            let seen = seen.lock().unwrap();
            assert!(seen.iter().all(|now| now.bytes_read <= now.bytes_total && now.bytes_total > 0));
            assert!(seen.iter().any(|now| now.bytes_read == now.bytes_total), "{seen:?}");
        }
    }
}

#[test]
fn what_is_missing_is_told_at_once_and_what_is_broken_when_it_is_taken() {
    let (mut tensors, mut specs) = model();
    let broken =
        tensors.iter_mut().find(|tensor| tensor.name.contains("layers.1.mlp.experts.3.up_proj.scales"));
    broken.unwrap().bytes[..2].copy_from_slice(&[0, 0x7e]);
    let dir = folder(&tensors);
    let checkpoint = open(dir.path()).unwrap();
    let options = LoadOptions::default();
    let left = checkpoint.stream(&specs[1..], &options).unwrap_err();
    assert!(matches!(left, Error::Incomplete { .. }), "{left}");
    let mut params = checkpoint.stream(&specs, &options).unwrap();
    assert!(params.experts("model.layers.2.mlp.experts").is_ok());
    let error = params.experts("model.layers.1.mlp.experts").unwrap_err();
    assert!(matches!(error, Error::NonFinite { .. }), "{error}");
    assert!(error.to_string().contains("layers.1.mlp.experts.3.up_proj"), "{error}");
    assert!(params.experts("model.layers.0.mlp.experts").is_ok());
    let Err(Error::Incomplete { unused, .. }) = params.finish() else { panic!("parameters are left") };
    assert_eq!(unused.len(), 1 + LAYERS);
    specs.push(specs[0].clone());
    assert!(matches!(checkpoint.stream(&specs, &options), Err(Error::Param { .. })), "stated twice");
}
