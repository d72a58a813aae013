//! Chat templates in Hugging Face's dialect of Jinja, by minijinja: messages to the prompt that the model was trained on.
//! Knows no tokens.

use crate::{Error, Result};
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::collections::HashSet;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Once;

/// One turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
    /// What an earlier answer thought; templates that want it call it so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Calls of tools that it made: a list in OpenAI's shape, but arguments are objects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<serde_json::Value>,
    /// Of the call whose result this is, and of the tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Message {
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        let content = content.into();
        Message {
            role: role.into(),
            content,
            reasoning_content: None,
            tool_calls: None,
            tool_call_id: None,
            name: None,
        }
    }
}

pub struct ChatTemplate {
    environment: Environment<'static>,
    path: PathBuf,
    bos_token: String,
    eos_token: String,
}

/// Instructions of the template engine: a template that loops for ever must not.
const FUEL: u64 = 10_000_000;
/// Bytes of a rendered prompt.
const MAX_RENDERED: usize = 64 << 20;

impl ChatTemplate {
    /// From chat_template.jinja, or the `chat_template` of tokenizer_config.json (a string, or a list of named ones of which
    /// `default` is taken). `None`: the model has none.
    ///
    /// # Errors
    /// Unreadable files, a template that does not parse.
    pub fn load(folder: &Path) -> Result<Option<ChatTemplate>> {
        let config_path = folder.join("tokenizer_config.json");
        let config = match std::fs::read(&config_path) {
            Ok(bytes) => serde_json::from_slice::<serde_json::Value>(&bytes)
                .map_err(|e| Error::model(&config_path, format!("not valid JSON: {e}")))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => serde_json::Value::Null,
            Err(e) => return Err(Error::io(config_path, e)),
        };
        let token = |name: &str| match config.get(name) {
            Some(serde_json::Value::String(s)) => s.clone(),
            Some(v) => v.get("content").and_then(|c| c.as_str()).unwrap_or_default().to_string(),
            None => String::new(),
        };
        let file_path = folder.join("chat_template.jinja");
        let (source, path) = match std::fs::read_to_string(&file_path) {
            Ok(text) => (text, file_path),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => match config.get("chat_template") {
                None | Some(serde_json::Value::Null) => return Ok(None),
                Some(serde_json::Value::String(text)) => (text.clone(), config_path),
                Some(serde_json::Value::Array(list)) => {
                    let named = |t: &&serde_json::Value| t.get("name").and_then(|n| n.as_str()) == Some("default");
                    match list.iter().find(named).and_then(|t| t.get("template")).and_then(|t| t.as_str()) {
                        Some(text) => (text.to_string(), config_path),
                        None => {
                            return Err(Error::model(
                                config_path,
                                "\"chat_template\" has no template named \"default\"",
                            ));
                        }
                    }
                }
                Some(_) => {
                    return Err(Error::model(
                        config_path,
                        "\"chat_template\" is neither a string nor a list of templates",
                    ));
                }
            },
            Err(e) => return Err(Error::io(file_path, e)),
        };
        ChatTemplate::parse(source, &path, token("bos_token"), token("eos_token")).map(Some)
    }

