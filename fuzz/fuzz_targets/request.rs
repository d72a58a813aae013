//! The body of a request in every dialect (the first byte says which): parsed, and judged as if it were to be served, without a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ponder::device::Device;
use ponder::executor::ExecutorOptions;
use ponder::frontend::Frontend;
use ponder::model::Weights;
use ponder::server::{self, ServerState, Settings};
use ponder::thinking::ThinkingChoice;
use ponder::{Engine, Service};
use std::path::Path;
use std::sync::{Arc, LazyLock};

static STATE: LazyLock<Arc<ServerState>> = LazyLock::new(|| {
    let frontend = Frontend::open(Path::new("models/modulo"), &ThinkingChoice::Auto).unwrap();
    let device = Device::open("sim:h100,instant".parse().unwrap()).unwrap();
    let engine = Engine::new(frontend, Weights::Dummy, &device, &ExecutorOptions::default(), &mut |_, _| {}).unwrap();
    ServerState::new(Service::start(engine), None, Settings::default())
});

const ADDRESSES: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"];

fuzz_target!(|input: &[u8]| {
    let Some((&dialect, body)) = input.split_first() else { return };
    if let Err(error) = server::judge(ADDRESSES[usize::from(dialect) % 4], body, &STATE) {
        assert!(error.status.is_client_error() && !error.message.is_empty(), "{error:?}");
    }
});
