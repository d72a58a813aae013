//! `ponder bench perplexity`: how well the model foresees a text, so that what a quantisation costs is a number. The text is cut into
//! overlapping windows; each token is judged once, with at least `context - stride` tokens before it, but for those at the beginning.
//! Knows no files.

use crate::engine::Engine;
use crate::frontend::Request;
use crate::sampling::SamplingRequest;
use crate::sequence::FinishReason;
use crate::{Error, Result};
use serde::Serialize;
use std::collections::HashMap;

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measurement {
    /// Judged: all but the first.
    pub tokens: u64,
    /// Of the judged tokens.
    pub bytes: u64,
    /// exp of the mean negative log probability of a token.
    pub perplexity: f64,
    /// Of that mean; tokens are taken as independent.
    pub standard_error: f64,
    /// The same text in other tokens compares by this.
    pub bits_per_byte: f64,
    pub seconds: f64,
}

/// What a window may judge: the whole of it, and how many of its last tokens.
#[derive(Debug, PartialEq, Eq)]
pub struct Window {
    pub begin: usize,
    pub end: usize,
    pub judged: usize,
}

/// Windows of at most `context` tokens over `tokens` of them, each `stride` further.
pub fn windows(tokens: usize, context: usize, stride: usize) -> Vec<Window> {
    assert!(tokens >= 2 && (1..context).contains(&stride));
    let mut windows = Vec::new();
    let (mut begin, mut known) = (0, 1);
    while known < tokens {
        let end = tokens.min(begin + context);
        windows.push(Window { begin, end, judged: end - known });
        known = end;
        begin += stride;
    }
    windows
}

/// `progress` hears how many tokens have been judged.
///
/// # Errors
/// A text of less than two tokens; a window that is longer than the engine's context; logits that are not finite.
pub fn run(
    engine: &mut Engine,
    text: &[u32],
    context: usize,
    stride: usize,
    progress: &mut dyn FnMut(u64),
) -> Result<Measurement> {
    if text.len() < 2 {
        let problem = format!("{} tokens: give a text of at least two", text.len());
        return Err(Error::Usage(format!("the text has {problem}")));
    }
    // The token after a window has to be drawn, if only to be thrown away.
    let most = engine.context() as usize - 1;
    if context > most {
        return Err(Error::Usage(format!(
            "--context {context}: at most {most} fit: raise --max-context or --kv-pages"
        )));
    }
    if !(1..context).contains(&stride) {
        return Err(Error::Usage(format!("--stride {stride}: at least 1, and less than the context of {context}")));
    }
    let start = engine.now();
    let mut open = HashMap::new();
    for window in windows(text.len(), context, stride) {
        let sampling =
            SamplingRequest { temperature: Some(0.0), prompt_logprobs: Some(0), ..SamplingRequest::default() };
        let prompt = text[window.begin..window.end].to_vec();
        let id = engine.submit(&Request { prompt, max_tokens: Some(1), sampling, ..Request::default() })?;
        open.insert(id, window.judged);
    }
    let (mut tokens, mut sum, mut squares) = (0, 0.0, 0.0);
    while !engine.is_idle() {
        for update in engine.step()? {
            if update.finish == Some(FinishReason::Error) {
                return Err(Error::Device("the model's logits are not finite: it foresees nothing".into()));
            }
            let Some(token) = update.token else { continue };
            let judged = open[&update.request];
            for score in &token.prompt[token.prompt.len() - judged..] {
                let surprise = -f64::from(score.logprob);
                sum += surprise;
                squares += surprise * surprise;
            }
            tokens += judged as u64;
            progress(tokens);
        }
    }
    let seconds = (engine.now() - start).as_secs_f64();
    let n = tokens as f64;
    let (mean, bytes) =
        (sum / n, text[1..].iter().map(|&id| engine.frontend.tokenizer.token_bytes(id).len() as u64).sum());
    let variance = (squares / n - mean * mean).max(0.0);
    let perplexity = mean.exp();
    Ok(Measurement {
        tokens,
        bytes,
        perplexity,
        standard_error: perplexity * (variance / n).sqrt(),
        bits_per_byte: sum / std::f64::consts::LN_2 / bytes as f64,
        seconds,
    })
}
