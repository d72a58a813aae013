//! An engine on threads of its own, for requests from many others: each gets a stream of updates.
//!
//! One thread plans and runs steps and does nothing else; a second one turns tokens into text, looks for stop strings and feeds
//! the sinks; prompts are judged and encoded by whoever brings them. So the device does not wait for text, and a slow reader
//! holds up nobody: what it has not read yet waits in its stream.

use crate::batch::TokenEvent;
use crate::engine::{Accepted, Engine, RequestId, Texts, Update, accept};
use crate::frontend::{Frontend, Request};
use crate::guide::GuidedAnswer;
use crate::scheduler::Submission;
use crate::sequence::Transcript;
use crate::stepper::{Stats, Stepper};
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub struct Service {
    frontend: Arc<Frontend>,
    context: u32,
    next_serial: AtomicU32,
    progress: Arc<Mutex<Progress>>,
    commands: Sender<Command>,
    texts: Sender<Message>,
    threads: Vec<JoinHandle<()>>,
}

/// Where the updates of one request go, in order. It must not wait. Dropped without an end, no update will follow: the engine has
/// failed.
pub type Sink = Box<dyn FnMut(Result<Update>) + Send>;

/// As of the last step.
struct Progress {
    stats: Stats,
    at: Instant,
    /// Why there will be no more steps.
    problem: Option<String>,
}

/// The error of whoever asks something of an engine that has failed.
fn stopped(problem: &str) -> Error {
    Error::Engine(problem.into())
}

/// To the thread that runs steps.
enum Command {
    Submit(Box<Submission>, Option<GuidedAnswer>),
    Cancel(RequestId),
    EndThinking(RequestId),
    Stop,
}

/// To the thread that makes text.
enum Message {
    Open(RequestId, Box<Transcript>, Sink),
    Tokens(Vec<TokenEvent>),
    Cancel(RequestId),
    /// No step will follow; why, if not because the service is dropped.
    Stopped(Option<String>),
}

/// A request under way. Dropped, it cancels the request if that has not ended.
pub struct Ticket {
    id: RequestId,
    commands: Sender<Command>,
    texts: Sender<Message>,
}

/// The updates of one request, in order; the last one says why it ended. Dropped before that, it cancels the request.
pub struct Stream {
    ticket: Ticket,
    updates: Receiver<Result<Update>>,
    ended: bool,
}

