//! `spark-quantize` and its command: what is written loads here and in the packages whose formats it has, answers like
//! the plain model, and searching is never worse than rounding.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use half::{bf16, f16};
use serde_json::{Value, json};
use spark_cpu::dequantize;
use spark_engine::{Dtype, ModelFiles};
use spark_quantize::{CalibrationMedium, CalibrationPrompt, Error, Format, Kind, Options, Report, quantize};
use spark_testing::{Oracle, Random, kl_divergence, media_bytes, media_path, model_dir};
use spark_vision::{Alpha, DecodeOptions, ImageProcessor, ImageProcessorOverrides};
use spark_weights::{Checkpoint, DiskType, LoadOptions, OpenOptions, Param};
use tempfile::TempDir;

use crate::support::{forward::Forward, server::program};

const DENSE: &str = "dense_vl_bf16";
const MOE: &str = "moe_vl_bf16";
/// Inner size of the experts of [`wide_moe`].
const WIDE: usize = 64;

const AWQ: Format = Format::Awq { group_size: None, search: true };
const AWQ_ROUNDED: Format = Format::Awq { group_size: None, search: false };
const NVFP4: Format = Format::Nvfp4 { search: true };

fn open(folder: &Path) -> Checkpoint {
    Checkpoint::open(&folder.display().to_string(), &OpenOptions::default()).unwrap()
}

/// Quantises the model in `folder` into `out`.
fn run(folder: &Path, format: &Format, prompts: &[CalibrationPrompt], out: &Path) -> Result<Report, Error> {
    // Several shards and an index.
    let options = Options { shard_bytes: 100_000, ..Options::new(format.clone()) };
    quantize(&open(folder), &options, prompts, out, &|_| ())
}

/// The oracle's prompts with their images, and some random ones.
fn prompts(model: &str) -> Vec<CalibrationPrompt> {
    let decode = DecodeOptions::new(Alpha::OverWhite);
    let none = ImageProcessorOverrides::default();
    let processor = ImageProcessor::from_folder(&model_dir(model), &none, decode, [0; 32]).unwrap();
    let oracle = Oracle::load(model).unwrap();
    let placeholder = 268;
    let mut prompts = Vec::new();
    for case in oracle.cases.values() {
        let ids = case.prompt_ids.clone();
        let starts =
            (0..ids.len()).filter(|&i| ids[i] == placeholder && (i == 0 || ids[i - 1] != placeholder));
        let medium = |(name, offset): (&String, usize)| {
            let image = processor.process(&media_bytes(name).unwrap()).unwrap();
            CalibrationMedium { patches: image.patches, grid: image.grid_thw, offset }
        };
        let media = case.media.iter().zip(starts).map(medium).collect();
        prompts.push(CalibrationPrompt { ids, media });
    }
    let mut random = Random::new(1);
    let texts = (0..6).map(|_| CalibrationPrompt { ids: random.token_ids(48, 256), media: Vec::new() });
    prompts.extend(texts);
    prompts
}

/// [`MOE`] with wider experts: AWQ has no groups that divide 48. In transformers' layout, bf16.
fn wide_moe(folder: &Path) {
    let source = open(&model_dir(MOE));
    let mut random = Random::new(2);
    let mut tensors = Vec::new();
    for tensor in source.tensors() {
        let bytes = source.read_tensor(&tensor.name).unwrap();
        let (mut shape, mut out) = (tensor.shape.clone(), bytes.clone());
        let mut more = |count: usize| -> Vec<u8> {
            random.normals(count, 0.1).iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()
        };
        if tensor.name.ends_with("experts.gate_up_proj") {
            // [experts, hidden, gate | up]
            let half = shape[2];
            out = bytes.chunks(half).flat_map(|half| [half.to_vec(), more(WIDE - 48)].concat()).collect();
            shape[2] = 2 * WIDE;
        } else if tensor.name.ends_with("experts.down_proj") {
            // [experts, inner, hidden]
            let expert = 2 * shape[1] * shape[2];
            let columns = shape[2];
            let wider = |expert: &[u8]| [expert.to_vec(), more((WIDE - 48) * columns)].concat();
            out = bytes.chunks(expert).flat_map(wider).collect();
            shape[1] = WIDE;
        }
        tensors.push((tensor.name.clone(), dtype_name(tensor.dtype), shape, out));
    }
    for file in std::fs::read_dir(model_dir(MOE)).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !name.contains("safetensors") {
            std::fs::copy(&path, folder.join(name)).unwrap();
        }
    }
    change_config(folder, |config| config["text_config"]["moe_intermediate_size"] = WIDE.into());
    write_tensors(&folder.join("model.safetensors"), &tensors);
}

