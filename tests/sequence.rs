//! Tokens to text: stop strings cut exactly where a search of the whole text would, nothing is taken back, characters stay
//! whole, and every piece is in its channel.

use crate::random::Random;
use ponder::batch::{Finish, TokenEvent};
use ponder::sequence::{Channel, Piece, Transcript};

fn event(finish: Option<Finish>) -> TokenEvent {
    TokenEvent {
        serial: 1,
        slot: 1,
        token: 7,
        injected: false,
        reasoning: false,
        delimiter: false,
        max_hit: false,
        stopped: false,
        awaits_mask: false,
        finish,
        generated: 1,
        ignores_used: 0,
        reasoning_tokens: 0,
        found_tokens: 0,
        logprob: 0.0,
        top: vec![],
        prompt: vec![],
    }
}

fn text(pieces: &[Piece]) -> String {
    pieces.iter().map(|p| p.text.as_str()).collect()
}

/// Random bytes in tokens of random length, random stop strings over the same few characters: against a plain search.
#[test]
fn stop_strings_cut_exactly() {
    let mut random = Random(3);
    let alphabet = ["a", "b", "ab", "é", "中", "😀"];
    let word = |random: &mut Random, most: u32| -> String {
        (0..=random.below(most)).map(|_| alphabet[random.below(alphabet.len() as u32) as usize]).collect()
    };
    let (mut stopped_runs, mut finished_runs) = (0, 0);
    for _ in 0..20_000 {
        let whole = word(&mut random, 12);
        let stops: Vec<String> = (0..random.below(4)).map(|_| word(&mut random, 3)).collect();
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let mut transcript = Transcript::new(stops.clone(), String::new());
        let (mut given, mut at, mut cut) = (String::new(), 0, None);
        while at < whole.len() && cut.is_none() {
            let end = whole.len().min(at + 1 + random.below(5) as usize);
            let finish = (end == whole.len()).then_some(Finish::Length);
            let (pieces, stopped) = transcript.push(&event(finish), &whole.as_bytes()[at..end], false);
            let stopped = stopped.is_some();
            at = end;
            // What a detokeniser can have said by now.
            let known = (0..=end).rev().find(|&n| whole.is_char_boundary(n)).unwrap();
            cut = stops.iter().filter_map(|s| whole[..known].find(s.as_str())).min();
            assert_eq!(stopped, cut.is_some(), "{whole:?} {stops:?}");
            given += &text(&pieces);
            assert!(whole.starts_with(&given));
            assert!(stopped || given.len() + longest.max(1) > known, "more is held back than a stop string is long");
        }
        assert_eq!(given, whole[..cut.unwrap_or(whole.len())], "{whole:?} {stops:?}");
        *if cut.is_some() { &mut stopped_runs } else { &mut finished_runs } += 1;
    }
    assert!(stopped_runs > 1000 && finished_runs > 1000, "{stopped_runs} {finished_runs}");
}

/// The token that ends an answer has no text, and half a character before it is not lost.
#[test]
fn the_end_has_no_text() {
    let mut transcript = Transcript::new(vec!["xyz".into()], String::new());
    assert_eq!(text(&transcript.push(&event(None), b"wx", false).0), "w");
    assert_eq!(text(&transcript.push(&event(None), "é".as_bytes().split_at(1).0, false).0), "");
    let (pieces, stopped) = transcript.push(&event(Some(Finish::Stop)), b"<|im_end|>", false);
    assert_eq!((text(&pieces).as_str(), stopped), ("x\u{fffd}", None));
}

/// s1's forced end: the newline and the closing delimiter are delimiter, "Final Answer:" is answer.
#[test]
fn what_follows_the_close_is_answer() {
    let mut transcript = Transcript::new(vec![], "<|im_start|>answer".into());
    let mut pieces = Vec::new();
    let mut push = |bytes: &[u8], reasoning: bool, delimiter: bool| {
        let event = TokenEvent { reasoning, delimiter, injected: delimiter, ..event(None) };
        pieces.extend(transcript.push(&event, bytes, false).0);
    };
    push(b"try 3", true, false);
    for token in ["\n", "<|im_start|>", "answer", "\n", "Final", " Answer", ":"] {
        push(token.as_bytes(), false, true);
    }
    push(b" x = 3", false, false);
    let channel = |c: Channel| text(&pieces.iter().filter(|p| p.channel == c).cloned().collect::<Vec<_>>());
    assert_eq!(channel(Channel::Reasoning), "try 3");
    assert_eq!(channel(Channel::Delimiter), "\n<|im_start|>answer");
    assert_eq!(channel(Channel::Answer), "\nFinal Answer: x = 3");
    let injected: Vec<Piece> = pieces.iter().filter(|p| p.injected).cloned().collect();
    assert_eq!(text(&injected), "\n<|im_start|>answer\nFinal Answer:");
}
