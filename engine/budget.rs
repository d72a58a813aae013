//! The thinking budget of a request: what it asks for and the model's delimiters, turned into what the sampler enforces; or
//! refused, where it could not be enforced. The contract is in kernels/budget.cuh. Knows no device.

use crate::batch::{Accounting, BudgetParams, OnEnd};
use crate::steering::SteeringRequest;
use crate::thinking::{Delimiters, MAX_STRING, ThinkingChoice};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// As a user gives it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BudgetRequest {
    /// Minimum and maximum at once.
    pub exact_thinking_tokens: Option<u32>,
    pub max_thinking_tokens: Option<u32>,
    pub min_thinking_tokens: u32,
    /// How many ends of thinking are ignored.
    pub n_ignore: u32,
    /// What replaces an ignored end, in turn; an empty string, or an empty list: nothing, the end is masked for one step.
    /// Absent: the model's.
    pub ignore_strings: Option<Vec<String>>,
    /// What is forced at the maximum. Absent: the model's.
    pub end_string: Option<String>,
    pub accounting: Accounting,
    pub on_end: OnEnd,
    /// The delimiters of this request. Absent: the model's.
    pub thinking: Option<ThinkingChoice>,
    pub steering: SteeringRequest,
}

/// Limits of the sampler kernel (kernels/params.h).
pub const MAX_IGNORE_STRINGS: usize = 8;
const MAX_COUNT: u32 = 1 << 30;

impl BudgetRequest {
    /// Whether it asks for anything.
    pub fn is_empty(&self) -> bool {
        self.exact_thinking_tokens.is_none()
            && self.max_thinking_tokens.is_none()
            && self.min_thinking_tokens == 0
            && self.n_ignore == 0
            && self.ignore_strings.is_none()
            && self.end_string.is_none()
            && self.steering.given().is_none()
    }

    /// What the sampler enforces on a request with this prompt; `None`: the model has no delimiters and none of this was asked
    /// for.
    ///
    /// # Errors
    /// A budget that cannot be enforced, by the name of the parameter.
    pub fn validate(
        &self,
        delimiters: Option<&Delimiters>,
        tokenizer: &Tokenizer,
        prompt: &[u32],
    ) -> Result<Option<BudgetParams>> {
        let Some(delimiters) = delimiters else {
            if self.is_empty() {
                return Ok(None);
            }
            let parameter = match self {
                BudgetRequest { exact_thinking_tokens: Some(_), .. } => "exact_thinking_tokens",
                BudgetRequest { max_thinking_tokens: Some(_), .. } => "max_thinking_tokens",
                BudgetRequest { min_thinking_tokens: 1.., .. } => "min_thinking_tokens",
                BudgetRequest { n_ignore: 1.., .. } => "n_ignore",
                BudgetRequest { ignore_strings: Some(_), .. } => "ignore_string",
                BudgetRequest { end_string: Some(_), .. } => "end_string",
                _ => self.steering.given().expect("something is asked for"),
            };
            return Err(Error::request(
                parameter,
                "this model has no thinking delimiters, so no budget can be enforced: say --thinking s1, deepseek-r1 or think-tags, or give \
                 --thinking-start and --thinking-end",
            ));
        };
        let too_large = |name: &'static str, n: u32| match n > MAX_COUNT {
            true => Err(Error::request(name, format!("{n} is more than {MAX_COUNT}"))),
            false => Ok(()),
        };
        let (least, most) = match self.exact_thinking_tokens {
            None => (self.min_thinking_tokens, self.max_thinking_tokens),
            Some(_) if self.min_thinking_tokens > 0 || self.max_thinking_tokens.is_some() => {
                let problem = "it is minimum and maximum at once: leave those out";
                return Err(Error::request("exact_thinking_tokens", problem));
            }
            Some(exact) => {
                too_large("exact_thinking_tokens", exact)?;
                (exact, Some(exact))
            }
        };
        too_large("min_thinking_tokens", least)?;
        too_large("n_ignore", self.n_ignore)?;
        if let Some(max) = most {
            too_large("max_thinking_tokens", max)?;
            if max < least {
                return Err(Error::request(
                    "max_thinking_tokens",
                    format!("{max} is less than the minimum of {least}"),
                ));
            }
        }
        let encode = |name: &'static str, text: &str| {
            let ids = tokenizer.encode(text)?;
            match ids.len() {
                n if n > MAX_STRING => {
                    Err(Error::request(name, format!("{text:?} has {n} tokens: at most {MAX_STRING} can be injected")))
                }
                _ => Ok(ids),
            }
        };
        let ignore_strings = match &self.ignore_strings {
            None => delimiters.ignore_strings.clone(),
            Some(list) if list.len() > MAX_IGNORE_STRINGS => {
                let n = list.len();
                return Err(Error::request("ignore_string", format!("{n} strings are more than {MAX_IGNORE_STRINGS}")));
            }
            Some(list) => list.iter().map(|text| encode("ignore_string", text)).collect::<Result<_>>()?,
        };
        let ends = |ids: &[u32]| ids.windows(delimiters.end.len()).any(|w| w == delimiters.end);
        if ignore_strings.iter().any(|ids| ends(ids)) {
            return Err(Error::request("ignore_string", "it holds the end of thinking, which it is to replace"));
        }
        let (end_string, newline) = match &self.end_string {
            None => (delimiters.end_string.clone(), delimiters.newline),
            Some(text) => {
                let ids = encode("end_string", text)?;
                if !ends(&ids) {
                    let end = tokenizer.decode(&delimiters.end);
                    return Err(Error::request(
                        "end_string",
                        format!("{text:?} does not hold {end:?}, so it would not end the thinking"),
                    ));
                }
                (ids, None)
            }
        };
        let last_start = last_position(prompt, &delimiters.start);
        let last_end = last_position(prompt, &delimiters.end);
        // Without a start, thinking begins with the output. Where the end is the beginning of the start (s1), the start's own
        // is no end.
        let starts_thinking = delimiters.start.is_empty()
            || last_start.is_some_and(|start| last_end.is_none_or(|end| end < start + delimiters.start.len()));
        Ok(Some(BudgetParams {
            start: delimiters.start.clone(),
            end: delimiters.end.clone(),
            close: delimiters.close.clone(),
            end_string,
            newline,
            ignore_strings,
            max_thinking_tokens: most,
            min_thinking_tokens: least,
            n_ignore: self.n_ignore,
            accounting: self.accounting,
            on_end: self.on_end,
            starts_thinking,
            prompt_ends_with_newline: prompt.last().is_some_and(|&id| tokenizer.token_bytes(id).ends_with(b"\n")),
            steering: self.steering.validate(tokenizer)?,
        }))
    }
}

fn last_position(ids: &[u32], pattern: &[u32]) -> Option<usize> {
    if pattern.is_empty() {
        return None;
    }
    ids.windows(pattern.len()).rposition(|w| w == pattern)
}
