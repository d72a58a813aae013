//! thinking.json: parsed, and its strings turned into tokens of the tiny model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ponder::thinking::{Delimiters, MAX_DELIMITER, MAX_STRING, ThinkingFile};
use ponder::tokenizer::Tokenizer;
use std::path::Path;
use std::sync::LazyLock;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::load(Path::new("models/modulo"), 512).unwrap());

fuzz_target!(|json: &[u8]| {
    let Ok(file) = ThinkingFile::parse(json) else { return };
    if let Ok(d) = Delimiters::encode(&file, &TOKENIZER) {
        assert!(d.start.len() <= MAX_DELIMITER && (1..=MAX_DELIMITER).contains(&d.end.len()));
        assert!(d.close.starts_with(&d.end) && d.close.len() <= MAX_STRING && d.end_string.len() <= MAX_STRING);
        assert!(d.ignore_strings.iter().all(|s| s.len() <= MAX_STRING));
    }
});
