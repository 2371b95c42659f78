//! Streams (queues of work on a device), events (marks in them), graphs (recorded work), and copies.

use std::cell::{Cell, RefCell};
use std::sync::Arc as Shared;
use std::time::{Duration, Instant};

use cudarc::driver::sys;

use crate::device::DeviceMemory;
use crate::driver::check;
use crate::launch::Module;
use crate::sm_group::SmGroup;
use crate::{Device, DeviceSlice, Element, Error, HostBuffer, Result};

/// How long [`Event::wait`] looks before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// A queue of work; what is put in runs in order.
#[derive(Debug)]
pub struct Stream {
    device: Device,
    handle: sys::CUstream,
    /// Where its kernels run; `None`: anywhere.
    sm_group: Option<SmGroup>,
    /// While work is recorded: what the graph will need.
    recording: RefCell<Option<Kept>>,
    /// What was put in last is work of another library.
    foreign: Cell<bool>,
}

// SAFETY: the driver takes calls on a stream from any thread that made its context current, which every call here does.
unsafe impl Send for Stream {}

impl Stream {
    /// A stream that waits for no other.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(device: &Device) -> Result<Self> {
        Self::with_priority(device, 0)
    }

    /// A stream whose kernels come before those of others where multiprocessors become free.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn urgent(device: &Device) -> Result<Self> {
        // The driver takes its highest priority for anything above that.
        Self::with_priority(device, i32::MIN)
    }

    fn with_priority(device: &Device, priority: i32) -> Result<Self> {
        device.bind()?;
        let mut handle = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the pointer is valid; `Drop` destroys it.
        let status = unsafe { sys::cuStreamCreateWithPriority(&raw mut handle, flags, priority) };
        check("cuStreamCreateWithPriority", status)?;
        Ok(Self::of(device, handle, None))
    }

    /// A stream whose kernels run on `num_sms` multiprocessors of the device only, to measure what a smaller one would do.
    ///
    /// # Errors
    /// [`Error::LibraryTooOld`] for a driver that cannot; [`Error::Shape`] for a number that the device cannot give;
    /// [`Error::Driver`].
    pub fn on_sms(device: &Device, num_sms: u32) -> Result<Self> {
        let group = SmGroup::new(device, num_sms)?;
        let handle = group.create_stream()?;
        Ok(Self::of(device, handle, Some(group)))
    }

    fn of(device: &Device, handle: sys::CUstream, sm_group: Option<SmGroup>) -> Self {
        let (recording, foreign) = (RefCell::new(None), Cell::new(false));
        Self { device: device.clone(), handle, sm_group, recording, foreign }
    }

    /// Multiprocessors that its kernels run on: what grids are sized by.
    pub fn num_sms(&self) -> u32 {
        self.sm_group.as_ref().map_or(self.device.properties().num_sms, SmGroup::num_sms)
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn handle(&self) -> sys::CUstream {
        self.handle
    }

    /// An error of `op` unless all slices are on this stream's device. A graph that is being recorded keeps their memory.
    pub(crate) fn uses(&self, op: &'static str, slices: &[&DeviceSlice]) -> Result<()> {
        if !slices.iter().all(|slice| slice.device().is(&self.device)) {
            return Err(Error::shape(op, "memory of the stream's device", "memory of another"));
        }
        if let Some(kept) = self.recording.borrow_mut().as_mut() {
            slices.iter().for_each(|slice| keep(&mut kept.memory, slice.memory()));
        }
        Ok(())
    }

    /// Says that another library puts work in now: the kernel behind it starts when all of that has ended.
    pub(crate) fn set_foreign(&self) {
        self.foreign.set(true);
    }

    /// Whether the last work is another library's; asked by the kernel that is put in behind it.
    pub(crate) fn take_foreign(&self) -> bool {
        self.foreign.take()
    }

    /// A graph that is being recorded keeps `module` loaded.
    pub(crate) fn keep_module(&self, module: &Shared<Module>) {
        if let Some(kept) = self.recording.borrow_mut().as_mut() {
            keep(&mut kept.modules, module);
        }
    }

    /// An error of `op` while work is recorded: what it puts in would reach a graph that does not keep what it needs.
    fn not_recording(&self, op: &'static str) -> Result<()> {
        match self.recording.borrow().is_some() {
            false => Ok(()),
            true => Err(Error::shape(op, "a stream whose work runs", "one whose work is recorded")),
        }
    }

    /// Waits until everything put in so far is done.
    ///
    /// # Errors
    /// [`Error::Driver`]: also what an earlier kernel did wrong is reported here.
    pub fn synchronize(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the stream lives.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.handle) })
    }

    /// Lets what is put in from now on wait for `event`.
    ///
    /// # Errors
    /// [`Error::Shape`] for an event of another device, [`Error::Driver`].
    pub fn wait(&self, event: &Event) -> Result<()> {
        alike("wait", &self.device, &event.device)?;
        self.device.bind()?;
        // Early starts are for kernels that follow each other: the next one waits for all that the stream waits for.
        self.foreign.set(true);
        // SAFETY: stream and event live; the flags must be 0.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.handle, event.handle, 0) })
    }

    /// Copies `values` to the start of `target` and waits for it.
    ///
    /// # Errors
    /// [`Error::Shape`] when they do not fit, for memory of another device, while work is recorded; [`Error::Driver`].
    pub fn upload<T: Element>(&self, target: &DeviceSlice, values: &[T]) -> Result<()> {
        let num_bytes = size_of_val(values);
        fits("upload", target, num_bytes)?;
        self.uses("upload", &[target])?;
        self.not_recording("upload")?;
        self.device.bind()?;
        // SAFETY: the slice holds at least `num_bytes` and is kept alive by the caller; `values` is borrowed until the
        // copy is over, because of the wait.
        let status = unsafe {
            sys::cuMemcpyHtoDAsync_v2(target.address(), values.as_ptr().cast(), num_bytes, self.handle)
        };
        check("cuMemcpyHtoDAsync", status)?;
        self.synchronize()
    }

    /// The first `len` values of `source`, after everything put in so far.
    ///
    /// # Errors
    /// [`Error::Shape`] when it holds fewer, for memory of another device, while work is recorded; [`Error::Driver`].
    pub fn download<T: Element>(&self, source: &DeviceSlice, len: usize) -> Result<Vec<T>> {
        let mut values = vec![T::default(); len];
        let num_bytes = size_of_val(values.as_slice());
        fits("download", source, num_bytes)?;
        self.uses("download", &[source])?;
        self.not_recording("download")?;
        self.device.bind()?;
        // SAFETY: the slice holds at least `num_bytes`; `values` lives until the copy is over, because of the wait, and
        // takes any bytes (`Element`).
        let status = unsafe {
            sys::cuMemcpyDtoHAsync_v2(values.as_mut_ptr().cast(), source.address(), num_bytes, self.handle)
        };
        check("cuMemcpyDtoHAsync", status)?;
        self.synchronize()?;
        Ok(values)
    }

    /// Fills `target` from byte `offset` of `source`, without waiting.
    ///
    /// # Safety
    /// The bytes of `source` must not be changed or freed before the copy is over.
    ///
    /// # Errors
    /// [`Error::Shape`] when the buffer ends before, for memory of another device, while work is recorded; [`Error::Driver`].
    pub unsafe fn upload_from(&self, target: &DeviceSlice, source: &HostBuffer, offset: usize) -> Result<()> {
        let num_bytes = target.num_bytes() as usize;
        source.holds("upload", &self.device, offset, num_bytes)?;
        self.uses("upload", &[target])?;
        self.not_recording("upload")?;
        self.device.bind()?;
        // SAFETY: both hold `num_bytes` from there on; the source stays as it is (the caller's promise).
        let status = unsafe {
            let source = source.pointer().add(offset);
            sys::cuMemcpyHtoDAsync_v2(target.address(), source.cast(), num_bytes, self.handle)
        };
        check("cuMemcpyHtoDAsync", status)
    }

    /// Copies all of `source` to byte `offset` of `target`, without waiting.
    ///
    /// # Safety
    /// The bytes of `target` must not be read, changed or freed before the copy is over.
    ///
    /// # Errors
    /// [`Error::Shape`] when the buffer ends before, for memory of another device, while work is recorded; [`Error::Driver`].
    pub unsafe fn download_to(&self, target: &HostBuffer, offset: usize, source: &DeviceSlice) -> Result<()> {
        let num_bytes = source.num_bytes() as usize;
        target.holds("download", &self.device, offset, num_bytes)?;
        self.uses("download", &[source])?;
        self.not_recording("download")?;
        self.device.bind()?;
        // SAFETY: both hold `num_bytes` from there on; nobody uses the target meanwhile (the caller's promise).
        let status = unsafe {
            let target = target.pointer().add(offset);
            sys::cuMemcpyDtoHAsync_v2(target.cast(), source.address(), num_bytes, self.handle)
        };
        check("cuMemcpyDtoHAsync", status)
    }

    /// Copies all of `source` to the start of `target`.
    ///
    /// # Errors
    /// [`Error::Shape`] when it does not fit and for memory of another device, [`Error::Driver`].
    pub fn copy(&self, target: &DeviceSlice, source: &DeviceSlice) -> Result<()> {
        let num_bytes = source.num_bytes() as usize;
        fits("copy", target, num_bytes)?;
        self.uses("copy", &[target, source])?;
        self.device.bind()?;
        // SAFETY: both hold `num_bytes`.
        let status =
            unsafe { sys::cuMemcpyDtoDAsync_v2(target.address(), source.address(), num_bytes, self.handle) };
        check("cuMemcpyDtoDAsync", status)
    }

    /// Sets every byte of `target`.
    ///
    /// # Errors
    /// [`Error::Shape`] for memory of another device, [`Error::Driver`].
    pub fn fill(&self, target: &DeviceSlice, byte: u8) -> Result<()> {
        self.uses("fill", &[target])?;
        self.device.bind()?;
        let num_bytes = target.num_bytes() as usize;
        // SAFETY: the slice holds `num_bytes`.
        let status = unsafe { sys::cuMemsetD8Async(target.address(), byte, num_bytes, self.handle) };
        check("cuMemsetD8Async", status)
    }

    /// Records what `work` puts into this stream instead of running it. The graph keeps the memory and the kernels that the
    /// work uses. What is in the memory is the caller's business: a pool may give it out again while a graph refers to it.
    ///
    /// # Errors
    /// What `work` returns; [`Error::Driver`], also for work that cannot be recorded, such as waiting for the stream;
    /// [`Error::Shape`] inside another recording.
    pub fn record<E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        self.not_recording("record")?;
        self.device.bind()?;
        // Only this thread's calls are watched, so that other threads may load weights meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        let status = unsafe { sys::cuStreamBeginCapture_v2(self.handle, mode) };
        check("cuStreamBeginCapture", status)?;
        self.recording.replace(Some(Kept::default()));
        let result = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: recording was begun on this stream by this thread. It is ended even if the work failed.
        let status = unsafe { sys::cuStreamEndCapture(self.handle, &raw mut graph) };
        let kept = self.recording.take().unwrap_or_default();
        let recorded = result
            .and_then(|()| Ok(check("cuStreamEndCapture", status)?))
            .and_then(|()| Ok(Graph::new(&self.device, graph, kept)?));
        if !graph.is_null() {
            // SAFETY: the recorded form is ours; the executable form does not need it.
            unsafe { sys::cuGraphDestroy(graph) };
        }
        recorded
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: destroyed once; the driver finishes what is in it.
            unsafe { sys::cuStreamDestroy_v2(self.handle) };
        }
    }
}

