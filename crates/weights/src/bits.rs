//! Bytes to numbers and bytes to bytes: float decoding, transposition, nibble packing. Knows no tensor and no file.

use half::{bf16, f16};

use crate::header::DiskType;

/// The 32-bit words of a little-endian buffer.
fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
}

/// Float32 values of a plain tensor; `None` when the type is not a float type that is supported.
pub(crate) fn to_f32(bytes: &[u8], dtype: DiskType) -> Option<Vec<f32>> {
    let pairs = bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    Some(match dtype {
        DiskType::F32 => words(bytes).map(f32::from_bits).collect(),
        DiskType::F16 => pairs.map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
        DiskType::Bf16 => pairs.map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        _ => return None,
    })
}

/// How many values are NaN or infinite (E4M3 has no infinity).
pub(crate) fn count_non_finite(bytes: &[u8], dtype: DiskType) -> usize {
    let exponent_full = |mask: u16| {
        bytes.chunks_exact(2).filter(|pair| u16::from_le_bytes([pair[0], pair[1]]) & mask == mask).count()
    };
    match dtype {
        DiskType::F32 => words(bytes).filter(|&word| !f32::from_bits(word).is_finite()).count(),
        DiskType::F16 => exponent_full(0x7c00),
        DiskType::Bf16 => exponent_full(0x7f80),
        DiskType::F8E4m3 => bytes.iter().filter(|&&byte| byte & 0x7f == 0x7f).count(),
        _ => 0,
    }
}

/// `[rows, columns]` elements of `size` bytes (1, 2 or 4) -> `[columns, rows]`.
pub(crate) fn transpose(source: &[u8], rows: usize, columns: usize, size: usize) -> Vec<u8> {
    // A size that is known when compiling makes each copy one move instead of a call.
    match size {
        1 => transpose_elements::<1>(source, rows, columns),
        2 => transpose_elements::<2>(source, rows, columns),
        4 => transpose_elements::<4>(source, rows, columns),
        _ => unreachable!("tensor elements have 1, 2 or 4 bytes"),
    }
}

/// In tiles that stay in the first-level cache.
fn transpose_elements<const SIZE: usize>(source: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    const TILE: usize = 32;
    debug_assert_eq!(source.len(), rows * columns * SIZE);
    let mut target = vec![0; source.len()];
    let source = source.as_chunks::<SIZE>().0;
    let out = target.as_chunks_mut::<SIZE>().0;
    for row0 in (0..rows).step_by(TILE) {
        let end = rows.min(row0 + TILE);
        for column0 in (0..columns).step_by(TILE) {
            for column in column0..columns.min(column0 + TILE) {
                for (row, value) in (row0..end).zip(&mut out[column * rows + row0..]) {
                    *value = source[row * columns + column];
                }
            }
        }
    }
    target
}

/// AutoAWQ's order: nibble `i` of a word holds logical column `AWQ_COLUMN[i]` of its eight.
pub(crate) const AWQ_COLUMN: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Words that [`awq_codes`] takes side by side: a cache line of them, and what they become is computed in as many lanes.
const LANES: usize = 16;
/// Inputs that it takes together: a cache line of each output.
const INPUTS: usize = 128;

/// AWQ `qweight` `[k, n / 8]` words, interleaved along the outputs -> codes `[n, k / 2]`, low nibble the even input.
pub(crate) fn awq_codes(qweight: &[u8], k: usize, n: usize) -> Vec<u8> {
    debug_assert_eq!(qweight.len(), k * n / 2);
    let words = qweight.as_chunks::<4>().0;
    let (columns, width) = (n / 8, k / 2);
    let mut codes = Vec::with_capacity(n * width);
    // The outputs of the lanes, and one line of each: lines of a matrix get in each other's way in the cache where its width
    // is a power of two, so each is written whole.
    let mut rows = vec![0; 8 * LANES * width];
    let mut lines = [[0; INPUTS / 2]; 8 * LANES];
    for column0 in (0..columns).step_by(LANES) {
        let lanes = LANES.min(columns - column0);
        for input0 in (0..k).step_by(INPUTS) {
            let end = k.min(input0 + INPUTS);
            for input in (input0..end).step_by(16) {
                let mut pairs = [[0; LANES]; 8];
                for (i, pair) in pairs.iter_mut().enumerate().take((end - input) / 2) {
                    let words = |input: usize| &words[input * columns + column0..][..lanes];
                    let inputs = words(input + 2 * i).iter().zip(words(input + 2 * i + 1));
                    for (pair, (&low, &high)) in pair.iter_mut().zip(inputs) {
                        *pair = awq_pair(u32::from_le_bytes(low), u32::from_le_bytes(high));
                    }
                }
                transpose_bytes(&mut pairs);
                let at = (input - input0) / 2;
                for (pair, place) in pairs.iter().zip(AWQ_PAIR_COLUMN) {
                    for (lane, bytes) in pair.iter().enumerate() {
                        lines[8 * lane + place][at..at + 8].copy_from_slice(&bytes.to_le_bytes());
                    }
                }
            }
            let len = (end - input0) / 2;
            for (row, line) in rows.chunks_exact_mut(width).zip(&lines) {
                row[input0 / 2..][..len].copy_from_slice(&line[..len]);
            }
        }
        codes.extend_from_slice(&rows[..8 * lanes * width]);
    }
    codes
}

