//! Random bytes in many buffers at once, with all threads: the same bytes on every machine, and in a part of a buffer the
//! same as in the whole. Not their meaning.

use std::ops::Range;
use std::sync::Mutex;

use crate::load::lock;
use crate::read::run;

/// Bytes that one thread makes at a time. A part of the result: every chunk has its own numbers.
const CHUNK: usize = 1 << 20;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Where a sequence of random numbers starts (splitmix64).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seed(u64);

impl Seed {
    /// By a number and a name.
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        let hash = blake3::hash(name.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hash.as_bytes()[..8]);
        Seed(u64::from_le_bytes(first) ^ seed.wrapping_mul(STEP))
    }

    /// Another seed; the next call gives yet another.
    pub(crate) fn next(&mut self) -> Self {
        self.0 = self.0.wrapping_add(STEP);
        Seed(self.number())
    }

    /// What the `n`th call of [`Seed::next`] from now would give, from 0.
    fn nth(self, n: usize) -> Self {
        Seed(Seed(self.0.wrapping_add(STEP.wrapping_mul(n as u64 + 1))).number())
    }

    /// Its random number.
    pub(crate) fn number(self) -> u64 {
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// What random bytes look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Any bytes.
    Any,
    /// Any 4-bit codes but 0; 8 comes twice as often.
    Codes1To15,
    /// 7 or 8.
    Bytes7Or8,
    /// Random where `keep` has ones, and with the ones of `set`, in every eight bytes.
    Bits { keep: [u8; 8], set: [u8; 8] },
}

/// A buffer of `rows * stride` random bytes, or the part of it that is wanted: some rows, and some bytes of each.
#[derive(Debug, Clone)]
pub(crate) struct Fill {
    /// Rows of the whole buffer.
    pub(crate) rows: usize,
    /// Bytes of a row.
    pub(crate) stride: usize,
    /// Rows that are wanted.
    pub(crate) wanted: Range<usize>,
    /// Bytes that are wanted of each.
    pub(crate) bytes: Range<usize>,
    pub(crate) seed: Seed,
    pub(crate) pattern: Pattern,
}

impl Fill {
    /// Fills `out`, which is `wanted` of the buffer from `begin` on.
    fn fill(&self, out: &mut [u8], begin: usize) {
        let len = self.rows * self.stride;
        let (mut at, mut out) = (begin, out);
        while !out.is_empty() {
            let (chunk, from) = (at / CHUNK, at % CHUNK);
            let chunk_len = CHUNK.min(len - chunk * CHUNK);
            let (now, rest) = out.split_at_mut(out.len().min(chunk_len - from));
            at += now.len();
            fill(now, from, chunk_len / 8, self.seed.nth(chunk), self.pattern);
            out = rest;
        }
    }
}

