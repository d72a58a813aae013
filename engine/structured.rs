//! Answers of a given form: JSON, by a schema or any, a regular expression, a choice, a grammar in Lark's notation, calls of tools.
//! llguidance compiles it and says which tokens may come; `guide.rs` asks it. Knows no device and no request.

use crate::guide::{Grammar, Guide, Next};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Map, Value, json};
use std::fmt::Display;
use std::sync::{Arc, Mutex};

/// The form of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Structure {
    /// Any JSON object.
    JsonObject,
    /// JSON by a schema (json-schema.org, draft 2020-12, as far as llguidance enforces it).
    Schema(Value),
    Regex(String),
    Choice(Vec<String>),
    /// llguidance's dialect of Lark.
    Lark(String),
    /// Calls of tools ([`Tool`]), several if they may be `parallel`.
    Tools {
        tools: Vec<Tool>,
        in_place: InPlace,
        parallel: bool,
    },
}

/// What may be answered in place of a call.
#[derive(Clone, Debug, PartialEq)]
pub enum InPlace {
    /// There must be a call.
    Nothing,
    /// Any text, which may also come before a call.
    Text,
    /// JSON by this schema.
    Json(Value),
}

/// A function that the model may call. A call is written as the models of Nous Research and Qwen do:
/// `<tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call>`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    pub name: String,
    /// JSON schema of the arguments.
    pub parameters: Value,
}

/// Compiles structures for one tokenizer; holds a trie of its tokens.
pub struct Compiler {
    factory: ParserFactory,
}

impl Compiler {
    /// Takes about a second for a vocabulary of 150,000.
    ///
    /// # Errors
    /// A model without an end of sequence: nothing could end an answer.
    pub fn new(tokenizer: &Tokenizer, eos_ids: &[u32]) -> Result<Compiler> {
        let Some(&eos) = eos_ids.first() else {
            return Err(Error::request("response_format", "the model has no end of sequence, so no grammar can end"));
        };
        // Special tokens spell nothing that a grammar could ask for.
        let spelled = |id: u32| match tokenizer.is_special(id) {
            true => [&[TokTrie::SPECIAL_TOKEN_MARKER], tokenizer.token_bytes(id)].concat(),
            false => tokenizer.token_bytes(id).to_vec(),
        };
        let words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32).map(spelled).collect();
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, eos), &words).with_eos_tokens(eos_ids);
        let environment: TokEnv = Arc::new(Environment(trie));
        let mut factory = ParserFactory::new_simple(&environment).expect("its own slices are right");
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Compiler { factory })
    }

    /// `field`: who asked for it, for the error.
    ///
    /// # Errors
    /// What is no schema, expression or grammar, asks for what cannot be enforced, or is too large.
    pub fn compile(&self, field: &'static str, structure: &Structure) -> Result<Grammar> {
        let refuse = |problem: String| Error::request(field, problem.trim().to_string());
        let mut parser = self.factory.create_parser(grammar(structure)).map_err(|e| refuse(e.to_string()))?;
        parser.start_without_prompt();
        // What a lexer cannot be made for shows only now.
        let mut matcher = Matcher::new(Ok(parser));
        matcher.deep_clone().compute_mask().map_err(|e| refuse(e.to_string()))?;
        if let Some(warning) = matcher.grammar_warnings().first() {
            return Err(refuse(warning.clone()));
        }
        let matcher = Mutex::new(matcher);
        Ok(Grammar::new(move || Box::new(Matching(matcher.lock().expect("cloning does not panic").deep_clone()))))
    }
}

/// Whether text could be a grammar's is judged token by token, so any division of it into tokens will do.
struct Environment(TokTrie);

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

struct Matching(Matcher);

impl Guide for Matching {
    fn next(&mut self, tokens: &[u32], allowed: &mut [u32]) -> Result<Next> {
        let failed = |e: &dyn Display| Error::request("grammar", e.to_string());
        self.0.consume_tokens(tokens).map_err(|e| failed(&e))?;
        if self.0.is_stopped() {
            return Ok(Next::End);
        }
        let mask = self.0.compute_mask().map_err(|e| failed(&e))?;
        allowed.copy_from_slice(&mask.as_slice()[..allowed.len()]);
        Ok(Next::Token)
    }
}

fn grammar(structure: &Structure) -> TopLevelGrammar {
    match structure {
        Structure::JsonObject => TopLevelGrammar::from_json_schema(strict(json!({"type": "object"}))),
        Structure::Schema(schema) => TopLevelGrammar::from_json_schema(strict(schema.clone())),
        Structure::Regex(regex) => TopLevelGrammar::from_regex(regex),
        Structure::Choice(choices) => {
            let choices: Vec<String> = choices.iter().map(|choice| json!(choice).to_string()).collect();
            TopLevelGrammar::from_lark(format!("start: {}", choices.join(" | ")))
        }
        Structure::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        Structure::Tools { tools, in_place, parallel } => TopLevelGrammar::from_lark(calls(tools, in_place, *parallel)),
    }
}

/// Whitespace is where the usual printers put it: a model that is free to would often not stop writing it.
fn strict(mut schema: Value) -> Value {
    if let Value::Object(schema) = &mut schema {
        let how =
            json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": true});
        schema.insert("x-guidance".into(), how);
    }
    schema
}

fn calls(tools: &[Tool], in_place: &InPlace, parallel: bool) -> String {
    let call = |tool: &Tool| {
        let properties: Map<String, Value> =
            [("name".into(), json!({"const": tool.name})), ("arguments".into(), tool.parameters.clone())]
                .into_iter()
                .collect();
        strict(json!({
            "type": "object",
            "properties": properties,
            "required": ["name", "arguments"],
            "additionalProperties": false,
        }))
    };
    let alternatives: Vec<String> = tools.iter().map(|tool| format!("%json {}", call(tool))).collect();
    let more = if parallel { "(\"\\n<tool_call>\\n\" call)*" } else { "" };
    let calls = format!("call {more}\ncall: object \"\\n</tool_call>\"\nobject: {}\n", alternatives.join("\n  | "));
    match in_place {
        InPlace::Nothing => format!("start: \"<tool_call>\\n\" {calls}"),
        InPlace::Json(schema) => {
            let schema = strict(schema.clone());
            format!("start: \"<tool_call>\\n\" calls | answer\nanswer: %json {schema}\ncalls: {calls}")
        }
        // Until the words that open a call, an answer is free; at these the first of the two rules wins.
        InPlace::Text => format!(
            "start: before \"\\n\" calls | free\nbefore[suffix=\"<tool_call>\"]: /(?s:.*)/\nfree: /(?s:.*)/\ncalls: {calls}"
        ),
    }
}
