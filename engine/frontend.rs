//! The text side of a model: prompts become token ids, and requests are judged and become what scheduler and sampler need.
//! Opening it reads everything but the weights, so that bad input is refused before they load. Knows no device.

use crate::batch::SlotSetup;
use crate::budget::BudgetRequest;
use crate::chat::{ChatTemplate, Message};
use crate::config::ModelConfig;
use crate::guide::Grammar;
use crate::sampling::SamplingRequest;
use crate::sequence::Transcript;
use crate::thinking::{Delimiters, ThinkingChoice};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

pub struct Frontend {
    folder: PathBuf,
    pub config: ModelConfig,
    pub tokenizer: Tokenizer,
    /// Bytes.
    longest_token: usize,
    template: Option<ChatTemplate>,
    /// None: the model does not think, or is not to.
    pub delimiters: Option<Delimiters>,
}

/// What a user asks for.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Token ids, complete ([`Frontend::encode_chat`] or any others).
    pub prompt: Vec<u32>,
    /// None: as many as fit.
    pub max_tokens: Option<u32>,
    pub stop: Vec<String>,
    /// The stop string that ends the answer belongs to it.
    pub include_stop: bool,
    /// Special tokens have no text.
    pub hide_special: bool,
    pub sampling: SamplingRequest,
    pub budget: BudgetRequest,
    /// What the answer must follow; thinking is free of it.
    pub grammar: Option<Grammar>,
    /// How many requests that came earlier it goes before.
    pub priority: u32,
    /// Whose requests it may share computed prompts with.
    pub tenant: String,
}

fn load_config(folder: &Path) -> Result<ModelConfig> {
    match folder.is_dir() {
        true => ModelConfig::load(folder),
        false => Err(Error::model(folder, "no such folder: give one with config.json, safetensors and tokenizer.json")),
    }
}

impl Frontend {
    /// # Errors
    /// A folder without a model, or one whose files cannot be used or do not belong together.
    pub fn open(folder: &Path, thinking: &ThinkingChoice) -> Result<Frontend> {
        let config = load_config(folder)?;
        let tokenizer = Tokenizer::load(folder, config.vocab_size)?;
        let template = ChatTemplate::load(folder)?;
        let delimiters = Delimiters::resolve(thinking, folder, &tokenizer)?;
        let longest_token = tokenizer.longest_token();
        Ok(Frontend { folder: folder.into(), config, tokenizer, longest_token, template, delimiters })
    }

    /// For benches: of the folder only config.json is read. Prompts are token ids.
    ///
    /// # Errors
    /// No folder, or no usable config.json.
    pub fn without_text(folder: &Path) -> Result<Frontend> {
        let config = load_config(folder)?;
        let tokenizer = Tokenizer::without_text(config.vocab_size);
        Ok(Frontend { folder: folder.into(), config, tokenizer, longest_token: 1, template: None, delimiters: None })
    }

    /// Names that the chat template reads and does not set itself.
    pub fn template_variables(&self) -> HashSet<String> {
        self.template.as_ref().map(ChatTemplate::variables).unwrap_or_default()
    }

