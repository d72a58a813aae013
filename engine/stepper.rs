//! One step after another: the scheduler plans it, the executor or the simulator runs it, and the scheduler takes note of the
//! tokens. No step waits for the token of the one before it: several are in flight (`Techniques::run_ahead`). Guides are asked
//! beside that (`guide.rs`), and only their own sequences wait for them. Knows no text.

use crate::Result;
use crate::batch::{Batch, TokenEvent};
use crate::blocks::CacheWatcher;
use crate::config::ModelConfig;
use crate::device::Device;
use crate::executor::{Executor, ExecutorOptions, KernelCost, MemoryPlan};
use crate::guide::{GuidedAnswer, Guides};
use crate::kernels::params::{MAX_DECODE_ROWS, PAGE_TOKENS};
use crate::model::Weights;
use crate::scheduler::{Counters, Limits, Scheduler, Submission};
use crate::simulator::Simulator;
use std::time::{Duration, Instant};

/// Prompt tokens in one step while others decode. Fewer would take hardly less time on an H100: its tensor cores need as long
/// for about 300 tokens as its memory for the weights.
const PREFILL_BESIDE_DECODE: u32 = 256;

/// How long a step waits for a mask where nothing else is to be done; then whoever calls may bring something.
const MASK_PATIENCE: Duration = Duration::from_millis(1);

pub struct Stepper {
    runner: Runner,
    scheduler: Scheduler,
    /// Steps launched before the tokens of the first of them are read.
    run_ahead: u32,
    guides: Guides,
    start: Instant,
    pub host_work: HostWork,
}

/// What runs the steps.
enum Runner {
    Executor(Box<Executor>),
    Simulator(Box<Simulator>),
}

impl Runner {
    fn plan(&self) -> &MemoryPlan {
        match self {
            Runner::Executor(executor) => executor.plan(),
            Runner::Simulator(simulator) => simulator.plan(),
        }
    }

    /// Most sequences in one step.
    fn rows(&self) -> u32 {
        match self {
            Runner::Executor(_) => MAX_DECODE_ROWS,
            Runner::Simulator(simulator) => simulator.plan().slots - 1,
        }
    }

    fn in_flight(&self) -> u32 {
        match self {
            Runner::Executor(executor) => executor.in_flight(),
            Runner::Simulator(simulator) => simulator.in_flight(),
        }
    }

    fn submit(&mut self, batch: &Batch) -> Result<()> {
        match self {
            Runner::Executor(executor) => executor.submit(batch),
            Runner::Simulator(simulator) => {
                simulator.submit(batch);
                Ok(())
            }
        }
    }

    fn decode_steps(&self) -> u32 {
        match self {
            Runner::Executor(executor) => executor.decode_steps(),
            Runner::Simulator(_) => 1,
        }
    }

    fn is_looping(&self) -> bool {
        matches!(self, Runner::Executor(executor) if executor.is_looping())
    }

    fn break_in(&self) {
        if let Runner::Executor(executor) = self {
            executor.break_in();
        }
    }

    fn wait(&mut self) -> Result<Option<Vec<TokenEvent>>> {
        match self {
            Runner::Executor(executor) => executor.wait(),
            Runner::Simulator(simulator) => Ok(Some(simulator.wait())),
        }
    }
}

/// The time that the host has spent on steps since the start, but for handing them to the device.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostWork {
    /// Deciding what runs.
    pub plan: Duration,
    /// Taking note of what came back.
    pub receive: Duration,
    /// Turning it into text, which is not done here.
    pub text: Duration,
}

impl HostWork {
    pub fn total(&self) -> Duration {
        self.plan + self.receive + self.text
    }
}

/// How full the engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    pub waiting: usize,
    pub running: usize,
    /// Of the running ones, those whose pages others needed.
    pub preempted: usize,
    pub pages_used: u32,
    pub pages: u32,
    pub counters: Counters,
}

