//! The `eager` strategy: ranges joined into runs, runs cut into pieces of a few MiB, pieces read in file order by
//! several threads and scattered into the ranges' own buffers. Memory beside the result: one piece a thread.

use std::collections::HashMap;
use std::sync::Mutex;

use bytes::{Bytes, BytesMut};

use super::direct::{AlignedBuffer, Source};
use super::{Deliver, Progress, Request, run};
use crate::error::Result;
use crate::load::lock;

/// Bytes that are read at once: large enough for full speed on NVMe, small enough that every thread has its own.
const PIECE: u64 = 8 << 20;
/// A gap between ranges that is cheaper to read than to skip.
const GAP: u64 = 128 << 10;

/// One read.
#[derive(Debug, Default)]
struct Piece {
    file: usize,
    begin: u64,
    end: u64,
    scraps: Vec<Scrap>,
}

/// The part of a request that lies in a piece.
#[derive(Debug)]
struct Scrap {
    request: usize,
    /// From the beginning of the piece.
    from: usize,
    len: usize,
    /// Which of the request's scraps this is.
    number: usize,
}

/// A request that lies in several pieces: one buffer, split so that each thread fills its part without waiting.
struct Spread {
    lens: Vec<usize>,
    buffers: Vec<Option<BytesMut>>,
    missing: usize,
}

impl Spread {
    /// The buffer of a scrap. The whole is allocated with the first, in ordinary pages: the kernel may have to compact
    /// memory before it can give huge ones.
    fn take(&mut self, number: usize) -> BytesMut {
        if self.buffers.is_empty() {
            let mut rest = BytesMut::zeroed(self.lens.iter().sum());
            self.buffers = self.lens.iter().map(|&len| Some(rest.split_to(len))).collect();
        }
        self.buffers[number].take().unwrap_or_default()
    }

    /// Takes a filled buffer back; the whole, if it was the last.
    fn put(&mut self, number: usize, buffer: BytesMut) -> Option<Bytes> {
        self.buffers[number] = Some(buffer);
        self.missing -= 1;
        if self.missing > 0 {
            return None;
        }
        // Neighbours of one allocation join without a copy.
        let mut whole = BytesMut::new();
        for part in self.buffers.drain(..).flatten() {
            whole.unsplit(part);
        }
        Some(whole.freeze())
    }
}

/// Reads `requests`, which are sorted by file and offset.
pub(super) fn read(
    sources: &[Source],
    requests: &[Request],
    threads: usize,
    progress: &Progress,
    deliver: Deliver<'_>,
) -> Result<()> {
    for request in requests.iter().filter(|request| request.len == 0) {
        deliver(request, Bytes::new())?;
    }
    let pieces = plan(requests);
    let spreads = spreads(&pieces);
    let work = |buffer: &mut AlignedBuffer, index: usize| -> Result<()> {
        let piece = &pieces[index];
        let len = (piece.end - piece.begin) as usize;
        let bytes = sources[piece.file].read(buffer, piece.begin, len)?;
        for scrap in &piece.scraps {
            let part = &bytes[scrap.from..scrap.from + scrap.len];
            let Some(spread) = spreads.get(&scrap.request) else {
                deliver(&requests[scrap.request], Bytes::copy_from_slice(part))?;
                continue;
            };
            let mut target = lock(spread).take(scrap.number);
            target.copy_from_slice(part);
            let whole = lock(spread).put(scrap.number, target);
            if let Some(whole) = whole {
                deliver(&requests[scrap.request], whole)?;
            }
        }
        progress.add(len);
        Ok(())
    };
    run(threads, pieces.len(), || AlignedBuffer::new(PIECE as usize), work)
}

/// Bytes that reading `requests`, which are sorted, takes: gaps included, and what several want once.
pub(super) fn num_bytes(requests: &[Request]) -> u64 {
    plan(requests).iter().map(|piece| piece.end - piece.begin).sum()
}

