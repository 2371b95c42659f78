//! Memory of this device that the other ranks write: where they are processes of one machine whose GPUs reach each other, sums of few
//! rows need no library. The exchange itself is in `kernels/norm.cu`.

use std::sync::{Arc as Shared, Weak};

use cudarc::driver::sys;
use spark_backend::{Dtype, Rank};

use crate::driver::check;
use crate::{ALIGNMENT, Arena, ArenaPlan, Device, DeviceSlice, HostBuffer, Result, Stream, Team, Tensor};

/// Bytes that a rank tells the others: how to open its memory, and on which machine it is.
const HANDLE_BYTES: usize = 64;
const CARD_BYTES: usize = 2 * HANDLE_BYTES;
/// Where NCCL is told not to let GPUs reach each other, nobody shall.
const P2P_VARIABLE: &str = "NCCL_P2P_DISABLE";

/// This rank's mailbox, and those of the others.
#[derive(Debug)]
pub struct Mailboxes {
    rank: Rank,
    columns: usize,
    /// Mailbox, then a counter for each row.
    memory: DeviceSlice,
    /// Where the counters are.
    epochs: u64,
    /// By rank.
    addresses: [u64; Self::MAX_WORLD],
    others: Vec<Opened>,
    /// A word that is not zero once the group was given up.
    given_up: Shared<HostBuffer>,
}

impl Mailboxes {
    /// Most ranks.
    pub(crate) const MAX_WORLD: usize = 8;
    /// Most rows of an exchange: more have enough work for a library.
    pub(crate) const MAX_ROWS: usize = 128;
    /// Elements of 16 bytes; a thread has one.
    pub(crate) const VECTOR: usize = 8;
    const MAX_COLUMNS: usize = 1024 * Self::VECTOR;

    /// Bytes of a rank of a group of `world` for rows of `columns`: twice what is sent, two exchanges. None for a rank alone.
    pub(crate) fn num_bytes(world: usize, columns: usize) -> u64 {
        if world < 2 {
            return 0;
        }
        (2 * world * Self::MAX_ROWS * columns * 2 * 2) as u64 + (4 * Self::MAX_ROWS) as u64 + ALIGNMENT
    }

    /// Opens the mailboxes of all ranks of `team` for rows of `columns`; all must call this. `None` where they cannot reach each other:
    /// the same on all ranks.
    ///
    /// # Errors
    /// [`crate::Error::Group`], [`crate::Error::Memory`], [`crate::Error::Driver`].
    pub fn open(device: &Device, stream: &Stream, team: &Team, columns: usize) -> Result<Option<Self>> {
        let rank = team.rank();
        let is_possible = (2..=Self::MAX_WORLD).contains(&rank.world())
            && columns.is_multiple_of(Self::VECTOR)
            && (Self::VECTOR..=Self::MAX_COLUMNS).contains(&columns);
        // World and columns are the same on all ranks.
        if !is_possible {
            return Ok(None);
        }
        let memory = allocate(device, "mailboxes of ranks", Self::num_bytes(rank.world(), columns))?;
        stream.fill(&memory, 0)?;
        let cards = exchange(device, stream, team, &memory)?;
        let others = open_others(device, rank, &cards);
        if !agree(device, stream, team, others.is_some())? {
            tracing::info!(
                "the GPUs of the ranks do not reach each other's memory: all sums go through NCCL"
            );
            return Ok(None);
        }
        tracing::info!("sums of up to {} rows go from GPU to GPU", Self::MAX_ROWS);
        let given_up = Shared::new(HostBuffer::new(device, 4)?);
        team.on_abort(set_when_given_up(Shared::downgrade(&given_up)));
        let others = others.unwrap_or_default();
        let mut addresses = [0; Self::MAX_WORLD];
        addresses[rank.index()] = memory.address();
        for other in &others {
            addresses[other.rank] = other.address;
        }
        let boxes = Self::num_bytes(rank.world(), columns) - ALIGNMENT - (4 * Self::MAX_ROWS) as u64;
        let epochs = memory.address() + boxes;
        Ok(Some(Self { rank, columns, memory, epochs, addresses, others, given_up }))
    }

    /// Whether the sum of `partial` fits.
    pub fn takes(&self, partial: &Tensor) -> bool {
        partial.rows() <= Self::MAX_ROWS
            && partial.columns() == self.columns
            && partial.dtype() == Dtype::Bf16
    }

    pub(crate) fn rank(&self) -> Rank {
        self.rank
    }

    pub(crate) fn memory(&self) -> &DeviceSlice {
        &self.memory
    }

    pub(crate) fn addresses(&self) -> [u64; Self::MAX_WORLD] {
        self.addresses
    }

    /// Where the counters of the rows are.
    pub(crate) fn epochs(&self) -> u64 {
        self.epochs
    }

