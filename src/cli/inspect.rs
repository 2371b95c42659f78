//! `spark-engine inspect`: what a checkpoint is and what it takes to run it, without loading it.

use std::io::Write;

use anyhow::bail;
use clap::Args;
use serde_json::{Value, json};
use spark_engine::{
    Dtype, EngineOptions, HeadDtype, KvCacheDtype, Memory, MemoryPlan, MemoryUse, ModelFiles, Rank,
};
use spark_models::ModelConfig;
use spark_weights::Summary;

use super::{head::HeadArgs, model_name::ModelName, sharing::SharingArgs};

/// Show architecture, quantisation and sizes.
#[derive(Args)]
#[command(args_override_self = true)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    model: ModelName,
    /// Branch, tag or commit of a Hugging Face id.
    #[arg(long)]
    revision: Option<String>,
    /// Ranks to divide it over.
    #[arg(long, visible_alias = "tp", default_value_t = 1, value_name = "N")]
    tensor_parallel_size: usize,
    #[command(flatten)]
    sharing: SharingArgs,
    #[command(flatten)]
    head: HeadArgs,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: InspectArgs) -> anyhow::Result<()> {
    let files = ModelFiles::open(&args.model.choose()?.model, args.revision)?;
    let files = files.shared(args.sharing.experts(), args.sharing.encoder())?;
    let report = report(&files, args.tensor_parallel_size, args.head.dtype())?;
    let mut stdout = std::io::stdout().lock();
    if args.json {
        writeln!(stdout, "{report:#}")?;
    } else {
        write_text(&mut stdout, &report)?;
    }
    Ok(())
}

fn report(files: &ModelFiles, world: usize, head: HeadDtype) -> anyhow::Result<Value> {
    let (config, text) = (&files.config, &files.config.text);
    config.check_ranks(world)?;
    let summary = files.checkpoint.summary(&files.specs, world)?;
    let head_bytes = HeadBytes::new(files, &summary, head)?;
    let ranks =
        (0..world).map_while(|index| Rank::new(index, world)).zip(&summary.ranks).map(|(rank, held)| {
            json!({
                "tensors": held.tensors, "bytes_read": held.bytes_read,
                "bytes_read_in_exchange": held.bytes_read_in_exchange,
                "bytes_held": head_bytes.held(held.bytes_held, rank), "kv_bytes_per_token": kv_bytes(config, rank),
                "experts": text.moe.as_ref().map(|moe| moe.experts_of(rank)),
            })
        });
    let ranks: Vec<Value> = ranks.collect();
    let moe = text.moe.as_ref().map(|moe| {
        json!({"num_experts": moe.num_experts, "num_experts_per_tok": moe.num_experts_per_tok,
               "moe_intermediate_size": moe.moe_intermediate_size})
    });
    let vision = config.vision.as_ref().map(|vision| {
        json!({"depth": vision.depth, "hidden_size": vision.hidden_size, "num_heads": vision.num_heads,
               "patch_size": vision.patch_size, "deepstack": vision.deepstack_visual_indexes.len()})
    });
    let mut weights = serde_json::to_value(summary)?;
    if let Some(weights) = weights.as_object_mut() {
        // They are told with what else a rank holds.
        weights.remove("ranks");
    }
    Ok(json!({
        "model_type": config.model_type,
        "folder": files.checkpoint.dir(),
        "text": {
            "num_hidden_layers": text.num_hidden_layers, "hidden_size": text.hidden_size,
            "num_attention_heads": text.num_attention_heads, "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim, "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_position_embeddings, "moe": moe,
        },
        "vision": vision,
        "eos_token_ids": config.eos_token_ids,
        "lm_head": if files.has_lm_head { "own tensor" } else { "the embeddings" },
        "lm_head_dtype": format!("{head:?}").to_lowercase(),
        "weights": weights,
        "kv_bytes_per_token": kv_bytes(config, Rank::SINGLE),
        "tensor_parallel_size": world,
        "moe_parallel": text.moe.as_ref().map(|moe| format!("{:?}", moe.parallel).to_lowercase()),
        "ranks": ranks,
    }))
}

/// What an output head that is made FP8 while it is loaded takes in place of the checkpoint's.
struct HeadBytes {
    vocab: usize,
    /// Bytes of a row that are not kept: of an own head.
    before: u64,
    /// Bytes of a row that are added.
    after: u64,
}

impl HeadBytes {
    fn new(files: &ModelFiles, summary: &Summary, dtype: HeadDtype) -> anyhow::Result<Self> {
        let (vocab, k) = (files.config.text.vocab_size, files.config.text.hidden_size as u64);
        let name = if files.has_lm_head { "lm_head" } else { "embedding" };
        let head = summary.parts.iter().find(|part| part.part == name);
        let schemes: Vec<&str> =
            head.iter().flat_map(|part| part.schemes.keys().map(String::as_str)).collect();
        let is_dense = schemes.iter().all(|scheme| ["bf16", "f16", "f32"].contains(scheme));
        if dtype != HeadDtype::Auto && !is_dense {
            bail!(
                "--lm-head-dtype: the head is stored as {} in the checkpoint; leave the flag out",
                schemes.join(", ")
            );
        }
        if dtype != HeadDtype::Fp8 {
            return Ok(Self { vocab, before: 0, after: 0 });
        }
        let stored = head.map_or(0, |part| part.bytes / vocab.max(1) as u64);
        // A scale of four bytes for each 128 inputs.
        Ok(Self { vocab, before: if files.has_lm_head { stored } else { 0 }, after: k + 4 * k.div_ceil(128) })
    }

