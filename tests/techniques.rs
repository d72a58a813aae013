//! Steering (kernels/steering.cuh): each technique on hand-made logits, where it should act and nowhere else; all of them together
//! with budgets, in batches with neighbours that have them off, against a model that derives everything from the text so far.

use crate::devices::devices;
use crate::modulo::{self, answer_all, ids};
use crate::random::Random;
use crate::sampler::{Bench, Row, fast_device};
use ponder::budget::BudgetRequest;
use ponder::chat::Message;
use ponder::device::Device;
use ponder::frontend::Frontend;
use ponder::kernels::budget::Machine;
use ponder::kernels::params::*;
use ponder::sequence::Channel;
use ponder::steering::SteeringRequest;
use ponder::thinking::ThinkingChoice;
use ponder::{Error, Request};
use std::path::Path;

const A: i32 = 0;
const B: i32 = 1;
const C: i32 = 2;
const STOP: i32 = 3;
const WAIT: i32 = 4;
const END: i32 = 5;
const REST: i32 = 6;
const EOS: i32 = 7;
const FORCED: i32 = 8;
const VOCAB: usize = 12;

fn traits() -> Vec<u8> {
    (0..VOCAB as i32).map(|id| (TRAIT_REAL | if id == STOP { TRAIT_SENTENCE } else { 0 }) as u8).collect()
}

/// What a request asks of the sampler, and what the model says in each step, by turns.
#[derive(Clone)]
struct Case {
    end: Vec<i32>,
    ignore: Vec<i32>,
    n_ignore: i32,
    mask_on_end: bool,
    min: i32,
    max: i32,
    steering: Steering,
    avoided: Vec<i32>,
    switches: Vec<i32>,
    logits: Vec<Vec<f32>>,
}

/// A step in which these tokens have these logits, and all others -10.
fn says(tokens: &[(i32, f32)]) -> Vec<f32> {
    let mut logits = vec![-10.0; VOCAB];
    tokens.iter().for_each(|&(id, x)| logits[id as usize] = x);
    logits
}

impl Case {
    fn new(logits: Vec<Vec<f32>>) -> Case {
        Case {
            end: vec![END],
            ignore: vec![WAIT],
            n_ignore: 0,
            mask_on_end: false,
            min: 0,
            max: BUDGET_NO_MAX as i32,
            steering: Steering::default(),
            avoided: vec![],
            switches: vec![],
            logits,
        }
    }

    fn row(&self) -> Row {
        let mut row = Row::new(self.logits[0].clone());
        let mut pool = Vec::new();
        let mut store = |ids: &[i32]| {
            let offset = pool.len() as u32;
            pool.extend_from_slice(ids);
            PoolString { offset, length: ids.len() as u32 }
        };
        row.state.budget = Budget {
            end: store(&self.end),
            close: store(&[self.end.as_slice(), &[REST]].concat()),
            end_string: store(&[&[FORCED], self.end.as_slice()].concat()),
            ignore_count: 1,
            max_thinking: self.max,
            min_thinking: self.min,
            n_ignore: self.n_ignore,
            on_end: if self.mask_on_end { ON_END_MASK } else { ON_END_REPLACE },
            phase: PHASE_THINKING,
            newline: -1,
            inject_first: -1,
            steering: self.steering,
            ..Default::default()
        };
        row.state.budget.ignore_strings[0] = store(&self.ignore);
        row.state.eos_count = 1;
        row.state.stop_count = 1;
        row.state.stop_ids[0] = EOS;
        (row.pool, row.avoided, row.switches) = (pool, self.avoided.clone(), self.switches.clone());
        row
    }

    fn logits(&self, step: usize) -> &[f32] {
        &self.logits[step % self.logits.len()]
    }
}

/// The cases as a batch, with rows between them that ask for nothing but say the same: their tokens, and whether a technique
/// has ended their thinking.
fn run(device: &Device, cluster: u32, cases: &[Case], steps: usize) -> Vec<Vec<(i32, u32)>> {
    let plain = |case: &Case| Case { steering: Steering::default(), ..case.clone() };
    let all: Vec<Case> = cases.iter().flat_map(|case| [case.clone(), plain(case)]).collect();
    let rows: Vec<Option<Row>> = all.iter().map(|case| Some(case.row())).collect();
    let bench = Bench::new(device, &traits(), cluster, &rows);
    let mut tokens = vec![Vec::new(); all.len()];
    for step in 0..steps {
        for (i, case) in all.iter().enumerate() {
            bench.set_logits(i, case.logits(step));
        }
        for (tokens, record) in tokens.iter_mut().zip(bench.step()) {
            if record.flags & TOKEN_VALID != 0 {
                tokens.push((record.token, record.flags & !TOKEN_VALID));
            }
        }
    }
    tokens
}

