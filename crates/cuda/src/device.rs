//! One GPU: its context, one stream, the loaded kernels, memory, and the first error.
//!
//! Everything runs on one stream, in order; nothing here waits for it but `synchronize` and the copies that say so.
//! Where the device can, a kernel that directly follows another starts while that one still runs, as the rule in
//! `kernels/device.cuh` makes sound: then a launch costs no gap between two kernels.
//! Launches return nothing: an error is kept, what follows it is not launched, and `check` tells of it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use backend::BackendError;
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaSlice, CudaStream, DevicePtr, DriverError,
    PinnedHostSlice, result, sys,
};
use cudarc::nvrtc::Ptx;

use crate::CudaOptions;
use crate::images;
use crate::kernels::{self, Argument};
use crate::probe::{DeviceInfo, describe};

/// What a block may have of dynamic shared memory without asking for more.
const UNASKED_SHARED_BYTES: u32 = 48 << 10;
/// Blocks of a few warps that keep a multiprocessor busy.
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;
/// More than any kernel takes.
const MAX_ARGUMENTS: usize = 12;
/// Per cent of a multiprocessor's memory that are shared memory, where the rest is the L1 cache.
const ALL_SHARED: i32 = 100;

/// Bytes on the device, freed with this.
pub(crate) struct Buffer {
    slice: CudaSlice<u8>,
    /// Where it starts, on the device.
    pub(crate) address: u64,
}

impl Buffer {
    /// Its size.
    pub(crate) fn num_bytes(&self) -> usize {
        self.slice.num_bytes()
    }
}

/// Bytes on the host that the device copies from by itself.
pub(crate) struct PinnedBuffer {
    slice: PinnedHostSlice<u8>,
    /// The end of the last copy from it.
    copied: Option<CudaEvent>,
}

struct Kernel {
    function: CudaFunction,
    /// Dynamic shared memory that was asked for so far.
    shared_bytes: u32,
}

/// The GPU.
pub(crate) struct Device {
    stream: Arc<CudaStream>,
    kernels: HashMap<&'static str, Kernel>,
    /// Streaming multiprocessors.
    pub(crate) num_multiprocessors: u32,
    /// Whether products run on warpgroups' tensor cores.
    pub(crate) has_wgmma: bool,
    /// Whether kernels start while the one before still runs.
    dependent_launches: bool,
    /// Whether the last thing in the stream is a kernel that the next one may overlap.
    follows_kernel: bool,
    error: Option<DriverError>,
}

/// How many blocks, and what each of them has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    /// Blocks along x and y.
    pub(crate) blocks: [usize; 2],
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block.
    pub(crate) shared_bytes: u32,
}

impl Grid {
    /// `blocks` blocks without dynamic shared memory.
    pub(crate) fn new(blocks: usize, threads: u32) -> Self {
        Self { blocks: [blocks, 1], threads, shared_bytes: 0 }
    }

    /// A block for each row, or several along y where rows alone would leave the device idle: at most as many as give
    /// each thread one of the row's `num_items` items, and no more than keep every multiprocessor busy.
    pub(crate) fn over_rows(device: &Device, num_rows: usize, num_items: usize, threads: u32) -> Self {
        let wanted = BLOCKS_PER_MULTIPROCESSOR * device.num_multiprocessors as usize;
        let most = num_items.div_ceil(threads as usize).max(1);
        let along_y = wanted.div_ceil(num_rows.max(1)).min(most);
        Self { blocks: [num_rows, along_y], threads, shared_bytes: 0 }
    }
}

impl Device {
    /// Opens a device and loads every kernel that it needs.
    pub(crate) fn open(info: &DeviceInfo, options: &CudaOptions) -> Result<Self, BackendError> {
        let context = CudaContext::new(info.ordinal).map_err(failed)?;
        // SAFETY: one stream uses all memory, so there is nothing to be kept in order by events.
        unsafe { context.disable_event_tracking() };
        let dependent_launches = options.dependent_launches && info.capability.has_dependent_launches();
        let multiprocessors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(failed)?;
        let has_wgmma = info.capability.has_wgmma();
        Ok(Self {
            stream: context.new_stream().map_err(failed)?,
            kernels: load_kernels(&context, info, options.kernel_cache.as_deref(), dependent_launches)?,
            num_multiprocessors: multiprocessors as u32,
            has_wgmma,
            dependent_launches,
            follows_kernel: false,
            error: None,
        })
    }

    /// Free memory of the device.
    pub(crate) fn free_bytes(&self) -> Result<u64, BackendError> {
        let (free, _) = self.stream.context().mem_get_info().map_err(failed)?;
        Ok(free as u64)
    }

