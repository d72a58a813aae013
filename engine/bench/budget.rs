//! `ponder bench budget`: s1's loop against one request. To ignore N ends of thinking, the loop makes N + 2 plain calls: each
//! round of thinking up to its end, whatever came before as its prompt; then the answer. In one request the sampler does the same
//! without leaving the GPU. The tokens must be equal, or nothing has been compared.

use crate::budget::BudgetRequest;
use crate::engine::Engine;
use crate::frontend::Request;
use crate::sampling::SamplingRequest;
use crate::sequence::FinishReason;
use crate::thinking::Delimiters;
use crate::{Error, Result};
use serde::Serialize;

/// One way to the answer.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Run {
    pub seconds: f64,
    /// Tokens of prompts whose keys and values were computed.
    pub prefilled_tokens: u64,
}

/// The same tokens in three ways.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measurement {
    pub n_ignore: u32,
    /// After the prompt.
    pub tokens: usize,
    /// Of the loop.
    pub calls: u32,
    pub one_request: Run,
    /// Nothing is kept from call to call.
    pub calls_alone: Run,
    /// Each call finds the full pages of the one before.
    pub calls_with_prefix_cache: Run,
}

impl Measurement {
    pub fn heading() -> &'static str {
        "                            one request            N + 2 calls              N + 2 calls, prefix cache\n  \
         ignored  tokens  calls   seconds  prefill    seconds  ratio  prefill    seconds  ratio  prefill"
    }

    pub fn line(&self) -> String {
        let Measurement { n_ignore, tokens, calls, one_request: one, .. } = self;
        let run = |r: &Run| format!("{:10.3} {:6.3} {:8}", r.seconds, r.seconds / one.seconds, r.prefilled_tokens);
        let (alone, cached) = (run(&self.calls_alone), run(&self.calls_with_prefix_cache));
        let (seconds, prefilled) = (one.seconds, one.prefilled_tokens);
        format!("{n_ignore:9} {tokens:7} {calls:6} {seconds:9.3} {prefilled:8} {alone} {cached}")
    }
}

/// Answers `prompt`, greedily, with the first `n_ignore` ends of thinking replaced by the model's ignore strings.
///
/// # Errors
/// A model without delimiters; thinking that does not end by itself; answers that differ.
pub fn run(engine: &mut Engine, prompt: &[u32], n_ignore: u32) -> Result<Measurement> {
    let Some(delimiters) = engine.frontend.delimiters.clone() else {
        return Err(Error::request(
            "thinking",
            "this model has no thinking delimiters, so there are no ends to ignore",
        ));
    };
    let [end] = delimiters.end[..] else {
        return Err(Error::request("thinking", "its end has several tokens: the loop's calls stop at one"));
    };
    let eos = engine.frontend.config.eos_token_ids.clone();
    let budget = BudgetRequest { n_ignore, ..Default::default() };
    let request = Request { budget, ..plain(prompt.to_vec(), format!("one request, {n_ignore}")) };
    let (one_request, tokens) = measure(engine, |engine| generate(engine, &request))?;
    let mut runs = [one_request; 2];
    for (run, cached) in runs.iter_mut().zip([false, true]) {
        let of_loop;
        (*run, of_loop) =
            measure(engine, |engine| s1_loop(engine, prompt, n_ignore, (&delimiters, end, &eos), cached))?;
        if let Some(at) = (0..tokens.len().max(of_loop.len())).find(|&i| tokens.get(i) != of_loop.get(i)) {
            let decode = |ids: &[u32]| engine.frontend.tokenizer.decode(&ids[at.min(ids.len())..ids.len().min(at + 8)]);
            return Err(Error::Device(format!(
                "with {n_ignore} ends ignored, token {at} of the answer differs: {:?} in one request, {:?} in the loop, which \
                 computes by prefill what the one request decodes; the two best tokens may be as good as equal: ask another \
                 question",
                decode(&tokens),
                decode(&of_loop)
            )));
        }
    }
    let [calls_alone, calls_with_prefix_cache] = runs;
    let (tokens, calls) = (tokens.len(), n_ignore + 2);
    Ok(Measurement { n_ignore, tokens, calls, one_request, calls_alone, calls_with_prefix_cache })
}

/// The tokens after `prompt`, by calls that know no budget.
fn s1_loop(
    engine: &mut Engine,
    prompt: &[u32],
    n_ignore: u32,
    (delimiters, end, eos): (&Delimiters, u32, &[u32]),
    cached: bool,
) -> Result<Vec<u32>> {
    let mut ids = prompt.to_vec();
    // Tenants share no pages.
    let tenant = |call| if cached { format!("loop, {n_ignore}") } else { format!("call {call} of loop, {n_ignore}") };
    for round in 0..=n_ignore {
        let mut call = plain(ids.clone(), tenant(round));
        call.sampling.stop_ids = vec![end];
        call.sampling.min_tokens = u32::from(round > 0);
        ids.extend(generate(engine, &call)?);
        if ids.pop_if(|last| *last == end || eos.contains(last)).is_none() {
            return Err(Error::request(
                "prompt",
                "the model does not end its thinking by itself: ask another question",
            ));
        }
        let ignore = &delimiters.ignore_strings;
        match round < n_ignore {
            true if ignore.is_empty() => return Err(Error::request("thinking", "the model has no ignore strings")),
            true => ids.extend(&ignore[round as usize % ignore.len()]),
            false => ids.extend(&delimiters.close),
        }
    }
    let answer = generate(engine, &plain(ids.clone(), tenant(n_ignore + 1)))?;
    ids.extend(answer);
    Ok(ids.split_off(prompt.len()))
}

fn plain(prompt: Vec<u32>, tenant: String) -> Request {
    let sampling = SamplingRequest { temperature: Some(0.0), ..Default::default() };
    Request { prompt, sampling, tenant, ..Default::default() }
}

/// Tokens, the one that ended it included.
fn generate(engine: &mut Engine, request: &Request) -> Result<Vec<u32>> {
    engine.submit(request)?;
    let mut tokens = Vec::new();
    while !engine.is_idle() {
        for update in engine.step()? {
            if update.finish == Some(FinishReason::Error) {
                return Err(Error::Device("the model's logits are not finite: nothing can be measured with it".into()));
            }
            tokens.extend(update.token.map(|t| t.token));
        }
    }
    Ok(tokens)
}

fn measure(engine: &mut Engine, work: impl FnOnce(&mut Engine) -> Result<Vec<u32>>) -> Result<(Run, Vec<u32>)> {
    let (start, before) = (engine.now(), engine.stats().counters.prefilled_tokens);
    let tokens = work(engine)?;
    let run = Run {
        seconds: (engine.now() - start).as_secs_f64(),
        prefilled_tokens: engine.stats().counters.prefilled_tokens - before,
    };
    Ok((run, tokens))
}