/// The first case's tokens; and its neighbour's, which ask for nothing; and whether a technique has ended the first one's thinking.
fn with_and_without(case: &Case, steps: usize) -> (Vec<i32>, Vec<i32>, bool) {
    let on = |cluster| run(&fast_device(), cluster, std::slice::from_ref(case), steps);
    let runs = [1, 2, 4].map(on);
    runs.iter().for_each(|other| assert_eq!(*other, runs[0], "clusters agree"));
    let ids = |i: usize| runs[0][i].iter().map(|(token, _)| *token).collect();
    (ids(0), ids(1), runs[0][0].last().unwrap().1 & TOKEN_STOPPED != 0)
}

#[test]
fn avoided_tokens_are_not_drawn_while_it_thinks() {
    let steering = Steering { techniques: STEER_AVOID, ..Default::default() };
    let logits = vec![says(&[(WAIT, 3.0), (A, 1.0)])];
    let case = Case { steering, avoided: vec![WAIT], max: 3, ..Case::new(logits) };
    let (with, without, _) = with_and_without(&case, 7);
    assert_eq!(with, [A, A, A, FORCED, END, WAIT, WAIT], "the answer may say it");
    assert_eq!(without, [WAIT, WAIT, WAIT, FORCED, END, WAIT, WAIT]);
    // What is injected is not drawn.
    let logits = vec![says(&[(END, 5.0), (WAIT, 3.0), (A, 1.0)]), says(&[(WAIT, 3.0), (A, 1.0)])];
    let case = Case { logits, n_ignore: 1, max: 4, ..case };
    assert_eq!(with_and_without(&case, 3).0, [WAIT, A, END]);
}

#[test]
fn switches_are_less_likely_while_a_thought_is_young() {
    let steering = Steering { techniques: STEER_SWITCH, switch_penalty: 3.0, switch_window: 3, ..Default::default() };
    let logits = vec![says(&[(WAIT, 3.0), (B, 2.5), (A, 1.0)])];
    let case = Case { steering, switches: vec![WAIT, B], max: 9, ..Case::new(logits) };
    let (with, without, _) = with_and_without(&case, 12);
    assert_eq!(with, [A, A, A, WAIT, A, A, A, WAIT, A, FORCED, END, WAIT], "for three tokens, then again");
    assert_eq!(without[..3], [WAIT; 3]);
    // It is a penalty, not a ban.
    let far = Case { logits: vec![says(&[(WAIT, 3.0), (A, -1.0)])], ..case };
    assert_eq!(with_and_without(&far, 3).0, [WAIT; 3]);
}

#[test]
fn the_brake_acts_at_the_end_of_a_sentence() {
    let steering = Steering { techniques: STEER_BRAKE, brake_margin: 1.0, ..Default::default() };
    let near = says(&[(A, 2.0), (END, 1.0)]);
    let full_stop = says(&[(STOP, 2.0), (END, 1.5)]);
    let far = says(&[(B, 2.0), (END, 0.5)]);
    let logits = vec![near.clone(), full_stop.clone(), far, full_stop, near];
    let case = Case { steering, ..Case::new(logits) };
    let (with, without, stopped) = with_and_without(&case, 6);
    assert_eq!(with, [A, STOP, B, STOP, END, REST]);
    assert!(stopped);
    assert_eq!(without, [A, STOP, B, STOP, A, A]);
    // As an end of the model's own would be, it is ignored; the token after that is free.
    let ignored = Case { n_ignore: 1, ..case.clone() };
    let (with, _, stopped) = with_and_without(&ignored, 6);
    assert_eq!((with, stopped), (vec![A, STOP, B, STOP, WAIT, A], false));
    // An end of two tokens is closed from its beginning.
    let two = Case { end: vec![END, C], ..case };
    assert_eq!(with_and_without(&two, 7).0, [A, STOP, B, STOP, END, C, REST]);
}

