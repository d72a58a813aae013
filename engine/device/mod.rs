//! The device: memory, and launches in stream order. An enum and a `match`; two targets that run the same kernels.
//!
//! A launch is a value. CUDA executes it with one `cuLaunchKernelEx`; the host target runs it on the SIMT machine;
//! capturing records it. After start-up nothing here allocates.

pub mod cuda;
pub mod host;
pub mod ring;
pub mod simulated;

use crate::{Error, Result};
use simulated::SimulatedGpu;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where to run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DeviceChoice {
    /// A GPU if there is a driver with one, else the host target.
    Auto,
    Host,
    Cuda(u32),
    Simulated(SimulatedGpu),
}

impl std::str::FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<DeviceChoice> {
        if let Some(text) = text.strip_prefix("sim:") {
            return SimulatedGpu::parse(text).map(DeviceChoice::Simulated);
        }
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(DeviceChoice::Auto),
            ("host", _) => Ok(DeviceChoice::Host),
            (_, Some(Ok(ordinal))) => Ok(DeviceChoice::Cuda(ordinal)),
            _ => Err(Error::Usage(format!(
                "--device {text}: write host, cuda:N (cuda:0 is the first GPU), sim:h100 or auto"
            ))),
        }
    }
}

/// A handle that clones cheaply. All work goes into one stream, in order.
#[derive(Clone)]
pub struct Device(Arc<Target>, Arc<AtomicU64>);

enum Target {
    Host(host::HostDevice),
    Cuda(cuda::CudaDevice),
    Simulated(SimulatedGpu),
}

/// Kernel signatures, erased: what a target needs to run one. Made by `kernels.rs` alone.
pub struct KernelEntry {
    /// Symbol in the cubins, NUL-terminated.
    pub name: &'static std::ffi::CStr,
    pub threads: u32,
    pub params_bytes: usize,
    pub params_align: usize,
    /// The host target's build of the kernel, and the one with every access checked.
    pub host: unsafe extern "C" fn(*const std::ffi::c_void),
    pub checked: unsafe extern "C" fn(*const std::ffi::c_void),
}

/// One kernel launch, complete.
#[derive(Clone)]
pub struct Launch {
    pub kernel: &'static KernelEntry,
    pub grid: [u32; 3],
    /// Blocks per cluster along x; 1 for none.
    pub cluster: u32,
    /// Dynamic shared memory, bytes.
    pub shared_bytes: u32,
    /// May start before its predecessor has finished (the kernel calls `pdl_wait`).
    pub pdl: bool,
    /// The params struct, in 64-byte aligned words.
    pub params: Box<[AlignedWords]>,
    /// Device memory that must move at the least, for the report.
    pub bytes: u64,
    pub flops: u64,
}

/// 64 bytes, aligned as the strictest params struct wants.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct AlignedWords(pub [u64; 8]);

/// Device memory. Freed when dropped; the engine drops none while it runs.
pub struct Buffer {
    device: Device,
    address: u64,
    bytes: usize,
}

/// Host memory that the device can write (mapped, page-locked, cached).
pub struct Pinned {
    device: Device,
    host: *mut u8,
    address: u64,
    bytes: usize,
}

// SAFETY: the memory is this struct's own, and any thread may free it.
unsafe impl Send for Pinned {}

/// Fills buffers beside the stream's other users: every thread that uploads much has its own.
pub struct Uploader {
    device: Device,
    /// On a GPU: while one is copied the other is filled.
    staging: [Option<cuda::Staging>; 2],
}

/// A recorded list of launches.
pub struct Graph {
    pub launches: Vec<Launch>,
    /// They are repeated until one of them ends it ([`Device::begin_loop`]).
    pub repeats: bool,
    executable: Option<cuda::GraphExec>,
}

/// A strided bf16 tensor in device memory and the box that TMA moves; innermost dimension first.
#[derive(Clone, Copy, Debug)]
pub struct TensorMapSpec<const RANK: usize> {
    pub address: u64,
    pub dims: [u64; RANK],
    /// Bytes, of dimension i (entry 0 is the element size and ignored).
    pub strides: [u64; RANK],
    /// Elements.
    pub r#box: [u32; RANK],
    /// Swizzled by the box's width (128, 64 or 32 bytes), or not at all.
    pub swizzle: bool,
}

macro_rules! on {
    ($device:expr, $target:ident => $body:expr) => {
        match &*$device.0 {
            Target::Host($target) => $body,
            Target::Cuda($target) => $body,
            Target::Simulated(_) => unreachable!("without memory nothing can be asked of a simulated device"),
        }
    };
}

impl Device {
    /// # Errors
    /// No driver or no such GPU where one was asked for; too old a GPU.
    pub fn open(choice: DeviceChoice) -> Result<Device> {
        let cuda = |ordinal| cuda::CudaDevice::open(ordinal).map(|d| Device::on(Target::Cuda(d)));
        match choice {
            DeviceChoice::Host => Ok(Device::host(host::HostOptions::default())),
            DeviceChoice::Cuda(ordinal) => cuda(ordinal),
            DeviceChoice::Simulated(gpu) => Ok(Device::on(Target::Simulated(gpu))),
            DeviceChoice::Auto if cuda::available() => cuda(0),
            DeviceChoice::Auto => Ok(Device::host(host::HostOptions::default())),
        }
    }