fn change_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
}

fn dtype_name(dtype: DiskType) -> &'static str {
    match dtype {
        DiskType::Bf16 => "BF16",
        DiskType::F16 => "F16",
        DiskType::F32 => "F32",
        other => panic!("no plain type: {other:?}"),
    }
}

/// Writes a safetensors file: name, type, shape and bytes of each tensor.
fn write_tensors(path: &Path, tensors: &[(String, &str, Vec<usize>, Vec<u8>)]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend(bytes);
    }
    let header = Value::Object(header).to_string();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length[..], header.as_bytes(), &data].concat()).unwrap();
}

/// A plain multimodal MoE model that every format takes, and a folder for what is made of it.
fn moe() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain");
    std::fs::create_dir(&plain).unwrap();
    wide_moe(&plain);
    (folder, plain)
}

/// Mean divergence of the next-token distributions of two models over all rows of the oracle's cases, and the share of
/// rows whose best token is the same.
fn compare(plain: &Path, quantised: &Path, cases_of: &str) -> (f64, f64) {
    let load = |folder: &Path| Forward::load(&folder.display().to_string(), Dtype::F32);
    let (mut plain, mut quantised) = (load(plain), load(quantised));
    let (mut divergence, mut same, mut rows) = (0.0, 0, 0);
    for case in Oracle::load(cases_of).unwrap().cases.values() {
        let (want, got) = (plain.run(case), quantised.run(case));
        let (want, [_, vocab]) = &want["logits"];
        for (want, got) in want.chunks(*vocab).zip(got["logits"].0.chunks(*vocab)) {
            divergence += kl_divergence(got, want);
            same += usize::from(best(want) == best(got));
            rows += 1;
        }
    }
    (divergence / rows as f64, same as f64 / rows as f64)
}

fn best(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
}

#[test]
fn quantised_models_predict_like_the_plain_one() {
    let (folder, wide) = moe();
    // These networks are random, so that every error grows through them, as the square: FP8's errors are a third of
    // those of 4 bits. A wrong scale or a swapped nibble gives divergences above 2.
    for (plain, cases, limit) in [(model_dir(DENSE), DENSE, 0.3), (wide, MOE, 0.8)] {
        let prompts = prompts(cases);
        for (name, format, limit) in
            [("awq", AWQ, limit), ("nvfp4", NVFP4, limit), ("fp8", Format::Fp8, limit / 6.0)]
        {
            let out = folder.path().join(format!("{cases}-{name}"));
            run(&plain, &format, &prompts, &out).unwrap();
            let (divergence, same) = compare(&plain, &out, cases);
            assert!(divergence < limit, "{cases} {name}: divergence {divergence}");
            assert!(same > 0.5, "{cases} {name}: the best token is the same in {same} of all rows");
        }
    }
}

#[test]
fn text_models_are_quantised_too() {
    let folder = tempfile::tempdir().unwrap();
    for model in
        ["text_moe_bf16", "text_dense_bf16_tied", "text_dense_f16", "text_dense_f32", "moe_vl_bf16_resave"]
    {
        for (name, format, limit) in
            [("nvfp4", Format::Nvfp4 { search: false }, 0.8), ("fp8", Format::Fp8, 0.1)]
        {
            let out = folder.path().join(format!("{model}-{name}"));
            run(&model_dir(model), &format, &[], &out).unwrap();
            let (divergence, _) = compare(&model_dir(model), &out, model);
            assert!(divergence < limit, "{model} {name}: divergence {divergence}");
        }
    }
}

/// Squared errors of layers that are searched together.
fn together(report: &Report, kinds: &[Kind]) -> f64 {
    report.kinds.iter().filter(|kind| kinds.contains(&kind.kind)).map(|kind| kind.squared_error()).sum()
}

