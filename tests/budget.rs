//! Budget forcing: the state machine of kernels/budget.cuh against a model of its contract that is made differently (it keeps
//! the whole history and derives everything from it), on millions of random streams; against the loops of s1 that it replaces;
//! and a test for each bug that other engines had here.

use crate::devices::devices;
use crate::random::Random;
use crate::sampler::{Bench, Row, drawn, fast_device};
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
        let (state, pool) = self.state();
        Machine::new(state, pool)
    }

    /// As the host writes it, and the strings.
    fn state(&self) -> (Budget, Vec<i32>) {
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
        (state, pool)
    }

    /// A sequence with this budget.
    fn row(&self, logits: Vec<f32>, seed: u32) -> Row {
        let mut row = Row::new(logits);
        (row.state.budget, row.pool) = self.state();
        (row.state.temperature, row.state.seed_low) = (1.0, seed);
        (row.state.stop_count, row.state.eos_count) = (self.eos.len() as u32, self.eos.len() as u32);
        row.state.stop_ids[..self.eos.len()].copy_from_slice(&self.eos);
        row
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

/// Texts of tokens: whole characters, parts of them, newlines.
const PIECES: [&[u8]; 12] = [
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

fn string(random: &mut Random, vocab: u32, shortest: u32, longest: u32) -> Vec<i32> {
    let length = shortest + random.below(longest - shortest + 1);
    (0..length).map(|_| random.below(vocab) as i32).collect()
}

impl Spec {
    /// Small enough that everything happens soon, and often at once.
    fn random(random: &mut Random) -> Spec {
        let vocab = 5 + random.below(4);
        let bytes = (0..vocab).map(|_| PIECES[random.below(12) as usize].to_vec()).collect();
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

/// Rows with budgets of their own, through the sampler kernel: what the model does with the draws of the reference.
fn through_the_sampler(device: &ponder::device::Device, random: &mut Random, rows: usize, steps: usize, cluster: u32) {
    let vocab = 8;
    let bytes: Vec<Vec<u8>> = (0..vocab).map(|_| PIECES[random.below(12) as usize].to_vec()).collect();
    let specs: Vec<Spec> = (0..rows).map(|_| Spec { bytes: bytes.clone(), ..Spec::random(random) }).collect();
    let traits = specs[0].traits();
    let logits = |random: &mut Random| (0..vocab).map(|_| random.below(64) as f32 / 64.0).collect();
    let rows: Vec<Row> = specs.iter().map(|spec| spec.row(logits(random), random.next() as u32)).collect();
    let bench = Bench::new(device, &traits, cluster, &rows.iter().cloned().map(Some).collect::<Vec<_>>());
    let mut models: Vec<Option<Model>> = specs.iter().map(|spec| Some(Model::new(spec))).collect();
    for at in 0..steps {
        for (i, record) in bench.step().iter().enumerate() {
            let Some(model) = &mut models[i] else {
                assert_eq!(record.flags, 0, "it has ended");
                continue;
            };
            let mut row = rows[i].clone();
            row.state.length += at as i32;
            let expected = model.step(|masked| drawn(&row, &traits, masked));
            let TokenRecord { token, ignores_used, reasoning_tokens, .. } = *record;
            let word = Word { token, flags: record.flags & !TOKEN_VALID, reasoning_tokens, ignores_used };
            assert_eq!(word, expected, "row {i}, step {at}: {:?}", specs[i]);
            let ends = word.flags & TOKEN_INJECTED == 0 && specs[i].eos.contains(&token);
            assert_eq!(record.finish, if ends { FINISH_STOP } else { FINISH_NONE });
            if ends {
                models[i] = None;
            }
        }
    }
}

#[test]
fn the_sampler_does_what_the_model_does() {
    through_the_sampler(&devices().pop().unwrap(), &mut Random(1), 2, 12, 2);
    for seed in 0..9 {
        through_the_sampler(&fast_device(), &mut Random(seed), 16, 28, 1 << (seed % 3));
    }
}

#[test]
fn forced_tokens_report_the_probability_that_the_model_gave_them() {
    let spec = Spec { max: Some(1), ..Spec::plain() };
    let logits: Vec<f32> = (0..spec.bytes.len()).map(|id| id as f32 / 4.0).collect();
    let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    let mut row = spec.row(logits.clone(), 1);
    row.state.logprobs = 0;
    let bench = Bench::new(&fast_device(), &spec.traits(), 1, &[Some(row)]);
    let records: Vec<TokenRecord> = (0..5).map(|_| bench.step()[0]).collect();
    assert_eq!(records[1..4].iter().map(|r| r.token).collect::<Vec<_>>(), spec.end_string);
    for record in &records[..4] {
        let truth = f64::from(logits[record.token as usize]) - total.ln();
        assert!((f64::from(record.logprob) - truth).abs() < 1e-5, "{}, not {truth}", record.logprob);
    }
    let truth = f64::from(logits[records[4].token as usize]) - (total - f64::from(logits[EOS as usize]).exp()).ln();
    assert!((f64::from(records[4].logprob) - truth).abs() < 1e-5, "EOS is masked");
}

// ---- the bugs of others (each named after what went wrong) ----

const A: i32 = 0;
const B: i32 = 1;
const NEWLINE: i32 = 2;
const START: i32 = 3;
const END: i32 = 4;
const ANSWER: i32 = 5;
const FINAL: i32 = 6;
const WAIT: i32 = 7;
const EOS: i32 = 8;
/// Drawn where the script's token is masked.
const OTHER: i32 = 9;
/// The first byte of a character of three, and the others.
const LEAD: i32 = 10;
const CONTINUATION: i32 = 11;

impl Spec {
    /// A model whose thinking ends with one token, after which the answer begins with another.
    fn plain() -> Spec {
        let mut bytes: Vec<Vec<u8>> = b"ab\n(){}w.o".iter().map(|&b| vec![b]).collect();
        bytes.extend([b"\xe2".to_vec(), b"\x80".to_vec()]);
        Spec {
            bytes,
            start: vec![START],
            end: vec![END],
            close: vec![END, ANSWER],
            end_string: vec![END, ANSWER, FINAL],
            ignore_strings: vec![vec![WAIT]],
            newline: None,
            max: None,
            min: 0,
            n_ignore: 0,
            accounting: Accounting::Strict,
            mask_on_end: false,
            eos: vec![EOS],
            prompt: vec![A],
            starts_thinking: true,
        }
    }

    /// What is emitted when these tokens are drawn, one after the other.
    fn run(&self, script: &[i32]) -> Vec<Word> {
        let traits = self.traits();
        let mut machine = self.machine();
        let (mut drawn, mut words) = (0, Vec::new());
        while drawn < script.len() {
            let used = std::cell::Cell::new(false);
            words.push(machine_step(&mut machine, self, &traits, |masked| {
                used.set(true);
                if masked.contains(&script[drawn]) { OTHER } else { script[drawn] }
            }));
            drawn += usize::from(used.get());
        }
        // And what is due without a draw.
        while machine.state().phase == PHASE_INJECTING {
            words.push(machine_step(&mut machine, self, &traits, |_| unreachable!("injecting")));
        }
        words
    }

    fn tokens(&self, script: &[i32]) -> Vec<i32> {
        self.run(script).iter().map(|w| w.token).collect()
    }
}

#[test]
fn bug_1_stale_history_doubles_the_end() {
    // The model ends its thinking in the last step that the maximum leaves: nothing is forced after it.
    let spec = Spec { max: Some(3), ..Spec::plain() };
    assert_eq!(spec.tokens(&[A, B, END, A, A, A]), [A, B, END, ANSWER, A, A, A]);
    // It does not get there: the end is forced once.
    assert_eq!(spec.tokens(&[A, B, A, B, B, B]), [A, B, A, END, ANSWER, FINAL, B, B, B]);
}

#[test]
fn bug_3_an_end_that_has_begun_is_doubled() {
    let end = vec![END, B, END];
    let spec = Spec {
        end: end.clone(),
        close: [end.clone(), vec![ANSWER]].concat(),
        end_string: [vec![NEWLINE], end, vec![ANSWER, FINAL]].concat(),
        newline: Some(NEWLINE),
        max: Some(4),
        ..Spec::plain()
    };
    assert_eq!(spec.tokens(&[A, A, END, B, A]), [A, A, END, B, END, ANSWER, FINAL, A], "two of its ids are there");
    assert_eq!(spec.tokens(&[A, A, A, END, A]), [A, A, A, END, B, END, ANSWER, FINAL, A], "one of its ids is there");
    assert_eq!(spec.tokens(&[A, END, B, B, A]), [A, END, B, B, NEWLINE, NEWLINE, END, B, END, ANSWER, FINAL, A]);
    // It overlaps with itself: E B E B E is an end after three, and E E B E one after four.
    assert_eq!(spec.tokens(&[END, B, END, A]), [END, B, END, ANSWER, A]);
    assert_eq!(spec.tokens(&[END, END, B, END, A]), [END, END, B, END, ANSWER, A]);
    assert_eq!(spec.run(&[END, END, B, END])[3].reasoning_tokens, 1);
    assert_eq!(spec.run(&[A, A, END, B, A]).last().unwrap().reasoning_tokens, 2);
}

#[test]
fn bug_3_the_phrase_after_a_forced_end_is_dropped() {
    let spec = Spec { max: Some(1), ..Spec::plain() };
    let words = spec.run(&[A, B]);
    assert_eq!(words.iter().map(|w| w.token).collect::<Vec<_>>(), [A, END, ANSWER, FINAL, B]);
    let forced = TOKEN_DELIMITER | TOKEN_INJECTED | TOKEN_MAX_HIT;
    let flags = [TOKEN_REASONING, forced, forced, forced, TOKEN_MAX_HIT];
    assert_eq!(words.iter().map(|w| w.flags).collect::<Vec<_>>(), flags);
}

#[test]
fn bug_4_a_second_block_of_thinking_gets_a_second_budget() {
    let spec = Spec { max: Some(2), n_ignore: 1, ..Spec::plain() };
    let natural = spec.run(&[A, END, START, A, A, A, A, END, A]);
    assert_eq!(natural.iter().map(|w| w.token).collect::<Vec<_>>()[..5], [A, WAIT, END, ANSWER, FINAL]);
    let spec = Spec { max: Some(2), ..Spec::plain() };
    for script in [[A, END, START, A, A, A, END, B], [A, A, START, A, A, A, END, B]] {
        let words = spec.run(&script);
        assert_eq!(words.iter().map(|w| w.token).collect::<Vec<_>>()[words.len() - 6..], script[2..], "{script:?}");
        assert!(words[words.len() - 6..].iter().all(|w| w.flags & !TOKEN_MAX_HIT == 0));
        assert_eq!(words.last().unwrap().reasoning_tokens, words[1].reasoning_tokens);
    }
}

#[test]
fn bug_6_a_character_is_cut_in_two() {
    let spec = Spec { max: Some(2), ..Spec::plain() };
    assert_eq!(
        spec.tokens(&[A, LEAD, CONTINUATION, CONTINUATION, A]),
        [A, LEAD, CONTINUATION, CONTINUATION, END, ANSWER, FINAL, A]
    );
    // It never ends: four tokens of patience.
    let tokens = spec.tokens(&[A, LEAD, LEAD, LEAD, LEAD, LEAD, LEAD]);
    assert_eq!(tokens[..8], [A, LEAD, LEAD, LEAD, LEAD, LEAD, END, ANSWER]);
    // An end that is drawn meanwhile is the forced one.
    assert_eq!(spec.tokens(&[A, LEAD, END, A]), [A, LEAD, END, ANSWER, FINAL, A]);
}

#[test]
fn bug_7_delimiters_leak_into_the_text() {
    let spec = Spec { starts_thinking: false, n_ignore: 1, ..Spec::plain() };
    let words = spec.run(&[B, START, A, END, A, END, B]);
    assert_eq!(words.iter().map(|w| w.token).collect::<Vec<_>>(), [B, START, A, WAIT, A, END, ANSWER, B]);
    let thought = TOKEN_REASONING;
    let flags = [
        0,
        TOKEN_DELIMITER,
        thought,
        thought | TOKEN_INJECTED,
        thought,
        TOKEN_DELIMITER,
        TOKEN_DELIMITER | TOKEN_INJECTED,
        0,
    ];
    assert_eq!(words.iter().map(|w| w.flags).collect::<Vec<_>>(), flags);
}

#[test]
fn bug_10_the_answer_is_empty() {
    let spec = Spec { max: Some(2), ..Spec::plain() };
    assert_eq!(spec.tokens(&[A, A, EOS, EOS]), [A, A, END, ANSWER, FINAL, OTHER, EOS], "EOS right after a forced end");
    assert_eq!(spec.tokens(&[A, EOS, B]), [A, END, ANSWER, B], "EOS inside the thinking");
    let spec = Spec { n_ignore: 1, ..spec };
    assert_eq!(spec.tokens(&[EOS, A, B]), [WAIT, A, END, ANSWER, FINAL, B], "EOS while ends are ignored");
    // Where s1's loops let it through, so do their accountings.
    for accounting in [Accounting::Harness, Accounting::Readme] {
        let spec = Spec { accounting, max: Some(2), ..Spec::plain() };
        assert_eq!(spec.tokens(&[A, A, EOS]), [A, A, END, ANSWER, FINAL, EOS]);
    }
}

#[test]
fn bug_14_a_budget_of_nothing_lets_a_token_through() {
    let spec = Spec { max: Some(0), newline: Some(NEWLINE), ..Spec::plain() };
    assert_eq!(spec.tokens(&[A]), [NEWLINE, END, ANSWER, FINAL, A]);
    assert!(spec.run(&[A]).iter().all(|w| w.reasoning_tokens == 0));
    let spec = Spec { prompt: vec![NEWLINE], ..spec };
    assert_eq!(spec.tokens(&[A]), [END, ANSWER, FINAL, A], "the prompt's newline is the forced one");
    let spec = Spec { starts_thinking: false, ..spec };
    assert_eq!(spec.tokens(&[START, A]), [START, NEWLINE, END, ANSWER, FINAL, A]);
}

#[test]
fn bug_15_there_is_no_minimum() {
    let spec = Spec { min: 4, ..Spec::plain() };
    assert_eq!(spec.tokens(&[A, END, B, B, END, A]), [A, WAIT, B, B, END, ANSWER, A]);
    let words = spec.run(&[END, END, B, END, A, END]);
    assert_eq!(words.iter().map(|w| w.token).collect::<Vec<_>>(), [WAIT, OTHER, B, WAIT, A, END, ANSWER]);
    assert_eq!((words[6].reasoning_tokens, words[6].ignores_used), (5, 2));
    // The beginning of an end does not count.
    let spec = Spec { end: vec![END, ANSWER], close: vec![END, ANSWER], end_string: vec![END, ANSWER], min: 2, ..spec };
    assert_eq!(spec.tokens(&[A, END, ANSWER, B, END, ANSWER]), [A, END, WAIT, B, END, ANSWER]);
    // Exactly that many.
    for draws in [[END; 9], [A; 9], [EOS; 9]] {
        let spec = Spec { min: 5, max: Some(5), ..Spec::plain() };
        assert_eq!(spec.run(&draws)[8].reasoning_tokens, 5, "{draws:?}");
    }
}

#[test]
fn an_ignored_end_is_replaced_in_turn_or_masked() {
    let spec = Spec { n_ignore: 3, ignore_strings: vec![vec![WAIT, A], vec![B], vec![]], ..Spec::plain() };
    assert_eq!(spec.tokens(&[END, A, END, A, END, END]), [WAIT, A, A, B, A, OTHER, END, ANSWER]);
    assert_eq!(spec.tokens(&[END; 6]), [WAIT, A, OTHER, B, OTHER, OTHER, END, ANSWER]);
    let spec = Spec { mask_on_end: true, ..spec };
    assert_eq!(spec.tokens(&[A, END, END, END, END]), [A, OTHER, OTHER, OTHER, END, ANSWER]);
}

#[test]
fn the_maximum_cuts_an_ignore_string() {
    let spec = Spec { n_ignore: 9, max: Some(3), ignore_strings: vec![vec![WAIT, A, B]], ..Spec::plain() };
    assert_eq!(spec.tokens(&[A, END, B]), [A, WAIT, A, END, ANSWER, FINAL, B]);
    // s1's README does not count it.
    let spec = Spec { accounting: Accounting::Readme, ..spec };
    assert_eq!(spec.tokens(&[A, END, A, B]), [A, WAIT, A, B, A, END, ANSWER, FINAL, B]);
    assert_eq!(spec.tokens(&[A, A, END, B]), [A, A, END, ANSWER, B], "the end that spends the last token");
}

// ---- the loops of s1 ----

/// A model: the next token depends on all before it, and nothing else.
#[derive(Clone)]
struct PseudoModel {
    history: u64,
}

impl PseudoModel {
    fn new(prompt: &[i32]) -> PseudoModel {
        let mut model = PseudoModel { history: 0 };
        model.extend(prompt);
        model
    }

    fn extend(&mut self, tokens: &[i32]) {
        for &token in tokens {
            self.history = Random(self.history).next() ^ token as u64;
        }
    }

    fn next(&self, vocab: usize, masked: &[i32]) -> i32 {
        draw(vocab, self.history, masked)
    }

    /// One call of the loop: at most `max` tokens, of which the last may be one of `stop`; none of these before `min` tokens.
    /// Also says whether one of these ended it.
    fn generate(&self, vocab: usize, max: usize, min: usize, stop: &[i32]) -> (Vec<i32>, bool) {
        let (mut model, mut tokens) = (self.clone(), Vec::new());
        while tokens.len() < max {
            let token = model.next(vocab, if tokens.len() < min { stop } else { &[] });
            tokens.push(token);
            model.extend(&[token]);
            if stop.contains(&token) {
                return (tokens, true);
            }
        }
        (tokens, false)
    }
}

const VOCAB: usize = 10;
/// Tokens of an answer that are compared.
const LONGEST: usize = 40;

impl Spec {
    fn s1(random: &mut Random, accounting: Accounting) -> Spec {
        let strings = if random.below(4) > 0 { vec![string(random, 4, 1, 3)] } else { Vec::new() };
        Spec {
            newline: Some(NEWLINE),
            ignore_strings: strings,
            max: Some(1 + random.below(30) as i32),
            n_ignore: random.below(5) as i32,
            accounting,
            prompt: [string(random, VOCAB as u32, 1, 3), vec![random.next() as i32 & 0xffff]].concat(),
            ..Spec::plain()
        }
    }

    /// What the machine makes of the pseudo-model, up to the answer's EOS or so many tokens.
    fn engine(&self, tokens: usize) -> Vec<i32> {
        // The prompt's last token only stirs the pseudo-model.
        let spec = Spec { prompt: vec![A], ..self.clone() };
        let traits = spec.traits();
        let (mut machine, mut model) = (spec.machine(), PseudoModel::new(&self.prompt));
        let mut out = Vec::new();
        while out.len() < tokens && out.last() != Some(&EOS) {
            let word = machine_step(&mut machine, &spec, &traits, |masked| model.next(VOCAB, masked));
            out.push(word.token);
            model.extend(&[word.token]);
        }
        out
    }

    fn after(&self, text: &[i32]) -> PseudoModel {
        let mut model = PseudoModel::new(&self.prompt);
        model.extend(text);
        model
    }
}

/// The loop of s1's evaluation harness (s1-notes 1.2), a maximum per round. Gives the thinking before the cut to the maximum
/// and without the token that stopped it, whether that was one, and how many ends were ignored.
fn harness_rounds(spec: &Spec) -> (Vec<i32>, bool, i32) {
    let max = spec.max.unwrap() as usize;
    let mut text = Vec::new();
    for round in 0.. {
        let min = usize::from(spec.n_ignore > 0);
        let (mut tokens, stopped) = spec.after(&text).generate(VOCAB, max, min, &[END, EOS]);
        if stopped {
            tokens.pop();
        }
        text.extend(tokens);
        if !stopped || round == spec.n_ignore {
            return (text, stopped, round);
        }
        text.extend(spec.ignore_strings.concat());
    }
    unreachable!()
}

/// One exception: when an end was ignored and the rounds come to the maximum or more in all, the harness cuts the text to the
/// maximum, but picks what it appends (the end string or the plain delimiter, and the newline before it) by how its last round
/// ended and by text that it has cut off. The engine has not seen that text: it appends the end string, and the newline if the
/// text that was kept does not end with one. Compared then: the thinking, that end string, and the answer to it.
#[test]
fn s1_harness_parity() {
    in_parallel(100_000, |seed| {
        let spec = Spec::s1(&mut Random(seed), Accounting::Harness);
        let max = spec.max.unwrap() as usize;
        let (mut text, stopped, ignored) = harness_rounds(&spec);
        let is_exception = ignored > 0 && text.len() >= max;
        text.truncate(max);
        if stopped && !is_exception {
            text.extend(&spec.close);
        } else {
            if text.last() != Some(&NEWLINE) {
                text.push(NEWLINE);
            }
            text.extend(&spec.end_string);
        }
        let (answer, _) = spec.after(&text).generate(VOCAB, LONGEST, 0, &[EOS]);
        text.extend(answer);
        assert_eq!(spec.engine(text.len()), text, "seed {seed}: {spec:?}");
    });
}

/// s1's README (s1-notes 1.3), a maximum over all rounds. It forces no end; neither does the machine without an end string, and
/// with `close` no more than the end. The README's last call draws the dropped end again: where that is EOS the README has no
/// answer, and the engine closes the thinking in its place. Where the rounds have spent everything the README would ask for 0 tokens,
/// which no server allows; here its loop ends.
#[test]
fn s1_readme_parity() {
    in_parallel(100_000, |seed| {
        let spec = Spec::s1(&mut Random(seed), Accounting::Readme);
        let spec = Spec { close: spec.end.clone(), end_string: Vec::new(), newline: None, ..spec };
        let mut text = Vec::new();
        let mut left = spec.max.unwrap() as usize;
        let (mut tokens, mut stopped) = spec.after(&text).generate(VOCAB, left, 0, &[END, EOS]);
        for _ in 0..spec.n_ignore {
            left -= tokens.len();
            if left == 0 {
                break;
            }
            tokens.pop();
            text.extend(tokens);
            text.extend(spec.ignore_strings.concat());
            (tokens, stopped) = spec.after(&text).generate(VOCAB, left, 1, &[END, EOS]);
        }
        if stopped {
            tokens.pop();
        }
        text.extend(tokens);
        let (answer, _) = spec.after(&text).generate(VOCAB, LONGEST, 0, &[EOS]);
        if stopped && answer == [EOS] {
            text.extend(&spec.close);
        } else {
            text.extend(answer);
        }
        assert_eq!(spec.engine(text.len()), text, "seed {seed}: {spec:?}");
    });
}
