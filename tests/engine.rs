//! The engine as a whole on the tiny model: requests together and alone, cancelled, cut off, too long, in chunks.

use crate::modulo::{self, answer_all, ids};
use ponder::Error;
use ponder::batch::TokenEvent;
use ponder::budget::BudgetRequest;
use ponder::chat::Message;
use ponder::engine::Engine;
use ponder::executor::ExecutorOptions;
use ponder::frontend::Request;
use ponder::sampling::SamplingRequest;
use ponder::sequence::{Answer, FinishReason};
use ponder::thinking::ThinkingChoice;

fn engine() -> Engine {
    modulo::engine(&ThinkingChoice::Auto)
}

fn greedy() -> SamplingRequest {
    SamplingRequest { temperature: Some(0.0), logprobs: Some(1), ..Default::default() }
}

fn ask(engine: &Engine, problem: usize, max_tokens: u32) -> Request {
    let question = Message::new("user", modulo::problem(problem).question());
    let prompt = engine.frontend.encode_chat(&[question]).unwrap();
    Request { prompt, max_tokens: Some(max_tokens), sampling: greedy(), ..Default::default() }
}

fn is_empty(engine: &Engine) -> bool {
    let stats = engine.stats();
    engine.is_idle() && (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)
}

/// More requests than a step has rows, of different lengths, so that their prompts meet the answers of others.
#[test]
fn together_as_alone() {
    let mut engine = engine();
    let requests: Vec<Request> = (0..20).map(|i| ask(&engine, i, 4 + 3 * (i as u32 % 5))).collect();
    let together = answer_all(&mut engine, &requests);
    assert!(is_empty(&engine));
    for (request, together) in requests.iter().zip(&together) {
        let alone = answer_all(&mut engine, std::slice::from_ref(request)).remove(0);
        assert_eq!((ids(&alone), alone.finish, alone.text()), (ids(together), together.finish, together.text()));
    }
}

/// Weights in fp8, and so many rows that a launch of its own makes fp8 of what a product reads: as each row alone, whose product does
/// it on its way.
#[test]
fn many_together_as_alone_in_fp8() {
    let options = ExecutorOptions { quantize: true, max_slots: 49, deterministic: true, ..Default::default() };
    let mut engine = modulo::engine_with(&ThinkingChoice::Auto, &options);
    let requests: Vec<Request> = (0..48).map(|i| ask(&engine, i, 8)).collect();
    let together = answer_all(&mut engine, &requests);
    for i in [0, 17, 40, 47] {
        let alone = answer_all(&mut engine, &requests[i..=i]).remove(0);
        let numbers =
            |answer: &Answer| answer.tokens.iter().map(|t| (t.token, t.logprob.to_bits())).collect::<Vec<_>>();
        assert_eq!(numbers(&alone), numbers(&together[i]), "{i}");
    }
}

/// The same seed gives the same answer, another seed another one.
#[test]
fn seeds_decide() {
    let mut engine = engine();
    let request = |engine: &Engine, seed| Request {
        sampling: SamplingRequest { temperature: Some(3.0), seed: Some(seed), ..Default::default() },
        ..ask(engine, 0, 12)
    };
    let requests = [5, 5, 6].map(|seed| request(&engine, seed));
    let answers = answer_all(&mut engine, &requests);
    assert_eq!(ids(&answers[0]), ids(&answers[1]));
    assert_ne!(ids(&answers[0]), ids(&answers[2]));
}

#[test]
fn cancelling_leaves_the_others_alone() {
    let mut engine = engine();
    let requests: Vec<Request> = (0..3).map(|i| ask(&engine, i, 12)).collect();
    let undisturbed = answer_all(&mut engine, &requests);
    let handles: Vec<_> = requests.iter().map(|r| engine.submit(r).unwrap()).collect();
    let mut answers = vec![Answer::default(); 3];
    while !engine.is_idle() {
        for update in engine.step().unwrap() {
            let index = handles.iter().position(|id| *id == update.request).unwrap();
            assert_eq!(answers[index].finish, None, "nothing follows the end");
            answers[index].extend(update.token, update.text, update.finish);
            if index == 1 && answers[1].tokens.len() == 5 {
                let last = engine.cancel(handles[1]).unwrap();
                answers[1].extend(last.token, last.text, last.finish);
                assert!(engine.cancel(handles[1]).is_none(), "it has ended");
            }
        }
    }
    assert!(is_empty(&engine));
    assert_eq!(answers[1].finish, Some(FinishReason::Cancelled));
    assert_eq!(ids(&answers[1]), ids(&undisturbed[1])[..5]);
    assert_eq!([ids(&answers[0]), ids(&answers[2])], [ids(&undisturbed[0]), ids(&undisturbed[2])]);

    // Before it has begun, and the place of one that was cancelled is as good as new.
    let id = engine.submit(&requests[0]).unwrap();
    assert_eq!(engine.cancel(id).unwrap().finish, Some(FinishReason::Cancelled));
    assert_eq!(ids(&answer_all(&mut engine, &requests[2..])[0]), ids(&undisturbed[2]));
}