    /// Where kernels find the word.
    pub(crate) fn given_up(&self) -> u64 {
        self.given_up.address()
    }

    /// Ranks whose memory is open here, besides this one.
    pub fn num_others(&self) -> usize {
        self.others.len()
    }
}

fn allocate(device: &Device, what: &'static str, num_bytes: u64) -> Result<DeviceSlice> {
    let mut plan = ArenaPlan::default();
    let region = plan.add(what, num_bytes)?;
    Arena::new(device, plan)?.region(region)
}

/// What is run when the group is given up: kernels that wait for a rank end.
fn set_when_given_up(word: Weak<HostBuffer>) -> impl Fn() + Send + 'static {
    move || {
        if let Some(word) = word.upgrade() {
            // SAFETY: the buffer has 4 bytes, aligned to a page, that only this writes and only the device reads.
            unsafe { word.pointer().cast::<u32>().write_volatile(1) };
        }
    }
}

/// The cards of all ranks, in rank order.
fn exchange(device: &Device, stream: &Stream, team: &Team, memory: &DeviceSlice) -> Result<Vec<u8>> {
    let (rank, mut card) = (team.rank(), [0u8; CARD_BYTES]);
    let mut handle = sys::CUipcMemHandle_st { reserved: [0; HANDLE_BYTES] };
    device.bind()?;
    // SAFETY: the context is current; the address is that of an allocation of it; the pointer is valid.
    let status = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, memory.address()) };
    // A device that cannot share its memory says so with an empty card, which nobody can open.
    if check("cuIpcGetMemHandle", status).is_ok() {
        for (byte, value) in card.iter_mut().zip(handle.reserved) {
            *byte = value.to_ne_bytes()[0];
        }
        let machine = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let len = machine.len().min(HANDLE_BYTES);
        card[HANDLE_BYTES..HANDLE_BYTES + len].copy_from_slice(&machine[..len]);
    }
    let cards = allocate(device, "cards of ranks", (CARD_BYTES * rank.world()) as u64)?;
    stream.upload(&cards.slice((CARD_BYTES * rank.index()) as u64, CARD_BYTES as u64)?, &card)?;
    team.all_gather(stream, &cards, CARD_BYTES / 4)?;
    stream.download(&cards, CARD_BYTES * rank.world())
}

/// Memory of another rank.
#[derive(Debug)]
struct Opened {
    device: Device,
    rank: usize,
    address: u64,
}

impl Drop for Opened {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: opened in this context and closed once; what uses it is behind (the backend waits for its stream).
            unsafe { sys::cuIpcCloseMemHandle(self.address) };
        }
    }
}

/// The mailboxes of the other ranks; `None` unless all can be opened.
fn open_others(device: &Device, rank: Rank, cards: &[u8]) -> Option<Vec<Opened>> {
    if std::env::var(P2P_VARIABLE).is_ok_and(|value| value != "0") {
        return None;
    }
    let card = |index: usize| cards.get(CARD_BYTES * index..)?.get(..CARD_BYTES);
    let machine = &card(rank.index())?[HANDLE_BYTES..];
    if machine.iter().all(|&byte| byte == 0) {
        return None;
    }
    let others = (0..rank.world()).filter(|&index| index != rank.index());
    others
        .map(|index| {
            let card = card(index)?;
            (card[HANDLE_BYTES..] == *machine).then(|| open(device, index, &card[..HANDLE_BYTES])).flatten()
        })
        .collect()
}

fn open(device: &Device, rank: usize, card: &[u8]) -> Option<Opened> {
    let mut handle = sys::CUipcMemHandle_st { reserved: [0; HANDLE_BYTES] };
    for (target, &byte) in handle.reserved.iter_mut().zip(card) {
        *target = std::ffi::c_char::from_ne_bytes([byte]);
    }
    let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
    let mut address = 0;
    device.bind().ok()?;
    // SAFETY: the context is current; the pointer is valid; a handle that cannot be opened is refused.
    let status = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, handle, flags) };
    check("cuIpcOpenMemHandle", status).ok()?;
    Some(Opened { device: device.clone(), rank, address })
}

/// Whether all ranks say yes. Behind it in the stream, all have cleared their mailboxes.
fn agree(device: &Device, stream: &Stream, team: &Team, mine: bool) -> Result<bool> {
    let votes = allocate(device, "votes of ranks", 16)?;
    let vote = half::bf16::from_f32(f32::from(u8::from(mine)));
    stream.upload(&votes, &[vote; Mailboxes::VECTOR])?;
    team.all_reduce(stream, &Tensor::new(&votes, [1, Mailboxes::VECTOR], Dtype::Bf16)?)?;
    let votes: Vec<half::bf16> = stream.download(&votes, 1)?;
    Ok(votes[0].to_f32() == team.rank().world() as f32)
}
