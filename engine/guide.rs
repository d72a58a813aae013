//! Answers that must follow a grammar. A [`Guide`] says before each draw which tokens may come; it is asked on threads of its
//! own, meanwhile its sequence pauses, and the others go on (see `scheduler.rs`). Thinking is free: a guide hears of the answer
//! alone, and where the model may open its thinking by itself, it still may. Knows no device and no text.

use crate::Result;
use crate::batch::{SlotSetup, TokenEvent};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What may come next in one answer.
pub trait Guide: Send {
    /// Takes note of the answer's tokens since the last call, and sets the bits of those that may come next: bit `id % 32` of
    /// word `id / 32`, [vocab / 32 rounded up], all zero before. EOS is a token like others: where the answer may end, its bit
    /// is set.
    ///
    /// # Errors
    /// Tokens that it cannot follow. The answer ends with an error.
    fn next(&mut self, tokens: &[u32], allowed: &mut [u32]) -> Result<Next>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// One of the tokens allowed.
    Token,
    /// The answer is complete, whatever is allowed.
    End,
}

/// Makes a guide for each answer to a request.
#[derive(Clone)]
pub struct Grammar(Arc<dyn Fn() -> Box<dyn Guide> + Send + Sync>);

impl Grammar {
    pub fn new(guide: impl Fn() -> Box<dyn Guide> + Send + Sync + 'static) -> Grammar {
        Grammar(Arc::new(guide))
    }

    /// For another answer.
    pub fn guide(&self) -> Box<dyn Guide> {
        (self.0)()
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}

/// A guide and what it is to be told.
pub struct GuidedAnswer {
    guide: Box<dyn Guide>,
    /// Since it was asked last.
    tokens: Vec<u32>,
    /// Delimiter that may open the thinking before the answer, and how much of it has come; None: no more.
    start: Vec<u32>,
    opening: Option<usize>,
    /// The next token of `start` was allowed for its sake.
    offered: bool,
    eos_ids: Vec<u32>,
    begins_guided: bool,
    words: usize,
}

impl GuidedAnswer {
    /// `start`: by which the model may open its thinking; empty if it never does so by itself.
    pub fn new(grammar: &Grammar, setup: &SlotSetup, start: Vec<u32>, vocab: usize) -> GuidedAnswer {
        GuidedAnswer {
            guide: grammar.guide(),
            tokens: Vec::new(),
            opening: (setup.begins_guided() && !start.is_empty()).then_some(0),
            start,
            offered: false,
            eos_ids: setup.eos_ids.clone(),
            begins_guided: setup.begins_guided(),
            words: vocab.div_ceil(32),
        }
    }

    fn push(&mut self, event: &TokenEvent) {
        if event.reasoning || event.delimiter || event.injected {
            self.opening = None;
            return;
        }
        self.opening = match self.opening {
            Some(come) if self.offered && event.token == self.start[come] => Some(come + 1),
            _ => {
                self.tokens.push(event.token);
                None
            }
        };
    }

    /// The mask of the next draw. Nothing is allowed where the guide has failed: the sampler makes an error of it.
    fn next(&mut self) -> Vec<u32> {
        let mut allowed = vec![0; self.words];
        if let Some(come @ 1..) = self.opening {
            set(&mut allowed, self.start[come]);
            return allowed;
        }
        let tokens = std::mem::take(&mut self.tokens);
        match catch_unwind(AssertUnwindSafe(|| self.guide.next(&tokens, &mut allowed))) {
            Ok(Ok(Next::Token)) => {}
            Ok(Ok(Next::End)) => {
                allowed.fill(0);
                self.eos_ids.iter().for_each(|&id| set(&mut allowed, id));
            }
            Ok(Err(error)) => {
                tracing::warn!("an answer ends, because its grammar has failed: {error}");
                return vec![0; self.words];
            }
            // It has said so itself.
            Err(_) => return vec![0; self.words],
        }
        let start = self.start.first().filter(|_| self.opening.is_some());
        self.offered = start.is_some_and(|&id| allowed[id as usize / 32] >> (id % 32) & 1 == 0);
        start.iter().for_each(|&&id| set(&mut allowed, id));
        allowed
    }
}

fn set(allowed: &mut [u32], id: u32) {
    allowed[id as usize / 32] |= 1 << (id % 32);
}

/// All open guided answers, and the threads that ask their guides: one that takes long keeps at most one of them.
#[derive(Default)]
pub struct Guides {
    /// By serial; None while it is asked.
    open: HashMap<u32, Option<GuidedAnswer>>,
    asked: u32,
    threads: Option<Threads>,
}

struct Threads {
    questions: Sender<(u32, GuidedAnswer)>,
    answers: Receiver<(u32, GuidedAnswer, Vec<u32>)>,
}

impl Threads {
    fn start() -> Threads {
        let (questions, question) = channel::<(u32, GuidedAnswer)>();
        let (answer, answers) = channel();
        let question = Arc::new(Mutex::new(question));
        let count = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
        for i in 0..count {
            let (question, answer) = (question.clone(), answer.clone());
            let run = move || {
                loop {
                    let next = question.lock().expect("nobody panics with it").recv();
                    // Until the guides, or nobody, are there to hear.
                    let Ok((serial, mut guided)) = next else { break };
                    let allowed = guided.next();
                    if answer.send((serial, guided, allowed)).is_err() {
                        break;
                    }
                }
            };
            std::thread::Builder::new().name(format!("ponder-guide-{i}")).spawn(run).expect("a thread can be had");
        }
        Threads { questions, answers }
    }
}

impl Guides {
    pub fn open(&mut self, serial: u32, guided: GuidedAnswer) {
        self.threads.get_or_insert_with(Threads::start);
        if guided.begins_guided {
            self.ask(serial, guided);
        } else {
            self.open.insert(serial, Some(guided));
        }
    }

    fn ask(&mut self, serial: u32, guided: GuidedAnswer) {
        self.open.insert(serial, None);
        self.asked += 1;
        let threads = self.threads.as_ref().expect("an open answer has started them");
        threads.questions.send((serial, guided)).expect("they run while they may be asked");
    }

    /// Takes note of a token of any sequence.
    pub fn received(&mut self, event: &TokenEvent) {
        let Some(guided) = self.open.get_mut(&event.serial) else { return };
        if event.finish.is_some() {
            self.open.remove(&event.serial);
            return;
        }
        guided.as_mut().expect("a sequence pauses while its guide is asked").push(event);
        if event.awaits_mask {
            let guided = guided.take().expect("it is here");
            self.ask(event.serial, guided);
        }
    }

    pub fn cancel(&mut self, serial: u32) {
        self.open.remove(&serial);
    }

    /// The next mask that has become known, waiting for so long if one is due; with the serial of its sequence.
    pub fn mask(&mut self, patience: Duration) -> Option<(u32, Vec<u32>)> {
        while self.asked > 0 {
            let threads = self.threads.as_ref().expect("somebody has been asked");
            let (serial, guided, allowed) = threads.answers.recv_timeout(patience).ok()?;
            self.asked -= 1;
            if let Some(open) = self.open.get_mut(&serial) {
                *open = Some(guided);
                return Some((serial, allowed));
            }
        }
        None
    }
}
