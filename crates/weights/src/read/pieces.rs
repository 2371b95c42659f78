//! The `eager` strategy: ranges joined into runs, runs cut into pieces of a few MiB, pieces read in file order by several
//! threads, each a few ahead. What is soon dropped is lent from the piece's buffer, which is then read into again; what stays is too where it
//! is nearly all of its piece, else it gets a buffer of its own. Memory beside the result: a few pieces a thread.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;

use bytes::{Bytes, BytesMut};

use super::direct::{ALIGN, AlignedBuffer, Source};
use super::pool::Pool;
use super::ring::{Ring, Wanted};
use super::{Deliver, Next, Progress, Request, run_workers};
use crate::error::{Error, Result};
use crate::load::lock;

/// Bytes that are read at once: large enough for full speed on NVMe, small enough that every thread has its own.
const PIECE: u64 = 8 << 20;
/// A gap between ranges that is cheaper to read than to skip.
const GAP: u64 = 32 << 10;

/// Reads of a thread that are under way while it works on another.
const AHEAD: usize = 2;
/// Buffers that are kept for the next reads: for sixteen threads.
const FREE_BUFFERS: usize = 16 * (AHEAD + 1);
/// Alignment that a delivered buffer has, as one from the allocator would.
const DELIVERED: usize = 4;

/// One read.
#[derive(Debug, Default)]
struct Piece {
    file: usize,
    begin: u64,
    end: u64,
    scraps: Vec<Scrap>,
    /// It fills a buffer, and nearly all of it is a part of the result: the buffer may be too.
    stays: bool,
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

/// Opened files and the buffers that they are read into.
pub(crate) struct Files {
    paths: Vec<PathBuf>,
    sources: Vec<Source>,
    pool: Pool,
    /// Whether threads read ahead where the kernel has io_uring; else each waits for its reads.
    uses_rings: bool,
}

impl Files {
    pub(super) fn open(paths: &[PathBuf]) -> Result<Self> {
        let sources = paths.iter().map(|path| Source::open(path, true)).collect::<Result<_>>()?;
        let pool = Pool::new(PIECE as usize, FREE_BUFFERS);
        Ok(Self { paths: paths.to_vec(), sources, pool, uses_rings: true })
    }

    /// Reads `requests`, which are sorted by file and offset.
    pub(super) fn read(
        &self,
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
        let give = |index: usize, bytes: Bytes| -> Result<()> {
            let piece = &pieces[index];
            for scrap in &piece.scraps {
                let part = bytes.slice(scrap.from..scrap.from + scrap.len);
                let request = &requests[scrap.request];
                let Some(spread) = spreads.get(&scrap.request) else {
                    let is_lent =
                        (!request.stays || piece.stays) && part.as_ptr().align_offset(DELIVERED) == 0;
                    deliver(request, if is_lent { part } else { Bytes::copy_from_slice(&part) })?;
                    continue;
                };
                let mut target = lock(spread).take(scrap.number);
                target.copy_from_slice(&part);
                let whole = lock(spread).put(scrap.number, target);
                if let Some(whole) = whole {
                    deliver(request, whole)?;
                }
            }
            progress.add(bytes.len());
            Ok(())
        };
        run_workers(threads, pieces.len(), |next| match self.ring() {
            Some(ring) => self.read_ahead(&pieces, ring, next, &give),
            None => {
                while let Some(index) = next.take() {
                    give(index, self.piece(&pieces[index], self.pool.take())?)?;
                }
                Ok(())
            }
        })
    }

    fn ring(&self) -> Option<Ring> {
        if self.uses_rings { Ring::new(AHEAD) } else { None }
    }

    /// Reads what `next` gives, a few pieces ahead of the one that is given away.
    fn read_ahead(
        &self,
        pieces: &[Piece],
        mut ring: Ring,
        next: &Next,
        give: &dyn Fn(usize, Bytes) -> Result<()>,
    ) -> Result<()> {
        loop {
            while !ring.is_full()
                && let Some(index) = next.take()
            {
                let (piece, buffer) = (&pieces[index], self.pool.take());
                if let Err(buffer) = self.start(&mut ring, index, piece, buffer) {
                    give(index, self.piece(piece, buffer)?)?;
                }
            }
            let Some(flight) = ring.wait().map_err(|source| self.failed(source))? else { return Ok(()) };
            let (piece, buffer) = (&pieces[flight.piece], flight.buffer);
            let bytes = if flight.is_whole { self.lend(piece, buffer) } else { self.piece(piece, buffer)? };
            give(flight.piece, bytes)?;
        }
    }

    /// Starts to read a piece, directly. Gives the buffer back where that is not possible.
    fn start(
        &self,
        ring: &mut Ring,
        index: usize,
        piece: &Piece,
        buffer: AlignedBuffer,
    ) -> std::result::Result<(), AlignedBuffer> {
        let Some(file) = self.sources[piece.file].direct() else { return Err(buffer) };
        let need = piece.skip() + piece.len();
        let offset = piece.begin - piece.skip() as u64;
        ring.start(index, &Wanted { file, offset, len: need.next_multiple_of(ALIGN), need }, buffer)
    }

    /// The bytes of a piece that was read directly into `buffer`.
    fn lend(&self, piece: &Piece, buffer: AlignedBuffer) -> Bytes {
        self.pool.lend(buffer).slice(piece.skip()..piece.skip() + piece.len())
    }

