//! Requests are judged before they run: what cannot be served is refused by the name of its parameter, and never dropped.

use ponder::Error;
use ponder::batch::{BudgetParams, SamplingParams};
use ponder::budget::BudgetRequest;
use ponder::config::SamplingDefaults;
use ponder::sampling::SamplingRequest;
use ponder::thinking::{Delimiters, Profile, ThinkingChoice};
use ponder::tokenizer::Tokenizer;
use std::path::Path;

const MODEL: &str = "models/modulo";
const VOCAB: usize = 500;
const EOS: u32 = 7;

fn sampling(request: &SamplingRequest) -> ponder::Result<SamplingParams> {
    request.validate(&SamplingDefaults::default(), VOCAB, &[EOS])
}

/// Refused, and the message begins with the parameter.
fn assert_refused<T: std::fmt::Debug>(result: ponder::Result<T>, name: &str, what: &str) {
    match result {
        Err(error @ Error::Request { parameter, .. }) => {
            assert_eq!(parameter, name, "{what}: {error}");
            assert!(error.to_string().starts_with(&format!("{name}: ")) && error.to_string().len() > name.len() + 10);
        }
        other => panic!("{what} should be refused for its {name}: {other:?}"),
    }
}

#[test]
fn every_sampling_parameter_out_of_range_is_refused_by_name() {
    type Set = fn(&mut SamplingRequest, f32);
    let numbers: [(&str, Set, &[f32], &[f32]); 6] = [
        ("temperature", |r, x| r.temperature = Some(x), &[-0.1, 1e-9, 101.0], &[0.0, 0.001, 100.0]),
        ("top_p", |r, x| r.top_p = Some(x), &[-0.1, 0.0, 1.1], &[1e-6, 1.0]),
        ("min_p", |r, x| r.min_p = Some(x), &[-0.1, 1.1], &[0.0, 1.0]),
        ("repetition_penalty", |r, x| r.repetition_penalty = Some(x), &[0.0, -1.0, 1e9], &[0.5, 1.0, 2.0]),
        ("presence_penalty", |r, x| r.presence_penalty = Some(x), &[-2.1, 2.1], &[-2.0, 2.0]),
        ("frequency_penalty", |r, x| r.frequency_penalty = Some(x), &[-2.1, 2.1], &[-2.0, 2.0]),
    ];
    for (name, set, bad, good) in numbers {
        for &value in bad.iter().chain(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
            let mut request = SamplingRequest::default();
            set(&mut request, value);
            assert_refused(sampling(&request), name, &format!("{value}"));
        }
        for &value in good {
            let mut request = SamplingRequest::default();
            set(&mut request, value);
            assert!(sampling(&request).is_ok(), "{name} {value}");
        }
    }
    let others: [(&str, SamplingRequest); 10] = [
        ("logprobs", SamplingRequest { logprobs: Some(21), ..Default::default() }),
        ("logit_bias", SamplingRequest { logit_bias: vec![(500, 1.0)], ..Default::default() }),
        ("logit_bias", SamplingRequest { logit_bias: vec![(1, f32::NAN)], ..Default::default() }),
        ("logit_bias", SamplingRequest { logit_bias: vec![(1, 1.0), (2, 0.0), (1, 2.0)], ..Default::default() }),
        ("logit_bias", SamplingRequest { logit_bias: vec![(1, 1.0); 513], ..Default::default() }),
        ("allowed_ids", SamplingRequest { allowed_ids: Some(vec![]), ..Default::default() }),
        ("allowed_ids", SamplingRequest { allowed_ids: Some(vec![1, 500]), ..Default::default() }),
        ("stop_ids", SamplingRequest { stop_ids: vec![500], ..Default::default() }),
        ("stop_ids", SamplingRequest { stop_ids: (20..36).collect(), ..Default::default() }),
        ("stop_ids", SamplingRequest { stop_ids: vec![u32::MAX], ..Default::default() }),
    ];
    for (name, request) in others {
        assert_refused(sampling(&request), name, &format!("{request:?}"));
    }
}

