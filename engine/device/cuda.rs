//! The CUDA target: the driver API alone, opened at run time, so that the binary starts on a machine without a driver.
//!
//! One primary context, one stream. cudarc's safe layer is left out: it tracks every allocation with events, which a captured
//! graph would record. An error is final: all later calls repeat it, and nothing falls back to the host target.
//! Must not know what any kernel computes.

use super::{Graph, KernelEntry, Launch, Pinned, TensorMapSpec};
use crate::kernels::{self, params::TensorMap};
use crate::{Error, Result};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::sync::{Mutex, OnceLock};

/// A GPU, its stream and the kernels loaded on it.
pub struct CudaDevice {
    ordinal: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    functions: HashMap<&'static CStr, sys::CUfunction>,
    /// [`LOOP`], loaded by the first loop.
    loop_function: OnceLock<sys::CUfunction>,
    shared_bytes: i32,
    /// Address handed out -> address to free: the driver aligns to 256 bytes, we to 1024.
    allocations: Mutex<HashMap<u64, u64>>,
    capture: Mutex<Option<Capture>>,
    failure: OnceLock<(&'static str, String)>,
}

/// Between `begin_capture` or `begin_loop` and `end_capture`.
struct Capture {
    launches: Vec<Launch>,
    /// Of a loop: the graph with the conditional node whose body is captured.
    around: Option<sys::CUgraph>,
}

// SAFETY: the driver API may be called from any thread that has made the context current, which every method does first;
// the handles are otherwise opaque numbers.
unsafe impl Send for CudaDevice {}
// SAFETY: as above; what changes after `open` is behind a lock.
unsafe impl Sync for CudaDevice {}

/// An instantiated graph.
pub struct GraphExec(sys::CUgraphExec);

// SAFETY: a handle that any one thread at a time may use; replaying goes through `&CudaDevice` and the one stream.
unsafe impl Send for GraphExec {}

impl Drop for GraphExec {
    fn drop(&mut self) {
        // SAFETY: made by cuGraphInstantiate and destroyed only here; the driver keeps it until replays in flight are over.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

/// Page-locked memory on its way to the device.
pub struct Staging {
    memory: Pinned,
    /// Recorded behind each copy from the memory.
    copied: Event,
}

struct Event(sys::CUevent);

// SAFETY: a handle that any thread may use.
unsafe impl Send for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by cuEventCreate and destroyed only here; the driver keeps it until what it was recorded behind is over.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Staging {
    pub fn new(device: &CudaDevice, memory: Pinned) -> Result<Staging> {
        device.enter()?;
        // Who waits for it sleeps: the other threads have the cores to fill theirs.
        let flags =
            sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32 | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let mut event = std::ptr::null_mut();
        // SAFETY: writes one handle.
        device.check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, flags).result() })?;
        Ok(Staging { memory, copied: Event(event) })
    }
}

/// The driver that nvcc 13.0 compiles for, as cuDriverGetVersion counts; NVIDIA calls it 580.
const DRIVER_VERSION: i32 = 13000;

/// Only the thread that captures is kept from calls that cannot be captured.
const CAPTURE_MODE: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

/// Whether [`CudaDevice::open`] would find GPU 0 usable.
pub fn available() -> bool {
    usable(0).is_ok()
}

/// The handle of a GPU that can run our kernels.
fn usable(ordinal: u32) -> Result<sys::CUdevice> {
    let problem = |text: String| Err(Error::Device(text));
    if !cfg!(feature = "cuda") {
        return problem("this binary was built without GPU kernels: build it with `cargo build --release` (after `make setup`, which gets nvcc)".into());
    }
    // SAFETY: tries to open libcuda.so and closes it again.
    if !unsafe { sys::is_culib_present() } {
        return problem("no NVIDIA driver (libcuda.so) on this machine: install it, or use --device host".into());
    }
    if let Err(e) = result::init() {
        return problem(format!("the NVIDIA driver does not start ({e:?}): see nvidia-smi, or use --device host"));
    }
    let mut version = 0;
    // SAFETY: writes one int.
    let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    if asked.is_err() || version < DRIVER_VERSION {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return problem(format!("the NVIDIA driver is for CUDA {major}.{minor}: 13.0 is needed (driver 580 or later)"));
    }
    let count = driver("cuDeviceGetCount", result::device::get_count())?;
    if ordinal as i64 >= count as i64 {
        return problem(format!("there is no cuda:{ordinal}: this machine has {count} GPU(s), counted from 0"));
    }
    let device = driver("cuDeviceGet", result::device::get(ordinal as i32))?;
    let major = attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if (major, minor) != (9, 0) {
        let name = driver("cuDeviceGetName", result::device::get_name(device))?;
        return problem(format!(
            "cuda:{ordinal} is a {name} of compute capability {major}.{minor}: the kernels need 9.0 (H100, H200, GH200), or use --device host"
        ));
    }
    Ok(device)
}

fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32> {
    // SAFETY: `device` comes from cuDeviceGet.
    driver("cuDeviceGetAttribute", unsafe { result::device::get_attribute(device, which) })
}

fn driver<T>(call: &'static str, answer: std::result::Result<T, result::DriverError>) -> Result<T> {
    answer.map_err(|e| Error::Cuda { call, problem: format!("{e:?}") })
}

impl CudaDevice {
    /// # Errors
    /// No driver, no such GPU, a GPU or driver that is too old, or a cubin that disagrees with params.h.
    pub fn open(ordinal: u32) -> Result<CudaDevice> {
        let device = usable(ordinal)?;
        // SAFETY: `device` is valid; the primary context is kept for the life of the process.
        let context = driver("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(device) })?;
        // SAFETY: the context has just been retained.
        driver("cuCtxSetCurrent", unsafe { result::ctx::set_current(context) })?;
        let stream = driver("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        let shared = attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let others = kernels::CUBINS.iter().filter(|(name, _)| *name != LOOP);
        let modules = others.map(|(_, cubin)| load_module(cubin)).collect::<Result<Vec<_>>>()?;
        let load = |kernel: &&'static KernelEntry| Ok((kernel.name, load_kernel(kernel, &modules, shared)?));
        Ok(CudaDevice {
            ordinal,
            device,
            context,
            stream,
            functions: kernels::ALL
                .iter()
                .filter(|k| k.name.to_bytes() != LOOP.as_bytes())
                .map(load)
                .collect::<Result<_>>()?,
            loop_function: OnceLock::new(),
            shared_bytes: shared,
            allocations: Mutex::default(),
            capture: Mutex::default(),
            failure: OnceLock::new(),
        })
    }

    pub fn describe(&self) -> String {
        let name = result::device::get_name(self.device).unwrap_or_else(|_| "GPU without a name".into());
        format!("{name} (cuda:{})", self.ordinal)
    }

    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        self.check("cuMemGetInfo", result::mem_get_info()).map(|(free, total)| (free as u64, total as u64))
    }

    pub fn processors(&self) -> u32 {
        attribute(self.device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .expect("a device that was opened has processors") as u32
    }

    /// From the clocks as the driver states them. FLOP/s at 1.83 GHz, as data sheets count: the boost clock is higher, and
    /// does not last under tensor work.
    pub fn roofline(&self) -> Option<(f64, f64)> {
        use sys::CUdevice_attribute as Attribute;
        let number = |which| attribute(self.device, which).ok().map(f64::from);
        let kilohertz = number(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let bits = number(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
        const FLOPS_PER_CLOCK: f64 = 4096.0;
        Some((2.0 * kilohertz * 1e3 * bits / 8.0, self.processors() as f64 * FLOPS_PER_CLOCK * 1.83e9))
    }

    pub fn alloc(&self, bytes: usize) -> Result<u64> {
        const ALIGNMENT: u64 = 1024;
        self.enter()?;
        // SAFETY: a plain allocation; its contents are undefined, as documented.
        match unsafe { result::malloc_sync(bytes + ALIGNMENT as usize) } {
            Ok(base) => {
                let address = base.next_multiple_of(ALIGNMENT);
                self.allocations.lock().unwrap().insert(address, base);
                Ok(address)
            }
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = self.memory()?;
                Err(Error::Device(format!(
                    "{} has {free} of {total} bytes of memory free, and {bytes} more are needed",
                    self.describe()
                )))
            }
            Err(e) => self.check("cuMemAlloc", Err(e)),
        }
    }

    pub fn free(&self, address: u64) {
        let base = self.allocations.lock().unwrap().remove(&address).expect("freed once");
        if self.enter().is_ok() {
            // SAFETY: allocated by `alloc`, freed once. Waits for the work that may still use it.
            let _ = self.check("cuMemFree", unsafe { result::free_sync(base) });
        }
    }

    /// Zeroed, and cached by the CPU (not write-combined, which would make reading it 70 times slower).
    pub fn alloc_pinned(&self, bytes: usize) -> Result<(*mut u8, u64)> {
        self.enter()?;
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: a plain allocation.
        let host = self.check("cuMemHostAlloc", unsafe { result::malloc_host(bytes.max(1), flags) })?;
        let mut address = 0;
        // SAFETY: `host` has just been allocated, with room for `bytes`; `address` receives its device address.
        let mapped = unsafe {
            host.cast::<u8>().write_bytes(0, bytes);
            sys::cuMemHostGetDevicePointer_v2(&mut address, host, 0).result()
        };
        self.check("cuMemHostGetDevicePointer", mapped)?;
        Ok((host.cast(), address))
    }

    pub fn free_pinned(&self, host: *mut u8, _bytes: usize) {
        if self.enter().is_ok() {
            // SAFETY: allocated by `alloc_pinned`, freed once, after everything that may write to it.
            let freed =
                unsafe { result::stream::synchronize(self.stream).and_then(|()| result::free_host(host.cast())) };
            let _ = self.check("cuMemFreeHost", freed);
        }
    }

    /// From pageable memory, which the driver copies before it returns.
    pub fn upload(&self, address: u64, data: &[u8]) -> Result<()> {
        self.enter_outside_capture("upload")?;
        // SAFETY: the caller has checked that the range lies in a buffer.
        self.check("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(address, data, self.stream) })
    }

    /// Lets `write` fill the staging memory, once its last copy is over, and enqueues the next.
    pub fn upload_staged(
        &self,
        staging: &mut Staging,
        address: u64,
        bytes: usize,
        write: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        assert!(bytes <= staging.memory.bytes(), "more than the staging memory holds");
        self.enter_outside_capture("upload")?;
        // SAFETY: an event of this context; one that was never recorded is over.
        self.check("cuEventSynchronize", unsafe { result::event::synchronize(staging.copied.0) })?;
        // SAFETY: page-locked memory of that size, initialised by `alloc_pinned`, that the device does not read any more.
        let memory = unsafe { std::slice::from_raw_parts_mut(staging.memory.host(), bytes) };
        write(memory)?;
        // SAFETY: the caller has checked that the range lies in a buffer. The memory is not written before the event has passed,
        // nor freed: freeing it waits for the stream.
        self.check("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(address, memory, self.stream) })?;
        // SAFETY: our event and our stream.
        self.check("cuEventRecord", unsafe { result::event::record(staging.copied.0, self.stream) })
    }

    pub fn download(&self, address: u64, data: &mut [u8]) -> Result<()> {
        self.enter_outside_capture("download")?;
        // SAFETY: the caller has checked that the range lies in a buffer; `data` is borrowed until the copy is complete.
        self.check("cuMemcpyDtoHAsync", unsafe { result::memcpy_dtoh_async(data, address, self.stream) })?;
        self.synchronize()
    }

    pub fn fill(&self, address: u64, bytes: usize, value: u8) -> Result<()> {
        self.enter_outside_capture("fill")?;
        // SAFETY: the caller has checked that the range lies in a buffer.
        self.check("cuMemsetD8Async", unsafe { result::memset_d8_async(address, value, bytes, self.stream) })
    }

    pub fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.enter_outside_capture("copy")?;
        // SAFETY: the caller has checked that both ranges lie in a buffer.
        self.check("cuMemcpyDtoDAsync", unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) })
    }

    pub fn launch(&self, launch: &Launch) -> Result<()> {
        self.enter()?;
        if let Some(capture) = self.capture.lock().unwrap().as_mut() {
            capture.launches.push(launch.clone());
        }
        self.enqueue(launch, launch.pdl)
    }

    pub fn begin_capture(&self) -> Result<()> {
        self.enter()?;
        let mut capture = self.capture.lock().unwrap();
        assert!(capture.is_none(), "one capture at a time");
        // SAFETY: our stream.
        self.check("cuStreamBeginCapture", unsafe { result::stream::begin_capture(self.stream, CAPTURE_MODE) })?;
        *capture = Some(Capture { launches: Vec::new(), around: None });
        Ok(())
    }

    /// A graph of one conditional node; its body is what is captured. The first pass always runs.
    pub fn begin_loop(&self) -> Result<u64> {
        self.enter()?;
        let mut capture = self.capture.lock().unwrap();
        assert!(capture.is_none(), "one capture at a time");
        if self.loop_function.get().is_none() {
            let (_, cubin) = kernels::CUBINS.iter().find(|(name, _)| *name == LOOP).expect("built with kernels");
            let entry = kernels::ALL.iter().find(|k| k.name.to_bytes() == LOOP.as_bytes()).expect("it is in the table");
            let _ = self.loop_function.set(load_kernel(entry, &[load_module(cubin)?], self.shared_bytes)?);
        }
        let (mut graph, mut condition) = (std::ptr::null_mut(), 0);
        // SAFETY: writes one handle.
        self.check("cuGraphCreate", unsafe { sys::cuGraphCreate(&mut graph, 0).result() })?;
        // SAFETY: a graph and a context of ours; writes one handle, which lives as long as the graph and its instances.
        self.check("cuGraphConditionalHandleCreate", unsafe {
            let assign = sys::CU_GRAPH_COND_ASSIGN_DEFAULT;
            sys::cuGraphConditionalHandleCreate(&mut condition, graph, self.context, 1, assign).result()
        })?;
        let mut params = sys::CUgraphNodeParams {
            type_: sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_CONDITIONAL,
            reserved0: [0; 3],
            __bindgen_anon_1: sys::CUgraphNodeParams_st__bindgen_ty_1 { reserved1: [0; 29] },
            reserved2: 0,
        };
        params.__bindgen_anon_1.conditional = sys::CUDA_CONDITIONAL_NODE_PARAMS {
            handle: condition,
            type_: sys::CUgraphConditionalNodeType::CU_GRAPH_COND_TYPE_WHILE,
            size: 1,
            phGraph_out: std::ptr::null_mut(),
            ctx: self.context,
        };
        let (mut node, none) = (std::ptr::null_mut(), std::ptr::null());
        // SAFETY: the graph and the handle made above; a node without predecessors. The driver points phGraph_out to the one
        // body that it has made.
        let body = unsafe {
            let added = sys::cuGraphAddNode_v2(&mut node, graph, none, std::ptr::null(), 0, &mut params).result();
            added.map(|()| *params.__bindgen_anon_1.conditional.phGraph_out)
        };
        let body = self.check("cuGraphAddNode", body)?;
        // SAFETY: our stream; the body belongs to `graph` and is empty.
        self.check("cuStreamBeginCaptureToGraph", unsafe {
            sys::cuStreamBeginCaptureToGraph(self.stream, body, none, std::ptr::null(), 0, CAPTURE_MODE).result()
        })?;
        *capture = Some(Capture { launches: Vec::new(), around: Some(graph) });
        Ok(condition)
    }

    pub fn end_capture(&self) -> Result<Graph> {
        self.enter()?;
        let Capture { launches, around } = self.capture.lock().unwrap().take().expect("a capture has begun");
        // SAFETY: our stream, which is capturing.
        let captured = self.check("cuStreamEndCapture", unsafe { result::stream::end_capture(self.stream) })?;
        let graph = around.unwrap_or(captured);
        let mut exec = std::ptr::null_mut();
        // SAFETY: `graph` is a graph that nothing else knows; the instance does not need it any more.
        let made = unsafe {
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0).result();
            made.and(result::graph::destroy(graph))
        };
        self.check("cuGraphInstantiate", made)?;
        let exec = GraphExec(exec);
        // SAFETY: instantiated above. Uploading it now keeps that out of the first replay.
        self.check("cuGraphUpload", unsafe { result::graph::upload(exec.0, self.stream) })?;
        Ok(Graph { launches, repeats: around.is_some(), executable: Some(exec) })
    }

    pub fn replay(&self, graph: &GraphExec) -> Result<()> {
        self.enter_outside_capture("replay")?;
        // SAFETY: instantiated in this context; our stream.
        self.check("cuGraphLaunch", unsafe { result::graph::launch(graph.0, self.stream) })
    }

    pub fn synchronize(&self) -> Result<()> {
        self.enter_outside_capture("synchronize")?;
        // SAFETY: our stream.
        self.check("cuStreamSynchronize", unsafe { result::stream::synchronize(self.stream) })
    }

    pub fn is_finished(&self) -> Result<bool> {
        self.enter_outside_capture("is_finished")?;
        // SAFETY: our stream.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            answer => self.check("cuStreamQuery", answer.result()).map(|()| true),
        }
    }