impl Stepper {
    /// `traits`: [vocab], from the tokenizer.
    ///
    /// # Errors
    /// As [`Executor::new`].
    pub fn new(
        config: &ModelConfig,
        traits: Vec<u8>,
        weights: Weights,
        device: &Device,
        options: &ExecutorOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Stepper> {
        let runner = match device.simulated() {
            Some(&gpu) => {
                let plan = MemoryPlan::new(device, config, options)?;
                Runner::Simulator(Box::new(Simulator::new(
                    gpu,
                    config,
                    plan,
                    traits,
                    options.techniques.fusion.packed_gqa,
                )))
            }
            None => {
                let executor = Executor::new(device, config, weights, &traits, options, progress)?;
                Runner::Executor(Box::new(executor))
            }
        };
        let plan = runner.plan();
        let scheduler = Scheduler::new(Limits {
            slots: plan.slots,
            pages: plan.pages,
            page_tokens: PAGE_TOKENS,
            rows: runner.rows(),
            prefill_tokens: plan.prefill_chunk,
            prefill_beside_decode: plan.prefill_chunk.min(PREFILL_BESIDE_DECODE),
            decode_steps: runner.decode_steps(),
            deterministic: options.deterministic,
        });
        Ok(Stepper {
            runner,
            scheduler,
            run_ahead: options.techniques.run_ahead,
            guides: Guides::default(),
            start: Instant::now(),
            host_work: HostWork::default(),
        })
    }

    /// What takes the device's memory.
    pub fn memory(&self) -> &MemoryPlan {
        self.runner.plan()
    }

    /// Longest sequence: prompt and answer.
    pub fn context(&self) -> u32 {
        self.runner.plan().context
    }

    /// As [`Scheduler::watch_cache`].
    pub fn watch_cache(&mut self, watcher: CacheWatcher) {
        self.scheduler.watch_cache(watcher);
    }

    pub fn submit(&mut self, submission: Submission, guided: Option<GuidedAnswer>) {
        let serial = submission.setup.serial;
        self.scheduler.submit(submission);
        if let Some(guided) = guided {
            self.guides.open(serial, guided);
        }
    }

    /// False when it has ended by itself.
    pub fn cancel(&mut self, serial: u32) -> bool {
        let known = self.scheduler.cancel(serial);
        self.guides.cancel(serial);
        self.break_in();
        known
    }

    /// Makes a sequence end its thinking now, if it thinks and a budget is kept.
    pub fn end_thinking(&mut self, serial: u32) {
        self.scheduler.end_thinking(serial);
        self.break_in();
    }

    /// Whether [`Stepper::step`] would do nothing.
    pub fn is_idle(&self) -> bool {
        self.scheduler.waiting() + self.scheduler.running() == 0
            && self.runner.in_flight() == 0
            && !self.runner.is_looping()
    }

    /// Launches what can be launched, then waits for at least one step's tokens, if any are to come. Where all wait for masks
    /// it may return without tokens.
    ///
    /// # Errors
    /// The device failed.
    pub fn step(&mut self) -> Result<Vec<TokenEvent>> {
        self.take_masks(Duration::ZERO);
        self.break_in();
        let mut events = loop {
            while self.runner.in_flight() < self.run_ahead && !self.runner.is_looping() {
                let before = Instant::now();
                let batch = self.scheduler.plan();
                self.host_work.plan += before.elapsed();
                let Some(batch) = batch else { break };
                self.runner.submit(&batch)?;
            }
            if self.runner.in_flight() == 0 && !self.runner.is_looping() {
                self.take_masks(MASK_PATIENCE);
                break Vec::new();
            }
            match self.runner.wait()? {
                Some(events) => break events,
                None => self.scheduler.settle(),
            }
        };
        let before = Instant::now();
        // Others ran past the end.
        events.retain_mut(|event| self.scheduler.received(event));
        events.iter().for_each(|event| self.guides.received(event));
        self.host_work.receive += before.elapsed();
        Ok(events)
    }

    /// Hands on the masks that have become known; waits so long for the first.
    fn take_masks(&mut self, mut patience: Duration) {
        while let Some((serial, allowed)) = self.guides.mask(patience) {
            self.scheduler.set_mask(serial, allowed);
            patience = Duration::ZERO;
        }
    }

    /// Ends the loop on the device, if there is one and something has come up since it was launched.
    fn break_in(&self) {
        if self.runner.is_looping() && self.scheduler.has_news() {
            self.runner.break_in();
        }
    }

    /// Time since the start, as the device has it: a simulated one may only count it.
    pub fn now(&self) -> Duration {
        match &self.runner {
            Runner::Executor(_) => self.start.elapsed(),
            Runner::Simulator(simulator) => simulator.now(),
        }
    }

    /// What each kernel has cost, if the executor was told to profile.
    pub fn profile(&self) -> impl Iterator<Item = (&'static str, KernelCost)> {
        match &self.runner {
            Runner::Executor(executor) => Some(executor.profile()),
            Runner::Simulator(_) => None,
        }
        .into_iter()
        .flatten()
    }

    /// Kernels and recorded lists handed to the device since the start; none where nothing runs.
    pub fn launch_calls(&self) -> u64 {
        match &self.runner {
            Runner::Executor(executor) => executor.launch_calls(),
            Runner::Simulator(_) => 0,
        }
    }

    pub fn stats(&self) -> Stats {
        let (pages_used, pages) = self.scheduler.pages();
        Stats {
            waiting: self.scheduler.waiting(),
            running: self.scheduler.running(),
            preempted: self.scheduler.preempted(),
            pages_used,
            pages,
            counters: self.scheduler.counters(),
        }
    }
}