#[test]
fn what_a_request_leaves_open_the_model_decides() {
    let request = SamplingRequest::default();
    let with = |defaults: SamplingDefaults| request.validate(&defaults, VOCAB, &[EOS]).unwrap();
    let nothing = with(SamplingDefaults::default());
    let numbers = (nothing.temperature, nothing.top_k, nothing.top_p, nothing.min_p, nothing.repetition_penalty);
    assert_eq!(numbers, (0.0, 0, 1.0, 0.0, 1.0));
    assert_eq!((nothing.seed, nothing.logprobs, nothing.allowed), (0, None, None));
    let model =
        || SamplingDefaults { temperature: Some(0.6), top_k: Some(20), top_p: Some(0.95), ..Default::default() };
    assert_eq!(with(model()).temperature, 0.6);
    assert_eq!((with(model()).top_k, with(model()).top_p), (20, 0.95));
    assert_eq!(with(SamplingDefaults { do_sample: Some(false), ..model() }).temperature, 0.0);
    let own = SamplingRequest { temperature: Some(1.0), top_k: Some(0), ..Default::default() };
    let own = own.validate(&model(), VOCAB, &[EOS]).unwrap();
    assert_eq!((own.temperature, own.top_k, own.top_p), (1.0, 0, 0.95));
}

#[test]
fn stop_ids_are_kept_once_and_an_eos_that_is_asked_for_stops_although_eos_is_ignored() {
    let request = SamplingRequest { stop_ids: vec![9, EOS, 9, 3], ..Default::default() };
    assert_eq!(sampling(&request).unwrap().stop_ids, [3, 9]);
    let request = SamplingRequest { ignore_eos: true, ..request };
    assert_eq!(sampling(&request).unwrap().stop_ids, [3, EOS, 9]);
}

struct Model {
    tokenizer: Tokenizer,
    delimiters: Delimiters,
}

impl Model {
    fn load() -> Model {
        let tokenizer = Tokenizer::load(Path::new(MODEL), VOCAB).unwrap();
        let delimiters =
            Delimiters::resolve(&ThinkingChoice::Profile(Profile::named("s1").unwrap()), Path::new(MODEL), &tokenizer)
                .unwrap()
                .unwrap();
        Model { tokenizer, delimiters }
    }

    fn validate(&self, request: &BudgetRequest, prompt: &str) -> ponder::Result<BudgetParams> {
        let prompt = self.tokenizer.encode(prompt).unwrap();
        let params = request.validate(Some(&self.delimiters), &self.tokenizer, &prompt);
        params.map(|p| p.expect("the model has delimiters"))
    }
}

#[test]
fn a_budget_that_cannot_be_enforced_is_refused_by_name() {
    let model = Model::load();
    let long = "a b ".repeat(200);
    let cases: [(&str, BudgetRequest); 9] = [
        ("max_thinking_tokens", BudgetRequest { max_thinking_tokens: Some((1 << 30) + 1), ..Default::default() }),
        (
            "max_thinking_tokens",
            BudgetRequest { max_thinking_tokens: Some(4), min_thinking_tokens: 5, ..Default::default() },
        ),
        ("min_thinking_tokens", BudgetRequest { min_thinking_tokens: u32::MAX, ..Default::default() }),
        ("n_ignore", BudgetRequest { n_ignore: u32::MAX, ..Default::default() }),
        ("ignore_string", BudgetRequest { ignore_strings: Some(vec!["a".into(); 9]), ..Default::default() }),
        ("ignore_string", BudgetRequest { ignore_strings: Some(vec![long.clone()]), ..Default::default() }),
        ("ignore_string", BudgetRequest { ignore_strings: Some(vec!["a<|im_start|>".into()]), ..Default::default() }),
        ("end_string", BudgetRequest { end_string: Some("and that is that".into()), ..Default::default() }),
        ("end_string", BudgetRequest { end_string: Some(format!("{long}<|im_start|>")), ..Default::default() }),
    ];
    for (name, request) in cases {
        assert_refused(model.validate(&request, "a"), name, &format!("{request:?}"));
    }
}