    /// Between two events around the launch, without programmatic dependence. On an idle GPU that includes a few microseconds
    /// of launching; behind `before` both events and the launch are in the queue already, and it does not.
    pub fn time(&self, before: Option<&Launch>, launch: &Launch) -> Result<f64> {
        self.synchronize()?;
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let start = self.check("cuEventCreate", event())?;
        let end = self.check("cuEventCreate", event())?;
        before.map_or(Ok(()), |before| self.enqueue(before, false))?;
        // SAFETY: two events of this context, on our stream; destroyed below, after the last use.
        self.check("cuEventRecord", unsafe { result::event::record(start, self.stream) })?;
        self.enqueue(launch, false)?;
        // SAFETY: as above.
        self.check("cuEventRecord", unsafe { result::event::record(end, self.stream) })?;
        self.synchronize()?;
        // SAFETY: both events have been recorded and have passed.
        let elapsed = unsafe {
            let elapsed = result::event::elapsed(start, end);
            result::event::destroy(start).and(result::event::destroy(end)).and(elapsed)
        };
        Ok(self.check("cuEventElapsedTime", elapsed)? as f64 * 1e-3)
    }

    pub fn tensor_map<const RANK: usize>(&self, spec: &TensorMapSpec<RANK>) -> Result<TensorMap> {
        self.enter()?;
        let swizzle = match (spec.swizzle, spec.r#box[0]) {
            (false, _) => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            (true, 64) => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            (true, 32) => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            (true, _) => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        };
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: RANK dimensions, boxes and element strides, RANK - 1 strides in bytes, as the driver reads them; the
        // address is not followed here.
        let made = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                RANK as u32,
                spec.address as *mut c_void,
                spec.dims.as_ptr(),
                spec.strides[1..].as_ptr(),
                spec.r#box.as_ptr(),
                [1; RANK].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        match made.result() {
            Ok(()) => Ok(TensorMap { opaque: map.opaque }),
            Err(e) => Err(Error::Device(format!("tensor map: {e:?}: {spec:?}"))),
        }
    }

