//! The engine under load on a simulated GPU: every request gets its own tokens whatever happens around it, and the host does not
//! keep the device waiting.

use crate::modulo;
use crate::random::Random;
use ponder::bench::host;
use ponder::budget::BudgetRequest;
use ponder::device::{Device, DeviceChoice};
use ponder::engine::{Engine, RequestId, Stats};
use ponder::executor::ExecutorOptions;
use ponder::frontend::{Frontend, Request};
use ponder::model::{Weights, key_bytes};
use ponder::sampling::SamplingRequest;
use ponder::sequence::{Answer, FinishReason};
use ponder::simulator::step_seconds;
use ponder::thinking::ThinkingChoice;
use std::collections::BTreeMap;
use std::path::Path;

/// Time is counted, so that nothing waits.
const DEVICE: &str = "sim:h100,fp8,instant";

fn device() -> Device {
    Device::open(DEVICE.parse::<DeviceChoice>().unwrap()).unwrap()
}

/// The tokenizer and delimiters of the tiny model.
fn thinking_engine(options: &ExecutorOptions) -> Engine {
    let frontend = Frontend::open(Path::new(modulo::FOLDER), &ThinkingChoice::Auto).unwrap();
    Engine::new(frontend, Weights::Dummy, &device(), options, &mut |_, _| {}).unwrap()
}

/// Qwen2.5-32B in fp8, as far as time and memory are concerned.
fn large_engine(sequences: u32) -> Engine {
    let frontend = Frontend::without_text(Path::new("benches/models/qwen2.5-32b")).unwrap();
    let options = ExecutorOptions { max_slots: sequences + 1, ..Default::default() };
    Engine::new(frontend, Weights::Dummy, &device(), &options, &mut |_, _| {}).unwrap()
}

fn is_empty(stats: &Stats) -> bool {
    (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)
}

/// All kinds of requests; some begin as others do. `start`: what opens the thinking.
fn any_request(random: &mut Random, vocab: u32, start: &[u32]) -> Request {
    let family = u64::from(random.below(3));
    let tokens = |random: &mut Random, n: u32| -> Vec<u32> { (0..n).map(|_| 3 + random.below(vocab - 3)).collect() };
    let shared = random.below(200);
    let mut prompt = tokens(&mut Random(family), shared);
    let own = 1 + random.below(60);
    prompt.extend(tokens(random, own));
    prompt.extend(start.iter().filter(|_| !own.is_multiple_of(4)));
    let budget = match random.below(3) {
        0 => BudgetRequest::default(),
        _ => {
            let max = 1 + random.below(300);
            BudgetRequest {
                max_thinking_tokens: Some(max),
                min_thinking_tokens: random.below(max),
                n_ignore: random.below(4),
                ignore_strings: Some(vec![["Wait", " Hmm, wait", ""][random.below(3) as usize].into()]),
                ..Default::default()
            }
        }
    };
    Request {
        prompt,
        max_tokens: Some(1 + random.below(600)),
        sampling: SamplingRequest {
            seed: Some(random.next()),
            ignore_eos: random.below(4) > 0,
            repetition_penalty: (random.below(4) == 0).then_some(1.2),
            ..Default::default()
        },
        stop: if random.below(20) == 0 { vec!["7".into()] } else { vec![] },
        budget,
        priority: if random.below(6) == 0 { random.below(40) } else { 0 },
        tenant: if random.below(4) == 0 { "another".into() } else { String::new() },
        ..Default::default()
    }
}

/// What a request comes to when nothing else runs.
fn alone(engine: &mut Engine, request: &Request) -> Answer {
    modulo::answer_all(engine, std::slice::from_ref(request)).remove(0)
}

