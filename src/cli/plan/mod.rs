//! `spark-engine plan`: what a model can reach on a machine that need not be here, from bytes and operations. Runs nothing.

mod fullest;
mod hardware;
mod roofline;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use spark_engine::{KvCacheDtype, ModelFiles};

use super::sharing::SharingArgs;
use hardware::{Hardware, Machine};
use roofline::{Roofline, Storage};

/// Predict speed and memory of a model on a machine, without either.
#[derive(Args)]
#[command(
    args_override_self = true,
    after_help = "Examples:\n  \
    spark-engine plan --hardware gb10x2 --model qwen3-vl-235b-a22b\n  \
    spark-engine plan --hardware gb10 --model ./checkpoint --batch 1,8,64 --context 32768 --kv-cache-dtype bf16"
)]
pub(crate) struct PlanArgs {
    /// The machine.
    #[arg(long, value_enum)]
    hardware: Machine,
    /// A published shape (qwen3-vl-235b-a22b, qwen3-vl-30b-a3b, qwen3-30b-a3b, qwen3-vl-8b), a folder with config.json, or a Hugging Face
    /// id that is on this machine.
    #[arg(long, value_name = "NAME|FOLDER")]
    model: String,
    /// Sequences that are decoded together.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128", value_name = "N,...")]
    batch: Vec<u32>,
    /// Tokens of each sequence.
    #[arg(long, default_value_t = 4096, value_name = "N")]
    context: u32,
    /// How the decoder's linear layers are stored.
    #[arg(long, value_enum, default_value = "awq")]
    quantization: Scheme,
    /// How the output head is stored.
    #[arg(long, value_enum, default_value = "bf16")]
    lm_head_dtype: Wide,
    /// How K and V are stored.
    #[arg(long, value_enum, default_value = "fp8")]
    kv_cache_dtype: Wide,
    /// Share of the memory's and the tensor cores' measured speed that the kernels reach.
    #[arg(long, default_value_t = 0.85, value_name = "SHARE")]
    efficiency: f64,
    /// What `spark-engine probe --json FILE` measured on such a GPU, in place of the program's figures for memory and tensor cores.
    #[arg(long, value_name = "FILE")]
    probe: Option<PathBuf>,
    #[command(flatten)]
    sharing: SharingArgs,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Formats of linear layers.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Scheme {
    /// 4-bit integers in groups of 128.
    Awq,
    /// 4-bit integers in groups of 32.
    AwqG32,
    /// 4-bit floats in groups of 16.
    Nvfp4,
    /// 8-bit floats in blocks.
    Fp8,
    /// bfloat16.
    Bf16,
}

/// Formats of output head and KV cache.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Wide {
    /// 8-bit floats.
    Fp8,
    /// bfloat16.
    Bf16,
}

impl Scheme {
    /// Bytes of a weight in the engine's packed layout, scales included.
    fn bytes(self) -> f64 {
        match self {
            Self::Awq => 0.5 + 4.0 / 128.0,
            Self::AwqG32 => 0.5 + 4.0 / 32.0,
            Self::Nvfp4 => 0.5 + 1.0 / 16.0,
            Self::Fp8 => 1.0 + 4.0 / 128.0,
            Self::Bf16 => 2.0,
        }
    }
}

impl Wide {
    /// Bytes of a weight of the output head; FP8 has a scale for each 128.
    fn bytes_of_head(self) -> f64 {
        match self {
            Self::Fp8 => 1.0 + 4.0 / 128.0,
            Self::Bf16 => 2.0,
        }
    }

    fn of_cache(self) -> KvCacheDtype {
        match self {
            Self::Fp8 => KvCacheDtype::Fp8,
            Self::Bf16 => KvCacheDtype::Bf16,
        }
    }
}

pub(crate) fn run(args: &PlanArgs) -> anyhow::Result<()> {
    let files = files(args)?;
    if !(args.efficiency > 0.0 && args.efficiency <= 1.0) {
        bail!("--efficiency must be above 0 and at most 1, got {}", args.efficiency);
    }
    if args.batch.contains(&0) || args.context == 0 {
        bail!("--batch and --context must be at least 1");
    }
    let hardware = match &args.probe {
        None => args.hardware.hardware(),
        Some(path) => probed(args.hardware, path).with_context(|| format!("--probe {}", path.display()))?,
    };
    let report = report(args, &files, hardware)?;
    let mut stdout = std::io::stdout().lock();
    match args.json {
        true => writeln!(stdout, "{report:#}")?,
        false => write_text(&mut stdout, &report)?,
    }
    Ok(())
}

