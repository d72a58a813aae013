//! Guided answers: every draw waits for its mask, thinking is free, and nobody else waits, on the device under test and under
//! load on a simulated GPU.

use crate::modulo;
use crate::random::Random;
use ponder::Error;
use ponder::batch::TokenEvent;
use ponder::budget::BudgetRequest;
use ponder::chat::Message;
use ponder::device::Device;
use ponder::engine::{Engine, RequestId};
use ponder::executor::{DecodeLoop, ExecutorOptions};
use ponder::frontend::{Frontend, Request};
use ponder::guide::{Grammar, Guide, Next};
use ponder::model::Weights;
use ponder::sampling::SamplingRequest;
use ponder::sequence::{Answer, FinishReason};
use ponder::thinking::ThinkingChoice;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

/// These tokens, one after the other.
struct Fixed {
    tokens: Vec<u32>,
    come: usize,
}

impl Guide for Fixed {
    fn next(&mut self, tokens: &[u32], allowed: &mut [u32]) -> ponder::Result<Next> {
        for &token in tokens {
            assert_eq!(token, self.tokens[self.come], "a token that was not allowed");
            self.come += 1;
        }
        let Some(&token) = self.tokens.get(self.come) else { return Ok(Next::End) };
        allow(allowed, token);
        Ok(Next::Token)
    }
}

fn allow(allowed: &mut [u32], token: u32) {
    allowed[token as usize / 32] |= 1 << (token % 32);
}

fn fixed(tokens: Vec<u32>) -> Grammar {
    Grammar::new(move || Box::new(Fixed { tokens: tokens.clone(), come: 0 }))
}

/// A third of all tokens, another third after each; EOS now and then; so many at the most.
#[derive(Clone)]
struct Thirds {
    history: u64,
    left: u32,
    vocab: u32,
    eos: u32,
}

impl Guide for Thirds {
    fn next(&mut self, tokens: &[u32], allowed: &mut [u32]) -> ponder::Result<Next> {
        for &token in tokens {
            self.history = Random(self.history ^ u64::from(token)).next();
            self.left -= 1;
        }
        if self.left == 0 {
            return Ok(Next::End);
        }
        let third = (self.history >> 7) % 3;
        let may_end = self.history.is_multiple_of(16);
        for token in (0..self.vocab).filter(|&t| u64::from(t) % 3 == third || t == self.eos && may_end) {
            allow(allowed, token);
        }
        Ok(Next::Token)
    }
}

/// Waits before every answer until it is told to go on.
struct Gated {
    gate: Arc<Mutex<Receiver<()>>>,
    inner: Fixed,
}

impl Guide for Gated {
    fn next(&mut self, tokens: &[u32], allowed: &mut [u32]) -> ponder::Result<Next> {
        self.gate.lock().unwrap().recv().expect("the gate is there");
        self.inner.next(tokens, allowed)
    }
}

fn gated(tokens: Vec<u32>) -> (Sender<()>, Grammar) {
    let (open, gate) = channel();
    let gate = Arc::new(Mutex::new(gate));
    let inner = move || Fixed { tokens: tokens.clone(), come: 0 };
    (open, Grammar::new(move || Box::new(Gated { gate: gate.clone(), inner: inner() })))
}

fn simulated(options: &ExecutorOptions) -> Engine {
    simulated_with(&ThinkingChoice::Auto, options)
}

fn simulated_with(thinking: &ThinkingChoice, options: &ExecutorOptions) -> Engine {
    let frontend = Frontend::open(Path::new(modulo::FOLDER), thinking).unwrap();
    let device = Device::open("sim:h100,instant".parse().unwrap()).unwrap();
    Engine::new(frontend, Weights::Dummy, &device, options, &mut |_, _| {}).unwrap()
}

fn encode(engine: &Engine, text: &str) -> Vec<u32> {
    engine.frontend.tokenizer.encode(text).unwrap()
}

fn greedy() -> SamplingRequest {
    SamplingRequest { temperature: Some(0.0), ..Default::default() }
}

