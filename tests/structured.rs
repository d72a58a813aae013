//! Answers of a given form: whatever the model would say, what comes out is of that form and complete. The simulated device says
//! anything; so does the tiny model, which was never asked for JSON.

use crate::modulo::{self, Problem};
use ponder::budget::BudgetRequest;
use ponder::chat::Message;
use ponder::device::{Device, DeviceChoice};
use ponder::engine::Engine;
use ponder::executor::ExecutorOptions;
use ponder::frontend::{Frontend, Request};
use ponder::model::Weights;
use ponder::sampling::SamplingRequest;
use ponder::sequence::{Channel, FinishReason};
use ponder::structured::{Compiler, InPlace, Structure, Tool};
use ponder::thinking::ThinkingChoice;
use serde_json::{Value, json};
use std::path::Path;

fn frontend() -> Frontend {
    Frontend::open(Path::new(modulo::FOLDER), &ThinkingChoice::Auto).unwrap()
}

fn simulated() -> Engine {
    let device = Device::open("sim:h100,instant".parse::<DeviceChoice>().unwrap()).unwrap();
    Engine::new(frontend(), Weights::Dummy, &device, &ExecutorOptions::default(), &mut |_, _| {}).unwrap()
}

fn compiler() -> Compiler {
    let frontend = frontend();
    Compiler::new(&frontend.tokenizer, &frontend.config.eos_token_ids).unwrap()
}

/// What comes out under several seeds: thinking and answer. Each answer has ended by itself.
fn answers(engine: &mut Engine, structure: &Structure, budget: &BudgetRequest, seeds: u64) -> Vec<(String, String)> {
    let grammar = compiler().compile("response_format", structure).unwrap();
    let prompt = engine.frontend.encode_chat(&[Message::new("user", PROBLEM.question())]).unwrap();
    let request = |seed| Request {
        prompt: prompt.clone(),
        sampling: SamplingRequest { seed: Some(seed), temperature: Some(1.0), ..Default::default() },
        grammar: Some(grammar.clone()),
        budget: budget.clone(),
        ..Default::default()
    };
    let requests: Vec<Request> = (0..seeds).map(request).collect();
    let answers = modulo::answer_all(engine, &requests);
    assert!(answers.iter().all(|a| a.finish == Some(FinishReason::Stop)), "{structure:?}: an answer did not end");
    answers.iter().map(|a| (a.channel(Channel::Reasoning), a.channel(Channel::Answer))).collect()
}

const PROBLEM: Problem = Problem { m: 11, a: 3, b: 4, x: 3 };

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["a", "b", null]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
    })
}

fn is_person(value: &Value) -> bool {
    let object = value.as_object().expect("an object");
    let tags = object["tags"].as_array().unwrap();
    object.len() == 3
        && object["name"].as_str().unwrap().chars().count() <= 6
        && object["age"].as_u64().unwrap() <= 130
        && tags.len() <= 3
        && tags.iter().all(|tag| tag.is_null() || tag == "a" || tag == "b")
}

fn tools(in_place: InPlace, parallel: bool) -> Structure {
    let tool = |name: &str, parameters| Tool { name: name.into(), parameters };
    let tools = vec![tool("greet", person()), tool("wait", json!({"type": "object", "additionalProperties": false}))];
    Structure::Tools { tools, in_place, parallel }
}

/// The calls in an answer, and what stands before them.
fn calls(answer: &str) -> (&str, Vec<Value>) {
    let (before, calls) = answer.split_once("<tool_call>").unwrap_or((answer, ""));
    let calls = calls.split("<tool_call>").filter(|call| !call.is_empty());
    let object = |call: &str| call.trim().strip_suffix("</tool_call>").expect("a call ends").trim().to_string();
    (before, calls.map(|call| serde_json::from_str(&object(call)).unwrap()).collect())
}

fn is_call(call: &Value) -> bool {
    match call["name"].as_str().unwrap() {
        "greet" => is_person(&call["arguments"]),
        "wait" => call["arguments"] == json!({}),
        _ => false,
    }
}