/// No delimiters: no budget can be enforced, and saying nothing is the one bug class that costs users most (s1-notes 2.4, 9).
#[test]
fn bug_9_a_budget_is_silently_ignored() {
    let model = Model::load();
    let validate = |request: &BudgetRequest| request.validate(None, &model.tokenizer, &[1]);
    assert_eq!(validate(&BudgetRequest::default()).unwrap(), None);
    let cases: [(&str, BudgetRequest); 5] = [
        ("max_thinking_tokens", BudgetRequest { max_thinking_tokens: Some(0), ..Default::default() }),
        ("min_thinking_tokens", BudgetRequest { min_thinking_tokens: 1, ..Default::default() }),
        ("n_ignore", BudgetRequest { n_ignore: 1, ..Default::default() }),
        ("ignore_string", BudgetRequest { ignore_strings: Some(vec![]), ..Default::default() }),
        ("end_string", BudgetRequest { end_string: Some("a".into()), ..Default::default() }),
    ];
    for (name, request) in cases {
        assert_refused(validate(&request), name, &format!("{request:?}"));
    }
    // A model whose thinking needs no start begins with it.
    let delimiters = Delimiters { start: vec![], ..model.delimiters.clone() };
    let params = BudgetRequest::default().validate(Some(&delimiters), &model.tokenizer, &[1]).unwrap().unwrap();
    assert!(params.starts_thinking);
}

#[test]
fn whether_a_prompt_ends_inside_the_thinking() {
    let model = Model::load();
    let starts = |prompt| model.validate(&BudgetRequest::default(), prompt).unwrap().starts_thinking;
    assert!(starts("a<|im_start|>think"));
    assert!(starts("a<|im_start|>think\nb"));
    assert!(!starts("a"));
    assert!(!starts("a<|im_start|>think b<|im_start|>answer"));
    assert!(starts("a<|im_start|>think b<|im_start|>answer c<|im_start|>think"));
    let newline = |prompt| model.validate(&BudgetRequest::default(), prompt).unwrap().prompt_ends_with_newline;
    assert!(newline("a\n") && !newline("a\nb"));
}

#[test]
fn a_request_s_strings_replace_the_model_s() {
    let model = Model::load();
    let default = model.validate(&BudgetRequest::default(), "a").unwrap();
    assert_eq!(default.ignore_strings, model.delimiters.ignore_strings);
    assert_eq!((default.end_string, default.newline), (model.delimiters.end_string.clone(), model.delimiters.newline));
    let request = BudgetRequest {
        ignore_strings: Some(vec!["b".into(), String::new()]),
        end_string: Some("b<|im_start|>answer".into()),
        ..Default::default()
    };
    let own = model.validate(&request, "a").unwrap();
    assert_eq!(own.ignore_strings, [model.tokenizer.encode("b").unwrap(), vec![]]);
    assert_eq!((own.end_string, own.newline), (model.tokenizer.encode("b<|im_start|>answer").unwrap(), None));
}

#[test]
fn a_model_whose_end_string_does_not_end_the_thinking_is_refused() {
    let model = Model::load();
    let folder = std::env::temp_dir().join(format!("ponder-requests-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let json = r#"{"start": "<|im_start|>think", "end": "<|im_start|>", "end_string": "so much for that"}"#;
    std::fs::write(folder.join("thinking.json"), json).unwrap();
    let resolved = Delimiters::resolve(&ThinkingChoice::Auto, &folder, &model.tokenizer);
    std::fs::remove_dir_all(&folder).unwrap();
    let error = resolved.unwrap_err().to_string();
    assert!(error.contains("end_string") && error.contains("so much for that"), "{error}");
}
