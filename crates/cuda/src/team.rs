//! What the ranks of a group do together with tensors of this device, over NCCL. Everything is put into the stream and can be
//! recorded. When the other ranks do the same is not known here.

use std::ffi::c_void;

use spark_backend::{Dtype, Rank};
use spark_comm::nccl::{Aborter, Communicator, ElementType, Group};

use crate::{Arena, ArenaPlan, Device, DeviceSlice, Error, Result, Stream, Tensor};

/// Largest message of the warm-up: above it NCCL does not choose other ways.
const LARGEST: u64 = 32 << 20;
/// Its smallest, and the factor from one to the next.
const SMALLEST: u64 = 16;
const STEP: u64 = 2;

/// This device's place in a group of ranks.
#[derive(Debug)]
pub struct Team {
    communicator: Communicator,
    aborter: Aborter,
    /// Behind the communicator, which needs its context to the end.
    device: Device,
}

impl Team {
    /// Connects with the other ranks of `group`, all of which must do so, and runs every kind of operation in many sizes: NCCL
    /// allocates at first uses, and all of it is to be there before memory is planned.
    ///
    /// # Errors
    /// [`Error::Group`], [`Error::Memory`], [`Error::Driver`].
    pub fn connect(device: &Device, stream: &Stream, group: &Group) -> Result<Self> {
        let of_thread = device.clone();
        let bind = move || of_thread.bind().map_err(|error| error.to_string());
        let (communicator, aborter) = (group.connect(bind)?, group.aborter());
        let team = Self { communicator, aborter, device: device.clone() };
        let before = device.memory()?.available;
        team.warm_up(stream)?;
        let taken = before.saturating_sub(device.memory()?.available) >> 20;
        let (index, world) = (team.rank().index(), team.rank().world());
        tracing::info!(
            "rank {index} of {world} is connected; NCCL's buffers take {taken} MiB and more of the GPU"
        );
        Ok(team)
    }

    /// Runs `work` when the group is given up.
    pub(crate) fn on_abort(&self, work: impl Fn() + Send + 'static) {
        self.aborter.on_abort(work);
    }

    fn warm_up(&self, stream: &Stream) -> Result<()> {
        let mut plan = ArenaPlan::default();
        let region = plan.add("warm-up of NCCL", LARGEST)?;
        let memory = Arena::new(stream.device(), plan)?.region(region)?;
        stream.fill(&memory, 0)?;
        let world = self.rank().world() as u64;
        let mut num_bytes = SMALLEST;
        while num_bytes <= LARGEST {
            let message = memory.slice(0, num_bytes)?;
            let shape = [1, (num_bytes / 2) as usize];
            let tensor = Tensor::new(&message, shape, Dtype::Bf16)?;
            self.all_reduce(stream, &tensor)?;
            self.broadcast(stream, &tensor, 0)?;
            let part = num_bytes / world / 4;
            self.all_gather(stream, &memory.slice(0, 4 * part * world)?, part as usize)?;
            num_bytes *= STEP;
        }
        stream.synchronize()?;
        self.check()
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.communicator.rank()
    }

    /// What went wrong with the group since, in the background or because it was given up.
    ///
    /// # Errors
    /// [`Error::Group`].
    pub fn check(&self) -> Result<()> {
        Ok(self.aborter.check()?)
    }

    /// `x`, bf16, becomes the sum over the ranks: the same bits on all.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Group`], [`Error::Driver`].
    pub fn all_reduce(&self, stream: &Stream, x: &Tensor) -> Result<()> {
        const OP: &str = "all_reduce";
        x.expect(OP, x.shape(), Dtype::Bf16)?;
        let count = x.rows() * x.columns();
        self.put(OP, stream, x.slice(), |communicator, at, stream| {
            // SAFETY: the tensor has `count` numbers of bf16 (`put` for the rest).
            unsafe { communicator.all_reduce(at, count, ElementType::Bf16, stream) }
        })
    }

    /// Part r of `parts` (`[world][part_length]` values of 4 bytes) becomes that of rank r.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Group`], [`Error::Driver`].
    pub fn all_gather(&self, stream: &Stream, parts: &DeviceSlice, part_length: usize) -> Result<()> {
        const OP: &str = "all_gather";
        let world = self.rank().world();
        if part_length.checked_mul(4 * world).is_none_or(|needed| parts.num_bytes() < needed as u64) {
            return Err(Error::shape(
                OP,
                format!("{world} parts of {part_length} values"),
                parts.num_bytes(),
            ));
        }
        self.put(OP, stream, parts, |communicator, at, stream| {
            // SAFETY: the slice has `world` parts of as many values of 4 bytes (`put` for the rest).
            unsafe { communicator.all_gather(at, part_length, ElementType::F32, stream) }
        })
    }

    /// `x` becomes that of rank `root`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a rank that is not there, [`Error::Group`], [`Error::Driver`].
    pub fn broadcast(&self, stream: &Stream, x: &Tensor, root: usize) -> Result<()> {
        const OP: &str = "broadcast";
        if root >= self.rank().world() {
            return Err(Error::shape(OP, format!("a rank under {}", self.rank().world()), root));
        }
        let num_bytes = x.slice().num_bytes() as usize;
        self.put(OP, stream, x.slice(), |communicator, at, stream| {
            // SAFETY: the tensor has as many bytes (`put` for the rest).
            unsafe { communicator.broadcast(at, num_bytes, ElementType::U8, root, stream) }
        })
    }

    /// Puts `work` on `memory` into the stream. It gets an address on the stream's device, which is current, and the stream. What is
    /// recorded keeps the memory; otherwise it stays until the stream has ended, as that of kernels does.
    fn put(
        &self,
        op: &'static str,
        stream: &Stream,
        memory: &DeviceSlice,
        work: impl FnOnce(&Communicator, u64, *mut c_void) -> spark_comm::nccl::Result<()>,
    ) -> Result<()> {
        if !stream.device().is(&self.device) {
            return Err(Error::shape(op, "a stream of the rank's device", "one of another"));
        }
        stream.uses(op, &[memory])?;
        stream.device().bind()?;
        stream.set_foreign();
        Ok(work(&self.communicator, memory.address(), stream.handle().cast())?)
    }
}