#[test]
fn searching_is_never_worse_than_rounding() {
    let (folder, wide) = moe();
    for (plain, cases) in [(model_dir(DENSE), DENSE), (wide, MOE)] {
        let prompts = prompts(cases);
        let out = |name: &str| folder.path().join(format!("{cases}-{name}"));
        let rounded = run(&plain, &AWQ_ROUNDED, &prompts, &out("rounded")).unwrap();
        let searched = run(&plain, &AWQ, &prompts, &out("searched")).unwrap();
        assert_eq!(searched.group_size, Some(64));
        for kinds in [&[Kind::Q, Kind::K, Kind::V][..], &[Kind::O], &[Kind::Gate, Kind::Up], &[Kind::Down]] {
            let (before, after) = (together(&rounded, kinds), together(&searched, kinds));
            assert!(after < 0.97 * before, "{cases} {kinds:?}: {after} of {before}");
        }
        let rounded = run(&plain, &Format::Nvfp4 { search: false }, &[], &out("nvfp4-rounded")).unwrap();
        let searched = run(&plain, &NVFP4, &[], &out("nvfp4-searched")).unwrap();
        for (before, after) in rounded.kinds.iter().zip(&searched.kinds) {
            assert!(after.squared_error() < 0.9 * before.squared_error(), "{before:?} {after:?}");
            assert_eq!(before.bytes_after, after.bytes_after);
        }
    }
}

/// A matrix `[n, k]`.
struct Dense {
    k: usize,
    values: Vec<f32>,
}

