//! `ponder batch`: a file of requests, one JSON object a line, served together; answers in the order of the file. What is in the
//! output file already is not asked again.

use super::output;
use crate::args::BatchArgs;
use crate::batch::{Accounting, OnEnd};
use crate::chat::Message;
use crate::engine::{Engine, RequestId};
use crate::frontend::{Frontend, Request};
use crate::sequence::{Answer, Channel, FinishReason};
use crate::steering::SteeringRequest;
use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;

/// Requests that wait beside those that run, so that a seat is never empty.
const AHEAD: usize = 64;

/// A line of the input. What it does not say is as the flags say; names are theirs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    /// Anything; comes back with the answer.
    #[serde(default)]
    id: Value,
    /// One of these: a question, a conversation, a text to go on with, or token ids.
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    raw_prompt: Option<String>,
    prompt_ids: Option<Vec<u32>>,

    max_tokens: Option<u32>,
    stop: Option<Vec<String>>,
    priority: Option<u32>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    seed: Option<u64>,
    min_tokens: Option<u32>,
    ignore_eos: Option<bool>,
    stop_ids: Option<Vec<u32>>,
    allowed_ids: Option<Vec<u32>>,
    exact_thinking_tokens: Option<u32>,
    max_thinking_tokens: Option<u32>,
    min_thinking_tokens: Option<u32>,
    n_ignore: Option<u32>,
    ignore_strings: Option<Vec<String>>,
    end_string: Option<String>,
    accounting: Option<AccountingName>,
    on_end: Option<OnEndName>,
    steering: Option<SteeringRequest>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum AccountingName {
    Strict,
    S1Harness,
    S1Readme,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum OnEndName {
    Replace,
    Mask,
}

impl Line {
    /// # Errors
    /// No prompt, or more than one; one that cannot be encoded.
    fn request(self, defaults: &Request, frontend: &Frontend) -> Result<Request> {
        let mut request = defaults.clone();
        request.prompt = match (self.prompt, self.messages, self.raw_prompt, self.prompt_ids) {
            (Some(text), None, None, None) => frontend.encode_chat(&[Message::new("user", text)])?,
            (None, Some(messages), None, None) => frontend.encode_chat(&messages)?,
            (None, None, Some(text), None) => frontend.encode(&text)?,
            (None, None, None, Some(ids)) => ids,
            _ => return Err(Error::request("prompt", "give one of prompt, messages, raw_prompt and prompt_ids")),
        };
        request.max_tokens = self.max_tokens.or(request.max_tokens);
        request.stop = self.stop.unwrap_or(request.stop);
        request.priority = self.priority.unwrap_or(request.priority);
        let s = &mut request.sampling;
        s.temperature = self.temperature.or(s.temperature);
        s.top_k = self.top_k.or(s.top_k);
        s.top_p = self.top_p.or(s.top_p);
        s.min_p = self.min_p.or(s.min_p);
        s.repetition_penalty = self.repetition_penalty.or(s.repetition_penalty);
        s.presence_penalty = self.presence_penalty.or(s.presence_penalty);
        s.frequency_penalty = self.frequency_penalty.or(s.frequency_penalty);
        s.seed = self.seed.or(s.seed);
        s.min_tokens = self.min_tokens.unwrap_or(s.min_tokens);
        s.ignore_eos = self.ignore_eos.unwrap_or(s.ignore_eos);
        s.stop_ids = self.stop_ids.unwrap_or_else(|| s.stop_ids.clone());
        s.allowed_ids = self.allowed_ids.or_else(|| s.allowed_ids.clone());
        let b = &mut request.budget;
        b.exact_thinking_tokens = self.exact_thinking_tokens.or(b.exact_thinking_tokens);
        b.max_thinking_tokens = self.max_thinking_tokens.or(b.max_thinking_tokens);
        b.min_thinking_tokens = self.min_thinking_tokens.unwrap_or(b.min_thinking_tokens);
        b.n_ignore = self.n_ignore.unwrap_or(b.n_ignore);
        b.ignore_strings = self.ignore_strings.or_else(|| b.ignore_strings.clone());
        b.end_string = self.end_string.or_else(|| b.end_string.clone());
        b.accounting = self.accounting.map_or(b.accounting, |name| match name {
            AccountingName::Strict => Accounting::Strict,
            AccountingName::S1Harness => Accounting::S1Harness,
            AccountingName::S1Readme => Accounting::S1Readme,
        });
        b.on_end = self.on_end.map_or(b.on_end, |name| match name {
            OnEndName::Replace => OnEnd::Replace,
            OnEndName::Mask => OnEnd::Mask,
        });
        b.steering = self.steering.unwrap_or_else(|| b.steering.clone());
        Ok(request)
    }
}

pub fn run(args: &BatchArgs) -> Result<()> {
    let (frontend, checkpoint, device) = super::open(&args.model)?;
    let lines = count_lines(&args.file)?;
    let (mut output, done) = open_output(&args.output)?;
    if done > lines {
        return Err(Error::Usage(format!(
            "--output {}: it has {done} answers, and {} {lines} requests: they do not belong together",
            args.output.display(),
            args.file.display()
        )));
    }
    let mut engine = super::load(frontend, checkpoint.as_ref(), &device, &super::options(&args.model))?;
    let bar =
        ProgressBar::with_draw_target(Some(lines as u64), ProgressDrawTarget::stderr()).with_position(done as u64);
    let style = "{bar:40} {pos} of {len} requests, {msg} tokens/s, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
    bar.reset_eta();

    let input = BufReader::new(File::open(&args.file).map_err(|e| Error::io(&args.file, e))?);
    let mut requests = input.lines().enumerate().skip(done);
    let defaults = args.request.request();
    // Answers that are complete and wait for earlier ones, by line.
    let mut complete = BTreeMap::<usize, Value>::new();
    let mut open = HashMap::<RequestId, Open>::new();
    let (start, mut next, mut tokens) = (engine.now(), done, 0u64);
    while next < lines {
        while engine.stats().waiting < AHEAD {
            let Some((index, line)) = requests.next() else { break };
            let line = line.map_err(|e| Error::io(&args.file, e))?;
            match submit(&mut engine, &line, &defaults) {
                Ok((id, name, prompt_tokens)) => {
                    drop(open.insert(id, Open { index, name, prompt_tokens, answer: Answer::default() }))
                }
                Err(problem) => drop(complete.insert(index, json!({"index": index, "error": problem}))),
            }
        }
        for update in engine.step()? {
            tokens += u64::from(update.token.is_some());
            let request = open.get_mut(&update.request).expect("updates are of open requests");
            request.answer.extend(update.token, update.text, update.finish);
            if update.finish.is_some() {
                let request = open.remove(&update.request).expect("it is open");
                complete.insert(request.index, request.json(engine.frontend.delimiters.is_some()));
            }
        }
        let before = next;
        while let Some(answer) = complete.remove(&next) {
            writeln!(output, "{answer}").map_err(Error::Output)?;
            next += 1;
        }
        if next > before {
            output.flush().map_err(Error::Output)?;
            bar.set_position(next as u64);
            bar.set_message(format!("{:.1}", tokens as f64 / (engine.now() - start).as_secs_f64()));
        }
    }
    bar.finish_and_clear();
    let seconds = (engine.now() - start).as_secs_f64();
    eprintln!("[{} requests, {tokens} tokens, {:.1} tokens/s]", lines - done, tokens as f64 / seconds.max(1e-9));
    Ok(())
}

/// A request without an end.
struct Open {
    index: usize,
    name: Value,
    prompt_tokens: usize,
    answer: Answer,
}

impl Open {
    /// A line of the output.
    fn json(&self, thinks: bool) -> Value {
        let (answer, last) = (&self.answer, self.answer.tokens.last());
        json!({
            "index": self.index,
            "id": self.name,
            "text": answer.text(),
            "reasoning": thinks.then(|| answer.channel(Channel::Reasoning)),
            "answer": answer.channel(Channel::Answer),
            "finish_reason": answer.finish.map(FinishReason::name),
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": answer.tokens.len(),
                "total_tokens": self.prompt_tokens + answer.tokens.len(),
            },
            "thinking": last.filter(|_| thinks).map(output::thinking),
        })
    }
}

