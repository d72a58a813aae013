//! Where requests and tokens meet: requests go in, updates come out; in between steps are planned and run (`stepper.rs`).
//!
//! Synchronous: whoever owns an [`Engine`] calls [`Engine::step`] while there is work, from whichever thread. An error of the
//! device is sticky: drop the engine. For requests from many threads see `service.rs`.

use crate::batch::{Finish, TokenEvent};
use crate::blocks::{CacheWatcher, PageHash};
use crate::device::Device;
use crate::executor::{ExecutorOptions, KernelCost, MemoryPlan};
use crate::frontend::{Frontend, Request};
use crate::guide::GuidedAnswer;
use crate::model::Weights;
use crate::scheduler::Submission;
use crate::sequence::{FinishReason, Piece, Transcript};
use crate::stepper::Stepper;
pub use crate::stepper::{HostWork, Stats};
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub struct Engine {
    pub frontend: Arc<Frontend>,
    pub(crate) stepper: Stepper,
    texts: Texts,
    next_serial: u32,
}

/// Names a request while the engine lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(crate) u32);

/// What has become of a request: a token, text that is certain now, the end.
#[derive(Clone, Debug)]
pub struct Update {
    pub request: RequestId,
    /// None when the request was cancelled or failed.
    pub token: Option<TokenEvent>,
    pub text: Vec<Piece>,
    pub finish: Option<FinishReason>,
    /// What has ended it, if it was one of those.
    pub stop_string: Option<String>,
}

impl Engine {
    /// Loads the weights; `progress` hears of bytes done and bytes in all.
    ///
    /// # Errors
    /// Tensors that are missing or of the wrong shape, too little memory, a device that fails.
    pub fn new(
        mut frontend: Frontend,
        weights: Weights,
        device: &Device,
        options: &ExecutorOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Engine> {
        if options.quantize && device.simulated().is_some() {
            let problem = "--quantize: no weights are loaded on a simulated device: say --device sim:h100,fp8";
            return Err(Error::Usage(problem.into()));
        }
        frontend.config.weight_types = weights.types(&frontend.config, options.quantize)?;
        let stepper = Stepper::new(&frontend.config, frontend.tokenizer.traits(), weights, device, options, progress)?;
        let frontend = Arc::new(frontend);
        Ok(Engine { texts: Texts::new(frontend.clone()), frontend, stepper, next_serial: 0 })
    }

    /// What takes the device's memory.
    pub fn memory(&self) -> &MemoryPlan {
        self.stepper.memory()
    }

    /// Longest sequence: prompt and answer.
    pub fn context(&self) -> u32 {
        self.stepper.context()
    }

    /// From now on `watcher` is told what a later prompt would find computed.
    pub fn watch_cache(&mut self, watcher: CacheWatcher) {
        self.stepper.watch_cache(watcher);
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
        self.submit_as(request, Some(parent))
    }

    fn submit_as(&mut self, request: &Request, fork_of: Option<RequestId>) -> Result<RequestId> {
        let id = RequestId(self.next_serial);
        let Accepted { submission, guided, transcript } = accept(&self.frontend, request, id, fork_of, self.context())?;
        self.next_serial += 1;
        self.texts.open(id, transcript);
        self.stepper.submit(submission, guided);
        Ok(id)
    }

    /// Ends a request; no update of it follows the one returned. None when it has ended by itself.
    pub fn cancel(&mut self, request: RequestId) -> Option<Update> {
        let update = self.texts.cancel(request)?;
        assert!(self.stepper.cancel(request.0), "open requests are known to the scheduler");
        Some(update)
    }

    /// Time since the start, as the device has it: a simulated one may only count it.
    pub fn now(&self) -> Duration {
        self.stepper.now()
    }

    pub fn is_idle(&self) -> bool {
        self.texts.open.is_empty()
    }

    /// Launches what can be launched, then waits for at least one step's tokens, if any are to come soon.
    ///
    /// # Errors
    /// The device failed.
    pub fn step(&mut self) -> Result<Vec<Update>> {
        let events = self.stepper.step()?;
        let before = Instant::now();
        let mut updates = Vec::with_capacity(events.len());
        for event in events {
            let update = self.texts.take(event).expect("the scheduler knows open requests only");
            if update.is_stopped() {
                self.stepper.cancel(update.request.0);
            }
            updates.push(update);
        }
        self.stepper.host_work.text += before.elapsed();
        Ok(updates)
    }

    /// What each kernel has cost, if the executor was told to profile.
    pub fn profile(&self) -> impl Iterator<Item = (&'static str, KernelCost)> {
        self.stepper.profile()
    }

    /// Kernels and recorded lists handed to the device since the start.
    pub fn launch_calls(&self) -> u64 {
        self.stepper.launch_calls()
    }

    pub fn host_work(&self) -> HostWork {
        self.stepper.host_work
    }

    pub fn stats(&self) -> Stats {
        self.stepper.stats()
    }
}

/// A request as the threads that serve it take it.
pub(crate) struct Accepted {
    pub submission: Submission,
    pub guided: Option<GuidedAnswer>,
    pub transcript: Transcript,
}

/// # Errors
/// A request that can never be served.
pub(crate) fn accept(
    frontend: &Frontend,
    request: &Request,
    id: RequestId,
    fork_of: Option<RequestId>,
    context: u32,
) -> Result<Accepted> {
    let (setup, transcript) = frontend.accept(request, id.0, context)?;
    let delimiters = frontend.delimiters_of(&request.budget)?;
    let guided = request.grammar.as_ref().map(|grammar| {
        let opens = delimiters.filter(|d| !d.start_in_prompt);
        let start = opens.map_or_else(Vec::new, |d| d.start.clone());
        GuidedAnswer::new(grammar, &setup, start, frontend.config.vocab_size)
    });
    let tenant = PageHash::root(&request.tenant);
    let fork_of = fork_of.map(|parent| parent.0);
    let submission = Submission { setup, priority: request.priority, tenant, fork_of };
    Ok(Accepted { submission, guided, transcript })
}

impl Update {
    /// A stop string has ended it, of which the device does not know.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop_string.is_some() && self.token.as_ref().is_some_and(|token| token.finish.is_none())
    }
}