    fn on(target: Target) -> Device {
        Device(Arc::new(target), Arc::default())
    }

    pub fn host(options: host::HostOptions) -> Device {
        Device::on(Target::Host(host::HostDevice::new(options)))
    }

    /// The GPU that is only simulated, where this is one.
    pub fn simulated(&self) -> Option<&SimulatedGpu> {
        match &*self.0 {
            Target::Simulated(gpu) => Some(gpu),
            _ => None,
        }
    }

    pub fn is_host(&self) -> bool {
        matches!(&*self.0, Target::Host(_))
    }

    /// For people: "host target, 2 cores" or the GPU's name.
    pub fn describe(&self) -> String {
        self.simulated().map_or_else(|| on!(self, d => d.describe()), SimulatedGpu::describe)
    }

    /// Free and total device memory, bytes.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.simulated().map_or_else(|| on!(self, d => d.memory()), |gpu| Ok((gpu.memory, gpu.memory)))
    }

    /// Bytes of all buffers that there are.
    pub fn allocated(&self) -> u64 {
        self.1.load(Ordering::Relaxed)
    }

    /// Streaming multiprocessors (the host target answers with its own small number).
    pub fn processors(&self) -> u32 {
        self.simulated().map_or_else(|| on!(self, d => d.processors()), |gpu| gpu.processors)
    }

    /// What the hardware can do at the most: bytes/s of memory, bf16 FLOP/s of the tensor cores without sparsity. None for
    /// the host target.
    pub fn roofline(&self) -> Option<(f64, f64)> {
        let simulated = self.simulated().map(|gpu| Some((gpu.bytes_per_second, gpu.flops_per_second)));
        simulated.unwrap_or_else(|| on!(self, d => d.roofline()))
    }

    /// Device memory, 1024-byte aligned, contents undefined (NaN on the host target).
    ///
    /// # Errors
    /// None left, or a device that is only simulated.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.alloc_as(bytes, true)
    }

    /// The same for what is filled before it is read: the host target leaves it untouched, because writing a model's weights
    /// twice takes seconds.
    pub fn alloc_to_fill(&self, bytes: usize) -> Result<Buffer> {
        self.alloc_as(bytes, false)
    }

    fn alloc_as(&self, bytes: usize, nan: bool) -> Result<Buffer> {
        self.refuse_simulated()?;
        let address = match &*self.0 {
            Target::Host(d) => d.alloc(bytes, nan),
            Target::Cuda(d) => d.alloc(bytes),
            Target::Simulated(_) => unreachable!("refused"),
        }?;
        self.1.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(Buffer { device: self.clone(), address, bytes })
    }

    pub fn alloc_pinned(&self, bytes: usize) -> Result<Pinned> {
        self.refuse_simulated()?;
        let (host, address) = on!(self, d => d.alloc_pinned(bytes))?;
        Ok(Pinned { device: self.clone(), host, address, bytes })
    }

    fn refuse_simulated(&self) -> Result<()> {
        match self.simulated() {
            Some(_) => Err(Error::Device("no kernel runs on a simulated device: take host or cuda:N for this".into())),
            None => Ok(()),
        }
    }

    /// Copies `data` to `buffer[offset..]` in stream order. Returns once `data` may change.
    pub fn upload(&self, buffer: &Buffer, offset: usize, data: &[u8]) -> Result<()> {
        assert!(offset + data.len() <= buffer.bytes, "upload past the end");
        on!(self, d => d.upload(buffer.address + offset as u64, data))
    }

    /// For uploads of at most so many bytes each.
    ///
    /// # Errors
    /// No memory left that the device can read.
    pub fn uploader(&self, bytes: usize) -> Result<Uploader> {
        let staging = || match &*self.0 {
            Target::Cuda(d) => Ok(Some(cuda::Staging::new(d, self.alloc_pinned(bytes)?)?)),
            _ => Ok(None),
        };
        Ok(Uploader { device: self.clone(), staging: [staging()?, staging()?] })
    }

    /// Waits for everything before it.
    pub fn download(&self, buffer: &Buffer, offset: usize, data: &mut [u8]) -> Result<()> {
        assert!(offset + data.len() <= buffer.bytes, "download past the end");
        on!(self, d => d.download(buffer.address + offset as u64, data))
    }

    /// Sets bytes in stream order.
    pub fn fill(&self, buffer: &Buffer, offset: usize, bytes: usize, value: u8) -> Result<()> {
        assert!(offset + bytes <= buffer.bytes, "fill past the end");
        on!(self, d => d.fill(buffer.address + offset as u64, bytes, value))
    }

    /// Copies bytes within a buffer in stream order; the ranges do not overlap.
    pub fn copy(&self, buffer: &Buffer, from: usize, to: usize, bytes: usize) -> Result<()> {
        assert!(from.max(to) + bytes <= buffer.bytes && from.abs_diff(to) >= bytes, "copy past the end or onto itself");
        on!(self, d => d.copy(buffer.address + from as u64, buffer.address + to as u64, bytes))
    }

    /// Enqueues; between [`Device::begin_capture`] and [`Device::end_capture`] records instead.
    pub fn launch(&self, launch: &Launch) -> Result<()> {
        on!(self, d => d.launch(launch))
    }

    pub fn begin_capture(&self) -> Result<()> {
        on!(self, d => d.begin_capture())
    }

    /// Like [`Device::begin_capture`]; but what is recorded will be repeated on the device, as long as its last kernel says so
    /// each time of what this returns (graph_set_condition in kernels/sm90.cuh).
    pub fn begin_loop(&self) -> Result<u64> {
        on!(self, d => d.begin_loop())
    }

    pub fn end_capture(&self) -> Result<Graph> {
        on!(self, d => d.end_capture())
    }

    /// Enqueues all launches of a graph; its repetitions, too, wait for nobody.
    pub fn replay(&self, graph: &Graph) -> Result<()> {
        match &*self.0 {
            Target::Host(d) if graph.repeats => d.repeat(&graph.launches),
            Target::Host(d) => graph.launches.iter().try_for_each(|l| d.launch(l)),
            Target::Cuda(d) => d.replay(graph.executable.as_ref().expect("captured on this device")),
            Target::Simulated(_) => unreachable!("nothing is captured on a simulated device"),
        }
    }

    /// Waits for everything enqueued; reports the first error of any of it.
    pub fn synchronize(&self) -> Result<()> {
        on!(self, d => d.synchronize())
    }

    /// Whether everything enqueued has finished; does not wait.
    ///
    /// # Errors
    /// The first error of any of it.
    pub fn is_finished(&self) -> Result<bool> {
        on!(self, d => d.is_finished())
    }

    /// Runs one launch alone on an idle device and measures it, seconds; on a GPU with the time of launching it.
    pub fn time(&self, launch: &Launch) -> Result<f64> {
        on!(self, d => d.time(None, launch))
    }

    /// Seconds that `launch` takes directly after `before`, which is not measured. On a GPU everything has been enqueued
    /// before `before` ends, if that takes 10 us or more: then what is measured is the kernel and about 1 us of starting it.
    pub fn time_after(&self, before: &Launch, launch: &Launch) -> Result<f64> {
        on!(self, d => d.time(Some(before), launch))
    }

    pub fn tensor_map<const RANK: usize>(
        &self,
        spec: &TensorMapSpec<RANK>,
    ) -> Result<crate::kernels::params::TensorMap> {
        const { assert!(RANK >= 1 && RANK <= 4) };
        let bad = |problem: &str| Err(Error::Device(format!("tensor map: {problem}: {spec:?}")));
        if !spec.address.is_multiple_of(16) || spec.strides[1..].iter().any(|s| !s.is_multiple_of(16)) {
            return bad("address and strides must be multiples of 16 bytes");
        }
        if spec.swizzle && ![128, 64, 32].contains(&(spec.r#box[0] * 2)) {
            return bad("a swizzled box is 128, 64 or 32 bytes wide");
        }
        on!(self, d => d.tensor_map(spec))
    }
}