/// The request of a line, its `id` and the tokens of its prompt; or what is wrong with it.
fn submit(
    engine: &mut Engine,
    line: &str,
    defaults: &Request,
) -> std::result::Result<(RequestId, Value, usize), String> {
    let mut line: Line = serde_json::from_str(line).map_err(|e| format!("not a request: {e}"))?;
    let name = line.id.take();
    let request = line.request(defaults, &engine.frontend).map_err(|e| e.to_string())?;
    let id = engine.submit(&request).map_err(|e| e.to_string())?;
    Ok((id, name, request.prompt.len()))
}

fn count_lines(path: &Path) -> Result<usize> {
    let file = BufReader::new(File::open(path).map_err(|e| Error::io(path, e))?);
    file.lines().try_fold(0, |n, line| line.map(|_| n + 1)).map_err(|e| Error::io(path, e))
}

/// The output file, open at its end, and how many answers it has. A line that was cut short is removed.
fn open_output(path: &Path) -> Result<(File, usize)> {
    let io = |e| Error::io(path, e);
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
    // Bytes: a line may have been cut inside a character.
    let (mut reader, mut line) = (BufReader::new(&file), Vec::new());
    let (mut bytes, mut done) = (0, 0);
    while reader.read_until(b'\n', &mut line).map_err(io)? > 0 && line.ends_with(b"\n") {
        let index = serde_json::from_slice::<Value>(&line).ok().and_then(|value| value["index"].as_u64());
        if index != Some(done as u64) {
            let problem = format!("line {} is not an answer of ponder batch: name another file", done + 1);
            return Err(Error::Usage(format!("--output {}: {problem}", path.display())));
        }
        (bytes, done) = (bytes + line.len() as u64, done + 1);
        line.clear();
    }
    file.set_len(bytes).map_err(Error::Output)?;
    file.seek(SeekFrom::End(0)).map_err(Error::Output)?;
    Ok((file, done))
}
