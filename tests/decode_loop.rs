//! Decode steps one by one, several at a time, and in a loop on the device: the same tokens, whatever else happens meanwhile; and
//! the kernel that decides whether the loop goes on.

use crate::devices::{devices, upload};
use crate::modulo::{self, answer_all, ids};
use ponder::batch::{Accounting, SlotSetup, TokenEvent};
use ponder::budget::BudgetRequest;
use ponder::chat::Message;
use ponder::device::Device;
use ponder::engine::Engine;
use ponder::executor::{DecodeLoop, ExecutorOptions};
use ponder::frontend::Request;
use ponder::kernels::params::{MAX_DECODE_ROWS, RING_STEPS, TRAIT_REAL};
use ponder::ops;
use ponder::sampling::SamplingRequest;
use ponder::sequence::{Answer, FinishReason};
use ponder::slots::Slots;
use ponder::thinking::ThinkingChoice;

const LOOPS: [DecodeLoop; 3] = [DecodeLoop::Step, DecodeLoop::Multi, DecodeLoop::Device];

fn engine(decode_loop: DecodeLoop) -> Engine {
    modulo::engine_with(&ThinkingChoice::Auto, &ExecutorOptions { decode_loop, ..Default::default() })
}

fn ask(engine: &Engine, problem: usize, max_tokens: u32, budget: BudgetRequest) -> Request {
    let question = Message::new("user", modulo::problem(problem).question());
    let prompt = engine.frontend.encode_chat(&[question]).unwrap();
    let temperature = Some(if problem.is_multiple_of(2) { 0.0 } else { 0.7 });
    let sampling = SamplingRequest { temperature, seed: Some(problem as u64), ..Default::default() };
    Request { prompt, max_tokens: Some(max_tokens), sampling, budget, ..Default::default() }
}

/// All of a token but the number that depends on how many rows its step had.
fn without_logprob(answer: &Answer) -> Vec<TokenEvent> {
    answer.tokens.iter().map(|t| TokenEvent { logprob: 0.0, found_tokens: 0, ..t.clone() }).collect()
}

/// Budgets of all kinds, ends at different steps, more steps than a loop has.
#[test]
fn all_loops_give_the_same_tokens() {
    let run = |decode_loop| {
        let mut engine = engine(decode_loop);
        let none = BudgetRequest::default();
        let budgets = [
            BudgetRequest { n_ignore: 1, ..none.clone() },
            BudgetRequest { max_thinking_tokens: Some(30), ..none.clone() },
            BudgetRequest { min_thinking_tokens: 60, n_ignore: 3, accounting: Accounting::S1Readme, ..none.clone() },
            none,
        ];
        let requests: Vec<Request> =
            (0..7).map(|i| ask(&engine, i, [90, 7, 70, 33, 1, 50, 65][i], budgets[i % 4].clone())).collect();
        let answers = answer_all(&mut engine, &requests);
        let stats = engine.stats();
        assert_eq!((stats.waiting, stats.running, stats.pages_used), (0, 0, 0));
        answers
    };
    let [step, multi, device] = LOOPS.map(run);
    assert!(step.iter().any(|a| a.tokens.iter().any(|t| t.injected)), "nothing was forced");
    assert!(step.iter().any(|a| a.tokens.len() > RING_STEPS as usize), "all are short");
    for other in [multi, device] {
        for (i, (a, b)) in step.iter().zip(&other).enumerate() {
            assert_eq!((without_logprob(a), a.finish), (without_logprob(b), b.finish), "request {i}");
            assert_eq!(a.text(), b.text());
        }
    }
}