/// More than there is room for, cancelled now and then, preempted all the time: everybody gets exactly the tokens that are
/// theirs, thinking budgets and all, and nothing is left behind.
#[test]
fn a_thousand_requests_under_pressure() {
    let mut quiet = thinking_engine(&ExecutorOptions::default());
    let options =
        ExecutorOptions { max_slots: 65, pages: Some(70), max_context: Some(1024), ..ExecutorOptions::default() };
    let mut busy = thinking_engine(&options);
    let vocab = busy.frontend.tokenizer.real_tokens() as u32;
    let start = busy.frontend.delimiters.as_ref().unwrap().start.clone();
    let mut random = Random(1);
    let mut requests: BTreeMap<RequestId, (Request, Answer)> = BTreeMap::new();
    let (mut submitted, mut cancelled, mut last) = (0, 0, None);
    let mut open: Vec<RequestId> = Vec::new();
    while submitted < 1000 || !busy.is_idle() {
        while submitted < 1000 && busy.stats().waiting < 30 {
            let parent = last.filter(|_| random.below(6) == 0);
            let request = match parent {
                Some(parent) => {
                    let Request { prompt, tenant, .. } = requests[&parent].0.clone();
                    Request { prompt, tenant, ..any_request(&mut random, vocab, &start) }
                }
                None => any_request(&mut random, vocab, &start),
            };
            let id = match parent {
                Some(parent) => busy.fork(parent, &request).unwrap(),
                None => busy.submit(&request).unwrap(),
            };
            requests.insert(id, (request, Answer::default()));
            open.push(id);
            last = Some(id);
            submitted += 1;
        }
        for update in busy.step().unwrap() {
            let answer = &mut requests.get_mut(&update.request).unwrap().1;
            assert_eq!(answer.finish, None, "nothing follows the end");
            answer.extend(update.token, update.text, update.finish);
            open.retain(|&id| id != update.request || update.finish.is_none());
        }
        if random.below(150) == 0 && !open.is_empty() {
            let id = open.swap_remove(random.below(open.len() as u32) as usize);
            let update = busy.cancel(id).unwrap();
            requests.get_mut(&id).unwrap().1.extend(update.token, update.text, update.finish);
            cancelled += 1;
        }
    }
    let stats = busy.stats();
    assert!(is_empty(&stats), "{stats:?}");
    assert!(cancelled > 30 && stats.counters.preemptions > 50, "{cancelled} cancelled, {stats:?}");
    assert!(stats.counters.found_tokens * 5 > stats.counters.prefilled_tokens, "{stats:?}");
    let (mut ignores, mut hits) = (0, 0);
    for (request, answer) in requests.values() {
        let expected = alone(&mut quiet, request);
        if answer.finish == Some(FinishReason::Cancelled) {
            assert_eq!(answer.tokens.len(), modulo::ids(answer).len());
            assert!(modulo::ids(&expected).starts_with(&modulo::ids(answer)), "{request:?}");
            continue;
        }
        assert_eq!(answer.finish, expected.finish);
        assert_eq!(answer.text(), expected.text());
        assert_eq!(answer.tokens.len(), expected.tokens.len());
        for (token, expected) in answer.tokens.iter().zip(&expected.tokens) {
            let plain = |t: &ponder::batch::TokenEvent| ponder::batch::TokenEvent {
                serial: 0,
                slot: 0,
                found_tokens: 0,
                ..t.clone()
            };
            assert_eq!(plain(token), plain(expected), "{request:?}");
        }
        let last = answer.tokens.last().unwrap();
        ignores += last.ignores_used;
        hits += u32::from(last.max_hit);
    }
    assert!(ignores > 200 && hits > 100, "{ignores} ends ignored, {hits} maxima hit");
}

/// 64 requests, each with a budget and strings of its own, in one step: each as if it were alone.
#[test]
fn sixty_four_budgets_in_one_batch() {
    let mut engine = thinking_engine(&ExecutorOptions { max_slots: 65, ..ExecutorOptions::default() });
    let prompt = engine.frontend.encode_chat(&[ponder::chat::Message::new("user", "Find x.")]).unwrap();
    let end = engine.frontend.tokenizer.decode(&engine.frontend.delimiters.as_ref().unwrap().end);
    let requests: Vec<Request> = (0..64)
        .map(|i| Request {
            prompt: prompt.clone(),
            max_tokens: Some(400),
            sampling: SamplingRequest { seed: Some(i), ..Default::default() },
            budget: BudgetRequest {
                max_thinking_tokens: Some(40 + 4 * i as u32),
                min_thinking_tokens: i as u32,
                n_ignore: i as u32 % 5,
                ignore_strings: Some(vec![format!("Wait {i}"), format!("Hmm {i}")]),
                end_string: Some(format!("{end}The answer, {i}: ")),
                ..Default::default()
            },
            ..Default::default()
        })
        .collect();
    let together = modulo::answer_all(&mut engine, &requests);
    let (mut hits, mut ignores) = (0, 0);
    for (i, (request, together)) in requests.iter().zip(&together).enumerate() {
        let alone = alone(&mut engine, request);
        assert_eq!((modulo::ids(&alone), alone.text()), (modulo::ids(together), together.text()));
        let last = together.tokens.last().unwrap();
        assert!(last.reasoning_tokens <= 40 + 4 * i as u32 + 4, "a character may be finished");
        assert_eq!(last.max_hit, together.text().contains(&format!("The answer, {i}: ")));
        hits += u32::from(last.max_hit);
        ignores += last.ignores_used;
        if last.ignores_used > 0 {
            assert!(together.text().contains(&format!("Wait {i}")));
        }
    }
    assert!(hits > 10 && hits < 64 && ignores > 40, "{hits} maxima hit, {ignores} ends ignored");
}

/// Tokens of `requests` with `input` and `output` tokens and, of the time that this took, how much the device was busy at the
/// least; and the times between tokens.
fn load(engine: &mut Engine, requests: &[Request]) -> (f64, BTreeMap<RequestId, Vec<f64>>) {
    let start = engine.now();
    let mut times: BTreeMap<RequestId, Vec<f64>> = BTreeMap::new();
    for request in requests {
        times.insert(engine.submit(request).unwrap(), Vec::new());
    }
    while !engine.is_idle() {
        for update in engine.step().unwrap() {
            times.get_mut(&update.request).unwrap().push((engine.now() - start).as_secs_f64());
        }
    }
    ((engine.now() - start).as_secs_f64(), times)
}

