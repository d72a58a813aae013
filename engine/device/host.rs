//! The host target: launches run on the SIMT machine (kernels/simt). A thread of its own takes work off a queue in order, so
//! that enqueueing returns at once, as on a GPU. Must not know what any kernel computes.

use super::{Graph, KernelEntry, Launch, TensorMapSpec};
use crate::kernels::params::TensorMap;
use crate::{Error, Result};
use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// kernels/simt/simt.h in Rust.
#[allow(non_camel_case_types, dead_code)]
mod simt {
    include!(concat!(env!("OUT_DIR"), "/simt.rs"));
}

/// The order in which the SIMT machine runs the threads of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    Ascending,
    Descending,
    Random,
}

/// How the SIMT machine runs.
#[derive(Clone, Copy, Debug)]
pub struct HostOptions {
    /// Run the instrumented kernels with every check on: slow, and hostile.
    pub checked: bool,
    pub order: Order,
    /// Of the random order and of the delays of asynchronous work.
    pub seed: u32,
    /// OS threads.
    pub workers: u32,
}

impl Default for HostOptions {
    fn default() -> Self {
        let workers = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        HostOptions { checked: false, order: Order::Ascending, seed: 1, workers }
    }
}

impl HostOptions {
    /// With every check on.
    pub fn checked(order: Order, seed: u32) -> Self {
        HostOptions { checked: true, order, seed, ..HostOptions::default() }
    }
}

pub struct HostDevice {
    options: HostOptions,
    queue: Arc<Queue>,
    thread: Option<std::thread::JoinHandle<()>>,
    /// What has been launched since the capture began, and whether it is a loop.
    capture: Mutex<Option<(Vec<Launch>, bool)>>,
}

#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
    /// Where the last kernel of a loop says whether there is another pass. The stream runs one loop at a time.
    condition: AtomicU32,
}

#[derive(Default)]
struct QueueState {
    work: VecDeque<Work>,
    /// Something is being worked on.
    busy: bool,
    closed: bool,
    failure: Option<String>,
}

impl Queue {
    /// Tells the SIMT machine one device's stream from another's.
    fn id(&self) -> u64 {
        std::ptr::from_ref(self) as u64
    }
}

enum Work {
    Launch(Launch),
    Repeat(Vec<Launch>),
    Upload(u64, Box<[u8]>),
    Fill(u64, usize, u8),
    Copy(u64, u64, usize),
}

impl HostDevice {
    pub fn new(options: HostOptions) -> HostDevice {
        let queue = Arc::new(Queue::default());
        let theirs = queue.clone();
        let thread = std::thread::Builder::new()
            .name("host-stream".into())
            .spawn(move || stream(&theirs, options))
            .expect("a thread for the host target");
        HostDevice { options, queue, thread: Some(thread), capture: Mutex::default() }
    }

    pub fn describe(&self) -> String {
        let checked = if self.options.checked { ", every access checked" } else { "" };
        format!("host target (SIMT machine on {} cores{checked})", self.options.workers)
    }