fn probed(machine: Machine, path: &Path) -> anyhow::Result<Hardware> {
    machine.hardware().measured(&serde_json::from_str(&fs::read_to_string(path)?)?)
}

/// A published configuration, or that of a folder, shared as the flags say.
fn files(args: &PlanArgs) -> anyhow::Result<ModelFiles> {
    let files = ModelFiles::open_config(&args.model, None, None)
        .with_context(|| format!("{} is no published shape (see --help)", args.model))?;
    Ok(files.shared(args.sharing.experts(), args.sharing.encoder())?)
}

fn report(args: &PlanArgs, files: &ModelFiles, hardware: Hardware) -> anyhow::Result<Value> {
    let storage = Storage {
        weight: args.quantization.bytes(),
        head: args.lm_head_dtype.bytes_of_head(),
        kv: args.kv_cache_dtype.of_cache(),
    };
    let roofline = Roofline::new(files, storage, hardware.ranks)?;
    let weights = roofline.weight_bytes() + roofline.vision_bytes();
    let kv_tokens = ((hardware.memory - weights) / roofline.kv_bytes).max(0.0).floor();
    let decode: Vec<Value> = args
        .batch
        .iter()
        .map(|&batch| decode(args, &roofline, hardware, f64::from(batch), kv_tokens))
        .collect();
    let moe = files.config.text.moe.as_ref();
    Ok(json!({
        "model": files.config.model_type, "hardware": hardware.name, "ranks": hardware.ranks,
        "moe_parallel": moe.map(|moe| format!("{:?}", moe.parallel).to_lowercase()),
        "context": args.context, "efficiency": args.efficiency,
        "memory": {"available": hardware.memory, "weights": weights, "kv_bytes_per_token": roofline.kv_bytes,
                   "kv_tokens": kv_tokens, "fits": weights < hardware.memory},
        "decode": decode,
        "prefill": prefill(args, &roofline, hardware),
    }))
}

fn decode(args: &PlanArgs, roofline: &Roofline<'_>, hardware: Hardware, batch: f64, kv_tokens: f64) -> Value {
    let bytes = roofline.decode(batch, f64::from(args.context));
    let (count, size) = roofline.collectives(batch);
    let network = hardware.link.map_or(0.0, |link| count * link.seconds(size));
    let floor = bytes.total() / hardware.bandwidth;
    json!({
        "batch": batch, "distinct_experts": bytes.num_experts,
        "bytes": {"attention": bytes.attention, "experts": bytes.experts, "dense_mlp": bytes.dense_mlp,
                  "router": bytes.router, "head": bytes.head, "kv": bytes.kv, "activations": bytes.activations,
                  "total": bytes.total()},
        "all_reduces": count, "all_reduce_bytes": size, "network_ms": network * 1e3,
        "roofline_tokens_per_second": batch / (floor + network),
        "predicted_tokens_per_second": batch / (floor / args.efficiency + network),
        "fits": batch * f64::from(args.context) <= kv_tokens,
    })
}

/// A prompt of `context` tokens in chunks of at most 4096.
fn prefill(args: &PlanArgs, roofline: &Roofline<'_>, hardware: Hardware) -> Value {
    let context = f64::from(args.context);
    let chunk = context.min(4096.0);
    let flops = roofline.linear_flops() + roofline.attention_flops(context / 2.0);
    let compute = chunk * flops / hardware.bf16;
    let weights = roofline.weight_bytes() / hardware.bandwidth;
    let (count, size) = roofline.collectives(chunk);
    let network = hardware.link.map_or(0.0, |link| count * link.seconds(size));
    let speed = |share: f64| chunk / (compute.max(weights) / share + network);
    json!({
        "chunk": chunk, "gflop_per_token": flops / 1e9, "compute_ms": compute * 1e3, "weights_ms": weights * 1e3,
        "network_ms": network * 1e3, "roofline_tokens_per_second": speed(1.0),
        "predicted_tokens_per_second": speed(args.efficiency),
    })
}