    /// A prompt as it is; special tokens in it are such.
    ///
    /// # Errors
    /// More than could fit into any context: it is not even tokenised, which takes a hundred times its memory.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.check_length(text)?;
        self.tokenizer.encode(text)
    }

    fn check_length(&self, text: &str) -> Result<()> {
        // Some tokenizers drop spaces, or make one character of several.
        const SHRINKS: usize = 4;
        let context = self.config.max_position_embeddings;
        match text.len() > SHRINKS * context.saturating_mul(self.longest_token) {
            true => {
                let problem =
                    format!("{} bytes leave no room for an answer in a context of {context} tokens", text.len());
                Err(Error::request("prompt", problem + ": shorten it"))
            }
            false => Ok(()),
        }
    }

    /// Whether the chat template tells the model of tools, and shows calls of them in this tag.
    pub fn writes_calls_as(&self, tag: &str) -> bool {
        self.template.as_ref().is_some_and(|template| template.has(tag) && template.variables().contains("tools"))
    }

    /// The delimiters of a request's thinking: the model's, unless it names others.
    ///
    /// # Errors
    /// Delimiters that this tokenizer does not have.
    pub fn delimiters_of(&self, budget: &BudgetRequest) -> Result<Option<Cow<'_, Delimiters>>> {
        match &budget.thinking {
            None => Ok(self.delimiters.as_ref().map(Cow::Borrowed)),
            Some(choice) => Ok(Delimiters::resolve(choice, &self.folder, &self.tokenizer)?.map(Cow::Owned)),
        }
    }

    /// [`Frontend::encode_chat_with`] nothing else.
    ///
    /// # Errors
    /// As that.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.encode_chat_with(messages, &Map::new(), &BudgetRequest::default())
    }

    /// The prompt that asks for an answer to these messages, thinking opened where the model expects that. `variables`: what the
    /// template is told beside them. `budget`: only whose delimiters count.
    ///
    /// # Errors
    /// A model without a chat template, or one that does not take these messages.
    pub fn encode_chat_with(
        &self,
        messages: &[Message],
        variables: &Map<String, Value>,
        budget: &BudgetRequest,
    ) -> Result<Vec<u32>> {
        let delimiters = self.delimiters_of(budget)?;
        let delimiters = delimiters.as_deref();
        let Some(template) = &self.template else {
            return Err(Error::model(
                &self.folder,
                "the model has no chat template: give the prompt as it is, with --raw",
            ));
        };
        let (messages, variables, mark) = self.mark_special(messages, variables, delimiters)?;
        // Qwen3's template closes the thinking at once where it is not wanted.
        let mut variables = variables;
        variables.entry("enable_thinking").or_insert(delimiters.is_some().into());
        let mut ids = Vec::new();
        let text = template.render(&messages, true, &variables)?;
        self.check_length(&text)?;
        for part in text.split(mark) {
            ids.extend(self.tokenizer.encode(part)?);
        }
        ids.extend(delimiters.iter().filter(|d| d.start_in_prompt).flat_map(|d| &d.start));
        Ok(ids)
    }

    /// What the template is given, with a mark inside whatever would be read as a special token, so that nothing that a request says
    /// can pretend to be what only the template says; and the mark, which stands nowhere else.
    fn mark_special(
        &self,
        messages: &[Message],
        variables: &Map<String, Value>,
        delimiters: Option<&Delimiters>,
    ) -> Result<(Vec<Message>, Map<String, Value>, char)> {
        let said = serde_json::to_value((messages, variables)).expect("messages are plain");
        // Characters that Unicode keeps for such purposes.
        let mark = ('\u{fdd0}'..='\u{fdef}').find(|&mark| !any_text(&said, &|text| text.contains(mark)));
        let mark = mark.ok_or_else(|| Error::request("messages", "they hold every character that is no character"))?;
        let apart = |text: String| {
            let first = text.chars().next().expect("not empty").len_utf8();
            let marked = format!("{}{mark}{}", &text[..first], &text[first..]);
            (text, marked)
        };
        let special: Vec<_> =
            self.tokenizer.special_tokens().iter().filter(|text| !text.is_empty()).cloned().map(apart).collect();
        let delimiters = delimiters.into_iter().flat_map(|d| [&d.start, &d.end]).map(|ids| self.tokenizer.decode(ids));
        let delimiters: Vec<_> = delimiters.filter(|text| !text.is_empty()).map(apart).collect();
        let marked = messages.iter().map(|message| {
            let mut message = serde_json::to_value(message).expect("messages are plain");
            mark_texts(&mut message, &special);
            // Earlier answers are shown with the tags of their thinking, which templates look for.
            if message["role"] != "assistant" {
                mark_texts(&mut message, &delimiters);
            }
            serde_json::from_value(message).expect("it was one")
        });
        let marked = marked.collect();
        let mut variables = Value::Object(variables.clone());
        mark_texts(&mut variables, &special);
        mark_texts(&mut variables, &delimiters);
        let Value::Object(variables) = variables else { unreachable!("made as an object") };
        Ok((marked, variables, mark))
    }

    /// A request as the scheduler takes it, `serial` being its number; and what makes text of its tokens.
    ///
    /// # Errors
    /// What could never be served in a context of so many tokens.
    pub fn accept(&self, request: &Request, serial: u32, context: u32) -> Result<(SlotSetup, Transcript)> {
        let Request { prompt, max_tokens, stop, include_stop, hide_special, sampling, budget, .. } = request;
        if prompt.is_empty() {
            return Err(Error::request("prompt", "empty: there is nothing to answer"));
        }
        if let Some(id) = prompt.iter().find(|&&id| self.tokenizer.token_bytes(id).is_empty()) {
            return Err(Error::request("prompt", format!("{id} is not the id of a token of this model")));
        }
        let room = (context as usize).saturating_sub(prompt.len()) as u32;
        if room == 0 {
            let problem = format!("{} tokens leave no room for an answer in a context of {context}", prompt.len());
            return Err(Error::request("prompt", problem + ": shorten it, or raise --max-context or --kv-pages"));
        }
        if *max_tokens == Some(0) {
            return Err(Error::request("max_tokens", "0: ask for at least one"));
        }
        if stop.iter().any(String::is_empty) {
            return Err(Error::request("stop", "an empty string stands everywhere: leave it out"));
        }
        if let Some(id) = sampling.allowed_ids.iter().flatten().find(|&&id| self.tokenizer.token_bytes(id).is_empty()) {
            return Err(Error::request("allowed_ids", format!("{id} is not the id of a token of this model")));
        }
        if request.grammar.is_some() {
            let also = |parameter| {
                Error::request(parameter, "leave it to the grammar: it says what may come, and when it ends")
            };
            if sampling.allowed_ids.is_some() {
                return Err(also("allowed_ids"));
            }
            if sampling.ignore_eos {
                return Err(also("ignore_eos"));
            }
            if sampling.min_tokens > 0 {
                return Err(also("min_tokens"));
            }
        }
        let max_generated = max_tokens.map_or(room, |most| most.min(room));
        if sampling.min_tokens > max_generated {
            let problem = format!("{} is more than can be generated, {max_generated}", sampling.min_tokens);
            return Err(Error::request("min_tokens", problem));
        }
        let mut budget_params = budget.validate(self.delimiters_of(budget)?.as_deref(), &self.tokenizer, prompt)?;
        if let Some(params) = &mut budget_params
            && request.grammar.is_some()
            && budget.end_string.is_none()
        {
            // The usual one may begin the answer ("Final Answer:"), with what no grammar knows.
            params.end_string.clone_from(&params.close);
        }
        let setup = SlotSetup {
            slot: 0,
            serial,
            tokens: prompt.clone(),
            max_generated,
            max_length: context,
            eos_ids: self.config.eos_token_ids.clone(),
            sampling: sampling.validate(&self.config.defaults, self.config.vocab_size, &self.config.eos_token_ids)?,
            budget: budget_params,
            guided: request.grammar.is_some(),
        };
        let close: String = setup.budget.as_ref().map(|b| self.tokenizer.decode(&b.close)).unwrap_or_default();
        let transcript = Transcript::new(stop.clone(), close).show_stop(*include_stop).hide_special(*hide_special);
        Ok((setup, transcript))
    }
}

/// Whether it is so of any string in it.
fn any_text(value: &Value, is_so: &impl Fn(&str) -> bool) -> bool {
    match value {
        Value::String(text) => is_so(text),
        Value::Array(items) => items.iter().any(|item| any_text(item, is_so)),
        Value::Object(map) => map.iter().any(|(name, value)| is_so(name) || any_text(value, is_so)),
        _ => false,
    }
}

/// Replaces in every string in it, names of entries as well: a template may print those of a schema.
fn mark_texts(value: &mut Value, replacements: &[(String, String)]) {
    let mark = |text: &mut String| {
        for (plain, marked) in replacements {
            if text.contains(plain.as_str()) {
                *text = text.replace(plain.as_str(), marked);
            }
        }
    };
    match value {
        Value::String(text) => mark(text),
        Value::Array(items) => items.iter_mut().for_each(|item| mark_texts(item, replacements)),
        Value::Object(map) => {
            let entries = std::mem::take(map).into_iter().map(|(mut name, mut value)| {
                mark(&mut name);
                mark_texts(&mut value, replacements);
                (name, value)
            });
            *map = entries.collect();
        }
        _ => {}
    }
}
