//! What the sampler keeps on the device from step to step, and how a sequence comes into its slot (`kernels/sample_admit.cu`).
//! The step itself is in `sampler_step.rs`, its results on the host in `sampler_output.rs`.

use std::collections::HashMap;

use spark_backend::{SlotParams, StepInputs};

use super::sampler_output::{MAX_ALTERNATIVES, MAX_NAMED_TOKENS};
use super::{Kernels, LoadedModule, to_u32};
use crate::launch::{Kernel, Launch, Params};
use crate::{ALIGNMENT, DeviceSlice, Error, Result, Stream};

const OP: &str = "sampler";
/// Below this temperature sampling is greedy, as on the CPU.
const GREEDY: f32 = 1e-5;
/// Entries that one launch takes along.
const ENTRIES: usize = 440;
const NUM_THREADS: u32 = 512;
/// What an entry is: the two top bits of its token.
const KIND_SHIFT: u32 = 30;
/// Tokens are sorted as 20-bit numbers with fixed-point probabilities that leave as many bits free.
const MAX_VOCAB: usize = 1 << 20;
/// Most rows of one launch; more take several.
const MAX_ROWS: usize = 256;
/// Least rows of a launch, where there are fewer slots: rows of prompts have log-probabilities, too.
const MIN_ROWS: usize = 64;
/// Bytes of a row's counters, bins and lists: `Row`, `BINS` and `LIST` of `kernels/sample.cuh`.
const ROW_BYTES: u64 = 144;
const BIN_BYTES: u64 = 2 * 1024 * 2 * 4;
const LIST_BYTES: u64 = 2 * 4096 * 8;
/// A token of the history that was in the prompt; the lower bits count it in the output.
const IN_PROMPT: u16 = 1 << 15;

/// Flags of `Slot` in `kernels/sample.cuh`.
mod flag {
    pub(super) const BIAS: u32 = 1;
    pub(super) const STOPS: u32 = 2;
    pub(super) const PENALTIES: u32 = 4;
    pub(super) const RANDOM: u32 = 8;
    pub(super) const FILTERS: u32 = 16;
    pub(super) const LOGPROBS: u32 = 32;
}

/// `Slot` of `kernels/sample.cuh`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
struct SlotHeader {
    seed: u64,
    temperature: f32,
    floor: f32,
    top_p: f32,
    top_k: u32,
    repetition: f32,
    presence: f32,
    frequency: f32,
    flags: u32,
    generated: u32,
    min_tokens: u32,
    num_named: u32,
    unused: u32,
}

impl SlotHeader {
    fn new(params: &SlotParams) -> Self {
        let is_random = params.temperature >= GREEDY;
        let penalties = [params.repetition_penalty, params.presence_penalty, params.frequency_penalty];
        let has_filters = params.top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0;
        let set = |flag: u32, is_set: bool| if is_set { flag } else { 0 };
        Self {
            seed: params.seed,
            temperature: params.temperature,
            floor: if params.min_p > 0.0 { params.min_p.min(1.0).ln() } else { f32::NEG_INFINITY },
            top_p: params.top_p,
            top_k: params.top_k,
            repetition: params.repetition_penalty,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            flags: set(flag::BIAS, !params.logit_bias.is_empty())
                | set(flag::STOPS, params.min_tokens > 0 && !params.stop_token_ids.is_empty())
                | set(flag::PENALTIES, penalties != [1.0, 0.0, 0.0])
                | set(flag::RANDOM, is_random)
                | set(flag::FILTERS, is_random && has_filters)
                | set(flag::LOGPROBS, params.logprobs.is_some()),
            // Counters beyond 32 bits do not happen: that many tokens have no context.
            generated: u32::try_from(params.output.len()).unwrap_or(u32::MAX),
            min_tokens: u32::try_from(params.min_tokens).unwrap_or(u32::MAX),
            num_named: u32::try_from(num_named(params)).unwrap_or(u32::MAX),
            unused: 0,
        }
    }
}

/// Tokens whose log-probabilities a sequence reports.
fn num_named(params: &SlotParams) -> usize {
    params.logprobs.map_or(0, |_| params.named_tokens.len())
}

