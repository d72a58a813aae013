//! Several questions at once to the tiny thinking model: `cargo run --release --example service`.

use ponder::budget::BudgetRequest;
use ponder::chat::Message;
use ponder::checkpoint::Checkpoint;
use ponder::device::{Device, DeviceChoice};
use ponder::frontend::Frontend;
use ponder::model::Weights;
use ponder::sequence::{Answer, Channel};
use ponder::thinking::ThinkingChoice;
use ponder::{Engine, Request, Result, Service};
use std::path::Path;

fn main() -> Result<()> {
    let folder = Path::new("models/modulo");
    let frontend = Frontend::open(folder, &ThinkingChoice::Auto)?;
    let checkpoint = Checkpoint::open(folder)?;
    let device = Device::open(DeviceChoice::Auto)?;
    let weights = Weights::Checkpoint(&checkpoint);
    let service = Service::start(Engine::new(frontend, weights, &device, &Default::default(), &mut |_, _| {})?);

    // All are running before the first answer is read.
    let questions =
        ["Find x with 3x + 4 = 2 (mod 11).", "Find x with 7x + 1 = 6 (mod 13).", "Find x with 2x + 9 = 0 (mod 19)."];
    let mut streams = Vec::new();
    for question in questions {
        let request = Request {
            prompt: service.frontend().encode_chat(&[Message::new("user", question)])?,
            budget: BudgetRequest { max_thinking_tokens: Some(300), n_ignore: 1, ..Default::default() },
            ..Default::default()
        };
        streams.push(service.submit(&request)?);
    }
    for (question, stream) in questions.iter().zip(streams) {
        let mut answer = Answer::default();
        for update in stream {
            let update = update?;
            answer.extend(update.token, update.text, update.finish);
        }
        let thought = answer.tokens.last().map_or(0, |token| token.reasoning_tokens);
        println!("{question} {} ({thought} thinking tokens)", answer.channel(Channel::Answer));
    }
    Ok(())
}
