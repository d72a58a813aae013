//! Thinking delimiters: which tokens open and close a model's thinking, what stands in the output when it ends by itself, and
//! what is forced when it must end. All ids come from the model's tokenizer. Knows no budget.
//!
//! A model folder may say so itself in thinking.json:
//!
//! ```json
//! {
//!   "start": "<|im_start|>think",
//!   "start_in_prompt": true,
//!   "end": "<|im_start|>",
//!   "close": "<|im_start|>answer",
//!   "end_string": "<|im_start|>answer\nFinal Answer:",
//!   "end_string_on_new_line": true,
//!   "ignore_strings": ["Wait"]
//! }
//! ```
//!
//! `close` (default: `end`) begins with `end`. `end_string` defaults to `close`.

use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use serde::Deserialize;
use std::path::Path;

/// What `--thinking` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ThinkingChoice {
    /// thinking.json if the model folder has one, else the first of [`PROFILES`] whose marks the vocabulary has, else none.
    Auto,
    /// One of [`PROFILES`].
    Profile(&'static Profile),
    None,
    /// `--thinking-start`, `--thinking-end`.
    Explicit {
        start: String,
        end: String,
    },
}

impl ThinkingChoice {
    /// # Errors
    /// What the names are, if this is none of them.
    pub fn named(text: &str) -> std::result::Result<ThinkingChoice, String> {
        match text {
            "auto" => Ok(ThinkingChoice::Auto),
            "none" => Ok(ThinkingChoice::None),
            name => Profile::named(name).map(ThinkingChoice::Profile).ok_or_else(|| {
                let known: Vec<&str> = PROFILES.iter().map(|profile| profile.name).collect();
                format!("say auto, none or one of {}", known.join(", "))
            }),
        }
    }
}

/// How a family thinks.
#[derive(Debug, PartialEq, Eq)]
pub struct Profile {
    pub name: &'static str,
    /// Tokens that the vocabulary must have.
    needs: &'static [&'static str],
    /// Those that it is known by; none: by its name alone.
    marks: &'static [&'static str],
    start: &'static str,
    start_in_prompt: bool,
    end: &'static str,
    close: Option<&'static str>,
    end_string: &'static str,
    end_string_on_new_line: bool,
}

/// The families. Where the chat template itself opens the thinking (DeepSeek-R1's later ones, QwQ's), the prompt says so.
pub static PROFILES: [Profile; 3] = [
    // Fine-tuned from Qwen2.5 with words of its own, which the vocabulary does not show (arXiv 2501.19393, eval harness).
    Profile {
        name: "s1",
        needs: &["<|im_start|>"],
        marks: &[],
        start: "<|im_start|>think",
        start_in_prompt: true,
        end: "<|im_start|>",
        close: Some("<|im_start|>answer"),
        end_string: "<|im_start|>answer\nFinal Answer:",
        end_string_on_new_line: true,
    },
    // No sentence of its own; the answer begins after an empty line (arXiv 2501.12948; its chat template).
    Profile {
        name: "deepseek-r1",
        needs: &["<think>", "</think>"],
        marks: &["<think>", "</think>", "<\u{ff5c}Assistant\u{ff5c}>"],
        start: "<think>",
        start_in_prompt: false,
        end: "</think>",
        close: None,
        end_string: "</think>\n\n",
        end_string_on_new_line: true,
    },
    // Qwen3 and whoever else has the tags; the sentence is that of the Qwen3 report (arXiv 2505.09388, section 4.3).
    Profile {
        name: "think-tags",
        needs: &["<think>", "</think>"],
        marks: &["<think>", "</think>"],
        start: "<think>",
        start_in_prompt: false,
        end: "</think>",
        close: None,
        end_string: "Considering the limited time by the user, I have to give the solution based on the thinking directly now.\n\
                     </think>\n\n",
        end_string_on_new_line: false,
    },
];

impl Profile {
    pub fn named(name: &str) -> Option<&'static Profile> {
        PROFILES.iter().find(|profile| profile.name == name)
    }

    fn file(&self) -> ThinkingFile {
        ThinkingFile {
            start: self.start.into(),
            start_in_prompt: self.start_in_prompt,
            end: self.end.into(),
            close: self.close.map(String::from),
            end_string: Some(self.end_string.into()),
            end_string_on_new_line: self.end_string_on_new_line,
            ignore_strings: vec!["Wait".into()],
        }
    }
}

/// Delimiters as token ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delimiters {
    /// Opens the thinking.
    pub start: Vec<u32>,
    /// `start` is appended to the prompt; the model does not say it.
    pub start_in_prompt: bool,
    /// What the model says to end its thinking.
    pub end: Vec<u32>,
    /// What stands in the output after such an end; begins with `end`.
    pub close: Vec<u32>,
    /// Forced at the maximum.
    pub end_string: Vec<u32>,
    /// Forced before `end_string` where the text does not end with a newline.
    pub newline: Option<u32>,
    /// What replaces an ignored end unless the request says otherwise.
    pub ignore_strings: Vec<Vec<u32>>,
}