/// Every linear layer of the decoder as the engine reads it, by its normalised name.
fn weights(folder: &Path) -> BTreeMap<String, Dense> {
    let files = ModelFiles::open(&folder.display().to_string(), None).unwrap();
    let all = std::sync::Mutex::new(BTreeMap::new());
    let add = |name: String, matrix: &spark_backend::Matrix| {
        let dense = Dense { k: matrix.k, values: dequantize(matrix).unwrap() };
        all.lock().unwrap().insert(name, dense);
    };
    let sink = |index: usize, param: Param| {
        let spec = &files.specs[index];
        match &param {
            Param::Linear(weight) if spec.name.contains(".layers.") => {
                let spark_weights::ParamKind::Linear { parts, .. } = &spec.kind else { unreachable!() };
                for ((part, _), matrix) in parts.iter().zip(&weight.parts) {
                    add(format!("{}.{part}", spec.name).trim_end_matches('.').to_owned(), matrix);
                }
            }
            Param::Experts(weight) => {
                for (expert, (gate_up, down)) in weight.experts.iter().enumerate() {
                    let parts = gate_up.parts.iter().chain(&down.parts);
                    for (part, matrix) in ["gate_proj", "up_proj", "down_proj"].iter().zip(parts) {
                        add(format!("{}.{expert}.{part}", spec.name), matrix);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    };
    files.checkpoint.load_each(&files.specs, &LoadOptions::default(), &sink).unwrap();
    all.into_inner().unwrap()
}

/// A norm or another plain tensor in float32.
fn plain_tensor(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let bytes = checkpoint.read_tensor(name).unwrap();
    bytes.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
}

/// Euclidean norm of the difference relative to that of `want`.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    let square =
        |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v) * f64::from(v)).sum::<f64>();
    let error = square(&mut got.iter().zip(want).map(|(a, b)| a - b));
    (error / square(&mut want.iter().copied())).sqrt()
}

#[test]
fn folded_scales_cancel_in_what_is_written() {
    let (folder, plain) = moe();
    let out = folder.path().join("awq");
    run(&plain, &AWQ, &prompts(MOE), &out).unwrap();
    let (before, after) = (open(&plain), open(&out));
    let (plain, quantised) = (weights(&plain), weights(&out));
    let mut num_scaled = 0;
    for layer in 0..3 {
        let base = format!("model.language_model.layers.{layer}");
        // What a norm was divided by, its readers were multiplied by.
        let mut scale = |norm: &str| -> Vec<f32> {
            let name = format!("{base}.{norm}.weight");
            let (old, new) = (plain_tensor(&before, &name), plain_tensor(&after, &name));
            let scale: Vec<f32> = old.iter().zip(&new).map(|(old, new)| old / new).collect();
            num_scaled += usize::from(scale.iter().any(|s| (s - 1.0).abs() > 0.1));
            scale
        };
        let check = |module: &str, scale: &[f32], limit: f64| {
            let (plain, quantised) = (&plain[module], &quantised[module]);
            let scales = scale.iter().cycle();
            let unfolded: Vec<f32> = quantised.values.iter().zip(scales).map(|(w, s)| w / s).collect();
            assert_eq!(scale.len(), plain.k);
            let distance = distance(&unfolded, &plain.values);
            assert!(distance < limit, "{module}: {distance}");
        };
        let qkv = scale("input_layernorm");
        for part in ["q_proj", "k_proj", "v_proj"] {
            check(&format!("{base}.self_attn.{part}"), &qkv, 0.15);
        }
        let mlp = scale("post_attention_layernorm");
        check(&format!("{base}.mlp.gate"), &mlp, 4e-3);
        for expert in 0..6 {
            let module = |part: &str| format!("{base}.mlp.experts.{expert}.{part}");
            check(&module("gate_proj"), &mlp, 0.15);
            // The rows of up were divided by what the columns of down were multiplied by.
            let (up, down) = (&quantised[&module("up_proj")], &quantised[&module("down_proj")]);
            let unfolded = |columns: &[f32], row: usize, weights: &BTreeMap<String, Dense>| -> Vec<f32> {
                let weight = &weights[&module("up_proj")];
                weight.values[row * weight.k..][..weight.k].iter().zip(columns).map(|(w, s)| w / s).collect()
            };
            let ones = vec![1.0; up.k];
            for row in 0..WIDE {
                let column = |weight: &Dense| -> Vec<f32> {
                    weight.values.iter().skip(row).step_by(weight.k).copied().collect()
                };
                let product = |up: &[f32], down: &[f32]| -> Vec<f32> {
                    up.iter().flat_map(|u| down.iter().map(move |d| u * d)).collect()
                };
                let got = product(&unfolded(&mlp, row, &quantised), &column(down));
                let want = product(&unfolded(&ones, row, &plain), &column(&plain[&module("down_proj")]));
                assert!(distance(&got, &want) < 0.35, "{base} expert {expert} row {row}");
            }
        }
    }
    assert!(num_scaled >= 4, "the search found next to no scales: the test shows nothing");
}

/// The tensors of a checkpoint by name: type, shape, bytes.
fn raw(folder: &Path) -> BTreeMap<String, (DiskType, Vec<usize>, Vec<u8>)> {
    let checkpoint = open(folder);
    let read = |name: &str| checkpoint.read_tensor(name).unwrap();
    checkpoint.tensors().map(|t| (t.name.clone(), (t.dtype, t.shape.clone(), read(&t.name)))).collect()
}

/// AutoAWQ's way: nibbles in the order of their bits, columns put right by its reverse order.
fn autoawq_unpack(packed: &[u8], columns: usize) -> Vec<f32> {
    const REVERSE_ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
    let words = packed.chunks(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
    let nibbles: Vec<u32> = words.flat_map(|word| (0..8).map(move |i| word >> (4 * i) & 15)).collect();
    assert!(columns.is_multiple_of(8));
    nibbles.chunks(8).flat_map(|eight| REVERSE_ORDER.map(|i| eight[i] as f32)).collect()
}

/// `[n, k]` of an AWQ layer by AutoAWQ's formula.
fn autoawq_dequantize(tensors: &BTreeMap<String, (DiskType, Vec<usize>, Vec<u8>)>, module: &str) -> Vec<f32> {
    let (_, shape, qweight) = &tensors[&format!("{module}.qweight")];
    let (k, n) = (shape[0], 8 * shape[1]);
    let codes = autoawq_unpack(qweight, n);
    let zeros = autoawq_unpack(&tensors[&format!("{module}.qzeros")].2, n);
    let (dtype, shape, scales) = &tensors[&format!("{module}.scales")];
    assert_eq!(*dtype, DiskType::F16);
    let scales: Vec<f32> = scales.chunks(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
    let group = k / shape[0];
    let value = |row: usize, column: usize| {
        let at = column / group * n + row;
        (codes[column * n + row] - zeros[at]) * scales[at]
    };
    (0..n).flat_map(|row| (0..k).map(move |column| (row, column))).map(|(r, c)| value(r, c)).collect()
}

#[test]
fn awq_layers_are_what_autoawq_reads() {
    let (folder, plain) = moe();
    let out = folder.path().join("awq");
    run(&plain, &AWQ, &prompts(MOE), &out).unwrap();
    let (tensors, weights) = (raw(&out), weights(&out));
    let mut num_layers = 0;
    for (module, weight) in &weights {
        if !tensors.contains_key(&format!("{module}.qweight")) {
            assert!(module.ends_with("mlp.gate"), "{module} is not quantised");
            continue;
        }
        assert_eq!(autoawq_dequantize(&tensors, module), weight.values, "{module}");
        num_layers += 1;
    }
    assert_eq!(num_layers, 3 * (4 + 3 * 6));
}

#[test]
fn nvfp4_and_fp8_layers_have_the_names_of_published_checkpoints() {
    let (folder, plain) = moe();
    let (nvfp4, fp8) = (folder.path().join("nvfp4"), folder.path().join("fp8"));
    run(&plain, &NVFP4, &[], &nvfp4).unwrap();
    run(&plain, &Format::Fp8, &[], &fp8).unwrap();
    let tensors = raw(&nvfp4);
    let base = "model.language_model.layers.1.";
    let shape = |tensors: &BTreeMap<String, (DiskType, Vec<usize>, Vec<u8>)>, name: &str| {
        let (dtype, shape, _) = &tensors[&format!("{base}{name}")];
        (*dtype, shape.clone())
    };
    let scalar = |name: &str| tensors[&format!("{base}{name}.weight_global_scale")].2.clone();
    assert_eq!(shape(&tensors, "mlp.experts.5.up_proj.weight_packed"), (DiskType::U8, vec![WIDE, 32]));
    assert_eq!(shape(&tensors, "mlp.experts.5.up_proj.weight_scale"), (DiskType::F8E4m3, vec![WIDE, 4]));
    assert_eq!(shape(&tensors, "mlp.experts.5.up_proj.weight_global_scale"), (DiskType::F32, vec![1]));
    assert_eq!(
        scalar("mlp.experts.5.up_proj"),
        scalar("mlp.experts.5.gate_proj"),
        "engines fuse gate and up"
    );
    assert_eq!(scalar("self_attn.q_proj"), scalar("self_attn.v_proj"), "engines fuse q, k, v");
    let tensors = raw(&fp8);
    assert_eq!(shape(&tensors, "mlp.experts.gate_up_proj"), (DiskType::F8E4m3, vec![6, 64, 2 * WIDE]));
    assert_eq!(shape(&tensors, "mlp.experts.gate_up_proj_scale_inv"), (DiskType::Bf16, vec![6, 1, 1]));
    assert_eq!(shape(&tensors, "mlp.experts.down_proj"), (DiskType::F8E4m3, vec![6, WIDE, 64]));
    assert_eq!(shape(&tensors, "self_attn.o_proj.weight_scale_inv"), (DiskType::Bf16, vec![1, 1]));
    for out in [&nvfp4, &fp8] {
        let (plain, quantised) = (weights(&plain), weights(out));
        for (module, weight) in &plain {
            let distance = distance(&quantised[module].values, &weight.values);
            assert!(distance < 0.1, "{module}: {distance}");
            assert_eq!(distance == 0.0, module.ends_with("mlp.gate"), "{module}: {distance}");
        }
    }
}

/// Lets AutoAWQ, compressed-tensors and torch dequantise every layer. They take gigabytes, so that the default filter of
/// `.config/nextest.toml` leaves this test out: docs/results/quantised-layouts.md has the command.
#[test]
fn packages_dequantise_to_the_same_values() {
    let (folder, plain) = moe();
    for (name, format, prompts) in
        [("awq", AWQ, prompts(MOE)), ("nvfp4", NVFP4, vec![]), ("fp8", Format::Fp8, vec![])]
    {
        let out = folder.path().join(name);
        run(&plain, &format, &prompts, &out).unwrap();
        check_with_packages(&folder, &out);
    }
}

fn check_with_packages(folder: &TempDir, checkpoint: &Path) {
    let python = std::env::var_os("SPARK_TEST_TORCH_PYTHON")
        .expect("SPARK_TEST_TORCH_PYTHON names a Python with torch");
    let reference = folder.path().join("reference.safetensors");
    let tensors: Vec<_> = weights(checkpoint)
        .into_iter()
        .map(|(name, weight)| {
            let bytes = weight.values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (name, "F32", vec![weight.values.len() / weight.k, weight.k], bytes)
        })
        .collect();
    write_tensors(&reference, &tensors);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/quantised_layers.py");
    let output = Command::new(python).arg(script).arg(checkpoint).arg(&reference).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("layers are equal"), "{stdout}");
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let refuse = |model: &Path, format: &Format, prompts: &[CalibrationPrompt]| {
        let error = run(model, format, prompts, &out).unwrap_err().to_string();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something is left behind: {error}");
        error
    };
    for quantised in ["dense_vl_awq", "moe_vl_fp8_block", "text_moe_nvfp4_modelopt"] {
        let error = refuse(&model_dir(quantised), &NVFP4, &[]);
        assert!(error.contains("quantised already"), "{error}");
    }
    let other = tempfile::tempdir().unwrap();
    for file in [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ] {
        std::fs::copy(model_dir(DENSE).join(file), other.path().join(file)).unwrap();
    }
    change_config(other.path(), |config| config["model_type"] = "llama".into());
    assert!(refuse(other.path(), &NVFP4, &[]).contains("llama"));
    let error = refuse(&model_dir(MOE), &AWQ_ROUNDED, &[]);
    assert!(
        error.contains("experts.0.down_proj") && error.contains("[64, 48]") && error.contains("32"),
        "{error}"
    );
    let odd = Format::Awq { group_size: Some(48), search: false };
    assert!(refuse(&model_dir(MOE), &odd, &[]).contains("48 is not one of"));
    assert!(refuse(&model_dir(DENSE), &AWQ, &[]).contains("calibration prompts"));
    let prompt = |ids: Vec<u32>, offset| {
        let medium = CalibrationMedium { patches: vec![0; 4 * 768].into(), grid: [1, 2, 2], offset };
        vec![CalibrationPrompt { ids, media: vec![medium] }]
    };
    let bad = [(vec![], 0), (vec![288], 0), (vec![1], 1), (vec![1], usize::MAX)];
    for (ids, offset) in bad {
        let error = refuse(&model_dir(DENSE), &AWQ, &prompt(ids, offset));
        assert!(error.contains("calibration prompt 0"), "{error}");
    }
    assert!(refuse(&model_dir("text_dense_f32"), &AWQ, &prompt(vec![1], 0)).contains("text-only"));
}

fn command(arguments: &[&str]) -> Output {
    program(&[&["quantize"], arguments].concat()).output().unwrap()
}

#[test]
fn the_command_writes_a_folder_that_generates() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::copy(media_path("leaf.jpg"), path("leaf.jpg")).unwrap();
    let image = json!({"type": "image_url", "image_url": {"url": "leaf.jpg"}});
    let text = json!({"type": "text", "text": "What is this?"});
    let lines = [
        json!({"messages": [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": "A leaf."}]}),
        json!({"text": "A line of text without a template."}),
    ];
    std::fs::write(path("prompts.jsonl"), lines.map(|line| format!("{line}\n\n")).concat()).unwrap();
    let model = model_dir(DENSE).display().to_string();
    let (prompts, out) = (path("prompts.jsonl"), path("awq"));
    let arguments =
        [&model, "--format", "awq", "--group-size", "32", "--calibration", &prompts, "--out", &out];
    let output = command(&arguments);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    assert!(
        stdout.contains("q_proj") && stdout.contains("of outputs") && stdout.contains("group size 32"),
        "{stdout}"
    );
    let config = open(Path::new(&out)).config().clone();
    assert_eq!(config["quantization_config"]["quant_method"], "awq");
    assert_eq!(config["text_config"], open(Path::new(&model)).config()["text_config"]);

    let output = program(&["generate", &out, "--image", &path("leaf.jpg"), "-n", "4", "What is this?"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let again = command(&arguments);
    assert!(!again.status.success());
    assert!(String::from_utf8_lossy(&again.stderr).contains("not empty"));
}

#[test]
fn the_command_brings_prompts_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("awq").display().to_string();
    let model = model_dir("text_dense_bf16_tied").display().to_string();
    let output = command(&[&model, "--format", "awq", "--out", &out]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("calibrating with 128 prompts"), "{stderr}");
}

#[test]
fn wrong_lines_of_a_calibration_file_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("prompts.jsonl"), folder.path().join("out").display().to_string());
    let model = model_dir(DENSE).display().to_string();
    for (line, problem) in [
        ("{\"prompt\": \"x\"}", "`prompt` is not known"),
        ("{}", "neither messages nor text"),
        ("{\"text\": 1}", "not a string"),
        ("[", "line 2"),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", \"image_url\": {\"url\": \"no.png\"}}]}]}",
            "no.png",
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", \"image_url\": {\"url\": \"http://x/y\"}}]}]}",
            "not a local file",
        ),
    ] {
        std::fs::write(&file, format!("{{\"text\": \"fine\"}}\n{line}\n")).unwrap();
        let calibration = file.display().to_string();
        let output = command(&[&model, "--format", "awq", "--calibration", &calibration, "--out", &out]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && stderr.contains(problem) && stderr.contains("line 2"),
            "{line}: {stderr}"
        );
    }
    let output = command(&[&model, "--format", "fp8", "--group-size", "64", "--out", &out]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("--group-size is for"));
}