    /// Of the machine: free as Linux estimates it.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
        };
        // Elsewhere nobody says: then allocation itself decides.
        Ok((field("MemAvailable:").unwrap_or(u64::MAX), field("MemTotal:").unwrap_or(u64::MAX)))
    }

    pub fn processors(&self) -> u32 {
        4
    }

    pub fn roofline(&self) -> Option<(f64, f64)> {
        None
    }

    /// `nan`: filled with it.
    pub fn alloc(&self, bytes: usize, nan: bool) -> Result<u64> {
        // SAFETY: plain allocation; null is checked.
        let memory = unsafe { simt::simt_alloc(bytes as u64, self.queue.id(), nan as u32) };
        if memory.is_null() {
            return Err(Error::Device(format!("not enough memory: {bytes} bytes more could not be had")));
        }
        Ok(memory as u64)
    }

    pub fn free(&self, address: u64) {
        let _ = self.drain();
        // SAFETY: `address` comes from `alloc`, and nothing enqueued uses it any more.
        unsafe { simt::simt_free(address as *mut c_void) };
    }

    pub fn alloc_pinned(&self, bytes: usize) -> Result<(*mut u8, u64)> {
        let address = self.alloc(bytes, true)?;
        Ok((address as *mut u8, address))
    }

    pub fn free_pinned(&self, host: *mut u8, _bytes: usize) {
        self.free(host as u64);
    }

    pub fn upload(&self, address: u64, data: &[u8]) -> Result<()> {
        self.push(Work::Upload(address, data.into()))
    }

    /// Lets `write` fill the memory itself, once nothing enqueued uses it any more.
    pub fn write(&self, address: u64, bytes: usize, write: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        self.drain()?;
        // SAFETY: the range lies in a live allocation (checked by the caller against the buffer), the stream is idle, and
        // nobody else fills the range (Uploader::upload). Memory that was never written has been mapped, and any byte is a u8.
        write(unsafe { std::slice::from_raw_parts_mut(address as *mut u8, bytes) })
    }

    pub fn fill(&self, address: u64, bytes: usize, value: u8) -> Result<()> {
        self.push(Work::Fill(address, bytes, value))
    }

    pub fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.push(Work::Copy(from, to, bytes))
    }

    pub fn download(&self, address: u64, data: &mut [u8]) -> Result<()> {
        self.synchronize()?;
        // SAFETY: the range lies in a live allocation (checked by the caller against the buffer), and the stream is idle.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    pub fn launch(&self, launch: &Launch) -> Result<()> {
        if let Some((recorded, _)) = self.capture.lock().unwrap().as_mut() {
            recorded.push(launch.clone());
            return Ok(());
        }
        self.push(Work::Launch(launch.clone()))
    }

    pub fn begin_capture(&self) -> Result<()> {
        let before = self.capture.lock().unwrap().replace((Vec::new(), false));
        assert!(before.is_none(), "already capturing");
        Ok(())
    }

    pub fn begin_loop(&self) -> Result<u64> {
        self.begin_capture()?;
        self.capture.lock().unwrap().as_mut().expect("capturing").1 = true;
        Ok(self.queue.condition.as_ptr() as u64)
    }

    pub fn end_capture(&self) -> Result<Graph> {
        let (launches, repeats) = self.capture.lock().unwrap().take().expect("capturing");
        Ok(Graph { launches, repeats, executable: None })
    }

    pub fn repeat(&self, launches: &[Launch]) -> Result<()> {
        self.push(Work::Repeat(launches.to_vec()))
    }

    pub fn synchronize(&self) -> Result<()> {
        self.drain()?;
        // SAFETY: no launch is running.
        unsafe { simt::simt_sync(self.queue.id()) };
        Ok(())
    }

    pub fn is_finished(&self) -> Result<bool> {
        let state = self.queue.state.lock().unwrap();
        match &state.failure {
            Some(failure) => Err(Error::Kernel(failure.clone())),
            None => Ok(!state.busy && state.work.is_empty()),
        }
    }

    /// Seconds that one launch takes.
    pub fn time(&self, before: Option<&Launch>, launch: &Launch) -> Result<f64> {
        before.map_or(Ok(()), |before| self.launch(before))?;
        self.synchronize()?;
        let start = std::time::Instant::now();
        self.push(Work::Launch(launch.clone()))?;
        self.drain()?;
        Ok(start.elapsed().as_secs_f64())
    }

    pub fn tensor_map<const RANK: usize>(&self, spec: &TensorMapSpec<RANK>) -> Result<TensorMap> {
        let mut map = simt::SimtTensorMap {
            base: spec.address,
            rank: RANK as u32,
            element_bytes: 2,
            // enum Swizzle of kernels/sm90.cuh.
            swizzle: match (spec.swizzle, spec.r#box[0]) {
                (false, _) => 0,
                (true, 64) => 1,
                (true, 32) => 2,
                (true, _) => 3,
            },
            magic: simt::SIMT_MAP_MAGIC,
            ..Default::default()
        };
        for i in 0..RANK {
            map.dims[i] = u32::try_from(spec.dims[i]).expect("dimensions fit 32 bits");
            map.box_[i] = spec.r#box[i];
            if i > 0 {
                map.strides[i - 1] = spec.strides[i];
            }
        }
        const { assert!(size_of::<simt::SimtTensorMap>() <= size_of::<TensorMap>()) };
        let mut opaque = TensorMap::default();
        // SAFETY: plain data, and the target is large enough.
        unsafe { std::ptr::write_unaligned((&raw mut opaque).cast(), map) };
        Ok(opaque)
    }

    fn push(&self, work: Work) -> Result<()> {
        let mut state = self.queue.state.lock().unwrap();
        if let Some(failure) = &state.failure {
            return Err(Error::Kernel(failure.clone()));
        }
        state.work.push_back(work);
        self.queue.changed.notify_all();
        Ok(())
    }

    /// Waits until the queue is empty and nothing runs.
    fn drain(&self) -> Result<()> {
        let mut state = self.queue.state.lock().unwrap();
        while state.busy || !state.work.is_empty() {
            state = self.queue.changed.wait(state).unwrap();
        }
        match &state.failure {
            Some(failure) => Err(Error::Kernel(failure.clone())),
            None => Ok(()),
        }
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        self.queue.state.lock().unwrap().closed = true;
        self.queue.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The stream's thread: one piece of work after the other; after a failure the rest is dropped.
fn stream(queue: &Queue, options: HostOptions) {
    let mut state = queue.state.lock().unwrap();
    loop {
        let Some(work) = state.work.pop_front() else {
            if state.closed {
                return;
            }
            state = queue.changed.wait(state).unwrap();
            continue;
        };
        state.busy = true;
        drop(state);
        let result = perform(work, queue, options);
        state = queue.state.lock().unwrap();
        state.busy = false;
        if let Err(problem) = result {
            state.failure = Some(problem);
            state.work.clear();
        }
        if state.work.is_empty() {
            queue.changed.notify_all();
        }
    }
}

fn perform(work: Work, queue: &Queue, options: HostOptions) -> std::result::Result<(), String> {
    let stream = queue.id();
    match work {
        // SAFETY: the range lies in a live allocation: checked on enqueueing, and `free` waits for the queue.
        Work::Upload(address, data) => unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), address as *mut u8, data.len())
        },
        // SAFETY: as above.
        Work::Fill(address, bytes, value) => unsafe { std::ptr::write_bytes(address as *mut u8, value, bytes) },
        // SAFETY: as above; the ranges do not overlap.
        Work::Copy(from, to, bytes) => unsafe {
            std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes)
        },
        Work::Launch(launch) => return run(&launch, stream, options),
        Work::Repeat(launches) => {
            const UNSET: u32 = u32::MAX;
            let mut again = 1;
            while again != 0 {
                queue.condition.store(UNSET, Ordering::Relaxed);
                launches.iter().try_for_each(|launch| run(launch, stream, options))?;
                again = queue.condition.load(Ordering::Acquire);
                if again == UNSET {
                    return Err("a loop without a kernel that ends it".into());
                }
            }
        }
    }
    Ok(())
}