/// The wanted parts, row-major.
pub(crate) fn fill_all(buffers: &[Fill]) -> Vec<Vec<u8>> {
    // Zeroed memory costs nothing before it is written, which the threads below do.
    let mut filled: Vec<Vec<u8>> =
        buffers.iter().map(|fill| vec![0; fill.wanted.len() * fill.bytes.len()]).collect();
    let mut pieces = Vec::new();
    for (out, fill) in filled.iter_mut().zip(buffers) {
        if fill.bytes == (0..fill.stride) {
            for (i, out) in out.chunks_mut(CHUNK).enumerate() {
                pieces.push(Mutex::new((fill, fill.wanted.start * fill.stride + i * CHUNK, out)));
            }
        } else if !fill.bytes.is_empty() {
            // Some rows at a time.
            let rows = (CHUNK / fill.stride).max(1);
            for (i, out) in out.chunks_mut(rows * fill.bytes.len()).enumerate() {
                pieces.push(Mutex::new((fill, (fill.wanted.start + i * rows) * fill.stride, out)));
            }
        }
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = |(): &mut (), index: usize| {
        let (fill, begin, out) = &mut *lock(&pieces[index]);
        if fill.bytes == (0..fill.stride) {
            fill.fill(out, *begin);
        } else {
            for (row, out) in out.chunks_mut(fill.bytes.len()).enumerate() {
                fill.fill(out, *begin + row * fill.stride + fill.bytes.start);
            }
        }
        Ok(())
    };
    // Filling cannot fail.
    let _ = run(threads, pieces.len(), || (), work);
    drop(pieces);
    filled
}

/// The bytes `from..` of a chunk of `num_words` whole words and perhaps a few bytes more.
fn fill(bytes: &mut [u8], from: usize, num_words: usize, seed: Seed, pattern: Pattern) {
    let at = (from, num_words);
    match pattern {
        Pattern::Any => fill_with(bytes, at, seed, |word| word),
        Pattern::Codes1To15 => fill_with(bytes, at, seed, |word| {
            let any = word | word >> 1 | word >> 2 | word >> 3;
            word | (!any & 0x1111_1111_1111_1111) << 3
        }),
        Pattern::Bytes7Or8 => {
            fill_with(bytes, at, seed, |word| 0x0707_0707_0707_0707 + (word & 0x0101_0101_0101_0101));
        }
        Pattern::Bits { keep, set } => {
            let (keep, set) = (u64::from_le_bytes(keep), u64::from_le_bytes(set));
            fill_with(bytes, at, seed, |word| word & keep | set);
        }
    }
}

#[inline(always)]
fn fill_with(bytes: &mut [u8], (from, num_words): (usize, usize), seed: Seed, map: impl Fn(u64) -> u64) {
    let first = from / 8;
    // The bytes after the last whole word have a number of their own kind.
    let word = |index: usize| {
        let number = Seed(seed.0.wrapping_add(STEP.wrapping_mul(index as u64 + 1))).number();
        map(if index < num_words { number } else { Seed(number).number() }).to_le_bytes()
    };
    let (head, bytes) =
        bytes.split_at_mut((first * 8 + 8 - from).min(bytes.len()) * usize::from(from % 8 > 0));
    head.copy_from_slice(&word(first)[from % 8..][..head.len()]);
    let first = from.div_ceil(8);
    let (words, rest) = bytes.as_chunks_mut::<8>();
    let mut seed = Seed(seed.0.wrapping_add(STEP.wrapping_mul(first as u64)));
    for word in &mut *words {
        seed.0 = seed.0.wrapping_add(STEP);
        *word = map(seed.number()).to_le_bytes();
    }
    if !rest.is_empty() {
        rest.copy_from_slice(&word(first + words.len())[..rest.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(len: usize, seed: Seed, pattern: Pattern) -> Fill {
        Fill { rows: 1, stride: len, wanted: 0..1, bytes: 0..len, seed, pattern }
    }

    fn one(len: usize, pattern: Pattern) -> Vec<u8> {
        let seed = Seed::new(7, "x");
        fill_all(&[whole(3, seed, Pattern::Any), whole(len, seed, pattern)]).swap_remove(1)
    }

    #[test]
    fn a_part_is_a_part_of_the_whole() {
        let (rows, stride, seed) = (2_051, 1_027, Seed::new(7, "x"));
        let all = one(rows * stride, Pattern::Codes1To15);
        for (wanted, bytes) in
            [(0..rows, 0..stride), (3..2_050, 0..stride), (2_050..rows, 1_026..stride), (5..5, 0..9)]
                .into_iter()
                .chain((0..9).map(|i| (i..rows - i, i..100 + 2 * i)))
        {
            let fill = Fill {
                rows,
                stride,
                wanted: wanted.clone(),
                bytes: bytes.clone(),
                seed,
                pattern: Pattern::Codes1To15,
            };
            let part = fill_all(&[fill]).swap_remove(0);
            let expected: Vec<u8> =
                wanted.clone().flat_map(|row| &all[row * stride..][bytes.clone()]).copied().collect();
            assert!(part == expected, "rows {wanted:?}, bytes {bytes:?}");
        }
    }

    /// What a seed gives must not change: numbers of models of random weights are compared over time.
    #[test]
    fn the_bytes_are_the_known_ones() {
        assert_eq!(one(11, Pattern::Any), [247, 53, 28, 141, 205, 216, 208, 115, 222, 142, 94]);
    }

    #[test]
    fn patterns_are_kept_and_nothing_else() {
        for len in [0, 1, 7, 100_003] {
            assert_eq!(one(len, Pattern::Any).len(), len);
        }
        let mut counts = [0usize; 16];
        for byte in one(100_003, Pattern::Codes1To15) {
            counts[usize::from(byte & 15)] += 1;
            counts[usize::from(byte >> 4)] += 1;
        }
        let share = |code: usize| counts[code] as f64 / 200_006.0 * 16.0;
        assert_eq!(counts[0], 0);
        assert!(
            (share(8) - 2.0).abs() < 0.1 && (share(1) - 1.0).abs() < 0.1 && (share(15) - 1.0).abs() < 0.1
        );
        let sevens = one(100_003, Pattern::Bytes7Or8);
        assert!(sevens.iter().all(|byte| [7, 8].contains(byte)));
        assert!(sevens.iter().filter(|byte| **byte == 7).count().abs_diff(50_000) < 1000);
        let bits = Pattern::Bits { keep: [0x0f, 0, 0, 0, 0, 0, 0, 0x80], set: [0x30, 1, 2, 3, 4, 5, 6, 7] };
        for bytes in one(8_000, bits).as_chunks::<8>().0 {
            assert!(bytes[0] & 0xf0 == 0x30 && bytes[1..7] == [1, 2, 3, 4, 5, 6] && bytes[7] & 0x7f == 7);
        }
    }

    #[test]
    fn chunks_and_buffers_differ_and_come_again() {
        let bytes = one(3 * CHUNK + 5, Pattern::Any);
        let [a, b, c] = [0, 1, 2].map(|i| &bytes[i * CHUNK..(i + 1) * CHUNK]);
        assert!(a != b && b != c && a != c);
        assert!(a.iter().zip(b).filter(|(a, b)| a == b).count().abs_diff(CHUNK / 256) < 400);
        assert!(one(3 * CHUNK + 5, Pattern::Any) == bytes);
        let mut seed = Seed::new(7, "x");
        let both = fill_all(&[whole(64, seed.next(), Pattern::Any), whole(64, seed.next(), Pattern::Any)]);
        assert_ne!(both[0], both[1]);
    }
}
