//! The tiny thinking model (models/modulo) on the device under test, its problems, and helpers to ask it many things at once.

use ponder::checkpoint::Checkpoint;
use ponder::device::{Device, DeviceChoice};
use ponder::engine::Engine;
use ponder::executor::ExecutorOptions;
use ponder::frontend::{Frontend, Request};
use ponder::sequence::{Answer, FinishReason};
use ponder::thinking::ThinkingChoice;
use std::collections::BTreeMap;
use std::path::Path;

pub const FOLDER: &str = "models/modulo";

pub fn device() -> Device {
    let choice = match std::env::var("TEST_DEVICE").as_deref() {
        Ok("cuda") => DeviceChoice::Cuda(0),
        _ => DeviceChoice::Host,
    };
    Device::open(choice).unwrap()
}

/// An engine that serves 16 at a time.
pub fn engine(thinking: &ThinkingChoice) -> Engine {
    engine_with(thinking, &ExecutorOptions::default())
}

pub fn engine_with(thinking: &ThinkingChoice, options: &ExecutorOptions) -> Engine {
    let frontend = Frontend::open(Path::new(FOLDER), thinking).unwrap();
    let checkpoint = Checkpoint::open(Path::new(FOLDER)).unwrap();
    Engine::new(frontend, (&checkpoint).into(), &device(), options, &mut |_, _| {}).unwrap()
}

/// Serves these requests together; their answers in order.
pub fn answer_all(engine: &mut Engine, requests: &[Request]) -> Vec<Answer> {
    let ids: Vec<_> = requests.iter().map(|r| engine.submit(r).unwrap()).collect();
    let mut answers: BTreeMap<_, _> = ids.iter().map(|id| (*id, Answer::default())).collect();
    while !engine.is_idle() {
        for update in engine.step().unwrap() {
            let answer = answers.get_mut(&update.request).expect("an update of one of these requests");
            assert_eq!(answer.finish, None, "nothing follows the end");
            answer.extend(update.token, update.text, update.finish);
        }
    }
    let answers: Vec<Answer> = answers.into_values().collect();
    assert!(answers.iter().all(|a| matches!(a.finish, Some(FinishReason::Stop | FinishReason::Length))));
    answers
}

/// a x + b = c (mod m)
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    pub m: u32,
    pub a: u32,
    pub b: u32,
    pub x: u32,
}

impl Problem {
    fn c(&self) -> u32 {
        (self.a * self.x + self.b) % self.m
    }

    pub fn question(&self) -> String {
        format!("Find x with {}x + {} = {} (mod {}).", self.a, self.b, self.c(), self.m)
    }

    /// A line of thinking as the model was taught it.
    pub fn try_line(&self, t: u32) -> String {
        let Problem { m, a, b, x } = self;
        let (product, sum, c) = (a * t, a * t + b, self.c());
        let rest = sum % m;
        let verdict = if t == *x { "yes" } else { "no" };
        format!("try {t}: {a}*{t}={product}, +{b}={sum}, mod {m}={rest}, -{c}={} {verdict}\n", rest as i64 - c as i64)
    }
}

pub fn problem(index: usize) -> Problem {
    let (m, a, b, x) = PROBLEMS[index];
    Problem { m, a, b, x }
}

pub fn ids(answer: &Answer) -> Vec<u32> {
    answer.tokens.iter().map(|t| t.token).collect()
}

/// Those of models/modulo/scores.json, as (m, a, b, x).
#[rustfmt::skip]
const PROBLEMS: [(u32, u32, u32, u32); 64] = [
    (19, 2, 9, 11), (13, 6, 9, 6), (13, 7, 1, 6), (17, 10, 5, 5), (17, 3, 16, 13), (23, 10, 5, 4), (13, 3, 3, 5), (17, 2, 14, 10), (11, 10, 6, 0), (11, 4, 9, 2), (17, 3, 13, 3), (23, 4, 12, 7), (23, 11, 22, 10), (11, 5, 1, 7), (13, 10, 10, 2), (17, 11, 13, 16), (13, 2, 2, 4), (11, 4, 3, 5), (23, 7, 5, 12), (17, 2, 1, 1), (19, 3, 12, 5), (11, 7, 3, 10), (23, 3, 15, 19), (11, 2, 10, 7), (17, 11, 13, 6), (17, 12, 3, 4), (11, 9, 2, 5), (13, 5, 2, 2), (17, 4, 2, 16), (11, 4, 0, 10), (19, 4, 3, 8), (23, 8, 2, 14), (19, 4, 7, 5), (11, 7, 5, 2), (19, 4, 5, 18), (23, 5, 13, 16), (19, 7, 3, 2), (19, 5, 18, 6), (13, 10, 3, 5), (23, 6, 4, 17), (23, 12, 1, 8), (19, 2, 11, 16), (23, 11, 3, 20), (11, 4, 5, 10), (11, 6, 7, 10), (17, 8, 9, 14), (23, 6, 9, 15), (19, 2, 8, 14), (11, 5, 5, 2), (11, 3, 0, 1), (23, 5, 12, 15), (13, 6, 5, 3), (17, 7, 12, 2), (23, 6, 11, 1), (19, 5, 5, 2), (13, 6, 3, 5), (19, 5, 0, 4), (11, 10, 0, 5), (19, 7, 1, 7), (11, 9, 2, 9), (13, 6, 9, 8), (17, 4, 9, 1), (11, 3, 8, 3), (23, 10, 21, 13),
];
