//! Techniques that act on the draws within thinking, beside budget forcing: what a request asks for, turned into what the sampler
//! does; or refused. How they act is in kernels/steering.cuh. Knows no device.

use crate::batch::{ConfidenceStop, SteeringParams, SwitchPenalty};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use serde::Deserialize;
use std::str::FromStr;

/// As a user gives it; all of it is off by default.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SteeringRequest {
    /// NoWait: words that may not be drawn; [`DEFAULT_WORDS`] stands for the paper's.
    pub avoid_words: Vec<String>,
    /// TIP: what `switch_words` lose.
    pub switch_penalty: Option<f32>,
    /// In so many thinking tokens after one of them. Absent: 600, the paper's.
    pub switch_window: Option<u32>,
    /// Empty: the paper's.
    pub switch_words: Vec<String>,
    /// ThinkBrake: after a sentence, thinking ends where the end is as close to the most likely token, in log-probability.
    pub brake_margin: Option<f32>,
    /// Added to the logit of the end of thinking.
    pub end_bias: Option<f32>,
    /// As much again for each 1000 thinking tokens.
    pub end_bias_ramp: Option<f32>,
    /// Thinking ends after a streak of draws whose most likely token had this probability.
    pub stop_confidence: Option<f32>,
    /// How long. Absent: 30.
    pub stop_streak: Option<u32>,
    /// Not before so many thinking tokens. Absent: 400.
    pub stop_after: Option<u32>,
    /// Thinking ends where its last tokens are the same thing so many times in a row.
    pub loop_repeats: Option<u32>,
}

/// A request's steering by a name, for a study.
#[derive(Clone, Debug, PartialEq)]
pub struct Technique {
    pub name: String,
    /// As it was written.
    pub json: String,
    pub steering: SteeringRequest,
}

impl FromStr for Technique {
    type Err = String;

    /// NAME={"parameter": value, ...}
    fn from_str(text: &str) -> std::result::Result<Technique, String> {
        let (name, json) = text.split_once('=').ok_or("not NAME={\"parameter\": value, ...}")?;
        let steering = serde_json::from_str(json).map_err(|problem| format!("{json}: {problem}"))?;
        Ok(Technique { name: name.into(), json: json.into(), steering })
    }
}

/// In a list of words: those of the paper.
pub const DEFAULT_WORDS: &str = "default";
/// NoWait, arXiv 2506.08343.
const AVOIDED: [&str; 17] = [
    "wait",
    "alternatively",
    "hmm",
    "but",
    "however",
    "alternative",
    "another",
    "check",
    "double-check",
    "oh",
    "maybe",
    "verify",
    "other",
    "again",
    "now",
    "ah",
    "any",
];
/// TIP, arXiv 2501.18585.
const SWITCHES: [&str; 1] = ["alternatively"];
const SWITCH_WINDOW: u32 = 600;
const STOP_STREAK: u32 = 30;
const STOP_AFTER: u32 = 400;

const MAX_WORDS: usize = 256;
const MAX_COUNT: u32 = 1 << 30;
const MAX_BIAS: f32 = 1000.0;