impl Buffer {
    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device address as the pointer type a params struct wants. Only kernels may follow it.
    pub fn pointer<T>(&self) -> *mut T {
        self.address as *mut T
    }

    /// `pointer`, `bytes` further on.
    pub fn pointer_at<T>(&self, bytes: usize) -> *mut T {
        assert!(bytes <= self.bytes);
        (self.address + bytes as u64) as *mut T
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.device.1.fetch_sub(self.bytes as u64, Ordering::Relaxed);
        on!(self.device, d => d.free(self.address));
    }
}

impl Pinned {
    pub fn host(&self) -> *mut u8 {
        self.host
    }

    pub fn pointer<T>(&self) -> *mut T {
        self.address as *mut T
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Uploader {
    /// Fills `buffer[offset..][..bytes]`, in stream order, with what `write` writes: to page-locked memory, which is copied
    /// after this has returned; on the host target to the buffer itself. Several threads may do so at once, with ranges that
    /// do not overlap.
    ///
    /// # Errors
    /// Those of `write`, and of anything enqueued before.
    pub fn upload(
        &mut self,
        buffer: &Buffer,
        offset: usize,
        bytes: usize,
        write: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        assert!(offset + bytes <= buffer.bytes, "upload past the end");
        let address = buffer.address + offset as u64;
        match (&*self.device.0, &mut self.staging) {
            (Target::Host(d), _) => d.write(address, bytes, write),
            (Target::Cuda(d), [Some(staging), _]) => {
                d.upload_staged(staging, address, bytes, write)?;
                self.staging.swap(0, 1);
                Ok(())
            }
            _ => unreachable!("an uploader of this device"),
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        on!(self.device, d => d.free_pinned(self.host, self.bytes));
    }
}