/// Byte `i` of an [`awq_pair`] belongs to logical column `AWQ_PAIR_COLUMN[i]`: the even nibbles' columns, then the odd
/// ones'.
const AWQ_PAIR_COLUMN: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// The codes of two inputs for eight outputs: a byte an output, `low`'s nibble below `high`'s.
fn awq_pair(low: u32, high: u32) -> u64 {
    let even = (low & 0x0f0f_0f0f) | ((high & 0x0f0f_0f0f) << 4);
    let odd = ((low >> 4) & 0x0f0f_0f0f) | (high & 0xf0f0_f0f0);
    u64::from(even) | u64::from(odd) << 32
}

/// In each lane, byte `j` of word `i` becomes byte `i` of word `j`: blocks of 4 x 4 bytes change places, then of 2 x 2, then
/// bytes.
fn transpose_bytes(x: &mut [[u64; LANES]; 8]) {
    for (step, mask) in [(4, 0xffff_ffff), (2, 0x0000_ffff_0000_ffff), (1, 0x00ff_00ff_00ff_00ff_u64)] {
        for i in (0..8).filter(|i| i & step == 0) {
            let (low, high) = x.split_at_mut(i + step);
            for (low, high) in low[i].iter_mut().zip(&mut high[0]) {
                let changed = ((*low >> (8 * step)) ^ *high) & mask;
                *low ^= changed << (8 * step);
                *high ^= changed;
            }
        }
    }
}

/// AWQ `qzeros` `[groups, n / 8]` words -> one zero point a byte, `[n, groups]`.
pub(crate) fn awq_zeros(qzeros: &[u8], groups: usize, n: usize) -> Vec<u8> {
    let mut zeros = vec![0; n * groups];
    for (at, word) in words(qzeros).enumerate() {
        let (group, column) = (at / (n / 8), at % (n / 8));
        for (nibble, place) in AWQ_COLUMN.into_iter().enumerate() {
            zeros[(8 * column + place) * groups + group] = (word >> (4 * nibble) & 15) as u8;
        }
    }
    zeros
}

/// compressed-tensors zero points `[ceil(n / 8), groups]` words, packed along the outputs -> `[n, groups]` bytes.
pub(crate) fn packed_zeros(packed: &[u8], n: usize, groups: usize) -> Vec<u8> {
    let mut zeros = vec![0; n * groups];
    for (at, word) in words(packed).enumerate() {
        let (rows, group) = (8 * (at / groups), at % groups);
        for row in rows..n.min(rows + 8) {
            zeros[row * groups + group] = (word >> (4 * (row - rows)) & 15) as u8;
        }
    }
    zeros
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_across_tile_edges() {
        let (rows, columns) = (33, 70);
        let source: Vec<u8> = (0..rows * columns).flat_map(|i| (i as u16).to_le_bytes()).collect();
        let target = transpose(&source, rows, columns, 2);
        for row in 0..rows {
            for column in 0..columns {
                let at = 2 * (column * rows + row);
                let value = u16::from_le_bytes([target[at], target[at + 1]]);
                assert_eq!(usize::from(value), row * columns + column);
            }
        }
        assert_eq!(transpose(&target, columns, rows, 2), source);
        for size in [1, 4] {
            let bytes: Vec<u8> = (0..rows * columns * size).map(|i| (i % 251) as u8).collect();
            let there = transpose(&bytes, rows, columns, size);
            assert_eq!(
                there[size..2 * size],
                bytes[columns * size..][..size],
                "row 1 of column 0 comes second"
            );
            assert_eq!(transpose(&there, columns, rows, size), bytes);
        }
    }

    #[test]
    fn awq_words_become_rows() {
        // Code of (input, output) is a formula; the words are built nibble by nibble from the documented order.
        let (k, n) = (130, 24);
        let code = |input: usize, output: usize| ((input * 7 + output * 5 + input * output) % 16) as u32;
        let mut packed = Vec::new();
        for input in 0..k {
            for column in 0..n / 8 {
                let word = (0..8).map(|i| code(input, 8 * column + AWQ_COLUMN[i]) << (4 * i)).sum::<u32>();
                packed.extend(word.to_le_bytes());
            }
        }
        let codes = awq_codes(&packed, k, n);
        let zeros = awq_zeros(&packed, k, n);
        for output in 0..n {
            for input in 0..k {
                let nibble = codes[output * k / 2 + input / 2] >> (4 * (input % 2)) & 15;
                assert_eq!(u32::from(nibble), code(input, output), "({input}, {output})");
                assert_eq!(u32::from(zeros[output * k + input]), code(input, output));
            }
        }
    }

    #[test]
    fn packed_zero_points_of_a_partial_word() {
        // 10 outputs take two words per group; the second has 6 unused nibbles.
        let (n, groups) = (10, 2);
        let words = [0x7654_3210_u32, 0xfedc_ba98, 0x0000_00a5, 0x0000_003c];
        let packed: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let zeros = packed_zeros(&packed, n, groups);
        let group = |g: usize| zeros.iter().skip(g).step_by(groups).copied().collect::<Vec<_>>();
        assert_eq!(group(0), [0, 1, 2, 3, 4, 5, 6, 7, 5, 10]);
        assert_eq!(group(1), [8, 9, 10, 11, 12, 13, 14, 15, 12, 3]);
    }

    #[test]
    fn counts_what_is_not_finite() {
        let f32s: Vec<u8> =
            [1.0, f32::NAN, f32::INFINITY, -0.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(count_non_finite(&f32s, DiskType::F32), 2);
        let halves: Vec<u8> =
            [f16::MAX, f16::NEG_INFINITY, f16::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(count_non_finite(&halves, DiskType::F16), 2);
        let brains: Vec<u8> = [bf16::MAX, bf16::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(count_non_finite(&brains, DiskType::Bf16), 1);
        assert_eq!(count_non_finite(&[0x7e, 0x7f, 0xff, 0xfe], DiskType::F8E4m3), 2);
    }
}