/// What stands outside of thinking and its delimiters.
fn answer_of(answer: &Answer) -> Vec<u32> {
    let plain = |t: &&TokenEvent| !t.reasoning && !t.delimiter && !t.injected;
    answer.tokens.iter().filter(plain).map(|t| t.token).collect()
}

/// With and without thinking before it, beside others, however decode steps follow one another.
#[test]
fn a_guide_has_its_way() {
    let loops = [DecodeLoop::Step, DecodeLoop::Multi, DecodeLoop::Device];
    for (decode_loop, graphs) in loops.map(|l| (l, true)).into_iter().chain([(DecodeLoop::Step, false)]) {
        let options = ExecutorOptions { decode_loop, graphs, ..Default::default() };
        let mut engine = modulo::engine_with(&ThinkingChoice::Auto, &options);
        let eos = engine.frontend.config.eos_token_ids[0];
        let words = encode(&engine, "It is 42.");
        let question = Message::new("user", modulo::problem(1).question());
        let thinking = Request {
            prompt: engine.frontend.encode_chat(&[question]).unwrap(),
            max_tokens: Some(60),
            sampling: greedy(),
            budget: BudgetRequest { max_thinking_tokens: Some(12), n_ignore: 1, ..Default::default() },
            ..Default::default()
        };
        let plain = Request {
            prompt: encode(&engine, "try 1: 2*1="),
            max_tokens: Some(14),
            sampling: greedy(),
            ..Default::default()
        };
        let guided = |request: &Request| Request { grammar: Some(fixed(words.clone())), ..request.clone() };
        let requests = [guided(&plain), guided(&thinking), thinking, plain];
        let mut answers = modulo::answer_all(&mut engine, &requests);
        let expected: Vec<u32> = words.iter().copied().chain([eos]).collect();
        for answer in &answers[..2] {
            assert_eq!((answer_of(answer), answer.finish), (expected.clone(), Some(FinishReason::Stop)));
            assert_eq!(answer.text().matches("It is 42.").count(), 1);
        }
        // Thinking is what it is without a guide, and so are the others.
        let thought = |answer: &Answer| answer.tokens.iter().map(|t| t.token).take(12).collect::<Vec<_>>();
        assert!(answers[1].tokens.iter().filter(|t| t.reasoning).count() >= 12);
        assert_eq!(thought(&answers[1]), thought(&answers[2]));
        let stats = engine.stats();
        assert_eq!((stats.waiting, stats.running, stats.pages_used), (0, 0, 0), "{stats:?}");
        for (request, together) in requests.iter().zip(answers.drain(..)).skip(2) {
            let alone = modulo::answer_all(&mut engine, std::slice::from_ref(request)).remove(0);
            assert_eq!(modulo::ids(&alone), modulo::ids(&together), "{decode_loop:?}");
        }
    }
}

/// Its neighbours take exactly the steps that they take without it.
#[test]
fn who_waits_for_a_guide_holds_up_nobody() {
    let request = |engine: &Engine, seed| Request {
        prompt: encode(engine, &format!("Question {seed}")),
        max_tokens: Some(100),
        sampling: SamplingRequest { seed: Some(seed), ignore_eos: true, ..Default::default() },
        ..Default::default()
    };
    let steps = |with_guide: bool| {
        let mut engine = simulated(&ExecutorOptions::default());
        let words = encode(&engine, "It is 42.");
        let (open, grammar) = gated(words.clone());
        let guided = with_guide.then(|| {
            let sampling = SamplingRequest { seed: Some(99), ..Default::default() };
            let request = Request { grammar: Some(grammar), sampling, ..request(&engine, 99) };
            engine.submit(&request).unwrap()
        });
        let mut others: Vec<RequestId> = (0..16).map(|i| engine.submit(&request(&engine, i)).unwrap()).collect();
        let mut steps = 0;
        while !others.is_empty() {
            let updates = engine.step().unwrap();
            steps += u32::from(!updates.is_empty());
            for update in updates {
                assert_ne!(Some(update.request), guided, "the gate is closed");
                others.retain(|&id| id != update.request || update.finish.is_none());
            }
        }
        if guided.is_some() {
            assert_eq!((engine.stats().running, engine.is_idle()), (1, false));
            // For every token and EOS.
            (0..=words.len()).for_each(|_| open.send(()).unwrap());
            let mut answer = Answer::default();
            while !engine.is_idle() {
                for update in engine.step().unwrap() {
                    answer.extend(update.token, update.text, update.finish);
                }
            }
            assert_eq!(answer_of(&answer)[..words.len()], words);
        }
        steps
    };
    assert_eq!(steps(true), steps(false));
}

