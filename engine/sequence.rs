//! What a request becomes on the way out: tokens turn into text, the text is cut exactly at a stop string, and every piece
//! of it is known to be thinking, delimiter or answer, drawn or injected.
//!
//! Invariant: text that has been handed out never changes; what may turn out to begin a stop string is held back. Knows no
//! device and no other request.

use crate::batch::{Finish, TokenEvent};
use crate::tokenizer::Detokenizer;
use std::collections::VecDeque;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// End of sequence, a stop id or a stop string.
    Stop,
    /// The most tokens asked for, or the context, is reached.
    Length,
    Cancelled,
    /// The model's logits were not finite, or masks left no token to draw.
    Error,
}

impl FinishReason {
    /// As the JSON output spells it.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
            FinishReason::Error => "error",
        }
    }
}

/// What a piece of text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    Reasoning,
    Delimiter,
    Answer,
}

/// Text that stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub text: String,
    pub channel: Channel,
    /// Forced, not drawn.
    pub injected: bool,
}

/// The text of one sequence, as its tokens arrive.
pub struct Transcript {
    detokenizer: Detokenizer,
    stop: StopStrings,
    /// Text of the delimiter that stands between thinking and answer.
    close: String,
    /// The delimiter text that is being written.
    delimiter: String,
    /// Of the last token.
    channel: Channel,
    hide_special: bool,
}

impl Transcript {
    /// `stop`: no empty string among them. `close`: what ends the thinking; empty without thinking.
    pub fn new(stop: Vec<String>, close: String) -> Transcript {
        Transcript {
            detokenizer: Detokenizer::default(),
            stop: StopStrings::new(stop),
            close,
            delimiter: String::new(),
            channel: Channel::Answer,
            hide_special: false,
        }
    }

    /// Special tokens have no text. They still are delimiters.
    pub fn hide_special(mut self, hide: bool) -> Transcript {
        self.hide_special = hide;
        self
    }

    /// The stop string that ends the text is shown as well.
    pub fn show_stop(mut self, show: bool) -> Transcript {
        self.stop.show = show;
        self
    }

    /// The text that is certain now, and the stop string that has completed. `bytes` are those of the token, which is a special
    /// one or not; one that ends the sequence has no text.
    pub fn push(&mut self, event: &TokenEvent, bytes: &[u8], special: bool) -> (Vec<Piece>, Option<String>) {
        let mut pieces = Vec::with_capacity(1);
        let ends = event.finish == Some(Finish::Stop);
        let mut text = if ends { self.detokenizer.finish() } else { self.detokenizer.push(bytes) };
        self.channel = self.channel(event, &text);
        if special && self.hide_special && !ends {
            text.clear();
        }
        let piece = Piece { text, channel: self.channel, injected: event.injected };
        let stopped = self.stop.push(piece, &mut pieces).map(String::from);
        if event.finish.is_some() && stopped.is_none() {
            pieces.extend(self.finish());
        }
        (pieces, stopped)
    }

    /// The rest of the text, when no token will follow.
    pub fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let text = self.detokenizer.finish();
        if self.stop.push(Piece { text, channel: self.channel, injected: false }, &mut pieces).is_none() {
            pieces.extend(self.stop.flush());
        }
        pieces
    }

    /// What a forced end string says after its closing delimiter ("Final Answer:") belongs to the answer.
    fn channel(&mut self, event: &TokenEvent, text: &str) -> Channel {
        if event.delimiter {
            let closed = !self.close.is_empty() && self.delimiter.contains(&self.close);
            self.delimiter.push_str(text);
            return if closed { Channel::Answer } else { Channel::Delimiter };
        }
        self.delimiter.clear();
        if event.reasoning { Channel::Reasoning } else { Channel::Answer }
    }
}

/// Finds the first stop string in a text that arrives in pieces.
struct StopStrings {
    strings: Vec<String>,
    /// Pieces that may contain the beginning of a stop string.
    held: VecDeque<Piece>,
    /// Their text.
    text: String,
    /// What is found belongs to the text.
    show: bool,
}

impl StopStrings {
    fn new(strings: Vec<String>) -> StopStrings {
        assert!(strings.iter().all(|s| !s.is_empty()), "an empty stop string stands everywhere");
        StopStrings { strings, held: VecDeque::new(), text: String::new(), show: false }
    }

    /// Appends to `out` what no stop string can touch any more. The one that has completed: the text ends with it.
    fn push(&mut self, piece: Piece, out: &mut Vec<Piece>) -> Option<&str> {
        if piece.text.is_empty() {
            return None;
        }
        if self.strings.is_empty() {
            out.push(piece);
            return None;
        }
        self.text.push_str(&piece.text);
        self.held.push_back(piece);
        let places = self.strings.iter().enumerate().filter_map(|(i, s)| Some((self.text.find(s.as_str())?, i)));
        let Some((at, index)) = places.min() else {
            self.release(self.text.len() - self.possible_beginning(), out);
            return None;
        };
        self.release(if self.show { at + self.strings[index].len() } else { at }, out);
        self.held.clear();
        self.text.clear();
        Some(&self.strings[index])
    }

    fn flush(&mut self) -> Vec<Piece> {
        let mut out = Vec::new();
        self.release(self.text.len(), &mut out);
        out
    }

    /// Bytes at the end of the text that a stop string may begin with.
    fn possible_beginning(&self) -> usize {
        let longest = |s: &String| {
            (1..s.len()).rev().find(|&n| s.is_char_boundary(n) && self.text.ends_with(&s[..n])).unwrap_or(0)
        };
        self.strings.iter().map(longest).max().unwrap_or(0)
    }

    /// Hands out the first `bytes` of what is held.
    fn release(&mut self, mut bytes: usize, out: &mut Vec<Piece>) {
        self.text.drain(..bytes);
        while bytes > 0 {
            let mut piece = self.held.pop_front().expect("held pieces make up the held text");
            if piece.text.len() > bytes {
                let rest = piece.text.split_off(bytes);
                self.held.push_front(Piece { text: rest, ..piece });
            }
            bytes -= piece.text.len();
            out.push(piece);
        }
    }
}

/// A whole answer, put together from the updates of its request.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub tokens: Vec<TokenEvent>,
    pub pieces: Vec<Piece>,
    pub finish: Option<FinishReason>,
    /// What ended it, if it was one of those.
    pub stop_string: Option<String>,
}

impl Answer {
    pub fn extend(&mut self, token: Option<TokenEvent>, text: Vec<Piece>, finish: Option<FinishReason>) {
        self.tokens.extend(token);
        self.pieces.extend(text);
        self.finish = finish;
    }

    /// Everything after the prompt, delimiters included, up to the end or a stop string.
    pub fn text(&self) -> String {
        self.pieces.iter().map(|p| p.text.as_str()).collect()
    }

    /// What stands in one channel, without the space around it.
    pub fn channel(&self, channel: Channel) -> String {
        let text: String = self.pieces.iter().filter(|p| p.channel == channel).map(|p| p.text.as_str()).collect();
        text.trim().into()
    }
}