#[test]
fn a_biased_end_comes_sooner() {
    let logits = vec![says(&[(A, 0.0), (END, -2.0)])];
    let ramp = Steering { techniques: STEER_END_BIAS, end_bias: -1.0, end_bias_ramp: 0.5, ..Default::default() };
    let case = Case { steering: ramp, ..Case::new(logits.clone()) };
    let (with, without, stopped) = with_and_without(&case, 9);
    assert_eq!(with, [A, A, A, A, A, A, A, END, REST], "-2 - 1 + 7 / 2 > 0");
    assert!(!stopped, "the model itself has said it");
    assert_eq!(without, [A; 9]);
    let at_once = Steering { techniques: STEER_END_BIAS, end_bias: 3.0, ..Default::default() };
    // After the thinking it is a token like others: the answer does not end thinking again.
    let (with, ..) = with_and_without(&Case { steering: at_once, ..Case::new(logits) }, 4);
    assert_eq!(with, [END, REST, A, A]);
}

#[test]
fn confidence_stops_after_a_streak() {
    let steering = Steering {
        techniques: STEER_CONFIDENCE,
        confidence: 0.9,
        streak_needed: 3,
        stop_after: 4,
        ..Default::default()
    };
    let sure = says(&[(A, 5.0)]);
    let unsure = says(&[(B, 1.0), (A, 0.5)]);
    let of = |pattern: &str| pattern.chars().map(|c| if c == 's' { sure.clone() } else { unsure.clone() }).collect();
    let case = Case { steering, ..Case::new(of("sussssssss")) };
    let (with, without, stopped) = with_and_without(&case, 6);
    assert_eq!(with, [A, B, A, A, END, REST], "the third of the streak, after four tokens");
    assert!(stopped);
    assert_eq!(without, [A, B, A, A, A, A]);
    let later = Case { logits: of("susssssss"), steering: Steering { stop_after: 6, ..steering }, ..case.clone() };
    assert_eq!(with_and_without(&later, 8).0, [A, B, A, A, A, A, END, REST]);
    // Before the minimum it is ignored like any end, and the streak begins anew behind the token that follows.
    let least = Case { logits: of("s"), min: 5, n_ignore: 0, ..case };
    assert_eq!(with_and_without(&least, 10).0, [A, A, A, A, WAIT, A, A, A, END, REST]);
}

#[test]
fn loops_are_broken() {
    let steering = Steering { techniques: STEER_LOOP, loop_repeats: 3, ..Default::default() };
    let cycle = |ids: &[i32]| ids.iter().map(|&id| says(&[(id, 5.0)])).collect::<Vec<_>>();
    // The least that a loop covers; its draw takes the place of the next token.
    let short = Case { steering, ..Case::new(cycle(&[A, B])) };
    let (with, without, stopped) = with_and_without(&short, LOOP_TOKENS as usize + 2);
    assert_eq!(with[..LOOP_TOKENS as usize], without[..LOOP_TOKENS as usize]);
    assert_eq!(with[LOOP_TOKENS as usize..], [END, REST]);
    assert!(stopped);
    // Of twelve tokens three times, after three others.
    let mut text = vec![C, C, B];
    let period = [A, B, C, A, A, STOP, B, B, STOP, C, A, STOP];
    (0..4).for_each(|_| text.extend(period));
    let long = Case { logits: cycle(&text), ..short.clone() };
    let (with, ..) = with_and_without(&long, 41);
    assert_eq!(with[..39], text[..39]);
    assert_eq!(with[39..], [END, REST]);
    // An ignored end gives it another try, and a whole loop's time.
    let again = Case { n_ignore: 1, ..short };
    let (with, ..) = with_and_without(&again, 2 * LOOP_TOKENS as usize + 4);
    assert_eq!(with[LOOP_TOKENS as usize], WAIT);
    assert_eq!(with.iter().position(|&t| t == END), Some(2 * LOOP_TOKENS as usize + 1));
    // What does not repeat is no loop, however long it is.
    let mut random = Random(5);
    let varied: Vec<i32> = (0..300).map(|_| [A, B, C, STOP][random.below(4) as usize]).collect();
    let varied = Case { steering, ..Case::new(cycle(&varied)) };
    let tokens = run(&fast_device(), 1, std::slice::from_ref(&varied), 300);
    assert_eq!(tokens[0], tokens[1]);
}