/// The device runs ahead of the stop string, which only the host knows.
#[test]
fn what_ran_past_the_end_is_dropped() {
    let mut engine = engine();
    let plain = ask(&engine, 3, 40);
    let whole = answer_all(&mut engine, std::slice::from_ref(&plain)).remove(0);
    let text = whole.text();
    let stop = ": ";
    let requests = [Request { stop: vec![stop.into()], ..plain.clone() }, plain];
    let answers = answer_all(&mut engine, &requests);
    assert_eq!(answers[0].text(), text.split(stop).next().unwrap());
    assert_eq!(answers[0].finish, Some(FinishReason::Stop));
    let kept = answers[0].tokens.len();
    assert_eq!(ids(&answers[0]), ids(&whole)[..kept]);
    let until = |n: usize| engine.frontend.tokenizer.decode(&ids(&whole)[..n]);
    assert!(until(kept).contains(stop) && !until(kept - 1).contains(stop), "the token that completes it is the last");
    assert_eq!(ids(&answers[1]), ids(&whole));
    assert!(is_empty(&engine));
}

#[test]
fn the_context_is_the_limit() {
    let mut engine =
        modulo::engine_with(&ThinkingChoice::Auto, &ExecutorOptions { max_context: Some(72), ..Default::default() });
    assert_eq!(engine.context(), 72);
    let request = Request { max_tokens: None, ..ask(&engine, 0, 1) };
    let room = 72 - request.prompt.len();
    let answer = answer_all(&mut engine, &[request]).remove(0);
    assert_eq!((answer.finish, answer.tokens.len()), (Some(FinishReason::Length), room));

    let long = |n| Request { prompt: vec![300; n], sampling: greedy(), ..Default::default() };
    let answer = answer_all(&mut engine, &[long(71)]).remove(0);
    assert_eq!((answer.finish, answer.tokens.len()), (Some(FinishReason::Length), 1));
    for n in [0, 72, 10_000] {
        let Err(Error::Request { parameter: "prompt", problem }) = engine.submit(&long(n)) else {
            panic!("{n} tokens")
        };
        assert!(n == 0 || problem.contains(&n.to_string()) && problem.contains("72"), "{problem}");
    }
    assert!(is_empty(&engine));
}

/// A prompt in pieces is the same prompt. Pieces end anywhere in a page.
#[test]
fn any_chunking_is_the_same_prompt() {
    let options = |prefill_chunk| ExecutorOptions { prefill_chunk, ..Default::default() };
    let lines: String = (0..9).map(|t| modulo::problem(7).try_line(t)).collect();
    let mut answers: Vec<Vec<TokenEvent>> = Vec::new();
    for chunk in [512, 128, 37] {
        let mut engine = modulo::engine_with(&ThinkingChoice::Auto, &options(chunk));
        let mut long = ask(&engine, 7, 24);
        long.prompt.extend(engine.frontend.tokenizer.encode(&format!("\n{lines}")).unwrap());
        assert!(long.prompt.len() > 250);
        // With company, so that pieces are cut at odd places.
        let requests = [ask(&engine, 1, 8), long];
        answers.push(answer_all(&mut engine, &requests).remove(1).tokens);
    }
    for other in &answers[1..] {
        for (a, b) in answers[0].iter().zip(other) {
            assert_eq!(a.token, b.token);
            assert!((a.logprob - b.logprob).abs() < 0.02, "{} {}", a.logprob, b.logprob);
        }
    }
}

/// Generation across pages and through every bucket of rows, as one sequence after the other ends: replayed from recorded
/// launches and launched one by one, the same bits.
#[test]
fn replay_is_eager() {
    let run = |graphs| {
        let mut engine = modulo::engine_with(&ThinkingChoice::Auto, &ExecutorOptions { graphs, ..Default::default() });
        let requests: Vec<Request> = (0..16).map(|i| ask(&engine, i, 4 + 5 * i as u32)).collect();
        answer_all(&mut engine, &requests)
    };
    for (replayed, eager) in run(true).iter().zip(&run(false)) {
        assert_eq!(replayed.tokens, eager.tokens);
    }
}

