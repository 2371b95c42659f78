//! What one step is made of: its inputs (filled by the host, copied once), its key and its output.

use crate::KvSpec;

/// The shape of a step, all that a recorded graph may depend on. Contexts, block tables and positions are data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StepKey {
    /// Rows of the activations.
    pub num_tokens: usize,
    /// Sequences in the step.
    pub num_seqs: usize,
    /// Rows for which logits are computed.
    pub num_logit_rows: usize,
}

/// An input token: known to the host, or still on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenInput {
    /// The host knows it.
    Known(u32),
    /// The token last sampled in this slot, by a step that may still be in flight.
    Pending(usize),
}

/// Everything that changes from step to step. Tokens of a sequence are contiguous, sequences in `seqs` order.
#[derive(Debug, Clone, Default)]
pub struct StepInputs {
    /// `[num_tokens]`.
    pub tokens: Vec<TokenInput>,
    /// `[num_tokens]` M-RoPE positions: time, height, width. Equal for text.
    pub positions: Vec<[u32; 3]>,
    /// `[num_tokens]` where K and V go: `block * block_size + offset`.
    pub slot_mapping: Vec<u64>,
    /// `[num_seqs]`.
    pub seqs: Vec<SeqInput>,
    /// `[num_logit_rows]` token rows whose logits are needed, ascending.
    pub logit_rows: Vec<u32>,
    /// `[num_logit_rows]` what becomes of each row: `Some(slot)` samples, `None` is for prompt log-probabilities only.
    pub sample_slots: Vec<Option<usize>>,
    /// `[num_logit_rows]` for prompt log-probabilities: the token that follows in the prompt, and how many alternatives.
    pub prompt_targets: Vec<Option<(u32, usize)>>,
    /// Grammar masks: slot and `ceil(vocab / 32)` words, bit set = allowed.
    pub masks: Vec<(usize, Vec<u32>)>,
    /// Rows of media enter the step: what runs is not what was recorded for its key.
    pub has_media: bool,
}

/// One sequence of a step.
#[derive(Debug, Clone)]
pub struct SeqInput {
    /// Persistent device state of the sequence.
    pub slot: usize,
    /// Its first row.
    pub query_start: usize,
    /// Its rows in this step.
    pub query_len: usize,
    /// KV tokens after this step's are written.
    pub context_len: usize,
    /// Blocks that hold them, in order.
    pub block_table: Vec<u32>,
}

impl StepInputs {
    /// A step that is one whole prompt, in slot 0 and in the first blocks of `block_size` tokens: prefill without a
    /// scheduler. `positions` has one entry a token; `logit_rows` are sampled for nobody.
    pub fn whole_prompt(
        ids: &[u32],
        positions: Vec<[u32; 3]>,
        block_size: usize,
        logit_rows: Vec<u32>,
    ) -> Self {
        let (n, num_rows) = (ids.len(), logit_rows.len());
        Self {
            tokens: ids.iter().map(|&id| TokenInput::Known(id)).collect(),
            positions,
            slot_mapping: (0..n as u64).collect(),
            seqs: vec![SeqInput {
                slot: 0,
                query_start: 0,
                query_len: n,
                context_len: n,
                block_table: (0..n.div_ceil(block_size) as u32).collect(),
            }],
            logit_rows,
            sample_slots: vec![None; num_rows],
            prompt_targets: vec![None; num_rows],
            masks: Vec::new(),
            has_media: false,
        }
    }

    /// The key of these inputs.
    pub fn key(&self) -> StepKey {
        StepKey {
            num_tokens: self.tokens.len(),
            num_seqs: self.seqs.len(),
            num_logit_rows: self.logit_rows.len(),
        }
    }
}

/// Rows of an encoded medium that enter a step: `rows` rows from `source_row` go to token rows from `token_row`.
#[derive(Debug, Clone, Copy)]
pub struct VisualRows<'a, T> {
    /// Embeddings `[num_media_tokens, hidden]`.
    pub embeddings: &'a T,
    /// Deepstack levels, each `[num_media_tokens, hidden]`.
    pub deepstack: &'a [T],
    /// First row of the step.
    pub token_row: usize,
    /// First row of the medium.
    pub source_row: usize,
    /// How many.
    pub rows: usize,
}

/// Sizes of the state that lives on the device from start to end.
#[derive(Debug, Clone, Copy)]
pub struct StateSpec {
    /// The KV pool.
    pub kv: KvSpec,
    /// Sequence slots: `max_num_seqs`.
    pub num_slots: usize,
    /// Most tokens in a step.
    pub max_num_tokens: usize,
    /// Real tokens of the vocabulary: logits from here on are padding and never chosen.
    pub vocab_size: usize,
    /// Most blocks of a sequence.
    pub max_blocks_per_seq: usize,
    /// Bytes of all that [`Backend::keep`](crate::Backend::keep) keeps at once.
    pub encoder_cache_bytes: u64,
    /// The sizes of the activations.
    pub activations: ActivationSpec,
}

