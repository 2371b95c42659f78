//! A checkpoint to be read: the tensors of Qwen3-30B-A3B as a quantiser stores them, in shards of 5 GB, of random bytes,
//! written at the speed of the disk. Not a model that answers anything.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{FallocateFlags, OFlags, fallocate};
use serde_json::{Map, Value, json};
use spark_models::ModelConfig;
use spark_weights::{ParamKind, ParamSpec};

/// Bytes of a shard's tensors, about.
const SHARD: usize = 5_000_000_000;
/// Bytes that are written at once.
const CHUNK: usize = 16 << 20;
/// Alignment of direct writes.
const ALIGN: usize = 4096;

/// What is written of each tensor, beside random bits: where those are kept, and which bits are set, in every four bytes.
/// Scales and norms get numbers of an ordinary size, so that a model of them computes finite numbers.
#[derive(Debug, Clone, Copy)]
enum Kind {
    I32,
    U8,
    Bf16,
    F16,
    E4m3,
    /// Scales in E4M3: positive, between 2^-6 and 2^-3.
    E4m3Scale,
    F32,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::I32 => "I32",
            Kind::U8 => "U8",
            Kind::Bf16 => "BF16",
            Kind::F16 => "F16",
            Kind::E4m3 | Kind::E4m3Scale => "F8_E4M3",
            Kind::F32 => "F32",
        }
    }

    fn size(self) -> usize {
        match self {
            Kind::I32 | Kind::F32 => 4,
            Kind::Bf16 | Kind::F16 => 2,
            Kind::U8 | Kind::E4m3 | Kind::E4m3Scale => 1,
        }
    }

    /// Bits that stay random, and bits that are set.
    fn masks(self) -> [u32; 2] {
        match self {
            Kind::I32 | Kind::U8 => [!0, 0],
            Kind::Bf16 => [0x80ff_80ff, 0x3c00_3c00],
            Kind::F16 => [0x83ff_83ff, 0x1400_1400],
            Kind::E4m3 => [0xb7b7_b7b7, 0],
            Kind::E4m3Scale => [0x1f1f_1f1f, 0],
            Kind::F32 => [0x007f_ffff, 0x3b80_0000],
        }
    }
}

/// A tensor and where it lies behind its shard's header.
struct Tensor {
    name: String,
    kind: Kind,
    shape: Vec<usize>,
    begin: usize,
}

impl Tensor {
    fn new(name: String, kind: Kind, shape: Vec<usize>) -> Self {
        Self { name, kind, shape, begin: 0 }
    }

    fn len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.kind.size()
    }
}

/// Writes a checkpoint whose configuration is the published one but for `changes`, the fields of an object.
pub(crate) fn write(folder: &Path, changes: &Value, format: &str) -> Result<(), Box<dyn Error>> {
    let text = spark_models::published("qwen3-30b-a3b").ok_or("the published shape is gone")?;
    let mut config: Value = serde_json::from_str(text)?;
    for (field, value) in changes.as_object().into_iter().flatten() {
        config[field] = value.clone();
    }
    config["quantization_config"] = match format {
        "awq" => json!({"quant_method": "awq", "bits": 4, "group_size": 128}),
        "nvfp4" => json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
        "fp8" => json!({"quant_method": "fp8", "weight_block_size": [128, 128]}),
        _ => return Err(format!("{format} is none of awq, nvfp4, fp8").into()),
    };
    let specs = ModelConfig::parse(&config, None)?.specs(true);
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let mut shards: Vec<Vec<Tensor>> = Vec::new();
    let mut end = SHARD;
    for mut tensor in specs.iter().flat_map(|spec| tensors(spec, format)) {
        if end >= SHARD {
            shards.push(Vec::new());
            end = 0;
        }
        tensor.begin = end;
        end += tensor.len();
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    let mut places = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        write_shard(&folder.join(&file), shard, number as u64)?;
        places.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(file))));
    }
    let index = json!({"metadata": {}, "weight_map": places});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string())?;
    Ok(())
}

