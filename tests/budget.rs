//! Budget forcing: the state machine of kernels/budget.cuh against a model of its contract that is made differently (it keeps
//! the whole history and derives everything from it), on millions of random streams; against the loops of s1 that it replaces;
//! and a test for each bug that other engines had here.

use crate::random::Random;
use ponder::kernels::budget::Machine;
use ponder::kernels::params::*;
use std::collections::VecDeque;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accounting {
    Strict,
    Harness,
    Readme,
}

/// A vocabulary, and a request.
#[derive(Clone, Debug)]
struct Spec {
    /// What each token's text is.
    bytes: Vec<Vec<u8>>,
    start: Vec<i32>,
    end: Vec<i32>,
    close: Vec<i32>,
    end_string: Vec<i32>,
    ignore_strings: Vec<Vec<i32>>,
    newline: Option<i32>,
    max: Option<i32>,
    min: i32,
    n_ignore: i32,
    accounting: Accounting,
    mask_on_end: bool,
    eos: Vec<i32>,
    prompt: Vec<i32>,
    starts_thinking: bool,
}

/// One token of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word {
    token: i32,
    flags: u32,
    reasoning_tokens: i32,
    ignores_used: i32,
}

/// Gives the first token of a random order of preference that is not among those.
fn draw(vocab: usize, seed: u64, masked: &[i32]) -> i32 {
    let mut random = Random(seed);
    loop {
        let token = random.below(vocab as u32) as i32;
        if !masked.contains(&token) {
            return token;
        }
    }
}

fn traits(bytes: &[u8]) -> u8 {
    let newline = if bytes.ends_with(b"\n") { TRAIT_NEWLINE } else { 0 };
    let is_continuation = |b: &u8| b & 0xc0 == 0x80;
    let text = if bytes.iter().all(is_continuation) {
        (bytes.len() as u32) << TRAIT_CONTINUE_SHIFT
    } else {
        let tail = bytes.iter().rev().take_while(|b| is_continuation(b)).count();
        let needed = match bytes[bytes.len() - 1 - tail] {
            0xc0..0xe0 => 1,
            0xe0..0xf0 => 2,
            0xf0.. => 3,
            _ => 0usize,
        };
        needed.saturating_sub(tail) as u32
    };
    (TRAIT_REAL | newline | text) as u8
}

// ---- the machine ----

impl Spec {
    fn machine(&self) -> Machine {
        let mut pool = Vec::new();
        let mut store = |ids: &[i32]| {
            let offset = pool.len() as u32;
            pool.extend_from_slice(ids);
            PoolString { offset, length: ids.len() as u32 }
        };
        let mut state = Budget {
            start: store(&self.start),
            end: store(&self.end),
            close: store(&self.close),
            end_string: store(&self.end_string),
            ignore_count: self.ignore_strings.len() as u32,
            newline: self.newline.unwrap_or(-1),
            max_thinking: self.max.unwrap_or(BUDGET_NO_MAX as i32),
            min_thinking: self.min,
            n_ignore: self.n_ignore,
            accounting: match self.accounting {
                Accounting::Strict => ACCOUNT_STRICT,
                Accounting::Harness => ACCOUNT_S1_HARNESS,
                Accounting::Readme => ACCOUNT_S1_README,
            },
            on_end: if self.mask_on_end { ON_END_MASK } else { ON_END_REPLACE },
            phase: if self.starts_thinking { PHASE_THINKING } else { PHASE_OFF },
            inject_first: -1,
            mask_end_once: u32::from(
                self.starts_thinking && self.accounting == Accounting::Harness && self.n_ignore > 0,
            ),
            utf8_missing: bytes_missing(self.prompt.iter().map(|&t| &self.bytes[t as usize][..])) as u32,
            ends_with_newline: u32::from(self.prompt.last().is_some_and(|&t| self.bytes[t as usize].ends_with(b"\n"))),
            ..Default::default()
        };
        for (i, string) in self.ignore_strings.iter().enumerate() {
            state.ignore_strings[i] = store(string);
        }
        Machine::new(state, pool)
    }
}

