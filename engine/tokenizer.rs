//! Text to token ids and back: tokenizer.json through the `tokenizers` crate, the bytes of single tokens, and incremental
//! detokenisation that never splits a character. Knows no model but the size of its vocabulary.

use crate::{Error, Result};
use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Bytes of every id below the vocabulary size; empty for ids that are no token.
    bytes: Bytes,
    special: Vec<bool>,
    /// Their text.
    special_tokens: Vec<String>,
    /// Made when first asked for.
    words: OnceLock<HashMap<String, Vec<u32>>>,
}

/// Strings of bytes, end to end: a step of many sequences looks up as many tokens, all over the vocabulary.
struct Bytes {
    all: Vec<u8>,
    /// Where string i ends, and the next begins.
    ends: Vec<u32>,
}

impl Bytes {
    fn new<'a>(strings: impl Iterator<Item = &'a [u8]>) -> Bytes {
        let (mut all, mut ends) = (Vec::new(), Vec::new());
        for string in strings {
            all.extend_from_slice(string);
            ends.push(all.len() as u32);
        }
        Bytes { all, ends }
    }

    /// Empty beyond the last.
    fn get(&self, index: usize) -> &[u8] {
        let begin = index.checked_sub(1).map_or(0, |before| self.ends.get(before).map_or(0, |&end| end as usize));
        self.ends.get(index).map_or(&[], |&end| &self.all[begin..end as usize])
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.ends.len()).map(|index| self.get(index))
    }
}

/// Bits of [`Tokenizer::traits`], as kernels/params.h names them (TokenTrait).
const CONTINUE_SHIFT: u32 = 2;
const NEWLINE: u8 = 32;
const REAL: u8 = 64;
const SENTENCE: u8 = 128;

impl Tokenizer {
    /// `vocab_size`: rows of the model's embedding table.
    ///
    /// # Errors
    /// No or an unusable tokenizer.json; a token id that the model has no row for.
    pub fn load(folder: &Path, vocab_size: usize) -> Result<Tokenizer> {
        let path = folder.join("tokenizer.json");
        let json = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&json)
            .map_err(|e| Error::model(&path, format!("not a tokenizer that can be read: {e}")))?;
        // Padding and truncation belong to training; a prompt is used as it is.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::model(&path, e.to_string()))?;

        let byte_level = serde_json::from_slice::<serde_json::Value>(&json)
            .is_ok_and(|v| v.get("decoder").is_some_and(|d| mentions_byte_level(d, 0)));
        let alphabet = if byte_level { byte_level_alphabet() } else { HashMap::new() };
        let added = inner.get_added_tokens_decoder();
        let mut bytes: Vec<Box<[u8]>> = vec![Box::default(); vocab_size];
        let mut special = vec![false; vocab_size];
        for (token, id) in inner.get_vocab(true) {
            if id as usize >= vocab_size {
                return Err(Error::model(
                    &path,
                    format!(
                        "token {token:?} has id {id}, but the model's vocab_size is {vocab_size}: they do not belong together"
                    ),
                ));
            }
            let added_token = added.get(&id);
            special[id as usize] = added_token.is_some_and(|t| t.special);
            bytes[id as usize] = match added_token {
                Some(t) => t.content.as_bytes().into(),
                None => token_bytes(&token, &alphabet),
            };
        }
        let special_tokens = added.values().filter(|token| token.special).map(|token| token.content.clone()).collect();
        let bytes = Bytes::new(bytes.iter().map(|b| &**b));
        Ok(Tokenizer { inner, bytes, special, special_tokens, words: OnceLock::new() })
    }

    /// For benches, whose prompts are ids and whose answers nobody reads: every id is a token that spells a space.
    pub fn without_text(vocab_size: usize) -> Tokenizer {
        Tokenizer {
            inner: tokenizers::Tokenizer::new(tokenizers::models::wordlevel::WordLevel::default()),
            bytes: Bytes::new((0..vocab_size).map(|_| b" ".as_slice())),
            special: vec![false; vocab_size],
            special_tokens: Vec::new(),
            words: OnceLock::new(),
        }
    }

    /// Bytes of the longest token.
    pub fn longest_token(&self) -> usize {
        self.bytes.iter().map(<[u8]>::len).max().unwrap_or(0)
    }

    /// Special tokens in the text become their ids; none are added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| Error::request("prompt", format!("cannot be tokenised: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The id of a token that stands in the vocabulary as such.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The bytes of a token; empty for ids that are no token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize)
    }

    /// How special tokens are written; in a text they are read as such.
    pub fn special_tokens(&self) -> &[String] {
        &self.special_tokens
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The tokens that are this word, whatever its case and whatever stands around it that is neither letter nor digit: " Wait"
    /// and "wait," are "wait", "waiter" is not.
    pub fn word_tokens(&self, word: &str) -> &[u32] {
        let words = self.words.get_or_init(|| {
            let mut words: HashMap<String, Vec<u32>> = HashMap::new();
            for (id, bytes) in self.bytes.iter().enumerate().filter(|&(id, _)| !self.special[id]) {
                if let Some(word) = std::str::from_utf8(bytes).ok().map(bare_word).filter(|word| !word.is_empty()) {
                    words.entry(word).or_default().push(id as u32);
                }
            }
            words
        });
        words.get(&bare_word(word)).map_or(&[], Vec::as_slice)
    }

    /// Rows of the embedding table, padded ones included.
    pub fn vocab_size(&self) -> usize {
        self.bytes.ends.len()
    }

    /// Ids that are tokens.
    pub fn real_tokens(&self) -> usize {
        self.bytes.iter().filter(|b| !b.is_empty()).count()
    }

    /// All ids as text at once, broken characters replaced.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut detokenizer = Detokenizer::default();
        let mut text: String = ids.iter().map(|&id| detokenizer.push(self.token_bytes(id))).collect();
        text += &detokenizer.finish();
        text
    }

    /// What the sampler must know of each id, [vocab_size]: bits 0-1 the UTF-8 bytes still missing after its last character,
    /// bits 2-4 its length if it consists of continuation bytes alone (at most 7), bit 5 whether it ends with a newline,
    /// bit 6 whether it is a token at all, bit 7 whether it ends a sentence or a line.
    pub fn traits(&self) -> Vec<u8> {
        self.bytes.iter().map(token_traits).collect()
    }
}