fn run(launch: &Launch, stream: u64, options: HostOptions) -> std::result::Result<(), String> {
    let kernel: &KernelEntry = launch.kernel;
    let function = if options.checked { kernel.checked } else { kernel.host };
    let request = simt::SimtLaunch {
        name: kernel.name.as_ptr(),
        stream,
        kernel: Some(function),
        params: launch.params.as_ptr().cast(),
        params_bytes: kernel.params_bytes as u32,
        grid: launch.grid,
        cluster: launch.cluster,
        threads: kernel.threads,
        shared_bytes: launch.shared_bytes,
        pdl: launch.pdl as u32,
        checked: options.checked as u32,
        order: match options.order {
            Order::Ascending => simt::SIMT_ASCENDING,
            Order::Descending => simt::SIMT_DESCENDING,
            Order::Random => simt::SIMT_RANDOM,
        },
        seed: options.seed,
        workers: options.workers,
    };
    let mut report = [0 as c_char; 2048];
    // SAFETY: `function` takes the params that `launch` holds (kernels.rs pairs them), and the report's size is its own.
    let failed = unsafe { simt::simt_run(&request, report.as_mut_ptr(), report.len() as u64) } != 0;
    if failed {
        // SAFETY: the machine ends its report with a NUL within the capacity.
        return Err(unsafe { CStr::from_ptr(report.as_ptr()) }.to_string_lossy().into_owned());
    }
    Ok(())
}