    /// `path` is for messages.
    pub fn parse(source: String, path: &Path, bos_token: String, eos_token: String) -> Result<ChatTemplate> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(100);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<Value, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        contained(|| environment.add_template_owned("chat", source).map_err(|e| explain(&e)))
            .map_err(|problem| Error::model(path, format!("the chat template does not parse: {problem}")))?;
        Ok(ChatTemplate { environment, path: path.into(), bos_token, eos_token })
    }

    /// Names that it reads and does not set itself.
    pub fn variables(&self) -> HashSet<String> {
        self.environment.get_template("chat").expect("added in parse").undeclared_variables(false)
    }

    /// Whether this text stands in it.
    pub fn has(&self, text: &str) -> bool {
        self.environment.get_template("chat").expect("added in parse").source().contains(text)
    }

    /// The prompt for these messages; with `add_generation_prompt` it ends where the model's answer begins. `extra` variables
    /// are visible to the template (as `chat_template_kwargs` elsewhere) but cannot replace its own.
    ///
    /// # Errors
    /// A template that fails, or says by `raise_exception` that it does not take these messages.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String> {
        let mut context = extra.clone();
        context.insert("messages".into(), serde_json::to_value(messages).expect("messages are plain"));
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.insert("bos_token".into(), self.bos_token.clone().into());
        context.insert("eos_token".into(), self.eos_token.clone().into());
        let fail = |problem: String| Error::model(&self.path, format!("the chat template fails: {problem}"));
        let template = self.environment.get_template("chat").expect("added in parse");
        let mut out = Bounded(Vec::new());
        contained(|| {
            template.render_captured_to(Value::from_serialize(&context), &mut out).map(drop).map_err(|e| explain(&e))
        })
        .map_err(fail)?;
        String::from_utf8(out.0).map_err(|_| fail("it printed something that is not UTF-8".into()))
    }
}

/// A sink that refuses to grow without bound.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED {
            return Err(std::io::Error::other("it prints without end"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

thread_local! {
    static IN_TEMPLATE: Cell<bool> = const { Cell::new(false) };
}

/// Runs the template engine on text from outside. minijinja panics on some templates (`{{ missing[::-1][::-1][0] }}`): here that is one
/// more thing wrong with the template, and the thread's panic message is not printed.
fn contained<T>(run: impl FnOnce() -> std::result::Result<T, String>) -> std::result::Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !IN_TEMPLATE.get() {
                print(info);
            }
        }));
    });
    IN_TEMPLATE.set(true);
    // What `run` borrows is dropped or, the environment, not changed by rendering.
    let result = panic::catch_unwind(AssertUnwindSafe(run));
    IN_TEMPLATE.set(false);
    result.unwrap_or_else(|cause| {
        let message = cause.downcast_ref::<String>().map(String::as_str).or(cause.downcast_ref::<&str>().copied());
        Err(format!("the template engine does not survive it: {}", message.unwrap_or("no reason given")))
    })
}

/// What is wrong and where, on one line.
fn explain(e: &minijinja::Error) -> String {
    let mut text = e.detail().map_or_else(|| e.kind().to_string(), |d| d.to_string());
    if let Some(line) = e.line() {
        text += &format!(" (line {line})");
    }
    let mut source = std::error::Error::source(e);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

/// Python's time.strftime of the local time; a format that chrono does not know is an error, not a panic.
fn strftime_now(format: String) -> std::result::Result<String, minijinja::Error> {
    use std::fmt::Write;
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(&format)).map_err(|_| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know the format {format:?}"))
    })?;
    Ok(text)
}

/// Hugging Face's `tojson`: Python's json.dumps with ensure_ascii=False, ", " and ": " between, or indented.
fn to_json(value: Value, options: minijinja::value::Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<Value> = options.get("separators")?;
    let _: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    if indent.is_some_and(|n| n > 16) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "tojson: indent is at most 16"));
    }
    let json = serde_json::to_value(&value)
        .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}")))?;
    let mut text = String::new();
    write_json(&json, indent, 0, &mut text);
    if ensure_ascii == Some(true) {
        text = escape_non_ascii(&text);
    }
    Ok(Value::from_safe_string(text))
}

fn write_json(value: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    let newline = |depth: usize, out: &mut String| {
        if let Some(width) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value {
        serde_json::Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(separator);
                }
                newline(depth + 1, out);
                write_json(item, indent, depth + 1, out);
            }
            newline(depth, out);
            out.push(']');
        }
        serde_json::Value::Object(entries) if !entries.is_empty() => {
            out.push('{');
            for (i, (name, item)) in entries.iter().enumerate() {
                if i > 0 {
                    out.push_str(separator);
                }
                newline(depth + 1, out);
                out.push_str(&serde_json::Value::from(name.as_str()).to_string());
                out.push_str(": ");
                write_json(item, indent, depth + 1, out);
            }
            newline(depth, out);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}

fn escape_non_ascii(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out += &format!("\\u{unit:04x}");
            }
        }
    }
    out
}
