//! Where the two halves meet: requests go in, updates come out; in between the scheduler plans steps, the executor runs them,
//! and what ran past the end of a sequence is dropped.
//!
//! Synchronous: whoever owns an [`Engine`] calls [`Engine::step`] while there is work, from whichever thread. No step waits for
//! the token of the one before it: [`RUN_AHEAD`] of them are in flight. An error of the device is sticky: drop the engine.

use crate::Result;
use crate::batch::{Batch, Finish, TokenEvent};
use crate::blocks::PageHash;
use crate::device::Device;
use crate::executor::{Executor, ExecutorOptions, KernelCost, MemoryPlan};
use crate::frontend::{Frontend, Request};
use crate::kernels::params::{MAX_DECODE_ROWS, PAGE_TOKENS};
use crate::model::Weights;
use crate::scheduler::{Counters, Limits, Scheduler, Submission};
use crate::sequence::{FinishReason, Piece, Transcript};
use crate::simulator::Simulator;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Steps launched before the token of the first of them is read.
pub const RUN_AHEAD: u32 = 3;

/// Prompt tokens in one step while others decode. Fewer would take hardly less time on an H100: its tensor cores need as long
/// for about 300 tokens as its memory for the weights.
const PREFILL_BESIDE_DECODE: u32 = 256;

pub struct Engine {
    pub frontend: Frontend,
    runner: Runner,
    scheduler: Scheduler,
    /// Requests without an end, by serial.
    open: HashMap<u32, Transcript>,
    next_serial: u32,
    /// Longest sequence.
    context: u32,
    start: Instant,
    host_work: HostWork,
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

    fn wait(&mut self) -> Result<Vec<TokenEvent>> {
        match self {
            Runner::Executor(executor) => executor.wait(),
            Runner::Simulator(simulator) => Ok(simulator.wait()),
        }
    }
}

/// Names a request while the engine lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestId(u32);

/// What has become of a request: a token, text that is certain now, the end.
#[derive(Clone, Debug)]
pub struct Update {
    pub request: RequestId,
    /// None when the request was cancelled or failed.
    pub token: Option<TokenEvent>,
    pub text: Vec<Piece>,
    pub finish: Option<FinishReason>,
}

/// The time that the host has spent on steps since the start, but for handing them to the device.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostWork {
    /// Deciding what runs.
    pub plan: Duration,
    /// Taking note of what came back.
    pub receive: Duration,
    /// Turning it into text.
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

impl Engine {
    /// Loads the weights; `progress` hears of bytes done and bytes in all.
    ///
    /// # Errors
    /// Tensors that are missing or of the wrong shape, too little memory, a device that fails.
    pub fn new(
        frontend: Frontend,
        weights: Weights,
        device: &Device,
        options: &ExecutorOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Engine> {
        let (config, traits) = (&frontend.config, frontend.tokenizer.traits());
        let runner = match device.simulated() {
            Some(&gpu) => {
                let plan = MemoryPlan::new(device, config, options)?;
                Runner::Simulator(Box::new(Simulator::new(gpu, config, plan, traits)))
            }
            None => {
                let executor = Executor::new(device, config, weights, &traits, options, progress)?;
                Runner::Executor(Box::new(executor))
            }
        };
        let plan = runner.plan();
        let context = plan.context;
        let limits = Limits {
            slots: plan.slots,
            pages: plan.pages,
            page_tokens: PAGE_TOKENS,
            rows: runner.rows(),
            prefill_tokens: plan.prefill_chunk,
            prefill_beside_decode: plan.prefill_chunk.min(PREFILL_BESIDE_DECODE),
            deterministic: options.deterministic,
        };
        let scheduler = Scheduler::new(limits);
        Ok(Engine {
            frontend,
            runner,
            scheduler,
            open: HashMap::new(),
            next_serial: 0,
            context,
            start: Instant::now(),
            host_work: HostWork::default(),
        })
    }

    /// Longest sequence: prompt and answer.
    pub fn context(&self) -> u32 {
        self.context
    }

    /// # Errors
    /// A request that can never be served; nothing has changed then.
    pub fn submit(&mut self, request: &Request) -> Result<RequestId> {
        self.submit_as(request, None)
    }

    /// Another answer to the prompt of `parent`, which is computed once while that one runs. Seeds should differ.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub fn fork(&mut self, parent: RequestId, request: &Request) -> Result<RequestId> {
        self.submit_as(request, Some(parent.0))
    }

    fn submit_as(&mut self, request: &Request, fork_of: Option<u32>) -> Result<RequestId> {
        let serial = self.next_serial;
        let (setup, transcript) = self.frontend.accept(request, serial, self.context)?;
        self.next_serial += 1;
        self.open.insert(serial, transcript);
        let tenant = PageHash::root(&request.tenant);
        self.scheduler.submit(Submission { setup, priority: request.priority, tenant, fork_of });
        Ok(RequestId(serial))
    }

    /// Ends a request; no update of it follows the one returned. None when it has ended by itself.
    pub fn cancel(&mut self, request: RequestId) -> Option<Update> {
        let mut transcript = self.open.remove(&request.0)?;
        assert!(self.scheduler.cancel(request.0), "open requests are known to the scheduler");
        Some(Update { request, token: None, text: transcript.finish(), finish: Some(FinishReason::Cancelled) })
    }

    /// Time since the start, as the device has it: a simulated one may only count it.
    pub fn now(&self) -> Duration {
        match &self.runner {
            Runner::Executor(_) => self.start.elapsed(),
            Runner::Simulator(simulator) => simulator.now(),
        }
    }

    pub fn is_idle(&self) -> bool {
        self.open.is_empty()
    }

    /// Launches what can be launched, then waits for at least one step's tokens, if any are to come.
    ///
    /// # Errors
    /// The device failed.
    pub fn step(&mut self) -> Result<Vec<Update>> {
        while self.runner.in_flight() < RUN_AHEAD {
            let before = Instant::now();
            let batch = self.scheduler.plan();
            self.host_work.plan += before.elapsed();
            let Some(batch) = batch else { break };
            self.runner.submit(&batch)?;
        }
        let mut events = if self.runner.in_flight() > 0 { self.runner.wait()? } else { Vec::new() };
        let before = Instant::now();
        // Others ran past the end.
        events.retain(|event| self.scheduler.received(event));
        let received = Instant::now();
        let updates = events.into_iter().map(|event| self.update(event)).collect();
        self.host_work.receive += received - before;
        self.host_work.text += received.elapsed();
        Ok(updates)
    }

    fn update(&mut self, event: TokenEvent) -> Update {
        let request = RequestId(event.serial);
        if event.finish == Some(Finish::Error) {
            let mut transcript = self.open.remove(&event.serial).expect("the scheduler knows open requests only");
            return Update { request, token: None, text: transcript.finish(), finish: Some(FinishReason::Error) };
        }
        let transcript = self.open.get_mut(&event.serial).expect("the scheduler knows open requests only");
        let (text, stopped) = transcript.push(&event, self.frontend.tokenizer.token_bytes(event.token));
        let finish = match event.finish {
            _ if stopped => Some(FinishReason::Stop),
            Some(Finish::Stop) => Some(FinishReason::Stop),
            Some(Finish::Length) => Some(FinishReason::Length),
            Some(Finish::Error) => unreachable!("handled above"),
            None => None,
        };
        if finish.is_some() {
            self.open.remove(&event.serial);
            // A stop string: the device does not know.
            if event.finish.is_none() {
                self.scheduler.cancel(event.serial);
            }
        }
        Update { request, token: Some(event), text, finish }
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

    pub fn host_work(&self) -> HostWork {
        self.host_work
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