/// One step as the sampler makes it.
fn machine_step(machine: &mut Machine, spec: &Spec, traits: &[u8], draw: impl Fn(&[i32]) -> i32) -> Word {
    let step = machine.before();
    let token = step.forced.unwrap_or_else(|| {
        let mut masked = Vec::new();
        let completing = machine.completing();
        if step.mask_end {
            masked.extend(completing);
        }
        if step.mask_eos {
            masked.extend(&spec.eos);
        }
        let drawn = draw(&masked);
        machine.after(drawn, spec.eos.contains(&drawn)).unwrap_or_else(|| {
            masked.extend(machine.completing());
            masked.extend(&spec.eos);
            let drawn = draw(&masked);
            machine.after(drawn, spec.eos.contains(&drawn)).expect("a token outside of the end set is emitted")
        })
    });
    let flags = machine.emit(token, traits[token as usize]);
    let state = machine.state();
    Word { token, flags, reasoning_tokens: state.reasoning_tokens, ignores_used: state.ignores_used }
}

// ---- the model ----

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Outside of the thinking and its delimiters.
    Plain,
    /// Thinking, drawn.
    Thought,
    /// Thinking, injected.
    Ignore,
    /// Completes a start or an end.
    Delimiter,
    /// What follows an end that the model drew.
    Close,
    /// The end string, and the newline before it.
    Forced,
}

struct Model<'a> {
    spec: &'a Spec,
    text: Vec<(i32, Kind)>,
    /// Where the thinking begins, and what follows it.
    thinking: Option<usize>,
    answer: Option<usize>,
    /// An end may begin here.
    end_from: usize,
    dropped: i32,
    pending: VecDeque<(i32, Kind)>,
    mask_end: bool,
    mask_eos: bool,
    max_hit: bool,
}

/// Bytes by which a text ends short of a whole character.
fn bytes_missing<'b>(words: impl DoubleEndedIterator<Item = &'b [u8]>) -> usize {
    let mut continuations = 0;
    for &byte in words.rev().flat_map(|bytes| bytes.iter().rev()) {
        let needed = match byte {
            0x80..0xc0 => {
                continuations += 1;
                continue;
            }
            0..0x80 => 0,
            _ => (byte.leading_ones() as usize - 1).min(3),
        };
        return needed.saturating_sub(continuations);
    }
    0
}