/// One asks while others are answered, and one of those gives up; before that, somebody's stop string comes.
#[test]
fn the_host_breaks_in() {
    let run = |decode_loop| {
        let mut engine = engine(decode_loop);
        let none = BudgetRequest::default;
        let stopping = Request { stop: vec![": ".into()], ..ask(&engine, 2, 40, none()) };
        let mut requests = vec![ask(&engine, 0, 70, none()), ask(&engine, 1, 70, none()), stopping];
        let late = ask(&engine, 3, 20, none());
        let mut handles: Vec<_> = requests.iter().map(|r| engine.submit(r).unwrap()).collect();
        let mut answers = vec![Answer::default(); 4];
        while !engine.is_idle() {
            for update in engine.step().unwrap() {
                let index = handles.iter().position(|id| *id == update.request).unwrap();
                answers[index].extend(update.token, update.text, update.finish);
            }
            if requests.len() == 3 && answers[0].tokens.len() == 9 {
                handles.push(engine.submit(&late).unwrap());
                requests.push(late.clone());
            }
            // Else it would have waited for the end of a loop.
            let meanwhile = answers[0].tokens.len().saturating_sub(9);
            assert!(meanwhile < 20 || !answers[3].tokens.is_empty(), "nobody lets it in");
            if answers[3].tokens.len() == 2 && answers[1].finish.is_none() {
                let last = engine.cancel(handles[1]).unwrap();
                answers[1].extend(last.token, last.text, last.finish);
            }
        }
        let stats = engine.stats();
        assert_eq!((stats.waiting, stats.running, stats.pages_used), (0, 0, 0));
        assert_eq!(answers[1].finish, Some(FinishReason::Cancelled));
        assert_eq!(answers[2].finish, Some(FinishReason::Stop));
        // The place of one that was cancelled is as good as new.
        let again = ask(&engine, 1, 20, none());
        answers.extend(answer_all(&mut engine, &[again]));
        answers
    };
    let [step, multi, device] = LOOPS.map(run);
    for other in [multi, device] {
        for i in [0, 2, 3, 4] {
            assert_eq!((ids(&step[i]), step[i].finish), (ids(&other[i]), other[i].finish), "request {i}");
        }
        let both = step[1].tokens.len().min(other[1].tokens.len());
        assert_eq!(ids(&step[1])[..both], ids(&other[1])[..both]);
    }
}

/// A loop whose step is `sample` alone, on logits that never change: how many steps it makes when sequences of so many tokens
/// sit in some of its rows and the host lets it run for `steps`.
fn steps_made(device: &Device, lengths: &[u32], steps: u32) -> Vec<usize> {
    const VOCAB: usize = 500;
    let (rows, slots) = (lengths.len() as u32 + 2, lengths.len() as u32 + 1);
    let mut slots = Slots::new(device, slots, &[TRAIT_REAL as u8; VOCAB]).unwrap();
    for (slot, &length) in (1..).zip(lengths) {
        let sampling = SamplingRequest { temperature: Some(0.0), ..Default::default() };
        let sampling = sampling.validate(&Default::default(), VOCAB, &[]).unwrap();
        let (max_generated, max_length) = (length, 1000);
        let (tokens, eos_ids) = (vec![1], vec![]);
        slots
            .admit(&SlotSetup {
                slot,
                serial: slot,
                tokens,
                max_generated,
                max_length,
                eos_ids,
                sampling,
                budget: None,
                guided: false,
            })
            .unwrap();
    }
    let logits = upload(device, &vec![0.5f32; rows as usize * VOCAB]);
    // In reverse order, after padding.
    let row_slot = upload(device, &[&[0, 0], &(1..rows as i32 - 1).rev().collect::<Vec<_>>()[..]].concat());
    let condition = device.begin_loop().unwrap();
    device.launch(&ops::sample(slots.sample_params(), &logits, &row_slot, rows, None)).unwrap();
    device.launch(&ops::decode_loop(slots.sample_params(), &row_slot, rows, condition)).unwrap();
    let graph = device.end_capture().unwrap();
    assert!(graph.repeats && graph.launches.len() == 2);
    slots.run_for(steps);
    device.replay(&graph).unwrap();
    device.synchronize().unwrap();
    std::iter::from_fn(|| slots.pop()).map(|events| events.len()).collect()
}

#[test]
fn a_loop_ends_when_it_should() {
    for device in devices() {
        assert_eq!(steps_made(&device, &[3, 1, 5], 64), [3, 2, 2, 1, 1], "with the last of its sequences");
        assert_eq!(steps_made(&device, &[3, 1, 5], 4), [3, 2, 2, 1], "when the host has said so before");
        assert_eq!(steps_made(&device, &[3, 1, 5], 0), [3], "as soon as the host has broken in");
        let full = [&[1; MAX_DECODE_ROWS as usize - 3][..], &[3]].concat();
        assert_eq!(steps_made(&device, &full, 64), [full.len(), 1, 1]);
    }
}

/// A loop that nothing ends would never give the device back.
#[test]
fn a_loop_needs_its_kernel() {
    if std::env::var("TEST_DEVICE").is_ok_and(|d| d == "cuda") {
        return;
    }
    let device = Device::host(Default::default());
    device.begin_loop().unwrap();
    let out = upload(&device, &[0u16; 8]);
    device.launch(&ops::random(&device, &out, 8, 1, 1.0)).unwrap();
    let graph = device.end_capture().unwrap();
    device.replay(&graph).unwrap();
    let error = device.synchronize().unwrap_err().to_string();
    assert!(error.contains("a loop without a kernel that ends it"), "{error}");
}
