//! Which byte ranges of a checkpoint several ranks want, and which of them reads each. Every rank makes the same table from the
//! headers; nothing is read or sent here.

use std::collections::BTreeMap;

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::plan::{Item, Plan};
use crate::read::Request;
use crate::spec::ParamSpec;

/// Bytes that one rank reads before it is another's turn: long enough for reads of full speed, short enough that all ranks read at
/// all times.
const TURN: u64 = 2 << 20;
/// Longer ranges are read by everybody who wants them: what comes from another rank is held whole.
const LONGEST: usize = 256 << 20;

/// A range and the parameter that it is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    spec: usize,
    file: usize,
    offset: u64,
    len: usize,
}

/// A range that several ranks want.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Common {
    place: Place,
    /// The rank that reads it.
    pub(crate) reader: usize,
    /// A bit for each rank that wants it, the reader too.
    wanted_by: u64,
}

impl Common {
    /// The parameter.
    pub(crate) fn spec(&self) -> usize {
        self.place.spec
    }

    /// Its bytes.
    pub(crate) fn len(&self) -> usize {
        self.place.len
    }

    /// Whom its reader sends it to.
    pub(crate) fn takers(&self) -> impl Iterator<Item = usize> + use<> {
        let (wanted_by, reader) = (self.wanted_by, self.reader);
        (0..64).filter(move |&rank| wanted_by >> rank & 1 == 1 && rank != reader)
    }
}

/// All of them, by parameter and place. The position of one is its name among the ranks.
#[derive(Debug)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct Table {
    ranges: Vec<Common>,
    /// Of the table and of the headers that it was made from: equal on all ranks, or their files differ.
    pub(crate) hash: [u8; 32],
}

impl Table {
    /// For the ranks of a group of `world` that load `specs`.
    ///
    /// # Errors
    /// Those of [`Plan::new`].
    pub(crate) fn new(checkpoint: &Checkpoint, specs: &[ParamSpec], world: usize) -> Result<Self> {
        let mut wanted: BTreeMap<Place, u64> = BTreeMap::new();
        for (rank, plan) in Plan::of_ranks(checkpoint, specs, world)?.iter().enumerate() {
            for item in &plan.items {
                for place in places(checkpoint, item) {
                    *wanted.entry(place).or_default() |= 1 << rank;
                }
            }
        }
        let mut hash = blake3::Hasher::new();
        for tensor in &checkpoint.tensors {
            hash.update(format!("{:?} {}", tensor.info, tensor.file).as_bytes());
        }
        let mut turns = Turns { read: vec![0; world], reader: 0, since: 0 };
        let mut ranges = Vec::new();
        for (place, wanted_by) in wanted {
            if wanted_by.count_ones() < 2 || place.len > LONGEST {
                turns.count(wanted_by, place.len as u64);
                continue;
            }
            let reader = turns.next(wanted_by, place.len as u64);
            hash.update(format!("{place:?} {wanted_by} {reader}").as_bytes());
            ranges.push(Common { place, reader, wanted_by });
        }
        Ok(Self { ranges, hash: *hash.finalize().as_bytes() })
    }

    /// The range of this number, as ranks call it.
    pub(crate) fn get(&self, number: u32) -> Option<&Common> {
        self.ranges.get(number as usize)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.ranges.len()
    }

    /// The range that is exactly `request`, for parameter `spec`, and its number.
    pub(crate) fn find(&self, spec: usize, request: &Request) -> Option<(u32, &Common)> {
        let place = Place { spec, file: request.file, offset: request.offset, len: request.len };
        let number = self.ranges.binary_search_by_key(&place, |common| common.place).ok()?;
        Some((u32::try_from(number).ok()?, &self.ranges[number]))
    }

    /// Whether `rank` reads `request` itself.
    pub(crate) fn is_read_by(&self, rank: usize, spec: usize, request: &Request) -> bool {
        self.find(spec, request).is_none_or(|(_, common)| common.reader == rank)
    }
}

fn places(checkpoint: &Checkpoint, item: &Item) -> impl Iterator<Item = Place> {
    let spec = item.spec;
    let place = move |segment: &crate::scheme::Segment| Place {
        spec,
        file: checkpoint.tensors[segment.tensor].file,
        offset: segment.offset,
        len: segment.len,
    };
    item.segments.iter().map(place).filter(|place| place.len > 0)
}

/// Whose turn it is to read.
struct Turns {
    /// Bytes of each rank, those included that it alone wants.
    read: Vec<u64>,
    reader: usize,
    /// Bytes of this turn.
    since: u64,
}

impl Turns {
    /// Bytes that each of `ranks` reads for itself.
    fn count(&mut self, ranks: u64, len: u64) {
        for (rank, read) in self.read.iter_mut().enumerate() {
            *read += len * (ranks >> rank & 1);
        }
    }

    /// Who of `wanted_by` reads the next `len` bytes: whose turn it is, or then who has read least so far.
    fn next(&mut self, wanted_by: u64, len: u64) -> usize {
        let wants = |rank: usize| wanted_by >> rank & 1 == 1;
        if !wants(self.reader) || self.since > 0 && self.since + len > TURN {
            let wanting = (0..self.read.len()).filter(|&rank| wants(rank));
            self.reader = wanting.min_by_key(|&rank| self.read[rank]).unwrap_or(self.reader);
            self.since = 0;
        }
        self.since += len;
        self.read[self.reader] += len;
        self.reader
    }
}