/// `AdmitParams` of `kernels/sample_admit.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct AdmitParams {
    slots: u64,
    last_tokens: u64,
    bias: u64,
    stops: u64,
    history: u64,
    named: u64,
    slot: SlotHeader,
    index: u32,
    has_slot: u32,
    last_token: u32,
    stride: u32,
    num_entries: u32,
    unused: u32,
    entries: [[u32; 2]; ENTRIES],
}

// SAFETY: the fields are those of the kernel's struct in the same order; 6 * 8 + 56 + 6 * 4 + 440 * 8 bytes, no padding.
unsafe impl Params for AdmitParams {
    const NAME: &'static str = "AdmitParams";
}

#[derive(Debug)]
pub(super) struct SampleAdmit {
    kernel: Kernel<AdmitParams>,
}

impl SampleAdmit {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        Ok(Self { kernel: Kernel::new(module, "sample_admit", 0)? })
    }
}

/// Sampling state of all slots on the device: parameters, history of the penalties, last token; and the counters of the
/// sampling kernels, which they find and leave at zero.
#[derive(Debug)]
pub struct Sampler {
    parts: Parts<DeviceSlice>,
    num_slots: usize,
    vocab_size: usize,
    max_rows: usize,
    slots: Vec<HostSlot>,
}

/// What the host knows of a slot.
#[derive(Debug, Clone, Copy, Default)]
struct HostSlot {
    /// Whether bias, stop tokens, history were written.
    dirty: [bool; 3],
    logprobs: Option<usize>,
    num_named: usize,
    has_filters: bool,
}

/// The state's parts: their bytes, or their memory.
#[derive(Debug, Clone)]
pub(super) struct Parts<T> {
    /// `[num_slots]` `Slot`.
    pub(super) slots: T,
    /// `[num_slots]` u32.
    pub(super) last_tokens: T,
    /// `[num_slots][stride]` f32.
    pub(super) bias: T,
    /// `[num_slots][stride / 32]` u32.
    pub(super) stops: T,
    /// `[num_slots][stride]` u16.
    pub(super) history: T,
    /// `[max_rows]` `Row`.
    pub(super) rows: T,
    /// `[max_rows][2]` u32.
    pub(super) active: T,
    /// `[max_rows][2][BINS][2]` u32.
    pub(super) bins: T,
    /// `[max_rows][2][LIST]` u64.
    pub(super) lists: T,
    /// `[num_slots][MAX_NAMED_TOKENS]` u32.
    pub(super) named: T,
}

impl<T> Parts<T> {
    fn try_map<U>(self, mut f: impl FnMut(T) -> Result<U>) -> Result<Parts<U>> {
        Ok(Parts {
            slots: f(self.slots)?,
            last_tokens: f(self.last_tokens)?,
            bias: f(self.bias)?,
            stops: f(self.stops)?,
            history: f(self.history)?,
            rows: f(self.rows)?,
            active: f(self.active)?,
            bins: f(self.bins)?,
            lists: f(self.lists)?,
            named: f(self.named)?,
        })
    }
}

impl Parts<u64> {
    fn new(num_slots: usize, vocab_size: usize) -> Self {
        let (slots, stride, rows) = (num_slots as u64, stride(vocab_size), max_rows(num_slots) as u64);
        Self {
            slots: slots * size_of::<SlotHeader>() as u64,
            last_tokens: 4 * slots,
            bias: 4 * slots * stride,
            stops: slots * stride / 8,
            history: 2 * slots * stride,
            rows: rows * ROW_BYTES,
            active: 8 * rows,
            bins: rows * BIN_BYTES,
            lists: rows * LIST_BYTES,
            named: 4 * slots * MAX_NAMED_TOKENS as u64,
        }
    }
}

/// Tokens of a slot's tables: whole words of bits, aligned for 16-byte loads.
fn stride(vocab_size: usize) -> u64 {
    (vocab_size as u64).next_multiple_of(128)
}

fn max_rows(num_slots: usize) -> usize {
    num_slots.clamp(MIN_ROWS, MAX_ROWS)
}