fn fits(op: &'static str, slice: &DeviceSlice, num_bytes: usize) -> Result<()> {
    if num_bytes as u64 <= slice.num_bytes() {
        return Ok(());
    }
    Err(Error::shape(op, format!("at most {} bytes", slice.num_bytes()), num_bytes))
}

/// An error of `op` unless both are the same device.
fn alike(op: &'static str, stream: &Device, other: &Device) -> Result<()> {
    match other.is(stream) {
        true => Ok(()),
        false => Err(Error::shape(op, "an object of the stream's device", "one of another")),
    }
}

/// What recorded work refers to: the driver does not keep it.
#[derive(Debug, Default)]
struct Kept {
    memory: Vec<Shared<DeviceMemory>>,
    modules: Vec<Shared<Module>>,
}

/// Adds `item` unless it is there; there are few.
fn keep<T>(items: &mut Vec<Shared<T>>, item: &Shared<T>) {
    if !items.iter().any(|kept| Shared::ptr_eq(kept, item)) {
        items.push(Shared::clone(item));
    }
}

/// A mark in a stream, with its time.
#[derive(Debug)]
pub struct Event {
    device: Device,
    handle: sys::CUevent,
}

// SAFETY: as for `Stream`.
unsafe impl Send for Event {}

impl Event {
    /// An event that no stream has reached.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(device: &Device) -> Result<Self> {
        Self::with_flags(device, 0)
    }

    /// An event without a time, which costs the device less, and at which a waiting thread sleeps.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn without_time(device: &Device) -> Result<Self> {
        let flags = [sys::CUevent_flags::CU_EVENT_DISABLE_TIMING, sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC];
        Self::with_flags(device, flags.iter().fold(0, |all, &flag| all | flag as u32))
    }

    fn with_flags(device: &Device, flags: u32) -> Result<Self> {
        device.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the context is current; the pointer is valid; `Drop` destroys it.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut handle, flags) })?;
        Ok(Self { device: device.clone(), handle })
    }

    /// Sets the mark behind everything put into `stream` so far.
    ///
    /// # Errors
    /// [`Error::Shape`] for a stream of another device and while its work is recorded: another stream that waits for the
    /// mark would be recorded, too. [`Error::Driver`].
    pub fn record(&self, stream: &Stream) -> Result<()> {
        alike("event", stream.device(), &self.device)?;
        stream.not_recording("event")?;
        self.device.bind()?;
        // SAFETY: event and stream live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.handle, stream.handle) })
    }

    /// Waits until the mark is reached.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn synchronize(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the event lives.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.handle) })
    }

    /// Whether the mark is reached.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn is_reached(&self) -> Result<bool> {
        self.device.bind()?;
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.handle) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            status => check("cuEventQuery", status).map(|()| true),
        }
    }

    /// Waits until the mark is reached: looks for it for a moment, then sleeps. Waking a thread costs tens of microseconds,
    /// as much as a small model's step leaves to wait for; a long wait would burn the power that the GPU could use.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn wait(&self) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < SPIN {
            if self.is_reached()? {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        self.synchronize()
    }

    /// Microseconds from `earlier` to this mark; both must be reached.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn micros_since(&self, earlier: &Self) -> Result<f64> {
        self.device.bind()?;
        let mut millis = 0.0;
        // SAFETY: both events live; the pointer is valid.
        let status = unsafe { sys::cuEventElapsedTime_v2(&raw mut millis, earlier.handle, self.handle) };
        check("cuEventElapsedTime", status)?;
        Ok(f64::from(millis) * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: destroyed once.
            unsafe { sys::cuEventDestroy_v2(self.handle) };
        }
    }
}