impl SteeringRequest {
    /// The name of the first parameter that is given.
    pub fn given(&self) -> Option<&'static str> {
        let given = [
            ("avoid_words", !self.avoid_words.is_empty()),
            ("switch_penalty", self.switch_penalty.is_some()),
            ("switch_window", self.switch_window.is_some()),
            ("switch_words", !self.switch_words.is_empty()),
            ("brake_margin", self.brake_margin.is_some()),
            ("end_bias", self.end_bias.is_some()),
            ("end_bias_ramp", self.end_bias_ramp.is_some()),
            ("stop_confidence", self.stop_confidence.is_some()),
            ("stop_streak", self.stop_streak.is_some()),
            ("stop_after", self.stop_after.is_some()),
            ("loop_repeats", self.loop_repeats.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }

    /// # Errors
    /// The first parameter that is out of range, has no token that it could act on, or lacks the one that it belongs to; by name.
    pub fn validate(&self, tokenizer: &Tokenizer) -> Result<SteeringParams> {
        let number = |name: &'static str, value: Option<f32>, range: std::ops::RangeInclusive<f32>| match value {
            Some(x) if !range.contains(&x) => {
                let problem = format!("{x} is not a number from {} to {}", range.start(), range.end());
                Err(Error::request(name, problem))
            }
            other => Ok(other),
        };
        let count = |name: &'static str, value: Option<u32>, least: u32, default: u32| {
            let n = value.unwrap_or(default);
            match (least..=MAX_COUNT).contains(&n) {
                true => Ok(n),
                false => Err(Error::request(name, format!("{n} is not a number from {least} to {MAX_COUNT}"))),
            }
        };
        let needs = |name: &'static str, given: bool, other: &str| match given {
            true => Err(Error::request(name, format!("it changes nothing without {other}: give that, too"))),
            false => Ok(()),
        };
        let switch = match number("switch_penalty", self.switch_penalty, 0.0..=MAX_BIAS)? {
            None => {
                needs("switch_window", self.switch_window.is_some(), "switch_penalty")?;
                needs("switch_words", !self.switch_words.is_empty(), "switch_penalty")?;
                None
            }
            Some(penalty) => {
                let words = match self.switch_words.is_empty() {
                    true => &[DEFAULT_WORDS.to_string()],
                    false => self.switch_words.as_slice(),
                };
                Some(SwitchPenalty {
                    tokens: tokens("switch_words", words, &SWITCHES, tokenizer)?,
                    penalty,
                    window: count("switch_window", self.switch_window, 1, SWITCH_WINDOW)?,
                })
            }
        };
        let stop = match number("stop_confidence", self.stop_confidence, 0.0..=1.0)? {
            None => {
                needs("stop_streak", self.stop_streak.is_some(), "stop_confidence")?;
                needs("stop_after", self.stop_after.is_some(), "stop_confidence")?;
                None
            }
            Some(confidence) => Some(ConfidenceStop {
                confidence,
                streak: count("stop_streak", self.stop_streak, 1, STOP_STREAK)?,
                after: count("stop_after", self.stop_after, 0, STOP_AFTER)?,
            }),
        };
        if let Some(n) = self.loop_repeats.filter(|n| !(2..=1000).contains(n)) {
            return Err(Error::request("loop_repeats", format!("{n} is not a number from 2 to 1000")));
        }
        Ok(SteeringParams {
            avoid: tokens("avoid_words", &self.avoid_words, &AVOIDED, tokenizer)?,
            switch,
            brake_margin: number("brake_margin", self.brake_margin, 0.0..=MAX_BIAS)?,
            end_bias: number("end_bias", self.end_bias, -MAX_BIAS..=MAX_BIAS)?.unwrap_or(0.0),
            end_bias_ramp: number("end_bias_ramp", self.end_bias_ramp, -MAX_BIAS..=MAX_BIAS)?.unwrap_or(0.0) / 1000.0,
            stop,
            loop_repeats: self.loop_repeats,
        })
    }
}

/// The tokens that are one of the words. Of the paper's words those that the vocabulary has as a token.
fn tokens(parameter: &'static str, words: &[String], default: &[&str], tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    if words.len() > MAX_WORDS {
        return Err(Error::request(parameter, format!("{} words are more than {MAX_WORDS}", words.len())));
    }
    let mut ids = Vec::new();
    for word in words {
        if word == DEFAULT_WORDS {
            let before = ids.len();
            ids.extend(default.iter().flat_map(|word| tokenizer.word_tokens(word)));
            if ids.len() == before {
                let problem =
                    format!("the vocabulary has none of {} as a token: name words of its own", default.join(", "));
                return Err(Error::request(parameter, problem));
            }
            continue;
        }
        match tokenizer.word_tokens(word) {
            [] => {
                let problem = format!("{word:?} is no token of this vocabulary, and only whole tokens can be steered");
                return Err(Error::request(parameter, problem));
            }
            found => ids.extend(found),
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}