impl Model<'_> {
    fn new(spec: &Spec) -> Model<'_> {
        Model {
            spec,
            text: Vec::new(),
            thinking: spec.starts_thinking.then_some(0),
            answer: None,
            end_from: 0,
            dropped: 0,
            pending: VecDeque::new(),
            mask_end: spec.starts_thinking && spec.accounting == Accounting::Harness && spec.n_ignore > 0,
            mask_eos: false,
            max_hit: false,
        }
    }

    fn is_thinking(&self) -> bool {
        self.thinking.is_some() && self.answer.is_none()
    }

    fn count(&self) -> i32 {
        let thinking = &self.text[self.thinking.unwrap()..];
        match self.spec.accounting {
            Accounting::Readme => thinking.iter().filter(|w| w.1 == Kind::Thought).count() as i32 + self.dropped,
            _ => thinking.len() as i32,
        }
    }

    /// Tokens of the end that the text ends with; never all.
    fn begun(&self) -> usize {
        let text = &self.text[self.end_from..];
        let ends_with =
            |n: usize| n <= text.len() && text[text.len() - n..].iter().map(|w| &w.0).eq(&self.spec.end[..n]);
        (0..self.spec.end.len()).rev().find(|&n| ends_with(n)).unwrap()
    }

    fn is_inside_a_character(&self) -> bool {
        let tokens = self.spec.prompt.iter().copied().chain(self.text.iter().map(|w| w.0));
        let tokens: Vec<i32> = tokens.collect();
        bytes_missing(tokens.iter().map(|&t| &self.spec.bytes[t as usize][..])) > 0
    }

    fn ends_with_newline(&self) -> bool {
        let last = self.text.last().map(|w| w.0).or(self.spec.prompt.last().copied());
        last.is_some_and(|t| self.spec.bytes[t as usize].ends_with(b"\n"))
    }

    fn force_end(&mut self) {
        let spec = self.spec;
        let begun = self.begun();
        self.pending.clear();
        if begun > 0 {
            let at = spec.end_string.windows(spec.end.len()).position(|w| w == spec.end).unwrap();
            self.pending.extend(spec.end_string[at + begun..].iter().map(|&t| (t, Kind::Forced)));
        } else {
            let newline = spec.newline.filter(|_| !self.ends_with_newline());
            self.pending.extend(newline.iter().chain(&spec.end_string).map(|&t| (t, Kind::Forced)));
        }
        self.answer = Some(self.text.len() - begun);
        self.mask_end = false;
        self.max_hit = true;
    }

    fn step(&mut self, draw: impl Fn(&[i32]) -> i32) -> Word {
        let spec = self.spec;
        let over = |model: &Self| model.count() - spec.max.unwrap_or(i32::MAX);
        if self.is_thinking() && over(self) >= 0 && (!self.is_inside_a_character() || over(self) >= 4) {
            self.force_end();
        }
        if !self.pending.is_empty() {
            return self.emit_pending();
        }
        let completing = self.is_thinking() && self.begun() + 1 == spec.end.len();
        let completing = completing.then(|| *spec.end.last().unwrap());
        let end_set: Vec<i32> = spec.eos.iter().copied().chain(completing).collect();
        let masked: &[i32] = match (self.mask_end, self.mask_eos) {
            (true, _) => &end_set,
            (_, true) => &spec.eos,
            _ => &[],
        };
        let token = draw(masked);
        (self.mask_end, self.mask_eos) = (false, false);
        if !self.is_thinking() {
            return self.emit(token, Kind::Plain);
        }
        if !end_set.contains(&token) {
            return self.emit(token, Kind::Thought);
        }
        if over(self) >= 0 {
            self.force_end();
            return self.emit_pending();
        }
        // What would stand between the delimiters if this ended the thinking.
        let between = self.count() - if spec.accounting == Accounting::Readme { 0 } else { self.begun() as i32 };
        let last_of_readme = spec.accounting == Accounting::Readme && over(self) == -1;
        if (self.dropped < spec.n_ignore || between < spec.min) && !last_of_readme {
            self.dropped += 1;
            let strings = &spec.ignore_strings;
            let string = strings.get((self.dropped - 1) as usize % strings.len().max(1));
            let Some(string) = string.filter(|s| !s.is_empty() && !spec.mask_on_end) else {
                return self.emit(draw(&end_set), Kind::Thought);
            };
            self.mask_end = true;
            self.pending.extend(string.iter().map(|&t| (t, Kind::Ignore)));
            return self.emit_pending();
        }
        let begun = self.begun();
        self.answer = Some(self.text.len() - begun);
        if Some(token) == completing {
            self.pending.extend(spec.close[spec.end.len()..].iter().map(|&t| (t, Kind::Close)));
            return self.emit(token, Kind::Delimiter);
        }
        self.pending.extend(spec.close[begun..].iter().map(|&t| (t, Kind::Close)));
        self.emit_pending()
    }

    fn emit_pending(&mut self) -> Word {
        let (token, kind) = self.pending.pop_front().unwrap();
        if kind == Kind::Forced && self.pending.is_empty() {
            self.mask_eos = self.spec.accounting == Accounting::Strict;
        }
        self.emit(token, kind)
    }

    fn emit(&mut self, token: i32, mut kind: Kind) -> Word {
        let spec = self.spec;
        let mut text = std::mem::take(&mut self.text);
        text.push((token, kind));
        if self.thinking.is_none() && !spec.start.is_empty() && text.len() >= spec.start.len() {
            let tail = &text[text.len() - spec.start.len()..];
            if tail.iter().map(|w| &w.0).eq(&spec.start) {
                kind = Kind::Delimiter;
                self.thinking = Some(text.len());
                self.end_from = text.len();
                self.mask_end = spec.accounting == Accounting::Harness && spec.n_ignore > 0;
            }
        }
        if kind == Kind::Ignore {
            let since = &text[self.end_from..];
            if since.len() >= spec.end.len() && since[since.len() - spec.end.len()..].iter().map(|w| &w.0).eq(&spec.end)
            {
                self.end_from = text.len();
            }
        }
        self.text = text;
        let flags = match kind {
            Kind::Plain => 0,
            Kind::Thought => TOKEN_REASONING,
            Kind::Ignore => TOKEN_REASONING | TOKEN_INJECTED,
            Kind::Delimiter => TOKEN_DELIMITER,
            Kind::Close | Kind::Forced => TOKEN_DELIMITER | TOKEN_INJECTED,
        } | if self.max_hit { TOKEN_MAX_HIT } else { 0 };
        let until = self.answer.unwrap_or(self.text.len());
        let reasoning_tokens = self.thinking.map_or(0, |from| (until - from) as i32);
        Word { token, flags, reasoning_tokens, ignores_used: self.dropped }
    }
}

