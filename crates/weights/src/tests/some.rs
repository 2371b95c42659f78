//! Reading a part of a checkpoint: some parameters, single tensors.

use crate::tests::files::{bf16s, f32s, folder, open};
use crate::{LoadOptions, ParamSpec};

#[test]
fn a_part_is_loaded_and_the_rest_left_alone() {
    let tensors = [
        bf16s("model.norm.weight", &[2], &[1.0, 2.0]),
        f32s("model.layers.0.mlp.gate.weight", &[1, 2], &[3.0, 4.0]),
    ];
    let dir = folder(&tensors);
    let checkpoint = open(dir.path()).unwrap();
    let norm = [ParamSpec::vector("model.language_model.norm.weight", [1, 2])];
    assert!(checkpoint.load(&norm, &LoadOptions::default()).is_err(), "a whole model uses every tensor");
    let mut params = checkpoint.load_some(&norm, &LoadOptions::default()).unwrap();
    assert_eq!(params.vector("model.language_model.norm.weight").unwrap().values, [1.0, 2.0]);
    let missing = [ParamSpec::vector("model.language_model.other.weight", [1, 2])];
    let error = checkpoint.load_some(&missing, &LoadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("other.weight"), "{error}");
}

#[test]
fn a_tensor_is_read_as_stored_under_any_of_its_names() {
    let values = [3.0f32, 4.0];
    let dir = folder(&[f32s("model.a.weight", &[2], &[1.0, 2.0]), f32s("model.b.weight", &[2], &values)]);
    let checkpoint = open(dir.path()).unwrap();
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    for name in ["model.b.weight", "model.language_model.b.weight", "language_model.model.b.weight"] {
        assert_eq!(checkpoint.read_tensor(name).unwrap(), bytes);
    }
    assert!(checkpoint.read_tensor("model.c.weight").unwrap_err().to_string().contains("model.c.weight"));
    std::fs::write(dir.path().join("model.safetensors"), [0; 16]).unwrap();
    assert!(checkpoint.read_tensor("model.b.weight").is_err(), "a file that shrank is an error");
}