/// Writes a shard with all threads, past the page cache.
fn write_shard(path: &Path, tensors: &[Tensor], number: u64) -> Result<(), Box<dyn Error>> {
    let mut header = Map::new();
    for tensor in tensors {
        let offsets = [tensor.begin, tensor.begin + tensor.len()];
        let entry = json!({"dtype": tensor.kind.name(), "shape": tensor.shape, "data_offsets": offsets});
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let head = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    let len = head.len() + tensors.last().map_or(0, |last| last.begin + last.len());

    let file = File::create(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, len.next_multiple_of(ALIGN) as u64)?;
    let direct =
        OpenOptions::new().write(true).custom_flags(i32::try_from(OFlags::DIRECT.bits())?).open(path);
    // Some file systems have no direct writes.
    let target = direct.as_ref().unwrap_or(&file);
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(4, usize::from).min(8);
    std::thread::scope(|scope| {
        let work = || {
            let mut memory = vec![0_u8; CHUNK + ALIGN];
            let start = memory.as_ptr().align_offset(ALIGN);
            let chunk = &mut memory[start..start + CHUNK];
            loop {
                let begin = next.fetch_add(CHUNK, Ordering::Relaxed);
                if begin >= len {
                    return Ok(());
                }
                fill(chunk, begin, &head, tensors, number);
                let count = CHUNK.min((len - begin).next_multiple_of(ALIGN));
                target.write_all_at(&chunk[..count], begin as u64)?;
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread panicked")))
        })
    })?;
    file.set_len(len as u64)?;
    Ok(file.sync_all()?)
}

/// Fills the bytes of a shard from `begin` on.
fn fill(chunk: &mut [u8], begin: usize, head: &[u8], tensors: &[Tensor], number: u64) {
    let end = begin + chunk.len();
    // xorshift, from a seed of its own for every chunk.
    let mut state = ((begin as u64) << 8 | number) * 2 + 1;
    for word in chunk.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    if begin < head.len() {
        let count = head.len().min(end) - begin;
        chunk[..count].copy_from_slice(&head[begin..begin + count]);
    }
    let first = tensors.partition_point(|tensor| head.len() + tensor.begin + tensor.len() <= begin);
    for tensor in &tensors[first..] {
        let place = head.len() + tensor.begin;
        if place >= end {
            return;
        }
        let [keep, set] = tensor.kind.masks();
        if keep != !0 {
            let bytes = place.max(begin)..(place + tensor.len()).min(end);
            // Masks are the same in both halves, or the tensor is of whole words.
            for bytes in chunk[bytes.start - begin..bytes.end - begin].chunks_mut(4) {
                for ((byte, keep), set) in bytes.iter_mut().zip(keep.to_le_bytes()).zip(set.to_le_bytes()) {
                    *byte = *byte & keep | set;
                }
            }
        }
    }
}

/// The tensors of a parameter, as AutoAWQ, llm-compressor (NVFP4) or Qwen (FP8) store them.
fn tensors(spec: &ParamSpec, format: &str) -> Vec<Tensor> {
    let module = |module: String, n: usize, k: usize| {
        let parts: Vec<(&str, Kind, Vec<usize>)> = match format {
            "awq" => vec![
                ("qweight", Kind::I32, vec![k, n / 8]),
                ("qzeros", Kind::I32, vec![k / 128, n / 8]),
                ("scales", Kind::F16, vec![k / 128, n]),
            ],
            "nvfp4" => vec![
                ("weight_packed", Kind::U8, vec![n, k / 2]),
                ("weight_scale", Kind::E4m3Scale, vec![n, k / 16]),
                ("weight_global_scale", Kind::F32, vec![1]),
            ],
            _ => vec![
                ("weight", Kind::E4m3, vec![n, k]),
                ("weight_scale_inv", Kind::F32, vec![n.div_ceil(128), k.div_ceil(128)]),
            ],
        };
        parts.into_iter().map(move |(part, kind, shape)| Tensor::new(format!("{module}.{part}"), kind, shape))
    };
    let name = spec.name.replace("model.language_model.", "model.");
    match &spec.kind {
        ParamKind::Vector { shape } => vec![Tensor::new(name, Kind::Bf16, vec![shape[0] * shape[1]])],
        ParamKind::Linear { parts, k, .. } if name.contains("self_attn") => {
            let full = |part: &str| if part.is_empty() { name.clone() } else { format!("{name}.{part}") };
            parts.iter().flat_map(|(part, n)| module(full(part), *n, *k)).collect()
        }
        ParamKind::Linear { parts, k, .. } => {
            vec![Tensor::new(format!("{name}.weight"), Kind::Bf16, vec![parts[0].1, *k])]
        }
        &ParamKind::Experts { num_experts, hidden, intermediate } => (0..num_experts)
            .flat_map(|expert| {
                let part =
                    |part: &str, n: usize, k: usize| module(format!("{name}.{expert}.{part}_proj"), n, k);
                let down = part("down", hidden, intermediate);
                down.chain(part("gate", intermediate, hidden))
                    .chain(part("up", intermediate, hidden))
                    .collect::<Vec<_>>()
            })
            .collect(),
    }
}