    fn enqueue(&self, launch: &Launch, pdl: bool) -> Result<()> {
        use sys::{CUlaunchAttribute, CUlaunchAttributeID as Id, CUlaunchAttributeValue as Value};
        let attribute = |id, value| CUlaunchAttribute { id, pad: [0; 4], value };
        let mut cluster = Value { pad: [0; 64] };
        cluster.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: launch.cluster, y: 1, z: 1 };
        let mut serialization = Value { pad: [0; 64] };
        serialization.programmaticStreamSerializationAllowed = pdl as i32;
        let mut attributes = [
            attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, cluster),
            attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, serialization),
        ];
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        let of_loop = || *self.loop_function.get().expect("a loop has begun before");
        let function = self.functions.get(launch.kernel.name).copied().unwrap_or_else(of_loop);
        let mut params = [launch.params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the kernel takes one parameter of the size of its params struct (checked in `load_kernel`), which
        // `Kernel::launch` wrote to `launch.params`; the driver copies it before it returns.
        let answer = unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut()) };
        answer.result().or_else(|e| {
            let name = launch.kernel.name.to_string_lossy();
            let problem = format!(
                "{name}, grid {:?}, cluster {}, {} bytes: {e:?}",
                launch.grid, launch.cluster, launch.shared_bytes
            );
            self.fail("cuLaunchKernelEx", problem)
        })
    }

    /// Makes the context current; refuses once anything has failed.
    fn enter(&self) -> Result<()> {
        if let Some((call, problem)) = self.failure.get() {
            return Err(Error::Cuda { call, problem: problem.clone() });
        }
        // SAFETY: retained in `open` and never released.
        self.check("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })
    }

    fn enter_outside_capture(&self, what: &str) -> Result<()> {
        assert!(self.capture.lock().unwrap().is_none(), "{what} inside a capture: only launches can be replayed");
        self.enter()
    }

    fn check<T>(&self, call: &'static str, answer: std::result::Result<T, result::DriverError>) -> Result<T> {
        answer.or_else(|e| self.fail(call, format!("{e:?}")))
    }

    fn fail<T>(&self, call: &'static str, problem: String) -> Result<T> {
        let (call, problem) = self.failure.get_or_init(|| (call, problem));
        Err(Error::Cuda { call, problem: problem.clone() })
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            // SAFETY: our stream, used by nobody any more. The modules stay with the primary context.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
    }
}

