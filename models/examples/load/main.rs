//! How fast a checkpoint comes off a disk, without a device to take it: loads it as the engine does, copies every weight into a
//! staging area as the CUDA backend does, gives it away, and says how much was read in what time and what it took of memory.
//! `load read FOLDER [RANK WORLD [CACHE]]`; with a folder for a cache, the second time it reads that. `ep` in its place: a rank with whole
//! experts.
//!
//! `load write FOLDER LAYERS [awq|nvfp4|fp8]` makes one to read: Qwen3-30B-A3B with so many of its 48 layers (in AWQ 0.33 GB
//! each, and 1.2 GB for the embeddings), of random weights. What the disk gives at best:
//! `dd if=FILE of=/dev/null bs=16M iflag=direct`.

mod write;

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use spark_backend::{LinearWeight, MatrixData, Rank};
use spark_models::{ModelConfig, MoeParallel};
use spark_weights::{Checkpoint, LoadOptions, OpenOptions, ParamKind, ParamSpec, Params};

/// Bytes of the staging area that every weight is copied into.
const STAGING: usize = 32 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["read", folder] => read(folder, Rank::SINGLE, MoeParallel::Tp, None),
        ["read", folder, rank, world] => read(folder, parse(rank, world)?, MoeParallel::Tp, None),
        ["read", folder, rank, world, "ep"] => read(folder, parse(rank, world)?, MoeParallel::Ep, None),
        ["read", folder, rank, world, cache] => {
            read(folder, parse(rank, world)?, MoeParallel::Tp, Some(cache.into()))
        }
        ["write", folder, layers] => write(folder, layers, "awq"),
        ["write", folder, layers, format] => write(folder, layers, format),
        _ => Err("read FOLDER [RANK WORLD [CACHE|ep]], or write FOLDER LAYERS [awq|nvfp4|fp8]".into()),
    }
}

fn write(folder: &str, layers: &str, format: &str) -> Result<(), Box<dyn Error>> {
    let layers: usize = layers.parse()?;
    write::write(Path::new(folder), &serde_json::json!({ "num_hidden_layers": layers }), format)
}

fn parse(rank: &str, world: &str) -> Result<Rank, Box<dyn Error>> {
    Ok(Rank::new(rank.parse()?, world.parse()?).ok_or("RANK has to be below WORLD")?)
}

fn read(
    folder: &str,
    rank: Rank,
    experts: MoeParallel,
    cache: Option<PathBuf>,
) -> Result<(), Box<dyn Error>> {
    let before = read_bytes()?;
    let begin = Instant::now();
    let checkpoint = Checkpoint::open(folder, &OpenOptions::default())?;
    let mut config = ModelConfig::parse(checkpoint.config(), checkpoint.generation_config())?;
    config.share_experts(experts)?;
    let specs = config.specs(checkpoint.has_module("lm_head"));
    let opened = begin.elapsed().as_secs_f64();
    let mut params = checkpoint.stream(&specs, &LoadOptions { rank, cache, ..LoadOptions::default() })?;
    let mut staging = vec![0; STAGING];
    let mut held = 0;
    for spec in &specs {
        held += take(&mut params, spec, &mut staging)?;
    }
    params.finish()?;
    let seconds = begin.elapsed().as_secs_f64();
    let read = (read_bytes()? - before) as f64 / 1e9;
    let whole = size_of_shards(Path::new(folder))? as f64 / 1e9;
    writeln!(
        std::io::stdout(),
        "rank {} of {}: opened in {opened:.2} s; {read:.3} GB read in {seconds:.2} s: {:.3} GB/s; {:.1} % of the checkpoint's \
         {whole:.3} GB; {:.3} GB held; at most {} MB in memory",
        rank.index(),
        rank.world(),
        read / seconds,
        100.0 * read / whole,
        held as f64 / 1e9,
        peak_memory()? >> 10
    )?;
    Ok(())
}

/// Takes one parameter: its bytes go through `staging`, and how many they were comes back.
fn take(params: &mut Params, spec: &ParamSpec, staging: &mut [u8]) -> Result<usize, Box<dyn Error>> {
    let mut held = 0;
    let mut stage = |bytes: &[u8]| {
        for bytes in bytes.chunks(staging.len()) {
            staging[..bytes.len()].copy_from_slice(bytes);
        }
        held += bytes.len();
    };
    let mut layer = |weight: &LinearWeight| {
        for part in &weight.parts {
            match &part.data {
                MatrixData::Dense { values, .. } => stage(values),
                MatrixData::Int4 { codes, zeros, scales, .. } => {
                    stage(codes);
                    stage(scales);
                    stage(zeros.as_deref().unwrap_or_default());
                }
                MatrixData::Nvfp4 { codes, scales, .. } => {
                    stage(codes);
                    stage(scales);
                }
                MatrixData::Fp8 { values, scales, .. } => {
                    stage(values);
                    let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
                    stage(&scales);
                }
            }
        }
    };
    match spec.kind {
        // Vectors are small, and converted one value at a time.
        ParamKind::Vector { .. } => return Ok(4 * params.vector(&spec.name)?.values.len()),
        ParamKind::Linear { .. } => layer(&params.linear(&spec.name)?),
        ParamKind::Experts { .. } => {
            for (gate_up, down) in &params.experts(&spec.name)?.experts {
                layer(gate_up);
                layer(down);
            }
        }
    }
    Ok(held)
}

/// Bytes of a checkpoint's weights, headers included.
fn size_of_shards(folder: &Path) -> Result<u64, Box<dyn Error>> {
    let mut size = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == "safetensors") {
            size += entry.metadata()?.len();
        }
    }
    Ok(size)
}

/// Bytes that this process has fetched from storage.
fn read_bytes() -> Result<u64, Box<dyn Error>> {
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