    /// Bytes of all weights of `rank`, which are `held` as the checkpoint has them.
    fn held(&self, held: u64, rank: Rank) -> u64 {
        let rows = rank.range(self.vocab).len() as u64;
        (held + rows * self.after).saturating_sub(rows * self.before)
    }
}

/// Bytes of KV cache that a token takes on `rank`, by dtype of the cache.
fn kv_bytes(config: &ModelConfig, rank: Rank) -> Value {
    let bytes = |dtype| kv_bytes_per_token(config, dtype, rank).ok();
    json!({"bf16": bytes(KvCacheDtype::Bf16), "fp8": bytes(KvCacheDtype::Fp8)})
}

/// Bytes that a token takes on `rank` in a KV cache of `dtype`.
pub(super) fn kv_bytes_per_token(
    config: &ModelConfig,
    dtype: KvCacheDtype,
    rank: Rank,
) -> anyhow::Result<usize> {
    let options = EngineOptions { kv_cache_dtype: dtype, ..EngineOptions::default() };
    let unlimited = Memory { total: u64::MAX >> 1, available: u64::MAX >> 1, is_shared: true };
    let memory = MemoryUse { before: unlimited, now: unlimited };
    let plan = MemoryPlan::new(config, &options, Dtype::Bf16, memory, rank, |spec| spec.num_bytes(2))?;
    Ok(plan.kv.bytes_per_token())
}

fn write_text(out: &mut impl Write, report: &Value) -> anyhow::Result<()> {
    let text = &report["text"];
    writeln!(out, "architecture  {}", plain(&report["model_type"]))?;
    writeln!(
        out,
        "decoder       {} layers, hidden {}, {} heads / {} kv heads of {}, vocabulary {}, up to {} tokens",
        text["num_hidden_layers"],
        text["hidden_size"],
        text["num_attention_heads"],
        text["num_key_value_heads"],
        text["head_dim"],
        text["vocab_size"],
        text["max_position_embeddings"]
    )?;
    if let Some(moe) = text["moe"].as_object() {
        let (experts, used, inner) =
            (&moe["num_experts"], &moe["num_experts_per_tok"], &moe["moe_intermediate_size"]);
        writeln!(out, "experts       {experts}, {used} per token, intermediate {inner}")?;
    }
    if let Some(vision) = report["vision"].as_object() {
        let (depth, hidden, deepstack) = (&vision["depth"], &vision["hidden_size"], &vision["deepstack"]);
        writeln!(out, "vision        {depth} blocks, hidden {hidden}, {deepstack} deepstack levels")?;
    }
    let kept = if report["lm_head_dtype"] == "fp8" { ", kept as FP8" } else { "" };
    writeln!(out, "output head   {}{kept}", plain(&report["lm_head"]))?;
    let weights = &report["weights"];
    writeln!(out, "parameters    {}", grouped(&weights["parameters"]))?;
    writeln!(out, "\n{:<12} {:<24} {:>8} {:>16}", "part", "scheme", "tensors", "bytes")?;
    for part in weights["parts"].as_array().into_iter().flatten() {
        for (scheme, row) in part["schemes"].as_object().into_iter().flatten() {
            let (name, tensors, bytes) = (plain(&part["part"]), &row["tensors"], grouped(&row["bytes"]));
            writeln!(out, "{name:<12} {scheme:<24} {tensors:>8} {bytes:>16}")?;
        }
    }
    writeln!(out, "{:<12} {:<24} {:>8} {:>16}", "total", "", "", grouped(&weights["file_bytes"]))?;
    let kv = &report["kv_bytes_per_token"];
    writeln!(
        out,
        "\nKV cache      {} bytes a token in bf16, {} in fp8",
        grouped(&kv["bf16"]),
        grouped(&kv["fp8"])
    )?;
    let world = &report["tensor_parallel_size"];
    for (index, rank) in report["ranks"].as_array().into_iter().flatten().enumerate() {
        let [read, exchanged, held] =
            ["bytes_read", "bytes_read_in_exchange", "bytes_held"].map(|key| grouped(&rank[key]));
        let [bf16, fp8] = ["bf16", "fp8"].map(|dtype| grouped(&rank["kv_bytes_per_token"][dtype]));
        let tensors = grouped(&rank["tensors"]);
        let experts = match &rank["experts"] {
            experts if report["moe_parallel"] == "ep" => {
                format!("experts {} to {}, ", experts["start"], last(&experts["end"]))
            }
            _ => String::new(),
        };
        writeln!(
            out,
            "rank {index} of {world}   {experts}{tensors} tensors: reads {read} bytes ({exchanged} with --load-exchange), holds {held}; \
             KV cache {bf16} bytes a token in bf16, {fp8} in fp8"
        )?;
    }
    Ok(())
}

/// The last number before `end`.
fn last(end: &Value) -> u64 {
    end.as_u64().unwrap_or_default().saturating_sub(1)
}

fn plain(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// 1234567 as 1,234,567.
fn grouped(value: &Value) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_three() {
        assert_eq!(grouped(&json!(1)), "1");
        assert_eq!(grouped(&json!(1234)), "1,234");
        assert_eq!(grouped(&json!(123_456_789)), "123,456,789");
    }
}
