//! Random bytes in many buffers at once, with all threads: the same bytes on every machine. Not their meaning.

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

/// Buffers of the given lengths, seeds and patterns.
pub(crate) fn fill_all(buffers: &[(usize, Seed, Pattern)]) -> Vec<Vec<u8>> {
    // Zeroed memory costs nothing before it is written, which the threads below do.
    let mut filled: Vec<Vec<u8>> = buffers.iter().map(|&(len, ..)| vec![0; len]).collect();
    let mut chunks = Vec::new();
    for (buffer, &(_, mut seed, pattern)) in filled.iter_mut().zip(buffers) {
        for chunk in buffer.chunks_mut(CHUNK) {
            chunks.push(Mutex::new((chunk, seed.next(), pattern)));
        }
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = |(): &mut (), index: usize| {
        let chunk = &mut *lock(&chunks[index]);
        fill(chunk.0, chunk.1, chunk.2);
        Ok(())
    };
    // Filling cannot fail.
    let _ = run(threads, chunks.len(), || (), work);
    drop(chunks);
    filled
}

fn fill(bytes: &mut [u8], seed: Seed, pattern: Pattern) {
    match pattern {
        Pattern::Any => fill_with(bytes, seed, |word| word),
        Pattern::Codes1To15 => fill_with(bytes, seed, |word| {
            let any = word | word >> 1 | word >> 2 | word >> 3;
            word | (!any & 0x1111_1111_1111_1111) << 3
        }),
        Pattern::Bytes7Or8 => {
            fill_with(bytes, seed, |word| 0x0707_0707_0707_0707 + (word & 0x0101_0101_0101_0101));
        }
        Pattern::Bits { keep, set } => {
            let (keep, set) = (u64::from_le_bytes(keep), u64::from_le_bytes(set));
            fill_with(bytes, seed, |word| word & keep | set);
        }
    }
}

#[inline(always)]
fn fill_with(bytes: &mut [u8], mut seed: Seed, map: impl Fn(u64) -> u64) {
    let (words, rest) = bytes.as_chunks_mut::<8>();
    for word in words {
        seed.0 = seed.0.wrapping_add(STEP);
        *word = map(seed.number()).to_le_bytes();
    }
    let last = map(seed.next().number()).to_le_bytes();
    rest.copy_from_slice(&last[..rest.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(len: usize, pattern: Pattern) -> Vec<u8> {
        let seed = Seed::new(7, "x");
        fill_all(&[(3, seed, Pattern::Any), (len, seed, pattern)]).swap_remove(1)
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
        let both = fill_all(&[(64, seed.next(), Pattern::Any), (64, seed.next(), Pattern::Any)]);
        assert_ne!(both[0], both[1]);
    }
}