/// Runs of requests with small gaps, cut at multiples of the piece size.
fn plan(requests: &[Request]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut run: Option<(usize, u64, u64, Vec<usize>)> = None;
    for (index, request) in requests.iter().enumerate().filter(|(_, request)| request.len > 0) {
        let end = request.offset + request.len as u64;
        match &mut run {
            Some((file, _, until, members)) if *file == request.file && request.offset <= *until + GAP => {
                *until = end.max(*until);
                members.push(index);
            }
            _ => {
                let done = run.replace((request.file, request.offset, end, vec![index]));
                cut(&mut pieces, requests, done);
            }
        }
    }
    cut(&mut pieces, requests, run);
    pieces
}

fn cut(pieces: &mut Vec<Piece>, requests: &[Request], run: Option<(usize, u64, u64, Vec<usize>)>) {
    let Some((file, begin, end, members)) = run else { return };
    let (first, base) = (begin / PIECE, pieces.len());
    for number in first..end.div_ceil(PIECE) {
        let (begin, end) = (begin.max(number * PIECE), end.min((number + 1) * PIECE));
        pieces.push(Piece { file, begin, end, scraps: Vec::new() });
    }
    for index in members {
        let request = &requests[index];
        let request_end = request.offset + request.len as u64;
        let from = (request.offset / PIECE - first) as usize;
        let to = (request_end.div_ceil(PIECE) - first) as usize;
        for (number, piece) in pieces[base + from..base + to].iter_mut().enumerate() {
            let (start, stop) = (request.offset.max(piece.begin), request_end.min(piece.end));
            let scrap = Scrap {
                request: index,
                from: (start - piece.begin) as usize,
                len: (stop - start) as usize,
                number,
            };
            piece.scraps.push(scrap);
        }
    }
}

/// The requests that lie in several pieces.
fn spreads(pieces: &[Piece]) -> HashMap<usize, Mutex<Spread>> {
    let mut lens: HashMap<usize, Vec<usize>> = HashMap::new();
    for scrap in pieces.iter().flat_map(|piece| &piece.scraps) {
        lens.entry(scrap.request).or_default().push(scrap.len);
    }
    lens.retain(|_, lens| lens.len() > 1);
    let spread = |(request, lens): (usize, Vec<usize>)| {
        let missing = lens.len();
        (request, Mutex::new(Spread { lens, buffers: Vec::new(), missing }))
    };
    lens.into_iter().map(spread).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(offset: u64, len: u64) -> Request {
        Request { file: 0, offset, len: len as usize, item: 0, position: 0 }
    }

    #[test]
    fn pieces_cover_each_request_once() {
        let requests = [
            request(100, 50),
            request(100, 50),
            request(120, 3 * PIECE),
            request(3 * PIECE + 200, 7),
            request(5 * PIECE, PIECE),
            request(9 * PIECE + 1, 0),
        ];
        let pieces = plan(&requests);
        for (index, request) in requests.iter().enumerate() {
            let mut at = request.offset;
            for piece in &pieces {
                for scrap in piece.scraps.iter().filter(|scrap| scrap.request == index) {
                    assert_eq!(piece.begin + scrap.from as u64, at);
                    at += scrap.len as u64;
                    assert!(at <= piece.end && piece.end - piece.begin <= PIECE);
                }
            }
            assert_eq!(at, request.offset + request.len as u64);
        }
        // The large hole is skipped.
        let read: u64 = pieces.iter().map(|piece| piece.end - piece.begin).sum();
        assert_eq!(read, (3 * PIECE + 207 - 100) + PIECE);
    }

    #[test]
    fn ranges_over_several_pieces_come_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let data: Vec<u8> =
            (0..(2 * PIECE + 12_345) as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        std::fs::write(&path, &data).unwrap();
        let len = data.len() as u64;
        let requests = [request(0, 10), request(3, len - 3), request(PIECE - 1, 2), request(len - 1, 1)];
        let seen = Mutex::new(0);
        let progress = Progress::new(None, num_bytes(&requests));
        let sources = [Source::open(&path, true).unwrap()];
        read(&sources, &requests, 3, &progress, &|request, bytes| {
            let begin = request.offset as usize;
            assert!(bytes == data[begin..begin + request.len]);
            *lock(&seen) += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(*lock(&seen), requests.len());
    }
}