impl Sampler {
    /// Whether the best of each rank's share of the tokens are enough for a step: no row has filters, log-probabilities or a
    /// target, which depend on all logits.
    pub fn takes_shares(&self, inputs: &StepInputs) -> bool {
        let depends = |slot: &usize| {
            self.slots.get(*slot).is_none_or(|slot| slot.has_filters || slot.logprobs.is_some())
        };
        !inputs.sample_slots.iter().flatten().any(depends)
            && inputs.prompt_targets.iter().all(Option::is_none)
    }

    /// Bytes that [`Sampler::new`] needs: 6 and an eighth for each token of the vocabulary in each slot, and up to 20 MiB.
    pub fn num_bytes(num_slots: usize, vocab_size: usize) -> u64 {
        let mut sum = 0;
        let sizes = Parts::new(num_slots, vocab_size).try_map(|size| {
            sum += size.next_multiple_of(ALIGNMENT);
            Ok(())
        });
        debug_assert!(sizes.is_ok());
        sum
    }

    /// State for `num_slots` sequences over `vocab_size` tokens, in `memory`. Clears it with `stream`.
    ///
    /// # Errors
    /// [`Error::Shape`] for too little memory, memory that is not aligned to 256 bytes, or more than a million tokens;
    /// [`Error::Driver`].
    pub fn new(stream: &Stream, memory: &DeviceSlice, num_slots: usize, vocab_size: usize) -> Result<Self> {
        if !(1..=MAX_VOCAB).contains(&vocab_size) {
            return Err(Error::shape(OP, format!("a vocabulary of 1 to {MAX_VOCAB} tokens"), vocab_size));
        }
        if !memory.address().is_multiple_of(ALIGNMENT) {
            return Err(Error::shape(OP, "memory aligned to 256 bytes", memory.address()));
        }
        to_u32(OP, num_slots)?;
        let memory = memory.slice(0, Self::num_bytes(num_slots, vocab_size))?;
        stream.fill(&memory, 0)?;
        let mut offset = 0;
        let parts = Parts::new(num_slots, vocab_size).try_map(|size| {
            let part = memory.slice(offset, size);
            offset += size.next_multiple_of(ALIGNMENT);
            part
        })?;
        let slots = vec![HostSlot::default(); num_slots];
        Ok(Self { parts, num_slots, vocab_size, max_rows: max_rows(num_slots), slots })
    }

    /// `[num_slots]` u32: the token that each slot sampled last, for pending input tokens.
    pub fn last_tokens(&self) -> &DeviceSlice {
        &self.parts.last_tokens
    }

    /// Slots.
    pub fn num_slots(&self) -> usize {
        self.num_slots
    }

    /// Tokens that may be sampled.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Alternatives that the sequence in `slot` asked for; `None` for no log-probabilities.
    pub(super) fn logprobs(&self, slot: usize) -> Option<usize> {
        self.slots.get(slot).and_then(|slot| slot.logprobs)
    }

    /// How many tokens it named, whose log-probabilities take the place of alternatives.
    pub(super) fn num_named(&self, slot: usize) -> usize {
        self.slots.get(slot).map_or(0, |slot| slot.num_named)
    }

    pub(super) fn parts(&self) -> &Parts<DeviceSlice> {
        &self.parts
    }

    pub(super) fn stride(&self) -> u64 {
        stride(self.vocab_size)
    }

    pub(super) fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// The tables of a slot: bias, stop tokens, history.
    fn tables(&self, slot: usize) -> Result<[DeviceSlice; 3]> {
        let (slot, stride, parts) = (slot as u64, self.stride(), &self.parts);
        Ok([
            parts.bias.slice(4 * slot * stride, 4 * stride)?,
            parts.stops.slice(slot * stride / 8, stride / 8)?,
            parts.history.slice(2 * slot * stride, 2 * stride)?,
        ])
    }
}