    /// Reads a piece into `buffer`, waiting for it.
    fn piece(&self, piece: &Piece, mut buffer: AlignedBuffer) -> Result<Bytes> {
        let skip = self.sources[piece.file].read(&mut buffer, piece.begin, piece.len())?;
        Ok(self.pool.lend(buffer).slice(skip..skip + piece.len()))
    }

    fn failed(&self, source: std::io::Error) -> Error {
        let path = self.paths.first().cloned().unwrap_or_default();
        Error::Io { path, action: "cannot wait for reads of", offset: None, source }
    }
}

impl Piece {
    fn len(&self) -> usize {
        (self.end - self.begin) as usize
    }

    /// Bytes before it in its first aligned block.
    fn skip(&self) -> usize {
        (self.begin % ALIGN as u64) as usize
    }
}

/// Bytes that reading `requests`, which are sorted, takes: gaps included, and what several want once.
pub(super) fn num_bytes(requests: &[Request]) -> u64 {
    plan(requests).iter().map(|piece| piece.end - piece.begin).sum()
}

/// Requests with small gaps between them.
#[derive(Default)]
struct Run {
    /// The requests, by offset.
    members: Vec<usize>,
    end: u64,
    /// Places that no request lies across: where one ends and the next begins.
    seams: Vec<(u64, u64)>,
}

/// The reads for `requests`.
fn plan(requests: &[Request]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut run = Run::default();
    for (index, request) in requests.iter().enumerate().filter(|(_, request)| request.len > 0) {
        let file = run.members.first().map(|&first| requests[first].file);
        if file != Some(request.file) || request.offset > run.end + GAP {
            cut(&mut pieces, requests, &std::mem::take(&mut run));
        } else if request.offset >= run.end {
            run.seams.push((run.end, request.offset));
        }
        run.end = run.end.max(request.offset + request.len as u64);
        run.members.push(index);
    }
    cut(&mut pieces, requests, &run);
    for piece in &mut pieces {
        let stays = piece.scraps.iter().filter(|scrap| requests[scrap.request].stays);
        let stays = stays.map(|scrap| scrap.len as u64).sum::<u64>();
        // Of the whole buffer: a short piece would keep all of it.
        piece.stays = stays * 10 >= PIECE * 9;
    }
    pieces
}

/// Cuts a run into pieces: at seams, so that a request comes in one piece, unless it is larger than a piece itself.
fn cut(pieces: &mut Vec<Piece>, requests: &[Request], run: &Run) {
    let Some(&first) = run.members.first() else { return };
    let (file, base) = (requests[first].file, pieces.len());
    let mut begin = requests[first].offset;
    let mut seams = run.seams.iter().copied().chain([(run.end, run.end)]).peekable();
    while begin < run.end {
        let mut seam = None;
        while let Some(next) = seams.next_if(|&(end, _)| end <= begin + PIECE) {
            seam = Some(next);
        }
        // Without a seam, at a place where direct reads meet without an overlap.
        let full = (begin + PIECE) / ALIGN as u64 * ALIGN as u64;
        let (end, next) = seam.filter(|&(end, _)| end > begin).unwrap_or((full, full));
        pieces.push(Piece { file, begin, end, scraps: Vec::new(), stays: false });
        begin = next;
    }
    let mut from = base;
    for &index in &run.members {
        let request = &requests[index];
        let request_end = request.offset + request.len as u64;
        while pieces[from].end <= request.offset {
            from += 1;
        }
        let parts = pieces[from..].iter_mut().take_while(|piece| piece.begin < request_end);
        for (number, piece) in parts.enumerate() {
            let (start, stop) = (request.offset.max(piece.begin), request_end.min(piece.end));
            let from = (start - piece.begin) as usize;
            piece.scraps.push(Scrap { request: index, from, len: (stop - start) as usize, number });
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
        Request { file: 0, offset, len: len as usize, item: 0, position: 0, stays: false }
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
    fn only_a_piece_that_fills_its_buffer_gives_it_away() {
        let stays = |offset, len| Request { stays: true, ..request(offset, len) };
        // A rank's halves with what it skips between them, and a run of the same size.
        let halves: Vec<_> = (0..20).map(|i| stays(i * PIECE / 10, PIECE / 20)).collect();
        let pieces = plan(&halves);
        assert!(pieces.len() == 20 && pieces.iter().all(|piece| !piece.stays));
        let run: Vec<_> = (0..20).map(|i| stays(i * PIECE / 20, PIECE / 20)).collect();
        let pieces = plan(&run);
        assert!(pieces.len() == 1 && pieces[0].stays);
        assert!(plan(&[stays(0, PIECE / 2), request(PIECE / 2, PIECE / 2)]).iter().all(|piece| !piece.stays));
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
        let mut files = Files::open(&[path]).unwrap();
        let deliver = |request: &Request, bytes: Bytes| {
            let begin = request.offset as usize;
            assert!(bytes == data[begin..begin + request.len]);
            *lock(&seen) += 1;
            Ok(())
        };
        for uses_rings in [true, false] {
            files.uses_rings = uses_rings;
            files.read(&requests, 3, &progress, &deliver).unwrap();
        }
        assert_eq!(*lock(&seen), 2 * requests.len());
        let beyond = [request(len - 1, 2)];
        for uses_rings in [true, false] {
            files.uses_rings = uses_rings;
            let error = files.read(&beyond, 1, &progress, &|_, _| Ok(())).unwrap_err();
            assert!(matches!(error, Error::ShortRead { wanted: 2, got: 1, .. }), "{error}");
        }
    }
}
