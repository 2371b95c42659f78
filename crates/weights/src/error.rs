//! Everything that can be wrong with a checkpoint, with the file, tensor and offset at fault. Not the recovery: a
//! start stops with one of these.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a checkpoint cannot be used. Messages state the rule, the value and the place.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system gave no thread for loading.
    #[error("cannot start a thread that loads weights: {source}")]
    Thread {
        /// What the system said.
        source: std::io::Error,
    },
    /// MODEL is neither a folder nor a downloaded Hugging Face id.
    #[error("model `{model}` is neither a folder nor in the Hugging Face cache (looked in {}); give a folder, or download it with `spark-engine pull`",
        list(tried.iter().map(|path| path.display().to_string())))]
    NotFound {
        /// What was asked for.
        model: String,
        /// The places that were looked at.
        tried: Vec<PathBuf>,
    },
    /// A model id or revision that could leave the cache folder or is not of the form `owner/name`.
    #[error("`{value}` is not a model id: {reason}")]
    BadModelId {
        /// The id or revision.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The operating system refused.
    #[error("{}: {action}{}: {source}", path.display(), offset.map_or(String::new(), |at| format!(" at offset {at}")))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// Byte offset of a failed read.
        offset: Option<u64>,
        /// The reason.
        source: std::io::Error,
    },
    /// A file ended before a range that its header (or its size at opening) promised.
    #[error("{}: wanted {wanted} bytes at offset {offset}, the file ends after {got} of them; it is truncated or changed while it was read",
        path.display())]
    ShortRead {
        /// The file.
        path: PathBuf,
        /// Where the read began.
        offset: u64,
        /// Bytes that were needed.
        wanted: usize,
        /// Bytes that came.
        got: usize,
    },
    /// A JSON file that is no JSON, repeats a key or nests too deep.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: serde_json::Error,
    },
    /// A side file above its limit.
    #[error("{}: {size} bytes, the limit for this file is {limit}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A safetensors header that breaks the format as a whole.
    #[error("{}: {reason}", path.display())]
    Header {
        /// The shard.
        path: PathBuf,
        /// The rule and the value.
        reason: String,
    },
    /// One entry of a safetensors header that lies.
    #[error("{}: tensor `{tensor}` at offset {offset}: {reason}", path.display())]
    Tensor {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its first byte, counted from the end of the header.
        offset: u64,
        /// The rule and the value.
        reason: String,
    },
    /// An index that does not describe the shards.
    #[error("{}: {reason}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// The rule and the value.
        reason: String,
    },
    /// A tensor that cannot be what its name says.
    #[error("{}: tensor `{tensor}`: {reason}", path.display())]
    Mismatch {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Found against expected.
        reason: String,
    },
    /// A quantised weight without one of the tensors that give it meaning.
    #[error(
        "`{module}` is stored as {scheme}, but the checkpoint has no {wanted}; without it the weight has no meaning"
    )]
    MissingCompanion {
        /// The linear layer.
        module: String,
        /// The scheme its weight tensor shows.
        scheme: &'static str,
        /// The tensor (or tensors, one of which) that is missing.
        wanted: String,
    },
    /// A layout that exists but is not supported.
    #[error("`{module}`: {reason}")]
    Unsupported {
        /// The linear layer.
        module: String,
        /// What it is and what to do.
        reason: String,
    },
    /// NaN or infinite values where they would spread into every token.
    #[error("{}: tensor `{tensor}`: {count} of {total} values are not finite; the checkpoint is damaged, get it again", path.display())]
    NonFinite {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// How many.
        count: usize,
        /// Of how many.
        total: usize,
    },
    /// Parameters that nothing fills, tensors that nothing uses.
    #[error(
        "the checkpoint does not fit the model:{}{}",
        section("parameters without a tensor", unfilled),
        section("tensors that nothing uses", unused)
    )]
    Incomplete {
        /// Tensor names that the model needs and the checkpoint lacks.
        unfilled: Vec<String>,
        /// Tensors of the checkpoint that no parameter consumed.
        unused: Vec<String>,
    },
    /// A parameter list that contradicts itself or what was asked for.
    #[error("parameter `{name}`: {reason}")]
    Param {
        /// The parameter.
        name: String,
        /// The rule and the value.
        reason: String,
    },
    /// A hub that refuses, or answers with what cannot be used.
    #[error("{url}: {reason}")]
    Hub {
        /// What was asked, without its query.
        url: String,
        /// What came and what to do.
        reason: String,
    },
    /// A hub that cannot be reached.
    #[error("{url}: no answer: {source}")]
    Unreachable {
        /// What was asked, without its query.
        url: String,
        /// The reason.
        source: Box<ureq::Error>,
    },
    /// A download that does not go on.
    #[error(
        "`{file}`: {got} of {size} bytes are here, then {attempts} attempts brought nothing more: {reason}; \
        pull again to continue from there"
    )]
    Interrupted {
        /// The file, as the hub names it.
        file: String,
        /// Bytes that are kept for the next attempt.
        got: u64,
        /// Bytes it should have.
        size: u64,
        /// Attempts in a row without a new byte.
        attempts: u32,
        /// Why the last one ended.
        reason: String,
    },
    /// A downloaded file of the wrong content.
    #[error(
        "`{file}`: the hub announced the {kind} {expected}, what came has {got}; the file was deleted, pull again"
    )]
    Digest {
        /// The file, as the hub names it.
        file: String,
        /// The kind of digest.
        kind: &'static str,
        /// The hub's.
        expected: String,
        /// That of the bytes.
        got: String,
    },
    /// A file system that is too full for a download.
    #[error("{}: the download needs {needed} more bytes, {free} are free; make room or set HF_HOME to another disk", path.display())]
    NoRoom {
        /// Where the files go.
        path: PathBuf,
        /// Bytes that have to come.
        needed: u64,
        /// Bytes that fit.
        free: u64,
    },
    /// The ranks could not go on reading for each other; this rank is named where it is the one that gave up.
    #[error("loading together (--load-exchange) has ended because of rank {rank}: {reason}")]
    Exchange {
        /// The rank.
        rank: usize,
        /// What was heard of it.
        reason: String,
    },
    /// Options outside their range.
    #[error("{option}: {reason}")]
    Option {
        /// The option.
        option: &'static str,
        /// The rule and the value.
        reason: String,
    },
}

fn list(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(", ")
}

/// The first names of a list and how many more there are.
fn section(title: &str, names: &[String]) -> String {
    const SHOWN: usize = 20;
    if names.is_empty() {
        return String::new();
    }
    let shown = list(names.iter().take(SHOWN).cloned());
    let more = names.len().saturating_sub(SHOWN);
    let tail = if more == 0 { String::new() } else { format!(" and {more} more") };
    format!(" {} {title}: {shown}{tail};", names.len())
}