/// The longest period that is found.
#[test]
fn loops_of_the_longest_period_are_broken() {
    let mut random = Random(9);
    let text: Vec<i32> = (0..LOOP_PERIODS).map(|_| [A, B, C, STOP, REST][random.below(5) as usize]).collect();
    let steering = Steering { techniques: STEER_LOOP, loop_repeats: 2, ..Default::default() };
    let case = Case { steering, ..Case::new(text.iter().map(|&id| says(&[(id, 5.0)])).collect()) };
    let twice = 2 * LOOP_PERIODS as usize;
    let tokens = run(&fast_device(), 2, std::slice::from_ref(&case), twice + 1);
    assert_eq!(tokens[0].iter().position(|&(t, _)| t == END), Some(twice));
    assert_eq!(tokens[1].len(), twice + 1, "its neighbour goes on");
}

// ---- all of them together, against a model ----

impl Case {
    fn random(random: &mut Random) -> Case {
        let mut steering = Steering {
            switch_penalty: random.below(64) as f32 / 16.0,
            switch_window: 1 + random.below(6) as i32,
            brake_margin: random.below(32) as f32 / 16.0,
            end_bias: random.below(32) as f32 / 16.0 - 1.0,
            end_bias_ramp: random.below(8) as f32 / 64.0,
            confidence: 0.2 + random.below(70) as f32 / 100.0,
            streak_needed: 1 + random.below(3) as i32,
            stop_after: random.below(10) as i32,
            loop_repeats: 2 + random.below(6) as i32,
            ..Default::default()
        };
        steering.techniques = random.below(64);
        if random.below(3) == 0 {
            // Alone, and with few ends of the model's own: something else has to end it.
            steering.techniques = 1 << random.below(6);
        }
        let some = |random: &mut Random| (0..VOCAB as i32).filter(|_| random.below(4) == 0).collect::<Vec<i32>>();
        let period = 1 + random.below(7) as usize;
        let quiet = random.below(6) as f32;
        let mut logits: Vec<Vec<f32>> =
            (0..period).map(|_| (0..VOCAB).map(|_| random.below(64) as f32 / 16.0).collect()).collect();
        for step in &mut logits {
            step[END as usize] -= quiet;
            step[EOS as usize] -= quiet;
        }
        Case {
            end: if random.below(2) == 0 { vec![END] } else { vec![END, C] },
            ignore: vec![WAIT; random.below(3) as usize],
            n_ignore: random.below(3) as i32,
            mask_on_end: random.below(3) == 0,
            min: [0, 0, 5][random.below(3) as usize],
            max: [BUDGET_NO_MAX as i32, 20, 60][random.below(3) as usize],
            steering,
            avoided: some(random),
            switches: some(random),
            logits,
        }
    }
}

struct Model<'a> {
    case: &'a Case,
    /// Of the budget alone, which has a test of its own.
    machine: Machine,
    thoughts: Vec<i32>,
    last_ends_sentence: bool,
    streak: i32,
    /// Thoughts from here on count for loops, and those that they repeat.
    loop_from: usize,
    looping: bool,
    stopped: bool,
}

