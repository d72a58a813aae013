//! The fields that every dialect shares, as the engine takes them: sampling, thinking, what the chat template is told.

use super::ServerState;
use super::errors::{ApiError, ApiResult};
use super::fields::{Fields, MAX_STRING_BYTES, about_thinking};
use crate::budget::{BudgetRequest, MAX_IGNORE_STRINGS};
use crate::frontend::Request;
use crate::sampling::{MAX_LOGIT_BIAS, MAX_STOP_IDS, MAX_TOP_LOGPROBS, SamplingRequest};
use crate::steering::SteeringRequest;
use crate::thinking::ThinkingChoice;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// More than any context.
pub const MOST_TOKENS: u32 = 1 << 30;
/// Entries and bytes of `chat_template_kwargs`.
const MAX_TEMPLATE_VALUES: usize = 32;
const MAX_TEMPLATE_BYTES: usize = 4096;

/// `reasoning_effort`: most thinking tokens by name; None: no limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EffortTable(BTreeMap<String, Option<u32>>);

impl Default for EffortTable {
    fn default() -> EffortTable {
        let default = [
            ("none", Some(0)),
            ("minimal", Some(256)),
            ("low", Some(1024)),
            ("medium", Some(8192)),
            ("high", Some(32768)),
            ("xhigh", None),
            ("max", None),
        ];
        EffortTable(default.map(|(name, budget)| (name.into(), budget)).into())
    }
}

impl EffortTable {
    pub fn set(&mut self, name: String, budget: Option<u32>) {
        self.0.insert(name, budget);
    }

    fn names(&self) -> String {
        self.0.keys().cloned().collect::<Vec<_>>().join(", ")
    }
}

/// Everything but prompt and length.
///
/// # Errors
/// The first field that is not what it should be; ranges are judged by the engine.
pub fn sampling(fields: &mut Fields) -> ApiResult<Request> {
    let mut request = Request { stop: fields.strings("stop")?.unwrap_or_default(), ..Request::default() };
    request.hide_special = fields.boolean("skip_special_tokens")?.unwrap_or(true);
    request.include_stop = fields.boolean("include_stop_str_in_output")?.unwrap_or(false);
    let min_tokens = fields.count("min_tokens", MOST_TOKENS)?.unwrap_or(0);
    request.sampling = SamplingRequest {
        temperature: fields.number("temperature")?,
        // -1 is vLLM's spelling of off.
        top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| k.max(0) as u32),
        top_p: fields.number("top_p")?,
        min_p: fields.number("min_p")?,
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
        logprobs: None,
        prompt_logprobs: None,
        logit_bias: logit_bias(fields)?,
        allowed_ids: fields.ids("allowed_token_ids", MAX_LOGIT_BIAS)?,
        stop_ids: fields.ids("stop_token_ids", MAX_STOP_IDS)?.unwrap_or_default(),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        min_tokens,
    };
    // Earlier is lower, as vLLM counts.
    request.priority = fields.integer("priority", -i64::from(MOST_TOKENS)..=0)?.map_or(0, |p| -p as u32);
    if let Some(salt) = fields.string("cache_salt")? {
        if salt.is_empty() || salt.len() > 1024 {
            return Err(fields.error("cache_salt", "not a string of 1 to 1024 bytes"));
        }
        request.tenant = salt;
    }
    Ok(request)
}

/// {"token id": bias}
fn logit_bias(fields: &mut Fields) -> ApiResult<Vec<(u32, f32)>> {
    let Some(object) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let entries = object.into_entries();
    if entries.len() > MAX_LOGIT_BIAS {
        let problem = format!("{} entries are more than {MAX_LOGIT_BIAS}", entries.len());
        return Err(fields.error("logit_bias", problem));
    }
    let entry = |(id, bias): (String, Value)| {
        let bias = bias.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
        match (id.parse().ok(), bias) {
            (Some(id), Some(bias)) => Ok((id, bias)),
            _ => Err(fields.error("logit_bias", "not an object of token ids with finite numbers")),
        }
    };
    entries.into_iter().map(entry).collect()
}

/// How many of the most likely tokens.
pub fn top_logprobs(fields: &mut Fields, name: &str) -> ApiResult<Option<u32>> {
    fields.count(name, MAX_TOP_LOGPROBS)
}

/// The thinking that is asked for, in whatever words; and whether there is to be none at all, or some in any case.
#[derive(Debug, Default)]
pub struct Thinking {
    pub budget: BudgetRequest,
    pub enabled: Option<bool>,
    /// For the template.
    pub effort: Option<String>,
    /// `chat_template_kwargs`.
    kwargs: Map<String, Value>,
}

