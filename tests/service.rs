//! The engine on threads of its own: streams for many threads, on a simulated GPU and on the device under test.

use crate::modulo;
use ponder::batch::Finish;
use ponder::chat::Message;
use ponder::device::host::HostOptions;
use ponder::device::{Device, Launch};
use ponder::engine::Stats;
use ponder::executor::ExecutorOptions;
use ponder::frontend::Frontend;
use ponder::kernels::planted::EVERYBODY_WAITS;
use ponder::kernels::planted::abi::{PLANTED_SHARED, PlantedParams};
use ponder::model::Weights;
use ponder::sampling::SamplingRequest;
use ponder::sequence::{Answer, FinishReason};
use ponder::service::Stream;
use ponder::thinking::ThinkingChoice;
use ponder::{Engine, Error, Request, Service};
use std::path::Path;
use std::time::{Duration, Instant};

fn engine() -> Engine {
    let frontend = Frontend::open(Path::new(modulo::FOLDER), &ThinkingChoice::Auto).unwrap();
    let device = Device::open("sim:h100,instant".parse().unwrap()).unwrap();
    let options = ExecutorOptions { max_slots: 33, pages: Some(120), max_context: Some(1024), ..Default::default() };
    Engine::new(frontend, Weights::Dummy, &device, &options, &mut |_, _| {}).unwrap()
}

fn request(frontend: &Frontend, seed: u64, tokens: u32) -> Request {
    Request {
        prompt: frontend.encode_chat(&[Message::new("user", format!("Question {}", seed % 7))]).unwrap(),
        max_tokens: Some(tokens),
        sampling: SamplingRequest { seed: Some(seed), ignore_eos: true, ..Default::default() },
        stop: if seed.is_multiple_of(3) { vec!["4".into()] } else { vec![] },
        ..Default::default()
    }
}

fn answer(stream: Stream) -> Answer {
    let mut answer = Answer::default();
    for update in stream {
        let update = update.unwrap();
        assert_eq!(answer.finish, None, "nothing follows the end");
        answer.extend(update.token, update.text, update.finish);
    }
    answer
}

fn wait_until(service: &Service, is: impl Fn(&Stats) -> bool) {
    let start = Instant::now();
    while !is(&service.stats()) {
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", service.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn is_empty(stats: &Stats) -> bool {
    (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)
}

/// Each as if it were alone in an engine without threads.
#[test]
fn many_threads_many_streams() {
    let service = Service::start(engine());
    let answers: Vec<Vec<Answer>> = std::thread::scope(|scope| {
        let ask = |thread: u64| {
            let service = &service;
            move || {
                (0..8)
                    .map(|i| answer(service.submit(&request(service.frontend(), 8 * thread + i, 150)).unwrap()))
                    .collect()
            }
        };
        let threads: Vec<_> = (0..16).map(|thread| scope.spawn(ask(thread))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut alone = engine();
    for (seed, answer) in answers.iter().flatten().enumerate() {
        let request = request(&alone.frontend, seed as u64, 150);
        let expected = modulo::answer_all(&mut alone, std::slice::from_ref(&request)).remove(0);
        assert_eq!((modulo::ids(answer), answer.finish), (modulo::ids(&expected), expected.finish));
        assert_eq!(answer.text(), expected.text());
        let by_string = answer.finish == Some(FinishReason::Stop);
        assert_eq!(by_string, answer.tokens.last().unwrap().finish != Some(Finish::Length));
    }
    wait_until(&service, is_empty);
}

/// Cancelled, dropped or stopped by the end of the service: everything is given back, and every stream ends.
#[test]
fn streams_end_early() {
    let service = Service::start(engine());
    let long = |seed| Request { stop: vec![], ..request(service.frontend(), seed, 900) };
    let mut cancelled = service.submit(&long(1)).unwrap();
    cancelled.next().unwrap().unwrap();
    cancelled.cancel();
    let last = cancelled.by_ref().last().unwrap().unwrap();
    assert!(matches!(last.finish, Some(FinishReason::Cancelled | FinishReason::Length)));
    assert!(cancelled.next().is_none());
    drop(service.submit(&long(2)).unwrap());
    wait_until(&service, is_empty);

    let parent = service.submit(&long(3)).unwrap();
    let streams = [service.fork(parent.id(), &long(4)).unwrap(), service.submit(&long(5)).unwrap(), parent];
    drop(service);
    for stream in streams {
        let last = stream.last().unwrap().unwrap();
        assert!(matches!(last.finish, Some(FinishReason::Cancelled | FinishReason::Length)), "{last:?}");
    }
}

#[test]
fn bad_requests_are_refused_at_once() {
    let service = Service::start(engine());
    assert!(matches!(service.submit(&Request::default()), Err(Error::Request { parameter: "prompt", .. })));
    wait_until(&service, is_empty);
}

/// With real kernels behind it.
#[test]
fn on_the_device_under_test() {
    let service = Service::start(modulo::engine(&ThinkingChoice::Auto));
    let question = |i| {
        let prompt = service.frontend().encode_chat(&[Message::new("user", modulo::problem(i).question())]).unwrap();
        let sampling = SamplingRequest { temperature: Some(0.0), ..Default::default() };
        Request { prompt, max_tokens: Some(10), sampling, ..Default::default() }
    };
    let requests: Vec<Request> = (0..3).map(question).collect();
    let streams: Vec<Stream> = requests.iter().map(|r| service.submit(r).unwrap()).collect();
    let answers: Vec<Answer> = streams.into_iter().map(answer).collect();
    let expected = modulo::answer_all(&mut modulo::engine(&ThinkingChoice::Auto), &requests);
    assert_eq!(
        answers.iter().map(modulo::ids).collect::<Vec<_>>(),
        expected.iter().map(modulo::ids).collect::<Vec<_>>()
    );
}

/// A kernel that waits for ever comes between the engine's own: the machine notices, every stream hears of it, and nobody is served
/// any more.
#[test]
fn a_device_that_fails_ends_every_stream() {
    let frontend = Frontend::open(Path::new(modulo::FOLDER), &ThinkingChoice::Auto).unwrap();
    let device = Device::host(HostOptions::default());
    let engine = Engine::new(frontend, Weights::Dummy, &device, &ExecutorOptions::default(), &mut |_, _| {}).unwrap();
    let service = Service::start(engine);
    let long = |seed| Request { stop: vec![], ..request(service.frontend(), seed, 2000) };
    let mut streams: Vec<Stream> = (1..4).map(|seed| service.submit(&long(seed)).unwrap()).collect();
    for stream in &mut streams {
        stream.next().unwrap().unwrap();
    }
    let launch = EVERYBODY_WAITS.launch([1, 1, 1], PlantedParams { planted: 1, ..Default::default() });
    device.launch(&Launch { shared_bytes: PLANTED_SHARED, ..launch }).unwrap();
    for stream in streams {
        let updates: Vec<_> = stream.collect();
        let (last, before) = updates.split_last().unwrap();
        assert!(before.iter().all(|update| update.as_ref().is_ok_and(|u| u.finish.is_none())));
        let problem = last.as_ref().unwrap_err().to_string();
        assert!(problem.contains("the engine has stopped") && problem.contains("everybody_waits"), "{problem}");
    }
    let refused = service.submit(&long(4)).err().unwrap().to_string();
    assert!(refused.contains("the engine has stopped") && refused.contains("everybody_waits"), "{refused}");
}