impl Model<'_> {
    fn new(case: &Case) -> Model<'_> {
        let row = case.row();
        let machine = Machine::new(row.state.budget, row.pool);
        let (thoughts, last_ends_sentence) = (Vec::new(), false);
        Model { case, machine, thoughts, last_ends_sentence, streak: 0, loop_from: 0, looping: false, stopped: false }
    }

    fn has_loop(&self) -> bool {
        let t = &self.thoughts;
        (1..=LOOP_PERIODS as usize).any(|period| {
            let repeats = |i: &usize| *i >= period && t[*i] == t[*i - period];
            let run = (self.loop_from..t.len()).rev().take_while(repeats).count();
            run > 0 && run + period >= (LOOP_TOKENS as usize).max(self.case.steering.loop_repeats as usize * period)
        })
    }

    /// The token and its flags; `None`: rounding decides.
    fn step(&mut self, logits: &[f32]) -> Option<(i32, u32)> {
        let s = self.case.steering;
        let on = |technique: u32| s.techniques & technique != 0;
        let step = self.machine.before();
        let budget = *self.machine.state();
        let thinks = budget.phase == PHASE_THINKING;
        let token = match step.forced {
            Some(forced) => forced,
            None => {
                let mut x: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
                let next_of_end = if thinks { self.case.end[budget.end_match as usize] as usize } else { 0 };
                if thinks && on(STEER_END_BIAS) {
                    x[next_of_end] += f64::from(s.end_bias) + f64::from(s.end_bias_ramp) * f64::from(budget.count);
                }
                let mut mask = |ids: &[i32]| ids.iter().for_each(|&id| x[id as usize] = f64::NEG_INFINITY);
                if step.mask_end {
                    mask(&self.machine.completing().into_iter().collect::<Vec<_>>());
                }
                if step.mask_eos {
                    mask(&[EOS]);
                }
                let is_switch = |t: &i32| self.case.switches.contains(t);
                let age = self.thoughts.iter().rev().take_while(|t| !is_switch(t)).count();
                if thinks && on(STEER_SWITCH) && (age as i32) < s.switch_window {
                    self.case.switches.iter().for_each(|&id| x[id as usize] -= f64::from(s.switch_penalty));
                }
                if thinks && on(STEER_AVOID) {
                    self.case.avoided.iter().for_each(|&id| x[id as usize] = f64::NEG_INFINITY);
                }
                let best = |x: &[f64]| (0..VOCAB).max_by(|&a, &b| x[a].total_cmp(&x[b]).then(b.cmp(&a))).unwrap();
                let top = best(&x);
                let mut stops = false;
                if thinks && !step.mask_end {
                    stops |= on(STEER_LOOP) && self.looping;
                    stops |= on(STEER_BRAKE)
                        && self.last_ends_sentence
                        && x[top] - x[next_of_end] <= f64::from(s.brake_margin);
                    if on(STEER_CONFIDENCE) {
                        let probability = 1.0 / x.iter().map(|other| (other - x[top]).exp()).sum::<f64>();
                        if (probability - f64::from(s.confidence)).abs() < 1e-3 {
                            return None;
                        }
                        self.streak = if probability >= f64::from(s.confidence) { self.streak + 1 } else { 0 };
                        stops |= self.streak >= s.streak_needed && budget.count >= s.stop_after;
                    }
                }
                if stops {
                    (self.streak, self.looping) = (0, false);
                }
                match self.machine.after(top as i32, stops || top as i32 == EOS) {
                    Some(token) => {
                        let b = self.machine.state();
                        self.stopped |= stops && b.phase == PHASE_INJECTING && b.inject_kind == INJECT_CLOSE;
                        token
                    }
                    None => {
                        let masked = self.machine.completing().into_iter().chain([EOS]);
                        masked.for_each(|id| x[id as usize] = f64::NEG_INFINITY);
                        let drawn = best(&x) as i32;
                        self.machine.after(drawn, drawn == EOS).unwrap()
                    }
                }
            }
        };
        let flags = self.machine.emit(token, traits()[token as usize]);
        self.last_ends_sentence = false;
        if flags & TOKEN_REASONING != 0 {
            self.thoughts.push(token);
            self.last_ends_sentence = token == STOP;
            self.looping = on(STEER_LOOP) && self.has_loop();
            if self.looping {
                self.loop_from = self.thoughts.len();
            }
        }
        Some((token, flags | if self.stopped { TOKEN_STOPPED } else { 0 }))
    }
}

fn against_the_model(device: &Device, cluster: u32, seed: u64, cases: usize, steps: usize) -> usize {
    let mut random = Random(seed);
    let cases: Vec<Case> = (0..cases).map(|_| Case::random(&mut random)).collect();
    let tokens = run(device, cluster, &cases, steps);
    let mut stopped = 0;
    let plain = |case: &Case| Case { steering: Steering::default(), ..case.clone() };
    let all = cases.iter().flat_map(|case| [case.clone(), plain(case)]);
    for (i, (case, tokens)) in all.zip(&tokens).enumerate() {
        let mut model = Model::new(&case);
        for (at, &token) in tokens.iter().enumerate() {
            let Some(expected) = model.step(case.logits(at)) else { break };
            let s = &case.steering;
            assert_eq!(token, expected, "seed {seed}, row {i}, step {at}, techniques {:b}: {s:?}", s.techniques);
        }
        stopped += usize::from(model.stopped);
    }
    stopped
}