fn exact(seed: u64, input: u32, output: u32) -> Request {
    let mut random = Random(seed);
    Request {
        prompt: (0..input).map(|_| random.below(100_000)).collect(),
        max_tokens: Some(output),
        sampling: SamplingRequest { temperature: Some(0.0), ignore_eos: true, ..Default::default() },
        ..Default::default()
    }
}

/// Long decodes with a row for everybody: as fast as the device can, with and without prompts that are found computed.
#[test]
fn the_host_adds_nothing() {
    let gpu = *device().simulated().unwrap();
    for (shared, found) in [(false, 0), (true, 60 * 448)] {
        let mut engine = large_engine(64);
        let requests: Vec<Request> = (0..64).map(|i| exact(if shared { 0 } else { i }, 512, 4000)).collect();
        let (seconds, times) = load(&mut engine, &requests);
        let config = &engine.frontend.config;
        // Prompts in full steps, then every token in a step of all rows.
        let tokens = 64 * 512 - engine.stats().counters.found_tokens;
        let key_bytes = |keys| key_bytes(config, engine.memory().kv_type, keys);
        let prefill = tokens as f64 / 512.0 * step_seconds(&gpu, config, 512, 1, key_bytes(512), 512 * 256);
        let step = |keys: u64| step_seconds(&gpu, config, 64, 64, key_bytes(64 * keys), 64 * keys);
        let decode: f64 = (512..4511).map(step).sum();
        let bound = prefill + decode;
        println!("{} tokens/s, bound {}", 256_000.0 / seconds, 256_000.0 / bound);
        assert!(engine.stats().counters.found_tokens >= found, "{:?}", engine.stats());
        assert_eq!(engine.stats().counters.preemptions, 0);
        assert!(times.values().all(|t| t.len() == 4000));
        assert!(seconds < 1.03 * bound, "{seconds} s, {bound} s at the least");
    }
}

/// Prompts arrive while others decode, all the time or now and then: nobody's tokens come much later for it.
#[test]
fn prompts_do_not_hold_up_answers() {
    // So many requests of so many prompt tokens and about so many more.
    for (count, input, output) in [(200, 2000, 200), (200, 500, 1500)] {
        let mut engine = large_engine(64);
        let mut random = Random(2);
        let mut around = |n: u32| n / 2 + random.below(n);
        let requests: Vec<Request> = (0..count).map(|i| exact(i, around(input), around(output))).collect();
        let (_, times) = load(&mut engine, &requests);
        let mut gaps: Vec<f64> = times.values().flat_map(|t| t.windows(2).map(|w| w[1] - w[0])).collect();
        gaps.sort_by(f64::total_cmp);
        let (median, p99) = (gaps[gaps.len() / 2], gaps[gaps.len() * 99 / 100]);
        println!("between tokens: median {median} s, p99 {p99} s, longest {} s", gaps.last().unwrap());
        assert!(p99 < 2.0 * median, "{median} {p99}");
    }
}

/// With time that passes.
#[test]
fn steps_take_their_time() {
    let frontend = Frontend::without_text(Path::new("benches/models/qwen2.5-32b")).unwrap();
    let device = Device::open("sim:h100,fp8".parse().unwrap()).unwrap();
    let mut engine = Engine::new(frontend, Weights::Dummy, &device, &Default::default(), &mut |_, _| {}).unwrap();
    let start = std::time::Instant::now();
    let (seconds, _) = load(&mut engine, &[exact(1, 10, 20)]);
    let config = &engine.frontend.config;
    let key_bytes = key_bytes(config, engine.memory().kv_type, 20);
    let step = step_seconds(device.simulated().unwrap(), config, 1, 1, key_bytes, 20);
    assert!(seconds > 20.0 * step && seconds <= start.elapsed().as_secs_f64(), "{seconds} s for 20 steps of {step} s");
}

#[test]
fn no_kernel_runs_on_a_simulated_device() {
    assert!(matches!(device().alloc(16), Err(ponder::Error::Device(_))));
    for text in ["sim:", "sim:a100", "sim:h100,fp4", "sim:h100,"] {
        assert!(matches!(text.parse::<DeviceChoice>(), Err(ponder::Error::Usage(_))), "{text}");
    }
}

/// The bench runs, and leaves the engine as it was. How long things take is not for a test to say.
#[test]
fn host_work_is_measured() {
    let mut engine = large_engine(20);
    let m = host::run(&mut engine, 20, 30).unwrap();
    assert!(m.plan > 0.0 && m.receive > 0.0 && m.text > 0.0, "{m:?}");
    assert!(m.all >= m.plan.max(m.receive).max(m.text) && m.p99 >= m.all, "{m:?}");
    assert!(engine.is_idle() && is_empty(&engine.stats()));
}
