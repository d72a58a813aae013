//! `ponder chat`: a conversation. Ctrl-C stops the answer and not the program, Ctrl-D ends.

use super::output::{Meter, Printer};
use crate::args::ChatArgs;
use crate::chat::Message;
use crate::engine::Engine;
use crate::frontend::Request;
use crate::sequence::{Answer, Channel};
use crate::{Error, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const HELP: &str = "\
/budget          show how long the model thinks
/budget MAX [N]  at most MAX thinking tokens, the first N ends ignored
/budget off      as long as it likes
/clear           forget the conversation
/help            this
Ctrl-C stops an answer, Ctrl-D ends.
";

pub fn run(args: &ChatArgs) -> Result<()> {
    let (frontend, checkpoint, device) = super::open(&args.model)?;
    let mut request = args.request.request();
    // What is wrong with the flags is said now, not after the first question.
    request.prompt = frontend.encode_chat(&[Message::new("user", "?")])?;
    frontend.accept(&request, 0, frontend.config.max_position_embeddings as u32)?;
    let mut engine = super::load(frontend, checkpoint.as_ref(), &device, &super::options(&args.model))?;
    let mut editor = DefaultEditor::new().map_err(terminal)?;
    // After the editor, which installs a handler of its own.
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)).expect("the handler can be set");
    let prompt = if std::io::stdin().is_terminal() { "> " } else { "" };
    let system: Vec<Message> = args.system.iter().map(|text| Message::new("system", text)).collect();
    let mut messages = system.clone();
    let mut printer = Printer::new();
    loop {
        let line = match editor.readline(prompt) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(terminal(error)),
        };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        editor.add_history_entry(line).map_err(terminal)?;
        if let Some(command) = line.strip_prefix('/') {
            match command.split_whitespace().collect::<Vec<_>>().as_slice() {
                ["clear"] => messages.clone_from(&system),
                ["budget", words @ ..] => printer.write(&budget(&mut request, words))?,
                _ => printer.write(HELP)?,
            }
            continue;
        }
        messages.push(Message::new("user", line));
        interrupted.store(false, Ordering::Relaxed);
        let answer = engine.frontend.encode_chat(&messages).and_then(|prompt| {
            request.prompt = prompt;
            answer(&mut engine, &request, &interrupted, &mut printer)
        });
        match answer {
            Ok(answer) => messages.push(Message::new("assistant", answer.channel(Channel::Answer))),
            // A conversation that has become too long, for one: it can be cleared.
            Err(error @ Error::Request { .. }) => {
                messages.pop();
                eprintln!("ponder: {error}");
            }
            Err(error) => return Err(error),
        }
    }
}

/// Answers `request`, until it ends or somebody has enough.
fn answer(engine: &mut Engine, request: &Request, interrupted: &AtomicBool, printer: &mut Printer) -> Result<Answer> {
    let id = engine.submit(request)?;
    let mut meter = Meter::start(None);
    while !engine.is_idle() {
        let mut updates = engine.step()?;
        if interrupted.load(Ordering::Relaxed) {
            updates.extend(engine.cancel(id));
        }
        for update in updates {
            printer.print(&update.text)?;
            meter.take(update);
        }
    }
    printer.end_line()?;
    eprintln!("{}", meter.report(engine.frontend.delimiters.is_some()));
    Ok(meter.answer)
}

/// Changes the budget as the words say; what to print.
fn budget(request: &mut Request, words: &[&str]) -> String {
    let budget = &mut request.budget;
    match words {
        [] => {}
        ["off"] => (budget.max_thinking_tokens, budget.n_ignore) = (None, 0),
        [max, rest @ ..] if rest.len() < 2 => match (max.parse(), rest.first().map_or(Ok(0), |n| n.parse())) {
            (Ok(max), Ok(n)) => (budget.max_thinking_tokens, budget.n_ignore) = (Some(max), n),
            _ => return HELP.into(),
        },
        _ => return HELP.into(),
    }
    let max = budget.max_thinking_tokens.map_or("no maximum".into(), |max| format!("at most {max} thinking tokens"));
    format!("{max}, {} ends ignored\n", budget.n_ignore)
}

fn terminal(error: ReadlineError) -> Error {
    match error {
        ReadlineError::Io(source) => Error::io("standard input", source),
        other => Error::io("standard input", std::io::Error::other(other)),
    }
}