    /// Allocates zeroed memory; `what` is for the message if there is none.
    pub(crate) fn allocate(&mut self, what: &str, num_bytes: usize) -> Result<Buffer, BackendError> {
        self.end_chain();
        // A handle without rows still has an address.
        let slice = self.stream.alloc_zeros::<u8>(num_bytes.max(1)).map_err(|error| {
            if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                BackendError::OutOfMemory { what: what.to_owned(), needed_bytes: num_bytes as u64 }
            } else {
                failed(error)
            }
        })?;
        let address = slice.device_ptr(&self.stream).0;
        Ok(Buffer { slice, address })
    }

    /// Allocates zeroed host memory that copies need not wait for.
    pub(crate) fn allocate_pinned(&mut self, num_bytes: usize) -> Result<PinnedBuffer, BackendError> {
        // SAFETY: zeros are written before anything is read.
        let mut slice = unsafe { self.stream.context().alloc_pinned::<u8>(num_bytes) }.map_err(failed)?;
        slice.as_mut_slice().map_err(failed)?.fill(0);
        Ok(PinnedBuffer { slice, copied: None })
    }

    /// The bytes, once no copy reads them any more; `None` and the error is kept.
    pub(crate) fn pinned_bytes<'a>(&mut self, buffer: &'a mut PinnedBuffer) -> Option<&'a mut [u8]> {
        if let Some(copied) = buffer.copied.take() {
            self.call(|| copied.synchronize())?;
        }
        self.call(|| buffer.slice.as_mut_slice())
    }

    /// Copies the first bytes to the device in the order of the stream, without waiting.
    pub(crate) fn write_pinned(&mut self, to: &Buffer, from: &mut PinnedBuffer, num_bytes: usize) {
        assert!(num_bytes <= to.num_bytes());
        let Some(bytes) = self.pinned_bytes(from) else { return };
        let (bytes, stream) = (&bytes[..num_bytes], self.stream.clone());
        // SAFETY: the destination is in bounds, and `pinned_bytes` gives the source to nobody before the event.
        self.call(|| unsafe { result::memcpy_htod_async(to.address, bytes, stream.cu_stream()) });
        from.copied = self.call(|| stream.record_event(None));
    }

    /// Launches a kernel with arguments that are what it declares: nothing checks them but the tests, all of which also
    /// run under an emulator that checks every access.
    ///
    /// # Panics
    /// If there is no such kernel.
    pub(crate) fn launch(&mut self, name: &str, grid: Grid, arguments: &[&dyn Argument]) {
        if self.error.is_some() || grid.blocks.contains(&0) {
            return;
        }
        let kernel = self.kernels.get_mut(name).unwrap_or_else(|| panic!("there is no kernel {name}"));
        let overlaps = self.dependent_launches && self.follows_kernel;
        let result = launch(&self.stream, kernel, grid, arguments, overlaps);
        self.follows_kernel = true;
        self.record(result);
    }

    /// Makes the next launch wait for all before it; so does everything in the stream that is not a launch. Needed behind
    /// kernels that write what others take for constant: they read it before their predecessor is done.
    pub(crate) fn end_chain(&mut self) {
        self.follows_kernel = false;
    }

    /// Copies to the device and waits.
    pub(crate) fn write<T: bytemuck::Pod>(&mut self, buffer: &Buffer, first_byte: usize, values: &[T]) {
        self.write_later(buffer, first_byte, values);
        self.synchronize();
    }

    /// Copies to the device in the order of the stream; `values` must stay as they are until the next `synchronize`.
    pub(crate) fn write_later<T: bytemuck::Pod>(&mut self, buffer: &Buffer, first_byte: usize, values: &[T]) {
        assert!(first_byte + size_of_val(values) <= buffer.num_bytes());
        if values.is_empty() {
            return;
        }
        let (to, stream) = (buffer.address + first_byte as u64, self.stream.cu_stream());
        // SAFETY: the destination is in bounds, and the caller keeps the source.
        self.call(|| unsafe { result::memcpy_htod_async(to, values, stream) });
    }

    /// Copies from the device and waits.
    pub(crate) fn read<T: bytemuck::Pod>(&mut self, buffer: &Buffer, first_byte: usize, values: &mut [T]) {
        assert!(first_byte + size_of_val(values) <= buffer.num_bytes());
        let (from, stream) = (buffer.address + first_byte as u64, self.stream.cu_stream());
        if !values.is_empty() {
            // SAFETY: both sides are in bounds, and the destination is kept until the copy is done.
            self.call(|| unsafe { result::memcpy_dtoh_async(values, from, stream) });
        }
        self.synchronize();
    }

    /// What a call of the driver gives, or `None` and the error is kept.
    pub(crate) fn call<T>(&mut self, call: impl FnOnce() -> Result<T, DriverError>) -> Option<T> {
        self.end_chain();
        self.call_beside(call)
    }

    /// The same for a call that puts nothing into the stream.
    pub(crate) fn call_beside<T>(&mut self, call: impl FnOnce() -> Result<T, DriverError>) -> Option<T> {
        if self.error.is_some() {
            return None;
        }
        let result = self.stream.context().bind_to_thread().and_then(|()| call());
        result.map_err(|error| self.error = Some(error)).ok()
    }

    /// Seconds that the work of `launch` takes on the device.
    pub(crate) fn seconds(&mut self, launch: impl FnOnce(&mut Self)) -> Option<f64> {
        let timer = self.timer().ok()?;
        self.mark(&timer[0]);
        launch(self);
        self.mark(&timer[1]);
        self.seconds_between(&timer)
    }

    /// Two marks in the stream that [`Self::seconds_between`] knows the time between.
    ///
    /// # Errors
    /// If the driver has none.
    pub(crate) fn timer(&self) -> Result<[CudaEvent; 2], BackendError> {
        let event = || self.stream.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Ok([event().map_err(failed)?, event().map_err(failed)?])
    }

    /// Sets a mark behind all work so far.
    pub(crate) fn mark(&mut self, event: &CudaEvent) {
        let stream = self.stream.clone();
        self.call(|| event.record(&stream));
    }

    /// Seconds from one mark to the other, waiting for both; `None` after an error.
    pub(crate) fn seconds_between(&mut self, [start, end]: &[CudaEvent; 2]) -> Option<f64> {
        self.call(|| start.elapsed_ms(end)).map(|elapsed_ms| f64::from(elapsed_ms) / 1e3)
    }

    /// From here on launches are recorded instead of done.
    pub(crate) fn begin_recording(&mut self) {
        // The other threads of the process may go on using the driver.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let stream = self.stream.clone();
        self.call(|| stream.begin_capture(mode));
    }

    /// What was launched since `begin_recording`; `None` if that failed.
    pub(crate) fn end_recording(&mut self) -> Option<CudaGraph> {
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let stream = self.stream.clone();
        self.call(|| stream.end_capture(flags)).flatten()
    }

    /// Waits for all work.
    pub(crate) fn synchronize(&mut self) {
        self.end_chain();
        let result = self.stream.synchronize();
        self.record(result);
    }

    /// The first error; a device that had one has it for ever.
    ///
    /// # Errors
    /// That error.
    pub(crate) fn check(&self) -> Result<(), BackendError> {
        self.error.map_or(Ok(()), |error| Err(failed(error)))
    }

    fn record(&mut self, result: Result<(), DriverError>) {
        if let Err(error) = result {
            self.error.get_or_insert(error);
        }
    }
}

