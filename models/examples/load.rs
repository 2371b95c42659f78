//! How fast a checkpoint comes off a disk, without a device to take it: loads it as the engine does, gives everything away,
//! and says how much was read in what time. `load read FOLDER [RANK WORLD [CACHE]]`; with a folder for a cache, the second time it reads that.
//!
//! `load write FOLDER LAYERS` makes one to read: Qwen3-30B-A3B in AWQ with so many of its 48 layers (0.3 GB each, and 1.2 GB for
//! the embeddings), of random weights. What the disk gives at best: `dd if=FILE of=/dev/null bs=16M iflag=direct`.

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Map, Value, json};
use spark_backend::Rank;
use spark_models::ModelConfig;
use spark_weights::{Checkpoint, LoadOptions, OpenOptions, ParamKind, ParamSpec};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["read", folder] => read(folder, Rank::SINGLE, None),
        ["read", folder, rank, world] => read(folder, parse(rank, world)?, None),
        ["read", folder, rank, world, cache] => read(folder, parse(rank, world)?, Some(cache.into())),
        ["write", folder, layers] => write(Path::new(folder), layers.parse()?),
        _ => Err("read FOLDER [RANK WORLD [CACHE]], or write FOLDER LAYERS".into()),
    }
}

fn parse(rank: &str, world: &str) -> Result<Rank, Box<dyn Error>> {
    Ok(Rank::new(rank.parse()?, world.parse()?).ok_or("RANK has to be below WORLD")?)
}

fn read(folder: &str, rank: Rank, cache: Option<PathBuf>) -> Result<(), Box<dyn Error>> {
    let begin = Instant::now();
    let checkpoint = Checkpoint::open(folder, &OpenOptions::default())?;
    let config = ModelConfig::parse(checkpoint.config(), checkpoint.generation_config())?;
    let specs = config.specs(checkpoint.has_module("lm_head"));
    let opened = begin.elapsed().as_secs_f64();
    let mut params = checkpoint.stream(&specs, &LoadOptions { rank, cache, ..LoadOptions::default() })?;
    let mut held = 0;
    for spec in &specs {
        held += match spec.kind {
            ParamKind::Vector { .. } => 4 * params.vector(&spec.name)?.values.len(),
            ParamKind::Linear { .. } => {
                params.linear(&spec.name)?.parts.iter().map(|part| part.num_bytes()).sum()
            }
            ParamKind::Experts { .. } => {
                let experts = params.experts(&spec.name)?.experts;
                let both = experts.iter().flat_map(|(up, down)| up.parts.iter().chain(&down.parts));
                both.map(|part| part.num_bytes()).sum()
            }
        };
    }
    params.finish()?;
    let seconds = begin.elapsed().as_secs_f64();
    let read = read_bytes()?;
    writeln!(
        std::io::stdout(),
        "opened in {opened:.2} s; {:.3} GB read in {seconds:.2} s: {:.2} GB/s; {:.3} GB held; at most {} MB in memory",
        read / 1e9,
        read / 1e9 / seconds,
        held as f64 / 1e9,
        peak_memory()? >> 10
    )?;
    Ok(())
}

/// Bytes that this process has fetched from storage.
fn read_bytes() -> Result<f64, Box<dyn Error>> {
    field("/proc/self/io", "read_bytes:")?.parse().map_err(Into::into)
}

/// In KiB.
fn peak_memory() -> Result<u64, Box<dyn Error>> {
    field("/proc/self/status", "VmHWM:")?.parse().map_err(Into::into)
}

fn field(file: &str, name: &str) -> Result<String, Box<dyn Error>> {
    let text = std::fs::read_to_string(file)?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .ok_or_else(|| format!("no {name} in {file}"))?;
    Ok(line.split_whitespace().next().unwrap_or_default().to_owned())
}

/// Name, dtype and shape of a tensor.
type Tensor = (String, &'static str, Vec<usize>);

/// Writes a checkpoint in one file.
fn write(folder: &Path, layers: usize) -> Result<(), Box<dyn Error>> {
    let text = spark_models::published("qwen3-30b-a3b").ok_or("the published shape is gone")?;
    let mut config: Value = serde_json::from_str(text)?;
    config["num_hidden_layers"] = layers.into();
    config["quantization_config"] = json!({"quant_method": "awq", "bits": 4, "group_size": 128});
    let specs = ModelConfig::parse(&config, None)?.specs(true);
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let tensors: Vec<Tensor> = specs.iter().flat_map(tensors).collect();
    let (mut header, mut end) = (Map::new(), 0);
    for (name, dtype, shape) in &tensors {
        let begin = end;
        end += num_bytes(dtype, shape);
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}));
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::with_capacity(16 << 20, File::create(folder.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut state = 1_u64;
    for (_, dtype, shape) in &tensors {
        let mut left = num_bytes(dtype, shape);
        while left > 0 {
            // xorshift; floats get an exponent of a small number.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let word =
                if *dtype == "I32" { state } else { state & 0x83ff_83ff_83ff_83ff | 0x2c00_2c00_2c00_2c00 };
            let len = left.min(8);
            file.write_all(&word.to_le_bytes()[..len])?;
            left -= len;
        }
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}

fn num_bytes(dtype: &str, shape: &[usize]) -> usize {
    shape.iter().product::<usize>() * if dtype == "I32" { 4 } else { 2 }
}

/// The tensors of a parameter as AutoAWQ stores them.
fn tensors(spec: &ParamSpec) -> Vec<Tensor> {
    let awq = |module: String, n: usize, k: usize| {
        [
            ("qweight", "I32", vec![k, n / 8]),
            ("qzeros", "I32", vec![k / 128, n / 8]),
            ("scales", "F16", vec![k / 128, n]),
        ]
        .map(|(part, dtype, shape)| (format!("{module}.{part}"), dtype, shape))
    };
    let name = spec.name.replace("model.language_model.", "model.");
    match &spec.kind {
        ParamKind::Vector { shape } => vec![(name, "BF16", vec![shape[0] * shape[1]])],
        ParamKind::Linear { parts, k, .. } if name.contains("self_attn") => {
            let module = |part: &str| if part.is_empty() { name.clone() } else { format!("{name}.{part}") };
            parts.iter().flat_map(|(part, n)| awq(module(part), *n, *k)).collect()
        }
        ParamKind::Linear { parts, k, .. } => vec![(format!("{name}.weight"), "BF16", vec![parts[0].1, *k])],
        &ParamKind::Experts { num_experts, hidden, intermediate } => (0..num_experts)
            .flat_map(|expert| {
                let module = |part: &str| format!("{name}.{expert}.{part}_proj");
                let down = awq(module("down"), hidden, intermediate);
                let [gate, up] = ["gate", "up"].map(|part| awq(module(part), intermediate, hidden));
                down.into_iter().chain(gate).chain(up)
            })
            .collect(),
    }
}