/// # Errors
/// Fields that are not what they should be, or contradict each other.
pub fn thinking(fields: &mut Fields, state: &ServerState) -> ApiResult<Thinking> {
    let mut thinking = Thinking::default();
    let mut most = Budgets::default();
    let budget = &mut thinking.budget;
    for name in BUDGET_NAMES {
        most.take(fields, name)?;
    }
    for name in ["min_thinking_tokens", "thinking_min_tokens"] {
        if let Some(min) = fields.count(name, MOST_TOKENS)? {
            budget.min_thinking_tokens = min;
        }
    }
    budget.exact_thinking_tokens = fields.count("exact_thinking_tokens", MOST_TOKENS)?;
    if let Some(steering) = fields.object("thinking_steering")? {
        let steering = SteeringRequest::deserialize(Value::Object(steering.into_entries()));
        budget.steering = steering.map_err(|problem| fields.error("thinking_steering", problem.to_string()))?;
    }
    budget.n_ignore = fields.count("thinking_n_ignore", MOST_TOKENS)?.unwrap_or(0);
    budget.ignore_strings = fields.strings("thinking_n_ignore_str")?;
    if budget.ignore_strings.as_ref().is_some_and(|list| list.len() > MAX_IGNORE_STRINGS) {
        return Err(fields.error("thinking_n_ignore_str", format!("more than {MAX_IGNORE_STRINGS} strings")));
    }
    budget.end_string = fields.string("thinking_end_str")?;
    budget.thinking = delimiters(fields)?;
    if let Some(mut object) = fields.object("thinking")? {
        let kind = object.string("type")?;
        thinking.enabled = match kind.as_deref() {
            None => None,
            Some("enabled" | "adaptive") => Some(true),
            Some("disabled") => Some(false),
            Some(_) => return Err(object.error("type", "not enabled, adaptive or disabled")),
        };
        most.take(&mut object, "budget_tokens")?;
        refuse_rest(object)?;
    }
    if let Some(enabled) = fields.boolean("enable_thinking")? {
        thinking.enabled = Some(enabled);
    }
    thinking.effort = fields.string("reasoning_effort")?;
    if let Some(mut object) = fields.object("reasoning")? {
        most.take(&mut object, "max_tokens")?;
        if let Some(effort) = object.string("effort")? {
            thinking.effort = Some(effort);
        }
        if let Some(enabled) = object.boolean("enabled")? {
            thinking.enabled = Some(enabled);
        }
        // There are no summaries: the thinking itself is sent.
        for name in ["summary", "generate_summary"] {
            object.take(name);
        }
        refuse_rest(object)?;
    }
    if let Some(kwargs) = fields.object("chat_template_kwargs")? {
        // What is said there about thinking is said to the engine, too.
        let mut said = kwargs.clone();
        for name in BUDGET_NAMES {
            most.take(&mut said, name)?;
        }
        for name in ENABLE_NAMES {
            if let Some(enabled) = said.boolean(name)? {
                thinking.enabled = Some(enabled);
            }
        }
        if let Some(effort) = said.string("reasoning_effort")? {
            thinking.effort = Some(effort);
        }
        thinking.kwargs = kwargs.into_entries();
    }
    if let Some(effort) = &thinking.effort {
        let Some(&by_effort) = state.settings.efforts.0.get(effort) else {
            let problem = format!("{effort:?} is none of {}", state.settings.efforts.names());
            return Err(fields.error("reasoning_effort", problem));
        };
        match by_effort {
            Some(0) => thinking.enabled = Some(false),
            // A budget in numbers says it more precisely.
            _ if most.given => {}
            _ => most.value = by_effort,
        }
    }
    thinking.budget.max_thinking_tokens = most.value;
    if thinking.enabled == Some(false) {
        if most.value.is_some_and(|most| most > 0)
            || thinking.budget.min_thinking_tokens > 0
            || thinking.budget.n_ignore > 0
            || thinking.budget.exact_thinking_tokens.is_some_and(|exact| exact > 0)
        {
            return Err(fields.error("thinking", "a budget for thinking that is switched off: leave out one of them"));
        }
        let thinks = state.service.frontend().delimiters_of(&thinking.budget)?.is_some();
        thinking.budget.exact_thinking_tokens = None;
        thinking.budget.max_thinking_tokens = thinks.then_some(0);
    }
    Ok(thinking)
}

