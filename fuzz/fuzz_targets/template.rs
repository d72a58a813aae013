//! A chat template: parsed, and rendered for a short conversation, without a panic. Templates that could ask for more than there
//! is are left out: minijinja bounds its steps, but not the size of one (ARCHITECTURE.md, known limits).
#![no_main]

use libfuzzer_sys::fuzz_target;
use ponder::chat::{ChatTemplate, Message};
use std::path::Path;

/// Multiplies, doubles, or has a number of more than four digits.
fn is_greedy(source: &str) -> bool {
    let digit = |c: char| c.is_ascii_hexdigit() || "xXoO_".contains(c);
    let numbers = source.match_indices(|c: char| c.is_ascii_digit());
    source.contains(['*', '~'])
        || numbers.into_iter().any(|(at, _)| source[at..].chars().take_while(|&c| digit(c)).count() > 4)
}

fuzz_target!(|source: &str| {
    if is_greedy(source) {
        return;
    }
    let path = Path::new("chat_template.jinja");
    let Ok(template) = ChatTemplate::parse(source.into(), path, "<s>".into(), "</s>".into()) else { return };
    let messages = [Message::new("system", "Be brief."), Message::new("user", "Why?")];
    let _ = template.render(&messages, true, &serde_json::Map::new());
});
