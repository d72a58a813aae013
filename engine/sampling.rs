//! Sampling parameters of a request: defaults filled in, every range checked. Knows no device.

use crate::batch::SamplingParams;
use crate::config::SamplingDefaults;
use crate::{Error, Result};

/// As a user gives them; what is absent is taken from the model's generation_config.json, else is off. Without any
/// temperature a request is greedy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingRequest {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// 0 is off.
    pub top_k: Option<u32>,
    /// 1 is off.
    pub top_p: Option<f32>,
    /// 0 is off.
    pub min_p: Option<f32>,
    /// 1 is off.
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    /// Absent: 0, so that the same command gives the same answer.
    pub seed: Option<u64>,
    /// How many of the most likely tokens to report with each token.
    pub logprobs: Option<u32>,
    /// The same for each token of the prompt but the first.
    pub prompt_logprobs: Option<u32>,
    pub logit_bias: Vec<(u32, f32)>,
    pub allowed_ids: Option<Vec<u32>>,
    pub stop_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub min_tokens: u32,
}

/// Limits of the sampler kernel (kernels/params.h).
pub const MAX_TOP_LOGPROBS: u32 = 20;
pub const MAX_LOGIT_BIAS: usize = 512;
pub const MAX_STOP_IDS: usize = 16;

impl SamplingRequest {
    /// `vocab_size`: ids of the model; `eos_ids` count among the stop ids.
    ///
    /// # Errors
    /// The first parameter that is out of range, by its name.
    pub fn validate(&self, defaults: &SamplingDefaults, vocab_size: usize, eos_ids: &[u32]) -> Result<SamplingParams> {
        let number = |name: &'static str, value: Option<f32>, default: f32, range: std::ops::RangeInclusive<f32>| {
            let value = value.unwrap_or(default);
            if value.is_finite() && range.contains(&value) {
                return Ok(value);
            }
            Err(Error::request(name, format!("{value} is not a number from {} to {}", range.start(), range.end())))
        };
        let model_temperature = match defaults.do_sample {
            Some(false) => 0.0,
            Some(true) => defaults.temperature.unwrap_or(1.0),
            None => defaults.temperature.unwrap_or(0.0),
        };
        let temperature = number("temperature", self.temperature, model_temperature, 0.0..=100.0)?;
        if temperature > 0.0 && temperature < 0.001 {
            return Err(Error::request("temperature", format!("{temperature} is too close to 0: say 0 for greedy")));
        }
        let top_p = number("top_p", self.top_p, defaults.top_p.unwrap_or(1.0), 0.0..=1.0)?;
        if top_p == 0.0 {
            return Err(Error::request("top_p", "0 leaves no token: say a number above 0, or 1 for off"));
        }
        let repetition_penalty = number(
            "repetition_penalty",
            self.repetition_penalty,
            defaults.repetition_penalty.unwrap_or(1.0),
            0.0..=100.0,
        )?;
        if repetition_penalty < 0.01 {
            return Err(Error::request("repetition_penalty", format!("{repetition_penalty} is not at least 0.01")));
        }
        for (name, asked) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(n) = asked.filter(|&n| n > MAX_TOP_LOGPROBS) {
                let problem = format!("{n} is more than {MAX_TOP_LOGPROBS}, the most that are reported");
                return Err(Error::request(name, problem));
            }
        }
        let known = |name: &'static str, id: u32| match (id as usize) < vocab_size {
            true => Ok(()),
            false => Err(Error::request(name, format!("token id {id} is not below the vocabulary size, {vocab_size}"))),
        };
        if self.logit_bias.len() > MAX_LOGIT_BIAS {
            let n = self.logit_bias.len();
            return Err(Error::request("logit_bias", format!("{n} entries are more than {MAX_LOGIT_BIAS}")));
        }
        for (i, &(id, bias)) in self.logit_bias.iter().enumerate() {
            known("logit_bias", id)?;
            number("logit_bias", Some(bias), 0.0, -1000.0..=1000.0)?;
            if self.logit_bias[..i].iter().any(|&(other, _)| other == id) {
                return Err(Error::request("logit_bias", format!("token id {id} occurs twice")));
            }
        }
        if let Some(allowed) = &self.allowed_ids {
            if allowed.is_empty() {
                return Err(Error::request("allowed_ids", "an empty list leaves no token"));
            }
            allowed.iter().try_for_each(|&id| known("allowed_ids", id))?;
        }
        self.stop_ids.iter().try_for_each(|&id| known("stop_ids", id))?;
        let mut stop_ids = self.stop_ids.clone();
        stop_ids.sort_unstable();
        stop_ids.dedup();
        // EOS stops anyway, unless it is ignored; then asking for it says otherwise.
        stop_ids.retain(|id| self.ignore_eos || !eos_ids.contains(id));
        if stop_ids.len() + eos_ids.len() > MAX_STOP_IDS {
            return Err(Error::request(
                "stop_ids",
                format!(
                    "{} ids with the model's {} EOS ids are more than {MAX_STOP_IDS}",
                    stop_ids.len(),
                    eos_ids.len()
                ),
            ));
        }
        Ok(SamplingParams {
            temperature,
            top_k: self.top_k.or(defaults.top_k).unwrap_or(0),
            top_p,
            min_p: number("min_p", self.min_p, defaults.min_p.unwrap_or(0.0), 0.0..=1.0)?,
            repetition_penalty,
            presence_penalty: number("presence_penalty", self.presence_penalty, 0.0, -2.0..=2.0)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, 0.0, -2.0..=2.0)?,
            seed: self.seed.unwrap_or(0),
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            logit_bias: self.logit_bias.clone(),
            allowed: self.allowed_ids.clone(),
            stop_ids,
            ignore_eos: self.ignore_eos,
            min_tokens: self.min_tokens,
        })
    }
}
