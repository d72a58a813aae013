//! Where the two halves meet: requests go in, updates come out; in between the scheduler plans steps, the executor runs them,
//! and what ran past the end of a sequence is dropped.
//!
//! Synchronous: whoever owns an [`Engine`] calls [`Engine::step`] while there is work, from whichever thread. No step waits for
//! the token of the one before it: [`RUN_AHEAD`] of them are in flight. An error of the device is sticky: drop the engine.

use crate::Result;
use crate::batch::{Finish, TokenEvent};
use crate::blocks::PageHash;
use crate::device::Device;
use crate::executor::{Executor, ExecutorOptions, KernelCost};
use crate::frontend::{Frontend, Request};
use crate::kernels::params::{MAX_DECODE_ROWS, PAGE_TOKENS};
use crate::model::Weights;
use crate::scheduler::{Counters, Limits, Scheduler, Submission};
use crate::sequence::{FinishReason, Piece, Transcript};
use std::collections::BTreeMap;

/// Steps launched before the token of the first of them is read.
pub const RUN_AHEAD: u32 = 3;

pub struct Engine {
    pub frontend: Frontend,
    executor: Executor,
    scheduler: Scheduler,
    /// Requests without an end, by serial.
    open: BTreeMap<u32, Transcript>,
    next_serial: u32,
    /// Longest sequence.
    context: u32,
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
        let executor =
            Executor::new(device, &frontend.config, weights, &frontend.tokenizer.traits(), options, progress)?;
        let plan = executor.plan();
        let context = plan.context;
        let limits = Limits {
            slots: plan.slots,
            pages: plan.pages,
            page_tokens: PAGE_TOKENS,
            rows: MAX_DECODE_ROWS,
            prefill_tokens: plan.prefill_chunk,
            deterministic: options.deterministic,
        };
        let scheduler = Scheduler::new(limits);
        Ok(Engine { frontend, executor, scheduler, open: BTreeMap::new(), next_serial: 0, context })
    }

    /// Longest sequence: prompt and answer.
    pub fn context(&self) -> u32 {
        self.context
    }

    /// # Errors
    /// A request that can never be served; nothing has changed then.
    pub fn submit(&mut self, request: &Request) -> Result<RequestId> {
        let serial = self.next_serial;
        let (setup, transcript) = self.frontend.accept(request, serial, self.context)?;
        self.next_serial += 1;
        self.open.insert(serial, transcript);
        let tenant = PageHash::root(&request.tenant);
        self.scheduler.submit(Submission { setup, priority: request.priority, tenant, fork_of: None });
        Ok(RequestId(serial))
    }

    /// Ends a request; no update of it follows the one returned. None when it has ended by itself.
    pub fn cancel(&mut self, request: RequestId) -> Option<Update> {
        let mut transcript = self.open.remove(&request.0)?;
        assert!(self.scheduler.cancel(request.0), "open requests are known to the scheduler");
        Some(Update { request, token: None, text: transcript.finish(), finish: Some(FinishReason::Cancelled) })
    }

    pub fn is_idle(&self) -> bool {
        self.open.is_empty()
    }

    /// Launches what can be launched, then waits for at least one step's tokens, if any are to come.
    ///
    /// # Errors
    /// The device failed.
    pub fn step(&mut self) -> Result<Vec<Update>> {
        while self.executor.in_flight() < RUN_AHEAD {
            let Some(batch) = self.scheduler.plan() else { break };
            self.executor.submit(&batch)?;
        }
        let events = if self.executor.in_flight() > 0 { self.executor.wait()? } else { Vec::new() };
        Ok(events.into_iter().filter_map(|event| self.update(event)).collect())
    }

    /// None for a token that ran past the end.
    fn update(&mut self, event: TokenEvent) -> Option<Update> {
        if !self.scheduler.received(&event) {
            return None;
        }
        let request = RequestId(event.serial);
        if event.finish == Some(Finish::Error) {
            let mut transcript = self.open.remove(&event.serial).expect("the scheduler knows open requests only");
            return Some(Update { request, token: None, text: transcript.finish(), finish: Some(FinishReason::Error) });
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
        Some(Update { request, token: Some(event), text, finish })
    }

    /// What each kernel has cost, if the executor was told to profile.
    pub fn profile(&self) -> impl Iterator<Item = (&'static str, KernelCost)> {
        self.executor.profile()
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