/// With too few pages for all: whoever is preempted goes on later as if nothing had happened, with its budget, its penalties and
/// what it has said. Its keys and values come from prefill then and not from decode, so logits differ by rounding.
#[test]
fn preempted_as_undisturbed() {
    let run = |pages| {
        let options = ExecutorOptions { pages, max_context: Some(320), ..Default::default() };
        let mut engine = modulo::engine_with(&ThinkingChoice::Auto, &options);
        let requests: Vec<Request> = (0..6)
            .map(|i| Request {
                sampling: SamplingRequest { frequency_penalty: (i % 2 == 1).then_some(0.1), ..greedy() },
                budget: BudgetRequest {
                    max_thinking_tokens: Some(60 + 15 * i as u32),
                    n_ignore: 2 + i as u32 % 2,
                    ignore_strings: Some(vec![format!("Wait {i}\n"), "Wait\n".into()]),
                    ..Default::default()
                },
                ..ask(&engine, i, 170)
            })
            .collect();
        let answers = answer_all(&mut engine, &requests);
        assert!(is_empty(&engine));
        (answers, engine.stats().counters.preemptions)
    };
    let (undisturbed, none) = run(None);
    let (preempted, some) = run(Some(7));
    assert!(none == 0 && some > 1, "{some} preemptions");
    assert!(undisturbed.iter().any(|a| a.tokens.iter().any(|t| t.injected)));
    for (a, b) in undisturbed.iter().zip(&preempted) {
        assert_eq!((ids(a), a.text(), a.finish), (ids(b), b.text(), b.finish));
        for (a, b) in a.tokens.iter().zip(&b.tokens) {
            let budget =
                |t: &TokenEvent| (t.injected, t.reasoning, t.delimiter, t.max_hit, t.ignores_used, t.reasoning_tokens);
            assert_eq!(budget(a), budget(b));
            assert!((a.logprob - b.logprob).abs() < 0.1, "{} {}", a.logprob, b.logprob);
        }
    }
}

/// A fork takes over what its parent has computed, up to a copy of the last page, and its draws are its own.
#[test]
fn forks_as_alone() {
    let mut engine = engine();
    let request = |engine: &Engine, seed| Request {
        sampling: SamplingRequest { temperature: Some(1.5), seed: Some(seed), ..Default::default() },
        ..ask(engine, 0, 30)
    };
    let requests = [1, 2, 3].map(|seed| request(&engine, seed));
    let alone: Vec<_> =
        requests.iter().map(|r| ids(&answer_all(&mut self::engine(), std::slice::from_ref(r))[0])).collect();
    let before = engine.stats().counters.found_tokens;
    let parent = engine.submit(&requests[0]).unwrap();
    let forks = [parent, engine.fork(parent, &requests[1]).unwrap(), engine.fork(parent, &requests[2]).unwrap()];
    let mut answers = vec![Answer::default(); 3];
    while !engine.is_idle() {
        for update in engine.step().unwrap() {
            let index = forks.iter().position(|id| *id == update.request).unwrap();
            answers[index].extend(update.token, update.text, update.finish);
        }
    }
    assert_eq!(answers.iter().map(ids).collect::<Vec<_>>(), alone);
    let found = engine.stats().counters.found_tokens - before;
    assert_eq!(found, 2 * (requests[0].prompt.len() as u64 - 1));
}

/// A prompt that goes on where an earlier one went finds its pages, and comes to the same.
#[test]
fn found_as_cold() {
    let lines: String = (0..9).map(|t| modulo::problem(7).try_line(t)).collect();
    let long = |engine: &Engine, more: &str| {
        let mut request = ask(engine, 7, 24);
        request.prompt.extend(engine.frontend.tokenizer.encode(&format!("\n{lines}{more}")).unwrap());
        request
    };
    let mut warm = engine();
    let first = long(&warm, "");
    answer_all(&mut warm, std::slice::from_ref(&first));
    let request = long(&warm, &modulo::problem(7).try_line(9));
    let before = warm.stats().counters.found_tokens;
    let found = answer_all(&mut warm, std::slice::from_ref(&request)).remove(0);
    assert!(warm.stats().counters.found_tokens - before >= 192);
    let cold = answer_all(&mut engine(), std::slice::from_ref(&request)).remove(0);
    // What prefill computes does not depend on how it is cut: the same bits.
    let plain = |t: &TokenEvent| TokenEvent { serial: 0, slot: 0, found_tokens: 0, ..t.clone() };
    assert_eq!(found.tokens.iter().map(plain).collect::<Vec<_>>(), cold.tokens.iter().map(plain).collect::<Vec<_>>());
}

/// With `deterministic`, an answer is the same alone and in a busy batch, to the last bit of its log-probabilities.
#[test]
fn deterministic_answers_do_not_know_the_batch() {
    let options = ExecutorOptions { deterministic: true, ..Default::default() };
    let engine = || modulo::engine_with(&ThinkingChoice::Auto, &options);
    let request = |engine: &Engine, i: usize| Request {
        sampling: SamplingRequest {
            temperature: Some(0.5 * (i % 3) as f32),
            seed: Some(i as u64),
            logprobs: Some(2),
            ..Default::default()
        },
        budget: BudgetRequest { n_ignore: i as u32 % 2, ..Default::default() },
        ..ask(engine, i, 40 + 30 * (i as u32 % 5))
    };
    let mut busy = engine();
    let requests: Vec<Request> = (0..20).map(|i| request(&busy, i)).collect();
    let together = answer_all(&mut busy, &requests);
    let plain = |t: &TokenEvent| TokenEvent { serial: 0, slot: 0, found_tokens: 0, ..t.clone() };
    for i in [0, 4, 11, 19] {
        let alone = answer_all(&mut engine(), std::slice::from_ref(&requests[i])).remove(0);
        let plain = |answer: &Answer| answer.tokens.iter().map(plain).collect::<Vec<_>>();
        assert_eq!(plain(&alone), plain(&together[i]), "request {i}");
    }
}
