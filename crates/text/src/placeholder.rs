//! Makes room in a prompt for the embeddings of its media.

use crate::{Result, TextError};

/// Replaces the `i`-th token equal to `placeholder_id` by `counts[i]` copies of it.
///
/// Returns the new ids and, for each medium, the index of its first placeholder: what `MediaItem::offset` wants. A
/// medium of zero tokens leaves no placeholder, and its offset is where one would have been.
///
/// # Errors
/// When `ids` has more or fewer placeholders than `counts` has entries.
pub fn expand_placeholders(
    ids: &[u32],
    placeholder_id: u32,
    counts: &[usize],
) -> Result<(Vec<u32>, Vec<usize>)> {
    let found = ids.iter().filter(|&&id| id == placeholder_id).count();
    if found != counts.len() {
        return Err(TextError::Placeholders { found, expected: counts.len() });
    }
    let mut expanded = Vec::with_capacity(ids.len() - found + counts.iter().sum::<usize>());
    let mut offsets = Vec::with_capacity(found);
    for &id in ids {
        if id == placeholder_id {
            let count = counts[offsets.len()];
            offsets.push(expanded.len());
            expanded.resize(expanded.len() + count, id);
        } else {
            expanded.push(id);
        }
    }
    Ok((expanded, offsets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expands_in_order() {
        let (ids, offsets) = expand_placeholders(&[1, 9, 2, 9, 9, 3], 9, &[2, 1, 3]).unwrap();
        assert_eq!(ids, [1, 9, 9, 2, 9, 9, 9, 9, 3]);
        assert_eq!(offsets, [1, 4, 5]);
    }

    #[test]
    fn refuses_a_mismatch() {
        for counts in [&[][..], &[1, 1]] {
            let error = expand_placeholders(&[1, 9], 9, counts).unwrap_err();
            assert!(
                matches!(error, TextError::Placeholders { found: 1, expected } if expected == counts.len())
            );
            assert!(error.is_request_error());
        }
    }
}