fn failed(error: DriverError) -> BackendError {
    BackendError::Device(describe(error))
}

fn launch(
    stream: &CudaStream,
    kernel: &mut Kernel,
    grid: Grid,
    arguments: &[&dyn Argument],
    overlaps: bool,
) -> Result<(), DriverError> {
    assert!(arguments.len() <= MAX_ARGUMENTS);
    stream.context().bind_to_thread()?;
    if grid.shared_bytes > kernel.shared_bytes {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        kernel.function.set_attribute(attribute, grid.shared_bytes as i32)?;
        kernel.shared_bytes = grid.shared_bytes;
    }
    let mut pointers = [std::ptr::null_mut(); MAX_ARGUMENTS];
    pointers.iter_mut().zip(arguments).for_each(|(pointer, argument)| *pointer = argument.pointer());
    let [x, y] = grid.blocks.map(|blocks| blocks as u32);
    let value = sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
    let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    let mut overlap = sys::CUlaunchAttribute { id, pad: [0; 4], value };
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: 1,
        blockDimX: grid.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: grid.shared_bytes,
        hStream: stream.cu_stream(),
        attrs: &mut overlap,
        numAttrs: overlaps.into(),
    };
    let (function, pointers) = (kernel.function.cu_function(), pointers.as_mut_ptr());
    // SAFETY: every pointer is to a value that lives until the driver has copied it, which it does before returning.
    unsafe { sys::cuLaunchKernelEx(&config, function, pointers, std::ptr::null_mut()) }.result()
}

fn load_kernels(
    context: &Arc<CudaContext>,
    info: &DeviceInfo,
    cache: Option<&Path>,
    dependent_launches: bool,
) -> Result<HashMap<&'static str, Kernel>, BackendError> {
    let files = kernels::files(info.capability);
    let images = images::load(&files, &info.capability.target(), info.kernels, cache)?;
    let mut loaded = HashMap::new();
    for ((_, names), image) in kernels::by_file(info.capability).into_iter().zip(images) {
        let module = context.load_module(Ptx::from_binary(image.into_owned())).map_err(failed)?;
        for name in names {
            let function = module.load_function(name).map_err(failed)?;
            // A block starts beside another kernel's only where that has left it enough shared memory. The sampler is the
            // last of its step, and reads its rows often enough to want them in the L1 cache.
            if dependent_launches && name != "sample" {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
                function.set_attribute(attribute, ALL_SHARED).map_err(failed)?;
            }
            loaded.insert(name, Kernel { function, shared_bytes: UNASKED_SHARED_BYTES });
        }
    }
    Ok(loaded)
}