impl Kernels {
    /// Puts a sequence into `slot`, from the next step in `stream` on. Does not wait: steps may be in flight.
    ///
    /// # Errors
    /// [`Error::Shape`] for a slot that is not there, for more than [`MAX_ALTERNATIVES`] alternatives or
    /// [`MAX_NAMED_TOKENS`] named tokens, and for a named token outside the vocabulary; [`Error::Driver`].
    pub fn admit(
        &self,
        stream: &Stream,
        sampler: &mut Sampler,
        slot: usize,
        params: &SlotParams,
    ) -> Result<()> {
        if slot >= sampler.num_slots {
            return Err(Error::shape(OP, format!("a slot under {}", sampler.num_slots), slot));
        }
        check_logprobs(params, sampler.vocab_size)?;
        let header = SlotHeader::new(params);
        let needed = [flag::BIAS, flag::STOPS, flag::PENALTIES].map(|flag| header.flags & flag != 0);
        let tables = sampler.tables(slot)?;
        for ((table, needed), dirty) in tables.iter().zip(needed).zip(sampler.slots[slot].dirty) {
            if needed && dirty {
                stream.fill(table, 0)?;
            }
        }
        let host = &mut sampler.slots[slot];
        for (dirty, needed) in host.dirty.iter_mut().zip(needed) {
            *dirty |= needed;
        }
        host.logprobs = params.logprobs;
        host.num_named = num_named(params);
        host.has_filters = header.flags & flag::FILTERS != 0;
        let entries = entries(params, header.flags, sampler.vocab_size);
        let parts = &sampler.parts;
        let mut launch = AdmitParams {
            slots: parts.slots.address(),
            last_tokens: parts.last_tokens.address(),
            bias: parts.bias.address(),
            stops: parts.stops.address(),
            history: parts.history.address(),
            named: parts.named.address(),
            slot: header,
            index: to_u32(OP, slot)?,
            has_slot: 1,
            last_token: params.output.last().copied().unwrap_or(0),
            stride: to_u32(OP, sampler.stride() as usize)?,
            num_entries: 0,
            unused: 0,
            entries: [[0; 2]; ENTRIES],
        };
        stream.uses(OP, &[&parts.slots])?;
        let mut chunks = entries.chunks(ENTRIES);
        loop {
            let chunk = chunks.next().unwrap_or_default();
            launch.entries[..chunk.len()].copy_from_slice(chunk);
            launch.num_entries = chunk.len() as u32;
            // SAFETY: the parts have the sizes of `Parts::new`; the slot is one of them, and `entries` holds only tokens of the
            // vocabulary.
            unsafe { self.sample_admit.kernel.launch(stream, Launch::blocks(1, NUM_THREADS), &launch)? };
            launch.has_slot = 0;
            if chunks.len() == 0 {
                return Ok(());
            }
        }
    }
}

/// An error unless a row has room for what the sequence reports.
fn check_logprobs(params: &SlotParams, vocab_size: usize) -> Result<()> {
    if params.logprobs.is_some_and(|n| n > MAX_ALTERNATIVES) {
        return Err(Error::shape(OP, format!("at most {MAX_ALTERNATIVES} alternatives"), params.logprobs));
    }
    if num_named(params) > MAX_NAMED_TOKENS {
        let expected = format!("at most {MAX_NAMED_TOKENS} named tokens");
        return Err(Error::shape(OP, expected, num_named(params)));
    }
    match params.named_tokens.iter().find(|&&token| token as usize >= vocab_size) {
        Some(token) => Err(Error::shape(OP, format!("named tokens under {vocab_size}"), token)),
        None => Ok(()),
    }
}