/// Everybody as if alone: budgets, preemption and cancellation while guides are asked.
#[test]
fn guided_answers_under_pressure() {
    let mut quiet = simulated(&ExecutorOptions::default());
    let options = ExecutorOptions { max_slots: 33, pages: Some(30), max_context: Some(1024), ..Default::default() };
    let mut busy = simulated(&options);
    let eos_ids = busy.frontend.config.eos_token_ids.clone();
    let (vocab, eos) = (busy.frontend.tokenizer.real_tokens() as u32, eos_ids[0]);
    let start = busy.frontend.delimiters.as_ref().unwrap().start.clone();
    let mut random = Random(5);
    let mut requests: BTreeMap<RequestId, (Request, Thirds, Answer)> = BTreeMap::new();
    let mut cancelled = 0;
    while requests.len() < 300 || !busy.is_idle() {
        while requests.len() < 300 && busy.stats().waiting < 10 {
            let guide = Thirds { history: random.next(), left: 1 + random.below(300), vocab, eos };
            let guided = random.below(2) == 0;
            let mut prompt: Vec<u32> = (0..1 + random.below(60)).map(|_| 3 + random.below(vocab - 3)).collect();
            prompt.extend(start.iter().filter(|_| requests.len().is_multiple_of(2)));
            let max = 1 + random.below(400);
            let request = Request {
                prompt,
                max_tokens: Some(1 + random.below(700)),
                sampling: SamplingRequest { seed: Some(random.next()), ignore_eos: !guided, ..Default::default() },
                budget: BudgetRequest {
                    max_thinking_tokens: Some(max),
                    n_ignore: random.below(3),
                    ..Default::default()
                },
                grammar: guided.then(|| {
                    let guide = guide.clone();
                    Grammar::new(move || Box::new(guide.clone()))
                }),
                ..Default::default()
            };
            let id = busy.submit(&request).unwrap();
            requests.insert(id, (request, guide, Answer::default()));
        }
        for update in busy.step().unwrap() {
            let answer = &mut requests.get_mut(&update.request).unwrap().2;
            assert_eq!(answer.finish, None, "nothing follows the end");
            answer.extend(update.token, update.text, update.finish);
        }
        if random.below(100) == 0 {
            let id = *requests.keys().nth(random.below(requests.len() as u32) as usize).unwrap();
            if let Some(update) = busy.cancel(id) {
                requests.get_mut(&id).unwrap().2.extend(update.token, update.text, update.finish);
                cancelled += 1;
            }
        }
    }
    let stats = busy.stats();
    assert_eq!((stats.waiting, stats.running, stats.pages_used), (0, 0, 0), "{stats:?}");
    assert!(cancelled > 5 && stats.counters.preemptions > 3, "{cancelled} cancelled, {stats:?}");
    let (mut draws, mut thinking) = (0, 0);
    for (request, guide, answer) in requests.values() {
        let expected = modulo::answer_all(&mut quiet, std::slice::from_ref(request)).remove(0);
        let whole = answer.finish != Some(FinishReason::Cancelled);
        assert!(modulo::ids(&expected).starts_with(&modulo::ids(answer)), "{request:?}");
        assert!(!whole || (answer.finish, answer.text()) == (expected.finish, expected.text()), "{request:?}");
        if request.grammar.is_none() {
            continue;
        }
        let mut guide = guide.clone();
        let mut before = Vec::new();
        for token in answer_of(answer) {
            let mut allowed = vec![0; (vocab as usize).div_ceil(32)];
            let next = guide.next(&before, &mut allowed).unwrap();
            let is_allowed = allowed[token as usize / 32] >> (token % 32) & 1 == 1;
            assert!(if next == Next::End { eos_ids.contains(&token) } else { is_allowed }, "{request:?}");
            before = vec![token];
            draws += 1;
        }
        thinking += u32::from(answer.tokens.iter().any(|t| t.reasoning));
    }
    assert!(draws > 1000 && thinking > 50, "{draws} draws, {thinking} have thought");
}