/// `thinking_delimiters`: the name of a profile, or {"start", "end"}; for this request in place of the model's.
fn delimiters(fields: &mut Fields) -> ApiResult<Option<ThinkingChoice>> {
    const NAME: &str = "thinking_delimiters";
    match fields.take(NAME) {
        None => Ok(None),
        Some(Value::String(name)) => match ThinkingChoice::named(&name) {
            Ok(choice) => Ok(Some(choice)),
            Err(problem) => Err(fields.error(NAME, problem)),
        },
        Some(Value::Object(object)) => {
            fields.put(NAME, Value::Object(object));
            let mut object = fields.object(NAME)?.expect("just put there");
            let choice = match (object.string("start")?, object.string("end")?) {
                (Some(start), Some(end)) if start.len().max(end.len()) <= MAX_STRING_BYTES => {
                    ThinkingChoice::Explicit { start, end }
                }
                _ => {
                    return Err(
                        fields.error(NAME, format!("start and end: two strings of up to {MAX_STRING_BYTES} bytes"))
                    );
                }
            };
            refuse_rest(object)?;
            Ok(Some(choice))
        }
        Some(_) => Err(fields.error(NAME, "not the name of a profile, nor an object of start and end")),
    }
}

const BUDGET_NAMES: [&str; 3] = ["thinking_token_budget", "thinking_budget", "reasoning_max_tokens"];
/// The variables that templates have for it.
const ENABLE_NAMES: [&str; 2] = ["enable_thinking", "thinking"];

/// The maximum, by whichever name it comes.
#[derive(Default)]
struct Budgets {
    value: Option<u32>,
    given: bool,
}

impl Budgets {
    /// -1 is no limit.
    fn take(&mut self, fields: &mut Fields, name: &str) -> ApiResult<()> {
        let Some(budget) = fields.integer(name, -1..=i64::from(MOST_TOKENS))? else { return Ok(()) };
        let value = u32::try_from(budget).ok();
        if self.given && value != self.value {
            return Err(fields.error(name, "another field sets another budget: leave out one of them"));
        }
        *self = Budgets { value, given: true };
        Ok(())
    }
}

/// An object about thinking has no field that may be overlooked.
fn refuse_rest(object: Fields) -> ApiResult<()> {
    match object.names().first() {
        None => Ok(()),
        Some(name) => Err(object.error(name, "no such field: what is said about thinking is honoured or refused")),
    }
}

/// What the template is told beside the messages: `chat_template_kwargs`, but only variables that it has, and only plain values.
/// Others are named in `unknown`.
///
/// # Errors
/// Values that are no plain ones, too many of them, names that would change what the server itself tells the template.
pub fn template_variables(
    thinking: &Thinking,
    state: &ServerState,
    unknown: &mut Vec<String>,
) -> ApiResult<Map<String, Value>> {
    let known = state.service.frontend().template_variables();
    let mut variables = Map::new();
    if let Some(enabled) = thinking.enabled {
        let names = ENABLE_NAMES.into_iter().filter(|name| known.contains(*name));
        variables.extend(names.map(|name| (name.to_string(), enabled.into())));
    }
    if let Some(effort) = &thinking.effort
        && known.contains("reasoning_effort")
    {
        variables.insert("reasoning_effort".into(), effort.clone().into());
    }
    let problem = |problem: String| ApiError::field("chat_template_kwargs", problem);
    if thinking.kwargs.len() > MAX_TEMPLATE_VALUES {
        return Err(problem(format!("{} values are more than {MAX_TEMPLATE_VALUES}", thinking.kwargs.len())));
    }
    let bytes: usize =
        thinking.kwargs.iter().map(|(name, value)| name.len() + value.as_str().map_or(8, str::len)).sum();
    if bytes > MAX_TEMPLATE_BYTES {
        return Err(problem(format!("{bytes} bytes are more than {MAX_TEMPLATE_BYTES}")));
    }
    for (name, value) in &thinking.kwargs {
        let path = format!("chat_template_kwargs.{}", name.chars().take(64).collect::<String>());
        if RESERVED.contains(&name.as_str()) {
            return Err(ApiError::field(path, "the server itself sets this: leave it out"));
        }
        if value.is_object() || value.is_array() {
            return Err(ApiError::field(path, "not a string, a number, true or false"));
        }
        let understood = BUDGET_NAMES.iter().chain(&ENABLE_NAMES).chain(&["reasoning_effort"]).any(|n| n == name);
        if known.contains(name) {
            variables.insert(name.clone(), value.clone());
        } else if about_thinking(name, value).is_some() && !understood {
            return Err(ApiError::field(path, "neither this server nor the chat template knows such a field"));
        } else if !understood && !value.is_null() {
            unknown.push(path);
        }
    }
    Ok(variables)
}

/// What a request must not tell the template.
const RESERVED: &[&str] = &[
    "messages",
    "tools",
    "documents",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "return_dict",
    "return_tensors",
    "conversation",
    "tokenizer",
    "self",
];