/// What goes into the slot's tables: bias, stop tokens, history, each token once in each; and named tokens by their place. Tokens outside the vocabulary have
/// no logit to change.
fn entries(params: &SlotParams, flags: u32, vocab_size: usize) -> Vec<[u32; 2]> {
    let is_token = |token: &u32| (*token as usize) < vocab_size;
    let mut entries = Vec::new();
    if flags & flag::PENALTIES != 0 {
        let mut seen: HashMap<u32, u16> = HashMap::new();
        for &token in params.prompt.iter().filter(|token| is_token(token)) {
            seen.insert(token, IN_PROMPT);
        }
        for &token in params.output.iter().filter(|token| is_token(token)) {
            let seen = seen.entry(token).or_default();
            if *seen & !IN_PROMPT != !IN_PROMPT {
                *seen += 1;
            }
        }
        entries.extend(seen.into_iter().map(|(token, seen)| [token, u32::from(seen)]));
    }
    if flags & flag::BIAS != 0 {
        let mut biases: HashMap<u32, f32> = HashMap::new();
        for &(token, bias) in params.logit_bias.iter().filter(|(token, _)| is_token(token)) {
            *biases.entry(token).or_default() += bias;
        }
        entries.extend(biases.into_iter().map(|(token, bias)| [token | 1 << KIND_SHIFT, bias.to_bits()]));
    }
    if flags & flag::STOPS != 0 {
        let stops = params.stop_token_ids.iter().filter(|token| is_token(token));
        entries.extend(stops.map(|&token| [token | 2 << KIND_SHIFT, 0]));
    }
    if num_named(params) > 0 {
        entries.extend((0..).zip(&params.named_tokens).map(|(i, &token)| [token | 3 << KIND_SHIFT, i]));
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_kernels() {
        assert_eq!((size_of::<SlotHeader>(), size_of::<AdmitParams>()), (56, 3648));
        // The driver takes 4 KiB of parameters everywhere.
        assert!(size_of::<AdmitParams>() <= 4096);
        // 151,936 is 1187 * 128; 6.125 bytes a token, 80 KiB and 152 bytes a row, 60 and 128 named tokens a slot.
        let expected = 2 * (151_936 * 49 / 8 + 60 + 512) + 64 * (2 * 40_960 + 152);
        let rounding = Sampler::num_bytes(2, 151_900) - expected;
        assert!(rounding < 10 * 256, "{rounding}");
        assert_eq!(stride(1), 128);
        assert_eq!([1, 100, 300].map(max_rows), [64, 100, 256]);
    }

    #[test]
    fn a_slot_is_asked_for_no_more_than_it_needs() {
        let flags = |params: &SlotParams| SlotHeader::new(params).flags;
        let greedy = SlotParams::greedy();
        assert_eq!(flags(&greedy), 0);
        // Filters mean nothing to a greedy sequence, stop tokens nothing without a minimum.
        let filtered = SlotParams { top_k: 5, top_p: 0.5, min_p: 0.1, stop_token_ids: vec![1], ..greedy };
        assert_eq!(flags(&filtered), 0);
        let all = SlotParams {
            temperature: 0.5,
            min_tokens: 2,
            logit_bias: vec![(0, 1.0)],
            logprobs: Some(0),
            frequency_penalty: 0.1,
            output: vec![1, 2],
            ..filtered
        };
        let header = SlotHeader::new(&all);
        assert_eq!((header.flags, header.generated, header.min_tokens), (63, 2, 2));
        assert_eq!(header.floor, 0.1f32.ln());
        assert_eq!(SlotHeader::new(&SlotParams { min_p: 0.0, ..all }).floor, f32::NEG_INFINITY);
    }

    #[test]
    fn tables_hold_each_token_once_and_only_real_ones() {
        let params = SlotParams {
            prompt: vec![3, 3, 99],
            output: vec![3, 5, 3, 99],
            logit_bias: vec![(7, 1.0), (7, 0.5), (99, 1.0)],
            stop_token_ids: vec![2, 99],
            ..SlotParams::greedy()
        };
        let sorted = |flags| {
            let mut entries = entries(&params, flags, 10);
            entries.sort_unstable();
            entries
        };
        assert_eq!(sorted(flag::PENALTIES), [[3, 0x8002], [5, 1]]);
        assert_eq!(sorted(flag::BIAS), [[7 | 1 << 30, 1.5f32.to_bits()]]);
        assert_eq!(sorted(flag::STOPS), [[2 | 2 << 30, 0]]);
        assert!(sorted(0).is_empty());
        let named = SlotParams { logprobs: Some(0), named_tokens: vec![9, 0], ..SlotParams::greedy() };
        assert_eq!(entries(&named, 0, 10), [[9 | 3 << 30, 0], [3 << 30, 1]]);
        assert_eq!(SlotHeader::new(&named).num_named, 2);
        let silent = SlotParams { logprobs: None, ..named };
        assert_eq!((entries(&silent, 0, 10).len(), SlotHeader::new(&silent).num_named), (0, 0));
        let many = SlotParams { output: vec![1; 40_000], ..SlotParams::greedy() };
        assert_eq!(entries(&many, flag::PENALTIES, 10), [[1, 0x7fff]], "the count stops at its largest");
    }
}