fn bare_word(text: &str) -> String {
    text.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase()
}

/// Behind a full stop or its like may come quotes, brackets and spaces; a line ends a sentence in any case.
fn ends_sentence(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let said = text.trim_end_matches([' ', '"', '\'', ')', ']', '*', '\u{201d}', '\u{2019}']);
    said.ends_with(['.', '!', '?', '\n', '\u{3002}', '\u{ff01}', '\u{ff1f}'])
}

fn token_traits(bytes: &[u8]) -> u8 {
    if bytes.is_empty() {
        return 0;
    }
    let is_continuation = |b: &u8| b & 0xc0 == 0x80;
    let tail = bytes.iter().rev().take_while(|b| is_continuation(b)).count();
    let continuation = if tail == bytes.len() { tail.min(7) as u8 } else { 0 };
    let missing = match bytes.len().checked_sub(tail + 1).map(|lead| bytes[lead]) {
        Some(0xc0..=0xdf) => 1usize.saturating_sub(tail),
        Some(0xe0..=0xef) => 2usize.saturating_sub(tail),
        Some(0xf0..=0xf7) => 3usize.saturating_sub(tail),
        _ => 0,
    };
    let newline = if bytes.last() == Some(&b'\n') { NEWLINE } else { 0 };
    let sentence = if ends_sentence(bytes) { SENTENCE } else { 0 };
    missing as u8 | continuation << CONTINUE_SHIFT | newline | REAL | sentence
}

fn mentions_byte_level(decoder: &serde_json::Value, depth: usize) -> bool {
    decoder.get("type").and_then(|t| t.as_str()) == Some("ByteLevel")
        || depth < 4
            && decoder
                .get("decoders")
                .and_then(|d| d.as_array())
                .is_some_and(|list| list.iter().any(|d| mentions_byte_level(d, depth + 1)))
}

/// GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest for U+0100 and on.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let mut alphabet = HashMap::new();
    for byte in 0..=255u8 {
        let stand_in = if printable(byte) {
            byte as u32
        } else {
            next += 1;
            next - 1
        };
        alphabet.insert(char::from_u32(stand_in).unwrap(), byte);
    }
    alphabet
}

/// A vocabulary entry's bytes: byte-level, or SentencePiece with `▁` for a space and `<0x0A>` for single bytes.
fn token_bytes(token: &str, alphabet: &HashMap<char, u8>) -> Box<[u8]> {
    if !alphabet.is_empty() {
        if let Some(bytes) = token.chars().map(|c| alphabet.get(&c).copied()).collect::<Option<Vec<u8>>>() {
            return bytes.into();
        }
    } else if let Some(hex) = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'))
        && let (2, Ok(byte)) = (hex.len(), u8::from_str_radix(hex, 16))
    {
        return [byte].into();
    }
    token.replace('\u{2581}', " ").into_bytes().into()
}

/// Bytes of tokens to text, a token at a time: a character is handed out when it is whole.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    pending: Vec<u8>,
}

impl Detokenizer {
    /// The text that is certain now. Bytes that can never become a character come out as U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        if self.pending.is_empty()
            && let Ok(whole) = std::str::from_utf8(bytes)
        {
            return whole.into();
        }
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (valid, bad) = rest.split_at(e.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).expect("valid so far"));
                    rest = bad;
                    match e.error_len() {
                        Some(length) => {
                            text.push('\u{fffd}');
                            rest = &rest[length..];
                        }
                        None => break,
                    }
                }
            }
        }
        self.pending = rest.to_vec();
        text
    }

    /// The end: what is left of an unfinished character.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&rest).into_owned()
    }
}
