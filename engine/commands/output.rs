//! How answers look: thinking dim, injected tokens coloured, the answer plain; and the report under them.

use crate::batch::TokenEvent;
use crate::engine::Update;
use crate::sequence::{Answer, Channel, FinishReason, Piece};
use crate::telemetry::Telemetry;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};
use std::time::Instant;

const DIM: &str = "\x1b[2m";
const INJECTED: &str = "\x1b[33m";
const RESET: &str = "\x1b[0m";

/// Standard output, in colours if it is a terminal and NO_COLOR is not set.
pub struct Printer {
    colours: bool,
    /// What the terminal is set to; "" is plain.
    colour: &'static str,
    /// The last piece ended in the middle of a line.
    mid_line: bool,
}

impl Printer {
    pub fn new() -> Printer {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Printer { colours: std::io::stdout().is_terminal() && !unwanted, colour: "", mid_line: false }
    }

    pub fn print(&mut self, pieces: &[Piece]) -> Result<()> {
        let mut text = String::new();
        for piece in pieces {
            let colour = match piece.channel {
                _ if !self.colours => "",
                _ if piece.injected => INJECTED,
                Channel::Reasoning | Channel::Delimiter => DIM,
                Channel::Answer => "",
            };
            if colour != self.colour {
                text.extend([if self.colour.is_empty() { "" } else { RESET }, colour]);
                self.colour = colour;
            }
            text.push_str(&piece.text);
            self.mid_line = !piece.text.ends_with('\n');
        }
        self.write(&text)
    }

    /// So that what follows begins on a new line.
    pub fn end_line(&mut self) -> Result<()> {
        let reset = if std::mem::take(&mut self.colour).is_empty() { "" } else { RESET };
        let newline = if std::mem::take(&mut self.mid_line) { "\n" } else { "" };
        self.write(&[reset, newline].concat())
    }

    pub fn write(&mut self, text: &str) -> Result<()> {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::Output)
    }
}

/// An answer as it arrives, and how fast.
pub struct Meter {
    pub answer: Answer,
    telemetry: Option<Telemetry>,
    joules: Option<f64>,
    start: Instant,
    first: Option<Instant>,
    last: Instant,
}

/// How fast an answer came.
pub struct Speed {
    pub seconds_to_first_token: f64,
    /// After the first one.
    pub tokens_per_second: f64,
    pub joules_per_token: Option<f64>,
}

impl Meter {
    pub fn start(telemetry: Option<Telemetry>) -> Meter {
        let joules = telemetry.as_ref().and_then(Telemetry::joules);
        let now = Instant::now();
        Meter { answer: Answer::default(), telemetry, joules, start: now, first: None, last: now }
    }

    pub fn take(&mut self, update: Update) {
        if update.token.is_some() {
            self.last = Instant::now();
            self.first.get_or_insert(self.last);
        }
        self.answer.extend(update.token, update.text, update.finish);
    }

    pub fn speed(&self) -> Speed {
        let tokens = self.answer.tokens.len() as f64;
        let first = self.first.unwrap_or(self.last);
        let decoding = (self.last - first).as_secs_f64();
        let now = self.telemetry.as_ref().and_then(Telemetry::joules);
        Speed {
            seconds_to_first_token: (first - self.start).as_secs_f64(),
            tokens_per_second: if decoding > 0.0 { (tokens - 1.0) / decoding } else { 0.0 },
            joules_per_token: now.zip(self.joules).map(|(now, then)| (now - then) / tokens.max(1.0)),
        }
    }

    /// The last line: how long it thought, what was forced, how fast it was.
    pub fn report(&self, thinks: bool) -> String {
        let speed = self.speed();
        let mut parts = Vec::new();
        if let Some(last) = self.answer.tokens.last().filter(|_| thinks) {
            parts.push(format!("{} thinking tokens", last.reasoning_tokens));
            let ends = if last.ignores_used == 1 { "end" } else { "ends" };
            parts.push(format!("{} {ends} ignored", last.ignores_used));
            parts.push(format!("maximum {}hit", if last.max_hit { "" } else { "not " }));
            if last.stopped {
                parts.push("stopped by steering".into());
            }
        }
        parts.push(format!("{} tokens", self.answer.tokens.len()));
        parts.push(format!("{:.1} tokens/s", speed.tokens_per_second));
        parts.extend(speed.joules_per_token.map(|j| format!("{j:.2} J/token")));
        parts.push(format!("finish: {}", self.answer.finish.map_or("none", FinishReason::name)));
        format!("[{}]", parts.join(", "))
    }
}

/// `thinking` of an answer in JSON, as its last token has it.
pub fn thinking(last: &TokenEvent) -> Value {
    let mut thinking = json!({
        "reasoning_tokens": last.reasoning_tokens,
        "ignores_used": last.ignores_used,
        "max_hit": last.max_hit,
    });
    if last.stopped {
        thinking["stopped"] = true.into();
    }
    thinking
}