/// The model may open its thinking by itself, although the guide knows nothing of it.
#[test]
fn thinking_may_be_opened() {
    let thinking = ThinkingChoice::Explicit { start: "<|im_start|>think".into(), end: "<|im_start|>answer".into() };
    let mut engine = simulated_with(&thinking, &ExecutorOptions::default());
    let start = engine.frontend.delimiters.as_ref().unwrap().start.clone();
    assert!(start.len() > 1);
    let words = encode(&engine, "It is 42.");
    let request = |seed| Request {
        prompt: vec![300; 5],
        sampling: SamplingRequest { seed: Some(seed), ..Default::default() },
        budget: BudgetRequest { max_thinking_tokens: Some(20), ..Default::default() },
        grammar: Some(fixed(words.clone())),
        ..Default::default()
    };
    let requests: Vec<Request> = (0..40).map(request).collect();
    let answers = modulo::answer_all(&mut engine, &requests);
    let opened = |answer: &&Answer| modulo::ids(answer).starts_with(&start);
    let count = answers.iter().filter(opened).count();
    assert!(count > 0 && count < 40, "{count} have opened it");
    for answer in &answers {
        assert!(answer_of(answer).windows(words.len()).any(|w| w == words), "{:?}", answer.text());
        assert_eq!(answer.finish, Some(FinishReason::Stop));
    }
}

struct Broken(bool);

impl Guide for Broken {
    fn next(&mut self, _: &[u32], allowed: &mut [u32]) -> ponder::Result<Next> {
        allow(allowed, 300);
        assert!(!self.0, "this guide panics, as it should");
        Err(Error::request("grammar", "broken"))
    }
}

#[test]
fn a_guide_that_fails_ends_its_own_answer() {
    let mut engine = simulated(&ExecutorOptions::default());
    let request = |grammar: Option<Grammar>| Request {
        prompt: vec![300; 5],
        max_tokens: Some(20),
        sampling: SamplingRequest { ignore_eos: grammar.is_none(), ..Default::default() },
        grammar,
        ..Default::default()
    };
    let ids = [Some(true), Some(false), None].map(|panics| {
        let grammar = panics.map(|panics| Grammar::new(move || Box::new(Broken(panics))));
        engine.submit(&request(grammar)).unwrap()
    });
    let mut finish = BTreeMap::new();
    while !engine.is_idle() {
        for update in engine.step().unwrap() {
            finish.extend(update.finish.map(|f| (update.request, f)));
        }
    }
    assert_eq!(ids.map(|id| finish[&id]), [FinishReason::Error, FinishReason::Error, FinishReason::Length]);
}

/// What a grammar decides cannot be asked for beside it.
#[test]
fn contradictions_are_refused() {
    let mut engine = simulated(&ExecutorOptions::default());
    let parameters = [
        ("allowed_ids", SamplingRequest { allowed_ids: Some(vec![300]), ..Default::default() }),
        ("ignore_eos", SamplingRequest { ignore_eos: true, ..Default::default() }),
        ("min_tokens", SamplingRequest { min_tokens: 1, ..Default::default() }),
    ];
    for (name, sampling) in parameters {
        let request = Request { prompt: vec![300], sampling, grammar: Some(fixed(vec![300])), ..Default::default() };
        assert!(matches!(engine.submit(&request), Err(Error::Request { parameter, .. }) if parameter == name));
    }
}