// ---- random streams ----

fn string(random: &mut Random, vocab: u32, shortest: u32, longest: u32) -> Vec<i32> {
    let length = shortest + random.below(longest - shortest + 1);
    (0..length).map(|_| random.below(vocab) as i32).collect()
}

impl Spec {
    /// Small enough that everything happens soon, and often at once.
    fn random(random: &mut Random) -> Spec {
        let vocab = 5 + random.below(4);
        let pieces: [&[u8]; 12] = [
            b"a",
            b"b\n",
            b"\n",
            b"\xe2",
            b"\x80",
            b"\xa6\xa6",
            b"\xf0\x9f",
            b"\x98\x80\x80",
            b"\xc3",
            b"x\xf0",
            b"\xc3\xa9",
            b"y",
        ];
        let bytes = (0..vocab).map(|_| pieces[random.below(12) as usize].to_vec()).collect();
        // Few different ids, so that strings overlap with themselves and each other.
        let few = 2 + random.below(vocab - 1);
        let end = string(random, few, 1, 4);
        let with_end =
            |random: &mut Random| [string(random, few, 0, 2), end.clone(), string(random, few, 0, 2)].concat();
        let mut ignore_strings: Vec<_> = (0..random.below(4)).map(|_| string(random, few, 0, 4)).collect();
        ignore_strings.retain(|s| !s.windows(end.len()).any(|w| w == end));
        let max = (random.below(4) > 0).then(|| random.below(14) as i32);
        Spec {
            bytes,
            start: string(random, few, 0, 3),
            close: [end.clone(), string(random, few, 0, 2)].concat(),
            end_string: with_end(random),
            end,
            ignore_strings,
            newline: (random.below(2) == 0).then(|| random.below(vocab) as i32),
            max,
            min: (random.below(12) as i32).min(max.unwrap_or(99)),
            n_ignore: random.below(4) as i32,
            accounting: [Accounting::Strict, Accounting::Harness, Accounting::Readme][random.below(3) as usize],
            mask_on_end: random.below(4) == 0,
            eos: (0..1 + random.below(2)).map(|_| random.below(vocab) as i32).collect(),
            prompt: string(random, vocab, 0, 3),
            starts_thinking: random.below(3) > 0,
        }
    }

    fn traits(&self) -> Vec<u8> {
        self.bytes.iter().map(|b| traits(b)).collect()
    }
}

/// Runs `f` with seeds 0..count, on all cores.
fn in_parallel(count: u64, f: impl Fn(u64) + Sync) {
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let f = &f;
            scope.spawn(move || (worker..count).step_by(workers as usize).for_each(f));
        }
    });
}

#[test]
fn the_machine_does_what_the_model_does() {
    in_parallel(100_000, |seed| {
        let mut random = Random(seed);
        let spec = Spec::random(&mut random);
        let traits = spec.traits();
        for _ in 0..20 {
            let stream = random.next();
            let (mut machine, mut model) = (spec.machine(), Model::new(&spec));
            for at in 0..28 {
                let draw = |masked: &[i32]| draw(spec.bytes.len(), stream.wrapping_add(at << 20), masked);
                let expected = model.step(draw);
                let word = machine_step(&mut machine, &spec, &traits, draw);
                if word != expected {
                    panic!("seed {seed}, {spec:#?} after {:?}: {expected:?} is right, not {word:?}", model.text);
                }
                if word.flags & (TOKEN_INJECTED | TOKEN_REASONING) == 0 && spec.eos.contains(&word.token) {
                    break;
                }
            }
        }
    });
}