#[test]
fn all_techniques_do_what_the_model_does() {
    // Enough for a loop.
    for (i, device) in devices().iter().enumerate() {
        against_the_model(device, 1 + i as u32 % 2, 100 + i as u64, 1, LOOP_TOKENS as usize + 4);
    }
    let stopped: usize = (0..12).map(|seed| against_the_model(&fast_device(), 1 << (seed % 3), seed, 8, 60)).sum();
    assert!(stopped > 10, "many have ended so: {stopped}");
}

// ---- as requests ----

fn steered(steering: SteeringRequest) -> BudgetRequest {
    BudgetRequest { steering, ..Default::default() }
}

/// Each technique beside the others in one batch of the tiny model, which tries one number a line.
#[test]
fn requests_are_steered_each_by_its_own() {
    let mut engine = modulo::engine(&ThinkingChoice::Auto);
    let prompt = engine.frontend.encode_chat(&[Message::new("user", modulo::problem(0).question())]).unwrap();
    let none = SteeringRequest::default;
    let budgets = [
        BudgetRequest::default(),
        BudgetRequest { exact_thinking_tokens: Some(50), ..Default::default() },
        steered(SteeringRequest { brake_margin: Some(1000.0), ..none() }),
        steered(SteeringRequest { end_bias: Some(1000.0), ..none() }),
        steered(SteeringRequest { end_bias_ramp: Some(1e3), ..none() }),
        steered(SteeringRequest { stop_confidence: Some(0.0), stop_streak: Some(3), stop_after: Some(12), ..none() }),
        steered(SteeringRequest { loop_repeats: Some(1000), ..none() }),
        steered(SteeringRequest { switch_penalty: Some(3.0), ..none() }),
        BudgetRequest {
            n_ignore: 1,
            ..steered(SteeringRequest { brake_margin: Some(1000.0), avoid_words: vec!["default".into()], ..none() })
        },
    ];
    let request = |budget: &BudgetRequest| Request {
        prompt: prompt.clone(),
        budget: budget.clone(),
        max_tokens: Some(400),
        ..Default::default()
    };
    let requests: Vec<Request> = budgets.iter().map(request).collect();
    let answers = answer_all(&mut engine, &requests);
    let last = |i: usize| answers[i].tokens.last().unwrap();
    let thinking = |i: usize| answers[i].channel(Channel::Reasoning);
    let free = last(0).reasoning_tokens;
    assert!(free > 60 && !last(0).stopped, "{free}");
    assert_eq!((last(1).reasoning_tokens, last(1).max_hit), (50, true));
    // The first sentence is the line on which the delimiter stands.
    assert_eq!(engine.frontend.tokenizer.decode(&ids(&answers[0])[..1]), "\n");
    assert_eq!((last(2).reasoning_tokens, last(2).stopped), (1, true));
    assert_eq!((last(3).reasoning_tokens, last(3).stopped), (0, false), "the model itself ends it at once");
    assert!((1..free).contains(&last(4).reasoning_tokens), "{}", last(4).reasoning_tokens);
    assert_eq!((last(5).reasoning_tokens, last(5).stopped), (12, true));
    for i in [6, 7] {
        assert_eq!(ids(&answers[i]), ids(&answers[0]), "nothing loops, no thought is switched");
    }
    let twice = thinking(8);
    assert_eq!((last(8).ignores_used, last(8).stopped), (1, true));
    assert!(twice.trim_start().starts_with("Wait"), "{twice}");
    for (request, together) in requests.iter().zip(&answers).filter(|(_, answer)| answer.tokens.len() < 60) {
        let alone = answer_all(&mut engine, std::slice::from_ref(request)).remove(0);
        assert_eq!(ids(&alone), ids(together), "in a batch as alone");
    }
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let frontend = Frontend::open(Path::new(modulo::FOLDER), &ThinkingChoice::Auto).unwrap();
    let refusal = |budget: &BudgetRequest| {
        let error = budget.validate(frontend.delimiters.as_ref(), &frontend.tokenizer, &[1]).unwrap_err();
        let Error::Request { parameter, problem } = error else { panic!("{error}") };
        (parameter, problem)
    };
    let none = SteeringRequest::default;
    let words = |words: &[&str]| words.iter().map(|w| w.to_string()).collect::<Vec<String>>();
    for (steering, name, problem) in [
        (SteeringRequest { avoid_words: words(&["Wait", "zebra"]), ..none() }, "avoid_words", "\"zebra\" is no token"),
        (SteeringRequest { avoid_words: vec!["Wait".into(); 257], ..none() }, "avoid_words", "more than 256"),
        (SteeringRequest { switch_penalty: Some(-1.0), ..none() }, "switch_penalty", "not a number from 0"),
        (SteeringRequest { switch_penalty: Some(f32::NAN), ..none() }, "switch_penalty", "not a number"),
        (SteeringRequest { switch_window: Some(3), ..none() }, "switch_window", "without switch_penalty"),
        (SteeringRequest { switch_words: words(&["Hmm"]), ..none() }, "switch_words", "without switch_penalty"),
        (
            SteeringRequest { switch_penalty: Some(3.0), switch_words: words(&["zebra"]), ..none() },
            "switch_words",
            "zebra",
        ),
        (SteeringRequest { switch_penalty: Some(3.0), switch_window: Some(0), ..none() }, "switch_window", "from 1"),
        (SteeringRequest { brake_margin: Some(f32::INFINITY), ..none() }, "brake_margin", "not a number"),
        (SteeringRequest { end_bias: Some(2000.0), ..none() }, "end_bias", "to 1000"),
        (SteeringRequest { end_bias_ramp: Some(f32::NAN), ..none() }, "end_bias_ramp", "not a number"),
        (SteeringRequest { stop_confidence: Some(1.5), ..none() }, "stop_confidence", "to 1"),
        (SteeringRequest { stop_streak: Some(3), ..none() }, "stop_streak", "without stop_confidence"),
        (SteeringRequest { stop_after: Some(3), ..none() }, "stop_after", "without stop_confidence"),
        (SteeringRequest { stop_confidence: Some(0.5), stop_streak: Some(0), ..none() }, "stop_streak", "from 1"),
        (SteeringRequest { loop_repeats: Some(1), ..none() }, "loop_repeats", "from 2"),
    ] {
        let (parameter, said) = refusal(&steered(steering.clone()));
        assert_eq!(parameter, name, "{steering:?}: {said}");
        assert!(said.contains(problem), "{name}: {said}");
        // Without delimiters there is no thinking to steer.
        let error = steered(steering).validate(None, &frontend.tokenizer, &[1]).unwrap_err().to_string();
        assert!(error.contains("no thinking delimiters"), "{error}");
    }
    let exact = BudgetRequest { exact_thinking_tokens: Some(5), ..Default::default() };
    for both in [
        BudgetRequest { max_thinking_tokens: Some(9), ..exact.clone() },
        BudgetRequest { min_thinking_tokens: 1, ..exact.clone() },
    ] {
        assert_eq!(refusal(&both).0, "exact_thinking_tokens");
    }
}

/// Words are whole tokens, whatever their case and what stands around them.
#[test]
fn words_are_found_in_the_vocabulary() {
    let tokenizer = Frontend::open(Path::new(modulo::FOLDER), &ThinkingChoice::Auto).unwrap().tokenizer;
    let texts = |word: &str| {
        let ids = tokenizer.word_tokens(word).iter();
        ids.map(|&id| tokenizer.decode(&[id])).collect::<Vec<String>>()
    };
    assert_eq!(texts("wait"), ["Wait", " Wait"]);
    assert_eq!(texts("HMM,"), [" Hmm"]);
    assert_eq!(texts("wai"), ["Wai"]);
    assert!(texts("zebra").is_empty() && texts("").is_empty() && texts("...").is_empty());
    let traits = tokenizer.traits();
    let ends = |token: &str| traits[tokenizer.token_id(token).unwrap() as usize] & TRAIT_SENTENCE as u8 != 0;
    assert!(ends(".") && ends("Ċ") && ends(",Ċ") && !ends("Wait") && !ends(",") && !ends("1"));
}
