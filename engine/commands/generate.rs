//! `ponder generate`: one prompt, one answer.

use super::output::{self, Meter, Printer};
use super::profile;
use crate::args::GenerateArgs;
use crate::chat::Message;
use crate::executor::ExecutorOptions;
use crate::frontend::Frontend;
use crate::sequence::{Channel, FinishReason};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::io::Read;

pub fn run(args: &GenerateArgs) -> Result<()> {
    let (frontend, checkpoint, device) = super::open(&args.model)?;
    let mut request = args.request.request();
    request.prompt = prompt(args, &frontend)?;
    request.sampling.logprobs = args.logprobs;
    request.sampling.prompt_logprobs = args.prompt_logprobs;
    // The context may turn out shorter; all else that is wrong with the request is said before the weights load.
    frontend.accept(&request, 0, frontend.config.max_position_embeddings as u32)?;

    let options = ExecutorOptions { profile: args.profile, ..super::options(&args.model) };
    let mut engine = super::load(frontend, checkpoint.as_ref(), &device, &options)?;
    let mut meter = Meter::start(super::telemetry(&args.model.source, &device));
    let mut printer = Printer::new();
    engine.submit(&request)?;
    while !engine.is_idle() {
        for update in engine.step()? {
            if !args.json {
                printer.print(&update.text)?;
            }
            meter.take(update);
        }
    }
    let thinks = engine.frontend.delimiters.is_some();
    if args.json {
        return printer.write(&format!("{:#}\n", json(args, &request.prompt, &meter, thinks)));
    }
    printer.end_line()?;
    eprintln!("{}", meter.report(thinks));
    if args.profile {
        let roofline = device.roofline();
        printer.write(&profile::table(engine.profile(), roofline))?;
    }
    Ok(())
}

fn prompt(args: &GenerateArgs, frontend: &Frontend) -> Result<Vec<u32>> {
    if let Some(ids) = &args.prompt_ids {
        return Ok(ids.clone());
    }
    let text = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?,
        (None, None) => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map_err(|e| Error::io("standard input", e))?;
            text
        }
    };
    if args.raw {
        return frontend.encode(&text);
    }
    // Files and pipes end with a newline that nobody means.
    let text = text.trim_end_matches(['\n', '\r']);
    if text.is_empty() {
        return Err(Error::request(
            "prompt",
            "empty: give it as an argument, with --prompt-file, or on standard input",
        ));
    }
    let system = args.system.iter().map(|text| Message::new("system", text));
    let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
    frontend.encode_chat(&messages)
}

/// The object that `--json` prints.
fn json(args: &GenerateArgs, prompt: &[u32], meter: &Meter, thinks: bool) -> Value {
    let answer = &meter.answer;
    let (speed, last) = (meter.speed(), answer.tokens.last());
    let logprob = |id: u32, logprob: f32, top: &[(u32, f32)]| {
        let top: Vec<Value> = top.iter().map(|(id, l)| json!({"id": id, "logprob": l})).collect();
        json!({"id": id, "logprob": logprob, "top": top})
    };
    let of_answer = || answer.tokens.iter().map(|t| logprob(t.token, t.logprob, &t.top)).collect::<Vec<_>>();
    // They come with the first token.
    let of_prompt = || {
        let scores = answer.tokens.iter().flat_map(|t| &t.prompt);
        scores.map(|score| logprob(score.token, score.logprob, &score.top)).collect::<Vec<_>>()
    };
    let thinking = last.filter(|_| thinks).map(output::thinking);
    json!({
        "prompt_ids": prompt,
        "token_ids": answer.tokens.iter().map(|t| t.token).collect::<Vec<_>>(),
        "text": answer.text(),
        "reasoning": thinks.then(|| answer.channel(Channel::Reasoning)),
        "answer": answer.channel(Channel::Answer),
        "logprobs": args.logprobs.map(|_| of_answer()),
        "prompt_logprobs": args.prompt_logprobs.map(|_| of_prompt()),
        "finish_reason": answer.finish.map(FinishReason::name),
        "usage": {
            "prompt_tokens": prompt.len(),
            "completion_tokens": answer.tokens.len(),
            "total_tokens": prompt.len() + answer.tokens.len(),
        },
        "thinking": thinking,
        "speed": {
            "seconds_to_first_token": speed.seconds_to_first_token,
            "tokens_per_second": speed.tokens_per_second,
            "joules_per_token": speed.joules_per_token,
        },
    })
}