/// Recorded work, ready to be put into a stream with one call.
#[derive(Debug)]
pub struct Graph {
    device: Device,
    handle: sys::CUgraphExec,
    num_nodes: usize,
    /// Dropped after the graph is destroyed.
    _kept: Kept,
}

// SAFETY: as for `Stream`.
unsafe impl Send for Graph {}

impl Graph {
    fn new(device: &Device, graph: sys::CUgraph, kept: Kept) -> Result<Self> {
        let (mut handle, mut num_nodes) = (std::ptr::null_mut(), 0);
        // SAFETY: the graph lives; without an array the driver only counts.
        let status = unsafe { sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &raw mut num_nodes) };
        check("cuGraphGetNodes", status)?;
        // SAFETY: the graph lives; the pointer is valid; `Drop` destroys it.
        let status = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut handle, graph, 0) };
        check("cuGraphInstantiate", status)?;
        Ok(Self { device: device.clone(), handle, num_nodes, _kept: kept })
    }

    /// Operations in it.
    pub fn num_nodes(&self) -> usize {
        self.num_nodes
    }

    /// Puts the graph's own data on the device, so that the first launch is not slower than the others.
    ///
    /// # Errors
    /// [`Error::Shape`] for a stream of another device and while its work is recorded, [`Error::Driver`].
    pub fn upload(&self, stream: &Stream) -> Result<()> {
        alike("graph", stream.device(), &self.device)?;
        stream.not_recording("graph")?;
        self.device.bind()?;
        // SAFETY: graph and stream live.
        check("cuGraphUpload", unsafe { sys::cuGraphUpload(self.handle, stream.handle) })
    }

    /// Runs the recorded work behind everything put into `stream` so far.
    ///
    /// # Errors
    /// [`Error::Shape`] for a stream of another device and while its work is recorded, [`Error::Driver`].
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        alike("graph", stream.device(), &self.device)?;
        stream.not_recording("graph")?;
        self.device.bind()?;
        // SAFETY: graph and stream live.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.handle, stream.handle) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: destroyed once; a launch that is under way is finished by the driver.
            unsafe { sys::cuGraphExecDestroy(self.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_keeps_each_thing_once() {
        let (a, b) = (Shared::new(1), Shared::new(1));
        let mut kept = Vec::new();
        for item in [&a, &b, &a] {
            keep(&mut kept, item);
        }
        assert_eq!((kept.len(), Shared::strong_count(&a), Shared::strong_count(&b)), (2, 2, 2));
    }
}