impl Service {
    /// Takes an engine that nothing has been asked of yet.
    pub fn start(engine: Engine) -> Service {
        assert!(engine.is_idle(), "requests of before would have no stream");
        let Engine { frontend, stepper, .. } = engine;
        let context = stepper.context();
        let progress = Arc::new(Mutex::new(Progress { stats: stepper.stats(), at: Instant::now(), problem: None }));
        let (commands, command) = channel();
        let (texts, message) = channel();
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(run).expect("a thread can be had")
        };
        let (to_texts, to_steps) = (texts.clone(), commands.clone());
        let (shared, text) = (progress.clone(), Texts::new(frontend.clone()));
        let threads = vec![
            spawn("ponder-steps", Box::new(move || run_steps(stepper, &command, to_texts, &shared))),
            spawn("ponder-text", Box::new(move || make_text(text, &message, &to_steps))),
        ];
        Service { frontend, context, next_serial: AtomicU32::new(0), progress, commands, texts, threads }
    }

    pub fn frontend(&self) -> &Frontend {
        &self.frontend
    }

    /// Makes a request end its thinking now, as if it had reached its maximum; nothing happens where it does not think, or no more.
    pub fn end_thinking(&self, id: RequestId) {
        let _ = self.commands.send(Command::EndThinking(id));
    }

    /// Ends a request soon, as [`Ticket::cancel`].
    pub fn cancel(&self, id: RequestId) {
        let _ = self.commands.send(Command::Cancel(id));
        let _ = self.texts.send(Message::Cancel(id));
    }

    /// Longest sequence: prompt and answer.
    pub fn context(&self) -> u32 {
        self.context
    }

    /// # Errors
    /// A request that can never be served; an engine that has failed.
    pub fn submit(&self, request: &Request) -> Result<Stream> {
        self.stream(request, None)
    }

    /// Another answer to the prompt of `parent`, which is computed once while that one runs. Seeds should differ.
    ///
    /// # Errors
    /// As [`Service::submit`].
    pub fn fork(&self, parent: RequestId, request: &Request) -> Result<Stream> {
        self.stream(request, Some(parent))
    }

    fn stream(&self, request: &Request, fork_of: Option<RequestId>) -> Result<Stream> {
        let (sender, updates) = channel();
        // A reader that has gone has cancelled its request.
        let ticket = self.submit_to(request, fork_of, Box::new(move |update| drop(sender.send(update))))?;
        Ok(Stream { ticket, updates, ended: false })
    }

    /// As [`Service::submit`] or, of a parent, [`Service::fork`], for those who do not wait in a thread: `sink` is called for each
    /// update.
    ///
    /// # Errors
    /// As [`Service::submit`].
    pub fn submit_to(&self, request: &Request, fork_of: Option<RequestId>, sink: Sink) -> Result<Ticket> {
        if let Some(problem) = &self.progress.lock().expect("nobody panics with it").problem {
            return Err(stopped(problem));
        }
        let id = RequestId(self.next_serial.fetch_add(1, Ordering::Relaxed));
        let Accepted { submission, guided, transcript } = accept(&self.frontend, request, id, fork_of, self.context)?;
        // Where a thread has ended the sink is dropped: at once, or with the message.
        let _ = self.texts.send(Message::Open(id, Box::new(transcript), sink));
        let _ = self.commands.send(Command::Submit(Box::new(submission), guided));
        Ok(Ticket { id, commands: self.commands.clone(), texts: self.texts.clone() })
    }

    /// As of the last step.
    pub fn stats(&self) -> Stats {
        self.progress.lock().expect("nobody panics with it").stats
    }

    /// How long there has been work without a step that was done.
    pub fn stalled(&self) -> Duration {
        let progress = self.progress.lock().expect("nobody panics with it");
        match progress.stats.waiting + progress.stats.running {
            0 => Duration::ZERO,
            _ => progress.at.elapsed(),
        }
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

impl Ticket {
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Ends the request soon; its last update says so, or that it has ended by itself. After its end nothing happens.
    pub fn cancel(&self) {
        let _ = self.commands.send(Command::Cancel(self.id));
        let _ = self.texts.send(Message::Cancel(self.id));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Stream {
    pub fn id(&self) -> RequestId {
        self.ticket.id
    }

    /// Ends the request soon; its last update says so, or that it has ended by itself.
    pub fn cancel(&self) {
        self.ticket.cancel();
    }
}

impl Iterator for Stream {
    /// An error means that the engine has failed and nothing follows.
    type Item = Result<Update>;

    fn next(&mut self) -> Option<Result<Update>> {
        if self.ended {
            return None;
        }
        let update = self.updates.recv().unwrap_or_else(|_| Err(stopped("no request can be served")));
        self.ended = update.as_ref().map_or(true, |update| update.finish.is_some());
        Some(update)
    }
}

/// Tells the others when the thread of steps ends, by a panic as well.
struct Farewell<'a> {
    texts: Sender<Message>,
    progress: &'a Mutex<Progress>,
    problem: Option<String>,
}

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        // Before the streams hear of it: who asks then is refused.
        self.progress.lock().expect("nobody panics with it").problem.clone_from(&self.problem);
        let _ = self.texts.send(Message::Stopped(self.problem.take()));
    }
}

fn run_steps(mut stepper: Stepper, commands: &Receiver<Command>, texts: Sender<Message>, progress: &Mutex<Progress>) {
    let mut farewell = Farewell { texts, progress, problem: Some("it has panicked".into()) };
    loop {
        // Without work there is nothing to do but to wait for some.
        let next = if stepper.is_idle() { commands.recv().ok() } else { commands.try_recv().ok() };
        match next {
            Some(Command::Submit(submission, guided)) => stepper.submit(*submission, guided),
            Some(Command::Cancel(id)) => drop(stepper.cancel(id.0)),
            Some(Command::EndThinking(id)) => stepper.end_thinking(id.0),
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
        let done = Progress { stats: stepper.stats(), at: Instant::now(), problem: None };
        *progress.lock().expect("nobody panics with it") = done;
    }
    farewell.problem = None;
}

fn make_text(mut texts: Texts, messages: &Receiver<Message>, commands: &Sender<Command>) {
    let mut sinks: HashMap<RequestId, Sink> = HashMap::new();
    for message in messages {
        let (events, cancelled) = match message {
            Message::Open(id, transcript, sink) => {
                texts.open(id, *transcript);
                sinks.insert(id, sink);
                continue;
            }
            Message::Stopped(problem) => {
                for (id, mut sink) in sinks {
                    let update = match &problem {
                        Some(problem) => Err(stopped(problem)),
                        None => Ok(texts.cancel(id).expect("a sink belongs to an open request")),
                    };
                    sink(update);
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
            sinks.get_mut(&id).expect("a sink belongs to an open request")(Ok(update));
            if ended {
                sinks.remove(&id);
            }
        }
    }
}
