//! Makes room in a prompt for the embeddings of its media: the layout of videos before tokenisation, the runs of
//! placeholders after it.

use crate::{Result, Segment, TextError};

/// How a chat template shows a video; its placeholder and the marks around a run of them.
const VIDEO: &str = "<|video_pad|>";
const VISION_START: &str = "<|vision_start|>";
const VISION_END: &str = "<|vision_end|>";
/// How a chat template shows an image, for prompts that no template writes.
pub const IMAGE_PLACEHOLDER: &str = "<|vision_start|><|image_pad|><|vision_end|>";

/// A run of equal placeholders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaceholderRun {
    /// The placeholder's id.
    pub id: u32,
    /// How many of it.
    pub count: usize,
}

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
    let runs: Vec<_> = counts.iter().map(|&count| PlaceholderRun { id: placeholder_id, count }).collect();
    expand_media(ids, &[placeholder_id], &runs)
}

/// As [`expand_placeholders`], for media of several kinds: the `i`-th token that is one of `placeholder_ids` must be
/// `runs[i].id` and becomes `runs[i].count` copies of it.
///
/// # Errors
/// When `ids` has more or fewer placeholders than there are runs, or has them in another order.
pub fn expand_media(
    ids: &[u32],
    placeholder_ids: &[u32],
    runs: &[PlaceholderRun],
) -> Result<(Vec<u32>, Vec<usize>)> {
    let found = ids.iter().filter(|id| placeholder_ids.contains(id)).count();
    let mismatch = TextError::Placeholders { found, expected: runs.len() };
    if found != runs.len() {
        return Err(mismatch);
    }
    let mut expanded =
        Vec::with_capacity(ids.len() - found + runs.iter().map(|run| run.count).sum::<usize>());
    let mut offsets = Vec::with_capacity(found);
    for &id in ids {
        if placeholder_ids.contains(&id) {
            let run = runs[offsets.len()];
            if run.id != id {
                return Err(mismatch);
            }
            offsets.push(expanded.len());
            expanded.resize(expanded.len() + run.count, id);
        } else {
            expanded.push(id);
        }
    }
    Ok((expanded, offsets))
}

/// Replaces each video that a template shows (its placeholder with the marks around it) by one such triple for each of its
/// temporal patches, with the time before it: `<0.5 seconds><|vision_start|><|video_pad|><|vision_end|>`. `times[i]` are
/// those of the `i`-th video, in seconds. As `Qwen3VLProcessor` of transformers 4.57 does before it tokenises, so the
/// text before a video and its first time are tokenised together.
///
/// # Errors
/// When the template shows more or fewer videos than there are in `times`.
pub fn expand_videos(segments: Vec<Segment>, times: &[Vec<f64>]) -> Result<Vec<Segment>> {
    // Only the template can write a placeholder: in what a user wrote it is text.
    let shown = |segment: &Segment| match segment {
        Segment::Trusted(text) => text.matches(VIDEO).count(),
        Segment::Ordinary(_) => 0,
    };
    let found = segments.iter().map(shown).sum();
    if found != times.len() {
        return Err(TextError::Placeholders { found, expected: times.len() });
    }
    let mut times = times.iter();
    let mut expanded: Vec<Segment> = Vec::with_capacity(segments.len());
    for segment in segments {
        let Segment::Trusted(text) = segment else {
            expanded.push(segment);
            continue;
        };
        let (mut done, mut rest) = (String::with_capacity(text.len()), text.as_str());
        while let Some((before, after)) = rest.split_once(VIDEO) {
            done.push_str(before.strip_suffix(VISION_START).unwrap_or(before));
            rest = after.strip_prefix(VISION_END).unwrap_or(after);
            for (i, seconds) in times.next().into_iter().flatten().enumerate() {
                let time = format!("<{seconds:.1} seconds>");
                match expanded.last_mut() {
                    // The user's text ends here: the reference sees one run of text.
                    Some(Segment::Ordinary(text)) if i == 0 && done.is_empty() => text.push_str(&time),
                    _ => done.push_str(&time),
                }
                done.extend([VISION_START, VIDEO, VISION_END]);
            }
        }
        done.push_str(rest);
        expanded.push(Segment::Trusted(done));
    }
    Ok(expanded)
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

    #[test]
    fn kinds_must_come_in_their_order() {
        let run = |id, count| PlaceholderRun { id, count };
        let (ids, offsets) = expand_media(&[1, 9, 2, 8], &[8, 9], &[run(9, 2), run(8, 1)]).unwrap();
        assert_eq!((ids, offsets), (vec![1, 9, 9, 2, 8], vec![1, 4]));
        assert!(expand_media(&[1, 9, 2, 8], &[8, 9], &[run(8, 2), run(9, 1)]).is_err());
    }

    #[test]
    fn a_video_becomes_its_times() {
        let triple = "<|vision_start|><|video_pad|><|vision_end|>";
        let trusted = |text: String| Segment::Trusted(text);
        let user = |text: &str| Segment::Ordinary(text.into());
        let segments = vec![
            trusted(format!("a{triple}b")),
            user("see <|video_pad|>"),
            trusted(format!("{triple}<|im_end|>")),
        ];
        let expanded = expand_videos(segments.clone(), &[vec![0.25, 2.0], vec![0.75]]).unwrap();
        let expected = [
            trusted(format!("a<0.2 seconds>{triple}<2.0 seconds>{triple}b")),
            user("see <|video_pad|><0.8 seconds>"),
            trusted(format!("{triple}<|im_end|>")),
        ];
        assert_eq!(expanded, expected);
        assert!(expand_videos(segments, &[vec![0.0]]).is_err());
        // A template of its own without marks.
        let bare = expand_videos(vec![trusted("x<|video_pad|>y".into())], &[vec![1.0]]).unwrap();
        assert_eq!(bare, [trusted(format!("x<1.0 seconds>{triple}y"))]);
    }
}