/// Ids of a start or end; of any other string.
pub const MAX_DELIMITER: usize = 8;
pub const MAX_STRING: usize = 64;

/// thinking.json.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThinkingFile {
    start: String,
    #[serde(default)]
    start_in_prompt: bool,
    end: String,
    close: Option<String>,
    end_string: Option<String>,
    #[serde(default)]
    end_string_on_new_line: bool,
    #[serde(default)]
    ignore_strings: Vec<String>,
}

impl ThinkingFile {
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(json: &[u8]) -> std::result::Result<ThinkingFile, String> {
        let file: ThinkingFile = serde_json::from_slice(json).map_err(|e| format!("not a thinking.json: {e}"))?;
        if file.end.is_empty() {
            return Err("field \"end\" is empty: say what ends the thinking, or remove the file".into());
        }
        if file.ignore_strings.len() > 8 {
            return Err(format!("field \"ignore_strings\" has {} entries: at most 8", file.ignore_strings.len()));
        }
        Ok(file)
    }
}

impl Delimiters {
    /// The delimiters of the model in `folder`; `None`: it does not think.
    ///
    /// # Errors
    /// A thinking.json that cannot be read or used; delimiters that the tokenizer does not have.
    pub fn resolve(choice: &ThinkingChoice, folder: &Path, tokenizer: &Tokenizer) -> Result<Option<Delimiters>> {
        let has = |token: &str| tokenizer.token_id(token).is_some();
        match choice {
            ThinkingChoice::None => Ok(None),
            ThinkingChoice::Profile(profile) => {
                if let Some(token) = profile.needs.iter().find(|token| !has(token)) {
                    let problem = format!("{} needs the token {token}, which this tokenizer lacks", profile.name);
                    return Err(Error::request("thinking", problem));
                }
                Delimiters::encode(&profile.file(), tokenizer).map(Some).map_err(|p| Error::request("thinking", p))
            }
            ThinkingChoice::Explicit { start, end } => {
                if end.is_empty() {
                    return Err(Error::request("thinking_end", "empty: say what ends the thinking"));
                }
                let file = ThinkingFile {
                    start: start.clone(),
                    start_in_prompt: false,
                    end: end.clone(),
                    close: None,
                    end_string: None,
                    end_string_on_new_line: false,
                    ignore_strings: vec!["Wait".into()],
                };
                Delimiters::encode(&file, tokenizer).map(Some).map_err(|p| Error::request("thinking", p))
            }
            ThinkingChoice::Auto => {
                let path = folder.join("thinking.json");
                match std::fs::read(&path) {
                    Ok(json) => ThinkingFile::parse(&json)
                        .and_then(|file| Delimiters::encode(&file, tokenizer))
                        .map(Some)
                        .map_err(|problem| Error::model(path, problem)),
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
                    Err(_) => {
                        let known = |p: &&Profile| !p.marks.is_empty() && p.marks.iter().all(|token| has(token));
                        match PROFILES.iter().find(known) {
                            Some(profile) => Delimiters::resolve(&ThinkingChoice::Profile(profile), folder, tokenizer),
                            None => Ok(None),
                        }
                    }
                }
            }
        }
    }

    /// # Errors
    /// Strings without tokens or with too many, and such as do not fit each other; in words.
    pub fn encode(file: &ThinkingFile, tokenizer: &Tokenizer) -> std::result::Result<Delimiters, String> {
        let ids = |name: &str, text: &str, most: usize| {
            let ids = tokenizer.encode(text).map_err(|e| format!("{name}: {e}"))?;
            match ids.len() {
                0 if !text.is_empty() => Err(format!("{name} {text:?} has no tokens")),
                n if n > most => Err(format!("{name} {text:?} has {n} tokens: at most {most}")),
                _ => Ok(ids),
            }
        };
        let start = ids("start", &file.start, MAX_DELIMITER)?;
        let end = ids("end", &file.end, MAX_DELIMITER)?;
        let close = ids("close", file.close.as_deref().unwrap_or(&file.end), MAX_STRING)?;
        if !close.starts_with(&end) {
            return Err(format!("close {:?} does not begin with the tokens of end {:?}", file.close, file.end));
        }
        let end_string = match &file.end_string {
            Some(text) => ids("end_string", text, MAX_STRING)?,
            None => close.clone(),
        };
        if !end_string.windows(end.len()).any(|w| w == end) {
            return Err(format!("end_string {:?} does not hold the tokens of end {:?}", file.end_string, file.end));
        }
        let newline = match file.end_string_on_new_line {
            false => None,
            true => match ids("newline", "\n", 1)?.as_slice() {
                &[id] => Some(id),
                _ => return Err("the tokenizer has no single token for a newline".into()),
            },
        };
        let ignore_strings = file
            .ignore_strings
            .iter()
            .map(|s| ids("ignore_strings", s, MAX_STRING))
            .collect::<std::result::Result<_, _>>()?;
        Ok(Delimiters { start, start_in_prompt: file.start_in_prompt, end, close, end_string, newline, ignore_strings })
    }
}