/// Sizes that the memory for activations follows from: the largest step and the largest medium, and the model's widths.
/// What a model does not have is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ActivationSpec {
    /// Sequence slots, whose sampling state counts here.
    pub num_slots: usize,
    /// Most tokens in a step.
    pub num_tokens: usize,
    /// Most rows of a step with logits.
    pub num_logit_rows: usize,
    /// Rows of the output head, padding included.
    pub vocab_rows: usize,
    /// Width of the decoder.
    pub hidden_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width inside a dense MLP.
    pub intermediate_size: usize,
    /// Routed experts of a layer.
    pub num_experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Width inside an expert.
    pub moe_intermediate_size: usize,
    /// Patches of the largest medium.
    pub num_patches: usize,
    /// Width of the encoder's input: `3 * temporal * patch * patch`.
    pub patch_size: usize,
    /// Width of the encoder.
    pub vision_hidden_size: usize,
    /// Heads of the encoder.
    pub vision_num_heads: usize,
    /// Width of a head of the encoder.
    pub vision_head_dim: usize,
    /// Width inside the encoder's MLP.
    pub vision_intermediate_size: usize,
    /// Patches of a media token: `merge * merge`.
    pub patches_per_token: usize,
}

impl ActivationSpec {
    /// Bytes that the widest tensors of a layer, the logits and the encoder's widest tensors take together in elements of
    /// `element_size` bytes: enough for a backend that stores nothing else between operations.
    pub fn num_bytes(&self, element_size: usize) -> u64 {
        let qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim;
        let inner = self.intermediate_size.max(self.top_k * self.moe_intermediate_size);
        let step = self.num_tokens * (4 * self.hidden_size + 2 * qkv.max(2 * inner)) * element_size;
        let logits = self.num_logit_rows * self.vocab_rows * 4;
        let widest = (2 * self.vision_hidden_size + 4 * self.vision_num_heads * self.vision_head_dim)
            .max(2 * self.vision_hidden_size + 2 * self.vision_intermediate_size)
            .max(self.patch_size + self.vision_hidden_size);
        (step + logits).max(self.num_patches * widest * element_size) as u64
    }
}

/// Sampling parameters and penalty history of a slot, sent when a sequence is (re)admitted.
#[derive(Debug, Clone)]
pub struct SlotParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// Added to single logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the counter-based generator; the counter is the index of the output token.
    pub seed: u64,
    /// Tokens that are forbidden until `min_tokens` tokens are out: end-of-sequence and stop tokens.
    pub stop_token_ids: Vec<u32>,
    /// See `stop_token_ids`.
    pub min_tokens: usize,
    /// Alternatives to report; `None` reports nothing, `Some(0)` the sampled token alone.
    pub logprobs: Option<usize>,
    /// Tokens whose log-probabilities are reported instead of alternatives, if `logprobs` reports anything.
    pub named_tokens: Vec<u32>,
    /// Prompt tokens (repetition penalty).
    pub prompt: Vec<u32>,
    /// Output so far: not empty when a preempted sequence resumes.
    pub output: Vec<u32>,
}

impl SlotParams {
    /// Greedy sampling with everything else off, for a sequence without history.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            logprobs: None,
            named_tokens: Vec::new(),
            prompt: Vec::new(),
            output: Vec::new(),
        }
    }
}

/// What a step gives back, in the order of `logit_rows`.
#[derive(Debug, Clone, Default)]
pub struct StepOutput {
    /// Sampled tokens.
    pub sampled: Vec<SampledToken>,
    /// Log-probabilities of the next prompt token: its entry in `logit_rows`, target, alternatives.
    pub prompt_logprobs: Vec<(u32, TokenLogprob, Vec<TokenLogprob>)>,
}

/// A sampled token.
#[derive(Debug, Clone)]
pub struct SampledToken {
    /// Whose.
    pub slot: usize,
    /// The token.
    pub token: u32,
    /// The token's and the best alternatives' log-probabilities, if the slot asked for them.
    pub logprobs: Option<(TokenLogprob, Vec<TokenLogprob>)>,
    /// Log-probabilities of the slot's `named_tokens`, in their order; there are no alternatives then.
    pub named: Vec<f32>,
}

/// Log-probability of a token under the raw logits of the whole head, padding rows included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Natural logarithm.
    pub logprob: f32,
    /// 1 is the most likely; ties share the better rank.
    pub rank: usize,
}