fn write_text(out: &mut impl Write, report: &Value) -> anyhow::Result<()> {
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    let memory = &report["memory"];
    let gib = |value: &Value| number(value) / 1073741824.0;
    let share = 100.0 * number(&report["efficiency"]);
    writeln!(
        out,
        "{} on {}: {:.1} of {:.1} GiB for weights on each rank, {} bytes of KV a token, room for {} tokens",
        report["model"].as_str().unwrap_or_default(),
        report["hardware"].as_str().unwrap_or_default(),
        gib(&memory["weights"]),
        gib(&memory["available"]),
        number(&memory["kv_bytes_per_token"]),
        number(&memory["kv_tokens"]),
    )?;
    if memory["fits"] == false {
        writeln!(out, "The weights do not fit.")?;
    }
    let who = match report["moe_parallel"] == "ep" {
        true => "the rank with most of the chosen experts",
        false => "each rank",
    };
    writeln!(out, "\ndecode at {} tokens of context, GB that {who} reads in a step:", report["context"])?;
    let heads = ["batch", "experts", "attention", "experts", "dense", "router", "head", "kv", "total"];
    let units = ["", "hit", "GB", "GB", "GB", "GB", "GB", "GB", "GB"];
    for line in [heads, units] {
        let text: String = line.iter().map(|word| format!("{word:>10}")).collect();
        writeln!(
            out,
            "{text}{}",
            if line == heads { "  network  roofline   expected" } else { "       ms     tok/s      tok/s" }
        )?;
    }
    for row in report["decode"].as_array().into_iter().flatten() {
        write!(out, "{:>10}{:>10.1}", number(&row["batch"]), number(&row["distinct_experts"]))?;
        for part in ["attention", "experts", "dense_mlp", "router", "head", "kv", "total"] {
            write!(out, "{:>10.2}", number(&row["bytes"][part]) / 1e9)?;
        }
        writeln!(
            out,
            "{:>9.1}{:>10.1}{:>11.1}{}",
            number(&row["network_ms"]),
            number(&row["roofline_tokens_per_second"]),
            number(&row["predicted_tokens_per_second"]),
            if row["fits"] == false { "  the KV cache does not fit" } else { "" }
        )?;
    }
    let prefill = &report["prefill"];
    writeln!(
        out,
        "\nprefill in chunks of {}: {:.1} GFLOP a token, compute {:.0} ms, weights {:.0} ms, network {:.0} ms a chunk: \
         roofline {:.0} tok/s, expected {:.0}",
        number(&prefill["chunk"]),
        number(&prefill["gflop_per_token"]),
        number(&prefill["compute_ms"]),
        number(&prefill["weights_ms"]),
        number(&prefill["network_ms"]),
        number(&prefill["roofline_tokens_per_second"]),
        number(&prefill["predicted_tokens_per_second"]),
    )?;
    writeln!(
        out,
        "\nroofline: memory and tensor cores at the speed that was measured on such machines; expected: at {share:.0} % of it"
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        plan: PlanArgs,
    }

    fn planned(line: &str) -> Value {
        let args = Program::parse_from(line.split_whitespace()).plan;
        report(&args, &files(&args).unwrap(), args.hardware.hardware()).unwrap()
    }

    #[test]
    fn two_sparks_decode_the_235b_as_fast_as_their_memory() {
        let report = planned("plan --hardware gb10x2 --model qwen3-vl-235b-a22b --batch 1,64 --efficiency 1");
        let speed = |row: usize| report["decode"][row]["roofline_tokens_per_second"].as_f64().unwrap();
        // Worked out by hand without the scales of the cache: 30.1 and 190.5.
        assert!((29.0..30.5).contains(&speed(0)), "{}", speed(0));
        assert!((180.0..191.0).contains(&speed(1)), "{}", speed(1));
        assert_eq!(report["decode"][0]["all_reduces"], 188.0);
        assert_eq!(report["memory"]["fits"], true);
        let mut text = Vec::new();
        write_text(&mut text, &report).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("on two GB10") && text.contains("prefill in chunks of 4096"), "{text}");
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let report = planned("plan --hardware gb10 --model qwen3-vl-235b-a22b --quantization bf16");
        assert_eq!(report["memory"]["fits"], false);
        assert_eq!(report["memory"]["kv_tokens"], 0.0);
        let mut text = Vec::new();
        write_text(&mut text, &report).unwrap();
        assert!(String::from_utf8(text).unwrap().contains("The weights do not fit."));
    }

    #[test]
    fn an_unknown_model_is_named() {
        let args = Program::parse_from(["plan", "--hardware", "gb10", "--model", "gpt-7"]).plan;
        let error = format!("{:#}", files(&args).err().unwrap());
        assert!(error.contains("gpt-7 is no published shape"), "{error}");
    }
}