#[test]
fn every_form_holds_whatever_is_said() {
    let mut engine = simulated();
    let mut ask = |structure: &Structure| -> Vec<String> {
        answers(&mut engine, structure, &BudgetRequest::default(), 24).into_iter().map(|(_, answer)| answer).collect()
    };
    for answer in ask(&Structure::Schema(person())) {
        assert!(is_person(&serde_json::from_str(&answer).unwrap()), "{answer}");
    }
    let choices = ["yes", "no", "\"per\thaps\""].map(String::from);
    let answered = ask(&Structure::Choice(choices.to_vec()));
    assert!(answered.iter().all(|answer| choices.contains(answer)), "{answered:?}");
    assert!(choices.iter().all(|choice| answered.contains(choice)), "each is chosen by some seed: {answered:?}");
    for answer in ask(&Structure::Regex("[a-f]{3}-[0-9]{2}".into())) {
        let (letters, digits) = answer.split_once('-').unwrap();
        assert!(letters.len() == 3 && letters.chars().all(|c| ('a'..='f').contains(&c)), "{answer}");
        assert!(digits.len() == 2 && digits.chars().all(|c| c.is_ascii_digit()), "{answer}");
    }
    for answer in ask(&Structure::Lark("start: \"(\" start \")\" | \"x\"".into())) {
        let depth = answer.find('x').unwrap();
        assert_eq!(answer, format!("{}x{}", "(".repeat(depth), ")".repeat(depth)));
    }
    for answer in ask(&tools(InPlace::Nothing, false)) {
        let (before, calls) = calls(&answer);
        assert!(before.is_empty() && calls.len() == 1 && is_call(&calls[0]), "{answer}");
    }
    for answer in ask(&tools(InPlace::Nothing, true)) {
        let (before, calls) = calls(&answer);
        assert!(before.is_empty() && !calls.is_empty() && calls.iter().all(is_call), "{answer}");
    }
}

/// The tiny model's thinking stays what it is; only the answer follows the grammar.
#[test]
fn thinking_is_free_and_the_answer_is_not() {
    let mut engine = modulo::engine(&ThinkingChoice::Auto);
    let schema = json!({"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 10}},
        "required": ["x"], "additionalProperties": false});
    let budget = BudgetRequest { n_ignore: 1, ignore_strings: Some(vec!["Wait".into()]), ..Default::default() };
    for (thinking, answer) in answers(&mut engine, &Structure::Schema(schema), &budget, 3) {
        assert!(thinking.contains("try ") && thinking.contains("Wait"), "{thinking}");
        let x = serde_json::from_str::<Value>(&answer).unwrap()["x"].as_u64().unwrap();
        assert!(x <= 10, "{answer}");
    }
}

/// Free words, calls, or both: a call that is opened follows its schema.
#[test]
fn calls_of_tools_may_follow_words() {
    let frontend = frontend();
    let grammar = compiler().compile("tools", &tools(InPlace::Text, false)).unwrap();
    let follow = |text: &str| -> Result<bool, String> {
        let mut guide = grammar.guide();
        let mut said = Vec::new();
        for id in frontend.tokenizer.encode(text).unwrap() {
            let mut allowed = vec![0; frontend.config.vocab_size.div_ceil(32)];
            guide.next(&std::mem::take(&mut said), &mut allowed).map_err(|e| e.to_string())?;
            if allowed[id as usize / 32] >> (id % 32) & 1 == 0 {
                return Err(String::from_utf8_lossy(frontend.tokenizer.token_bytes(id)).into());
            }
            said.push(id);
        }
        let mut allowed = vec![0; frontend.config.vocab_size.div_ceil(32)];
        let eos = frontend.config.eos_token_ids[0];
        let next = guide.next(&said, &mut allowed).map_err(|e| e.to_string())?;
        Ok(next == ponder::guide::Next::End || allowed[eos as usize / 32] >> (eos % 32) & 1 == 1)
    };
    let call = "<tool_call>\n{\"name\": \"wait\", \"arguments\": {}}\n</tool_call>";
    assert_eq!(follow("Just words, a < b."), Ok(true));
    assert_eq!(follow(call), Ok(true));
    assert_eq!(follow(&format!("I call. {call}")), Ok(true));
    assert_eq!(follow("I call. <tool_call>\n{\"name\": \"wait\""), Ok(false), "not in the middle of a call");
    assert!(follow("<tool_call>\n{\"name\": \"jump\"").is_err(), "no such tool");
    assert!(follow(&format!("{call} and so")).is_err(), "nothing follows the last call");
}

#[test]
fn what_cannot_be_enforced_is_refused_by_name() {
    let compiler = compiler();
    let refused = |structure: Structure, words: &str| {
        let message = compiler.compile("response_format", &structure).expect_err("refused").to_string();
        assert!(message.contains("response_format") && message.contains(words), "{structure:?}: {message}");
    };
    refused(Structure::Schema(json!({"type": "person"})), "person");
    refused(
        Structure::Schema(json!({"type": "object", "unevaluatedProperties": {"type": "string"}})),
        "unevaluatedProperties",
    );
    refused(Structure::Schema(json!({"$ref": "http://example.com/elsewhere.json"})), "ref");
    refused(Structure::Schema(json!({"type": "integer", "minimum": 3, "maximum": 2})), "nsatisfiable");
    refused(Structure::Regex("(".into()), "regex");
    refused(Structure::Lark("start: missing".into()), "missing");
}