/// The kernel, and its cubin, that calls what only the driver defines (graph_set_condition of sm90.cuh): a driver that does
/// not must not keep the others from running.
const LOOP: &str = "decode_loop";

fn load_module(cubin: &[u8]) -> Result<sys::CUmodule> {
    // SAFETY: a whole cubin as nvcc wrote it, which the driver copies.
    driver("cuModuleLoadData", unsafe { result::module::load_data(cubin.as_ptr().cast()) })
}

/// Finds a kernel and compares it with params.h as it was when the Rust side was compiled; lets it use all shared memory;
/// loads it now rather than at its first launch, which may be inside a capture.
fn load_kernel(kernel: &KernelEntry, modules: &[sys::CUmodule], shared_bytes: i32) -> Result<sys::CUfunction> {
    let name = kernel.name.to_string_lossy();
    let stale = |what: String| Error::Cuda {
        call: "cuModuleGetFunction",
        problem: format!("kernel {name} {what}: build again"),
    };
    let mut function = std::ptr::null_mut();
    // SAFETY: loaded modules and a C string; writes one handle.
    let find = |&m: &sys::CUmodule| unsafe {
        sys::cuModuleGetFunction(&mut function, m, kernel.name.as_ptr()).result().is_ok()
    };
    if !modules.iter().any(find) {
        return Err(stale("is in no cubin".into()));
    }
    let (mut offset, mut bytes) = (0, 0);
    // SAFETY: a valid function; each call writes two numbers.
    let (first, second) = unsafe {
        (
            sys::cuFuncGetParamInfo(function, 0, &mut offset, &mut bytes).result(),
            sys::cuFuncGetParamInfo(function, 1, &mut offset, &mut 0).result(),
        )
    };
    if first.is_err() || second.is_ok() || bytes != kernel.params_bytes {
        return Err(stale(format!("does not take one struct of {} bytes", kernel.params_bytes)));
    }
    use sys::CUfunction_attribute as Attribute;
    let attribute = |which| {
        // SAFETY: a valid function.
        driver("cuFuncGetAttribute", unsafe { result::function::get_function_attribute(function, which) })
    };
    let threads = attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?;
    if threads as u32 != kernel.threads {
        return Err(stale(format!("is compiled for blocks of {threads} threads and not {}", kernel.threads)));
    }
    let dynamic = shared_bytes - attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
    let limit = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: a valid function.
    driver("cuFuncSetAttribute", unsafe { result::function::set_function_attribute(function, limit, dynamic) })?;
    // SAFETY: a valid function.
    driver("cuFuncLoad", unsafe { sys::cuFuncLoad(function).result() })?;
    Ok(function)
}
