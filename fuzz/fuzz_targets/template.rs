//! A chat template: parsed, and rendered for a short conversation; neither hangs nor grows without bound.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ponder::chat::{ChatTemplate, Message};
use std::path::Path;

fuzz_target!(|source: &str| {
    let path = Path::new("chat_template.jinja");
    let Ok(template) = ChatTemplate::parse(source.into(), path, "<s>".into(), "</s>".into()) else { return };
    let messages = [Message::new("system", "Be brief."), Message::new("user", "Why?")];
    let _ = template.render(&messages, true, &serde_json::Map::new());
});
