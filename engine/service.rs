//! An engine on threads of its own, for requests from many others: each gets a stream of updates.
//!
//! One thread plans and runs steps and does nothing else; a second one turns tokens into text, looks for stop strings and feeds
//! the streams; prompts are judged and encoded by whoever brings them. So the device does not wait for text, and a slow reader
//! holds up nobody: what it has not read yet waits in its stream.

use crate::batch::TokenEvent;
use crate::engine::{Engine, RequestId, Texts, Update, accept};
use crate::frontend::{Frontend, Request};
use crate::scheduler::Submission;
use crate::sequence::Transcript;
use crate::stepper::{Stats, Stepper};
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

pub struct Service {
    frontend: Arc<Frontend>,
    context: u32,
    next_serial: AtomicU32,
    stats: Arc<Mutex<Stats>>,
    commands: Sender<Command>,
    texts: Sender<Message>,
    threads: Vec<JoinHandle<()>>,
}

/// To the thread that runs steps.
enum Command {
    Submit(Box<Submission>),
    Cancel(RequestId),
    Stop,
}

/// To the thread that makes text.
enum Message {
    Open(RequestId, Box<Transcript>, Sender<Result<Update>>),
    Tokens(Vec<TokenEvent>),
    Cancel(RequestId),
    /// No step will follow; why, if not because the service is dropped.
    Stopped(Option<String>),
}

/// The updates of one request, in order; the last one says why it ended. Dropped before that, it cancels the request.
pub struct Stream {
    id: RequestId,
    updates: Receiver<Result<Update>>,
    commands: Sender<Command>,
    texts: Sender<Message>,
    ended: bool,
}

impl Service {
    /// Takes an engine that nothing has been asked of yet.
    pub fn start(engine: Engine) -> Service {
        assert!(engine.is_idle(), "requests of before would have no stream");
        let Engine { frontend, stepper, .. } = engine;
        let context = stepper.context();
        let stats = Arc::new(Mutex::new(stepper.stats()));
        let (commands, command) = channel();
        let (texts, message) = channel();
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(run).expect("a thread can be had")
        };
        let (to_texts, to_steps) = (texts.clone(), commands.clone());
        let (shared_stats, text) = (stats.clone(), Texts::new(frontend.clone()));
        let threads = vec![
            spawn("ponder-steps", Box::new(move || run_steps(stepper, &command, to_texts, &shared_stats))),
            spawn("ponder-text", Box::new(move || make_text(text, &message, &to_steps))),
        ];
        Service { frontend, context, next_serial: AtomicU32::new(0), stats, commands, texts, threads }
    }

    pub fn frontend(&self) -> &Frontend {
        &self.frontend
    }

    /// Longest sequence: prompt and answer.
    pub fn context(&self) -> u32 {
        self.context
    }

    /// # Errors
    /// A request that can never be served.
    pub fn submit(&self, request: &Request) -> Result<Stream> {
        self.submit_as(request, None)
    }

    /// Another answer to the prompt of `parent`, which is computed once while that one runs. Seeds should differ.
    ///
    /// # Errors
    /// As [`Service::submit`].
    pub fn fork(&self, parent: RequestId, request: &Request) -> Result<Stream> {
        self.submit_as(request, Some(parent))
    }

    fn submit_as(&self, request: &Request, fork_of: Option<RequestId>) -> Result<Stream> {
        let id = RequestId(self.next_serial.fetch_add(1, Ordering::Relaxed));
        let (submission, transcript) = accept(&self.frontend, request, id, fork_of, self.context)?;
        let (sender, updates) = channel();
        // Where a thread has ended the stream ends, too: its sender is gone, or goes with the message.
        let _ = self.texts.send(Message::Open(id, Box::new(transcript), sender));
        let _ = self.commands.send(Command::Submit(Box::new(submission)));
        Ok(Stream { id, updates, commands: self.commands.clone(), texts: self.texts.clone(), ended: false })
    }

    /// As of the last step.
    pub fn stats(&self) -> Stats {
        *self.stats.lock().expect("nobody panics with it")
    }
}

/// Requests without an end are cancelled.
impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        for thread in self.threads.drain(..) {
            // One that has panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Stream {
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Ends the request soon; its last update says so, or that it has ended by itself.
    pub fn cancel(&self) {
        let _ = self.commands.send(Command::Cancel(self.id));
        let _ = self.texts.send(Message::Cancel(self.id));
    }
}

impl Iterator for Stream {
    /// An error means that the engine has failed and nothing follows.
    type Item = Result<Update>;

    fn next(&mut self) -> Option<Result<Update>> {
        if self.ended {
            return None;
        }
        let stopped = || Err(Error::Device("the engine has stopped, so no request can be served".into()));
        let update = self.updates.recv().unwrap_or_else(|_| stopped());
        self.ended = update.as_ref().map_or(true, |update| update.finish.is_some());
        Some(update)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.ended {
            self.cancel();
        }
    }
}

/// Tells the other thread when this one ends, by a panic as well.
struct Farewell {
    texts: Sender<Message>,
    problem: Option<String>,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        let _ = self.texts.send(Message::Stopped(self.problem.take()));
    }
}

fn run_steps(mut stepper: Stepper, commands: &Receiver<Command>, texts: Sender<Message>, stats: &Mutex<Stats>) {
    let mut farewell = Farewell { texts, problem: Some("it has panicked".into()) };
    loop {
        // Without work there is nothing to do but to wait for some.
        let next = if stepper.is_idle() { commands.recv().ok() } else { commands.try_recv().ok() };
        match next {
            Some(Command::Submit(submission)) => stepper.submit(*submission),
            Some(Command::Cancel(id)) => drop(stepper.cancel(id.0)),
            Some(Command::Stop) => break,
            None => match stepper.step() {
                Ok(events) if events.is_empty() => {}
                Ok(events) => drop(farewell.texts.send(Message::Tokens(events))),
                Err(error) => {
                    farewell.problem = Some(error.to_string());
                    return;
                }
            },
        }
        *stats.lock().expect("nobody panics with it") = stepper.stats();
    }
    farewell.problem = None;
}

fn make_text(mut texts: Texts, messages: &Receiver<Message>, commands: &Sender<Command>) {
    let mut streams: HashMap<RequestId, Sender<Result<Update>>> = HashMap::new();
    for message in messages {
        let (events, cancelled) = match message {
            Message::Open(id, transcript, sender) => {
                texts.open(id, *transcript);
                streams.insert(id, sender);
                continue;
            }
            Message::Stopped(problem) => {
                for (id, sender) in streams {
                    let update = match &problem {
                        Some(problem) => Err(Error::Device(format!("the engine has stopped: {problem}"))),
                        None => Ok(texts.cancel(id).expect("a stream belongs to an open request")),
                    };
                    let _ = sender.send(update);
                }
                return;
            }
            Message::Cancel(id) => (Vec::new(), texts.cancel(id)),
            Message::Tokens(events) => (events, None),
        };
        // Tokens of cancelled requests are late.
        let updates = events.into_iter().filter_map(|event| texts.take(event)).chain(cancelled).collect::<Vec<_>>();
        for update in updates {
            let id = update.request;
            if update.is_stopped() {
                let _ = commands.send(Command::Cancel(id));
            }
            let ended = update.finish.is_some();
            // A reader that has gone has cancelled its request.
            let _ = streams[&id].send(Ok(update));
            if ended {
                streams.remove(&id);
            }
        }
    }
}