/// The requests without an end, whose tokens become text here.
pub(crate) struct Texts {
    frontend: Arc<Frontend>,
    open: HashMap<RequestId, Transcript>,
}

impl Texts {
    pub fn new(frontend: Arc<Frontend>) -> Texts {
        Texts { frontend, open: HashMap::new() }
    }

    pub fn open(&mut self, id: RequestId, transcript: Transcript) {
        self.open.insert(id, transcript);
    }

    /// None for one that is not open.
    pub fn take(&mut self, event: TokenEvent) -> Option<Update> {
        let request = RequestId(event.serial);
        if event.finish == Some(Finish::Error) {
            return self.end(request, FinishReason::Error);
        }
        let transcript = self.open.get_mut(&request)?;
        let tokenizer = &self.frontend.tokenizer;
        let (bytes, special) = (tokenizer.token_bytes(event.token), tokenizer.is_special(event.token));
        let (text, stop_string) = transcript.push(&event, bytes, special);
        let finish = match event.finish {
            _ if stop_string.is_some() => Some(FinishReason::Stop),
            Some(Finish::Stop) => Some(FinishReason::Stop),
            Some(Finish::Length) => Some(FinishReason::Length),
            Some(Finish::Error) => unreachable!("handled above"),
            None => None,
        };
        if finish.is_some() {
            self.open.remove(&request);
        }
        Some(Update { request, token: Some(event), text, finish, stop_string })
    }

    /// None for one that is not open.
    pub fn cancel(&mut self, request: RequestId) -> Option<Update> {
        self.end(request, FinishReason::Cancelled)
    }

    /// Without another token.
    fn end(&mut self, request: RequestId, reason: FinishReason) -> Option<Update> {
        let mut transcript = self.open.remove(&request)?;
        Some(Update { request, token: None, text: transcript.finish(), finish: Some(reason), stop_string: None })
    }
}
