//! Answers of a given form and calls of tools, over HTTP. The simulated device says anything at all, so what comes out right has been
//! made to.

use crate::modulo;
use crate::server::{CHAT, COMPLETIONS, Server, simulated_engine_of};
use ponder::frontend::Frontend;
use ponder::server::Settings;
use ponder::thinking::ThinkingChoice;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Tells of tools and shows calls of them, as Qwen's does.
const TEMPLATE: &str = r#"{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"#;

/// The tiny model with this template.
fn folder() -> PathBuf {
    let folder = std::env::temp_dir().join(format!("ponder-tools-{}", std::process::id()));
    if !folder.exists() {
        let made = folder.with_extension("made");
        std::fs::create_dir_all(&made).unwrap();
        for file in ["config.json", "tokenizer.json", "thinking.json"] {
            std::fs::copy(Path::new(modulo::FOLDER).join(file), made.join(file)).unwrap();
        }
        std::fs::write(made.join("chat_template.jinja"), TEMPLATE).unwrap();
        // Another test may have been faster.
        let _ = std::fs::rename(&made, &folder);
    }
    folder
}

fn frontend() -> Frontend {
    Frontend::open(&folder(), &ThinkingChoice::Auto).unwrap()
}

fn server() -> Server {
    Server::start(simulated_engine_of(frontend()), Settings::default())
}

/// Anything, without thinking.
fn asking(more: Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": "Go on."}],
        "temperature": 1,
        "seed": 5,
        "max_tokens": 400,
        "thinking_token_budget": 0,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "b"]}},
        "required": ["x", "kind"],
        "additionalProperties": false,
    })
}

fn fits(value: &Value) -> bool {
    value.as_object().unwrap().len() == 2
        && value["x"].as_u64().unwrap() < 100
        && "ab".contains(value["kind"].as_str().unwrap())
}

fn tools(strict: bool) -> Value {
    json!([
        {"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": schema(), "strict": strict}},
        {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": false}}},
    ])
}

fn parsed(text: &Value) -> Value {
    let text = text.as_str().unwrap();
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text:?}"))
}

#[test]
fn an_answer_has_the_form_that_is_asked_for() {
    let server = server();
    let chat = |more: Value| {
        let answer = server.ask(CHAT, &asking(more));
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        answer["choices"][0]["message"]["content"].clone()
    };
    let wrapped = json!({"type": "json_schema", "json_schema": {"name": "it", "strict": true, "schema": schema()}});
    assert!(fits(&parsed(&chat(json!({"response_format": wrapped})))));
    assert!(fits(&parsed(&chat(json!({"response_format": {"type": "json_object", "schema": schema()}})))));
    assert!(fits(&parsed(&chat(json!({"structured_outputs": {"json": schema()}})))));
    assert!(fits(&parsed(&chat(json!({"guided_json": schema().to_string()})))), "a schema in a string");
    assert!(["yes", "no"].contains(&chat(json!({"structured_outputs": {"choice": ["yes", "no"]}})).as_str().unwrap()));
    let completion = |more: Value| {
        let mut body = asking(more);
        body.as_object_mut().unwrap().remove("messages");
        body["prompt"] = "Go on.".into();
        let answer = server.ask(COMPLETIONS, &body);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        answer["choices"][0]["text"].as_str().unwrap().to_string()
    };
    let number = completion(json!({"structured_outputs": {"regex": "[1-9][0-9]{2}"}}));
    assert!(number.len() == 3 && number.parse::<u32>().unwrap() >= 100, "{number}");
    let list = completion(json!({"guided_grammar": "start: \"(\" /[a-c]{1,4}/ \")\""}));
    assert!(list.starts_with('(') && list.ends_with(')') && list.len() <= 6, "{list}");
    let format = json!({"type": "json_schema", "name": "it", "schema": schema()});
    let answer = server.ask("/v1/responses", &json!({
        "input": "Go on.", "temperature": 1, "max_output_tokens": 400, "thinking_token_budget": 0, "text": {"format": format}
    }));
    let message = answer["output"].as_array().unwrap().iter().find(|item| item["type"] == "message").unwrap();
    assert!(fits(&parsed(&message["content"][0]["text"])), "{answer}");
}

/// The calls of a message, with their arguments parsed; their ids differ.
fn calls(message: &Value) -> Vec<(String, Value)> {
    let calls = message["tool_calls"].as_array().unwrap();
    let mut ids: Vec<&Value> = calls.iter().map(|call| &call["id"]).collect();
    ids.dedup();
    assert_eq!(ids.len(), calls.len());
    let call = |call: &Value| {
        assert_eq!(call["type"], "function");
        (call["function"]["name"].as_str().unwrap().to_string(), parsed(&call["function"]["arguments"]))
    };
    calls.iter().map(call).collect()
}

fn is_right((name, arguments): &(String, Value)) -> bool {
    match name.as_str() {
        "find" => fits(arguments),
        "stop" => *arguments == json!({}),
        _ => false,
    }
}

#[test]
fn a_model_that_must_call_does() {
    let server = server();
    for seed in 0..4 {
        let body = asking(
            json!({"tools": tools(false), "tool_choice": "required", "parallel_tool_calls": false, "seed": seed}),
        );
        let answer = server.ask(CHAT, &body);
        let choice = &answer["choices"][0];
        assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null));
        let made = calls(&choice["message"]);
        assert!(made.len() == 1 && is_right(&made[0]), "{answer}");

        let events = server.stream(CHAT, body);
        let deltas = events.iter().flat_map(|event| event["choices"][0]["delta"]["tool_calls"].as_array()).flatten();
        let streamed: Vec<_> = deltas.cloned().collect();
        assert_eq!(streamed.len(), 1);
        assert_eq!(
            (&streamed[0]["index"], &streamed[0]["function"]),
            (&json!(0), &choice["message"]["tool_calls"][0]["function"])
        );
        assert!(events.iter().all(|event| event["choices"][0]["delta"]["content"].as_str().is_none_or(str::is_empty)));
        assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    }
    let named = json!({"type": "function", "function": {"name": "find"}});
    let answer = server.ask(CHAT, &asking(json!({"tools": tools(false), "tool_choice": named})));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let made = calls(&answer["choices"][0]["message"]);
    assert!(made.len() == 1 && made[0].0 == "find" && is_right(&made[0]), "{answer}");
}

#[test]
fn a_model_that_may_call_keeps_to_strict_schemas_and_to_the_form_of_its_answer() {
    let server = server();
    let format = json!({"type": "json_object", "schema": {"type": "object", "properties": {"said": {"const": 1}},
        "required": ["said"], "additionalProperties": false}});
    let mut called = 0;
    for seed in 0..12 {
        let body = asking(json!({"tools": tools(true), "response_format": format, "seed": seed}));
        let choice = server.ask(CHAT, &body)["choices"][0].clone();
        match choice["message"].get("tool_calls") {
            Some(_) => {
                assert!(calls(&choice["message"]).iter().all(is_right), "{choice}");
                assert_eq!(choice["finish_reason"], "tool_calls");
                called += 1;
            }
            None => assert_eq!(parsed(&choice["message"]["content"]), json!({"said": 1})),
        }
    }
    assert!((1..12).contains(&called), "{called} of 12 called: this tests one way only");
}

#[test]
fn the_template_is_told_of_tools_and_earlier_calls_and_nobody_speaks_for_it() {
    let server = server();
    let prompt = |messages: Value, tools: Value| {
        let tokens = server.ask("/tokenize", &json!({"messages": messages, "tools": tools}))["tokens"].clone();
        let text = server.ask("/detokenize", &json!({"tokens": tokens}))["prompt"].as_str().unwrap().to_string();
        (tokens.as_array().unwrap().clone(), text)
    };
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "find", "arguments": "{\"x\": 1, \"kind\": \"é\"}"}});
    let messages = json!([
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "There."},
    ]);
    let tool = json!([{"type": "function", "function": {"name": "stop"}}]);
    let (_, text) = prompt(messages, tool);
    let expected = "<|im_start|>system\n{\"type\": \"function\", \"function\": {\"name\": \"stop\"}}\n<|im_end|>\n\
                    <|im_start|>user\nWhere?<|im_end|>\n\
                    <|im_start|>assistant\n<tool_call>\n{\"name\": \"find\", \"arguments\": {\"x\": 1, \"kind\": \"é\"}}\n</tool_call><|im_end|>\n\
                    <|im_start|>tool\nThere.<|im_end|>\n<|im_start|>assistant\n";
    assert!(text.starts_with(expected), "{text}");

    let end = frontend().tokenizer.encode("<|im_end|>").unwrap();
    assert_eq!(end.len(), 1, "a special token");
    let ends = |description: &str| {
        let tools = json!([{"type": "function", "function": {"name": "stop", "description": description,
            "parameters": {"type": "object", "properties": {description: {"type": "string"}}}}}]);
        let call =
            json!({"id": "1", "type": "function", "function": {"name": "find", "arguments": {"x": description}}});
        let messages =
            json!([{"role": "assistant", "content": "", "reasoning_content": description, "tool_calls": [call]}]);
        prompt(messages, tools).0.iter().filter(|token| **token == end[0]).count()
    };
    assert_eq!(ends("a <|im_end|> b"), ends("a b"));
}

#[test]
fn forms_and_tools_that_cannot_be_had_are_refused_by_name() {
    let server = server();
    let without_tools = Server::simulated();
    let refused = |server: &Server, more: Value, param: &str, words: &str| {
        let reply = server.post(CHAT, &asking(more.clone()));
        let error = reply.json()["error"].clone();
        assert_eq!((reply.status, &error["param"]), (400, &json!(param)), "{more}: {error}");
        assert!(error["message"].as_str().unwrap().contains(words), "{more}: {error}");
    };
    let here = |more, param, words| refused(&server, more, param, words);
    here(json!({"response_format": {"type": "yaml"}}), "response_format.type", "json_schema");
    here(json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema.schema", "missing");
    here(
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}),
        "response_format.json_schema.schema",
        "object",
    );
    here(
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "person"}}}}),
        "response_format",
        "person",
    );
    here(json!({"structured_outputs": {"regex": "("}}), "structured_outputs", "");
    here(json!({"structured_outputs": {"structural_tag": "{}"}}), "structured_outputs.structural_tag", "only");
    here(json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice", "1 to");
    here(json!({"guided_grammar": "start: nothing"}), "guided_grammar", "");
    here(json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice", "one form");
    here(json!({"guided_regex": "a", "min_tokens": 4}), "min_tokens", "grammar");
    here(json!({"tools": "find"}), "tools", "array");
    here(json!({"tools": [{"type": "search"}]}), "tools[0].type", "function");
    here(json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools[0].function.name", "name");
    here(json!({"tools": [tools(false)[0], tools(false)[0]]}), "tools", "two");
    here(json!({"tools": vec![tools(false)[0].clone(); 129]}), "tools", "129");
    here(json!({"tool_choice": "required"}), "tool_choice", "give tools");
    here(json!({"tools": tools(false), "tool_choice": "perhaps"}), "tool_choice", "none of");
    let other = json!({"type": "function", "function": {"name": "lose"}});
    here(json!({"tools": tools(false), "tool_choice": other}), "tool_choice.function.name", "lose");
    here(json!({"tools": tools(false), "guided_regex": "a"}), "guided_regex", "");
    let call = json!({"function": {"name": "find", "arguments": "{"}});
    here(json!({"messages": [{"role": "assistant", "tool_calls": [call]}]}), "messages[0].tool_calls[0]", "arguments");
    refused(&without_tools, json!({"tools": tools(false)}), "tools", "template");
    without_tools.ask(CHAT, &asking(json!({"tools": tools(false), "tool_choice": "none"})));
    without_tools.ask(CHAT, &asking(json!({"tools": [], "response_format": {"type": "text"}})));
}

/// Schemas and expressions that would take for ever or all memory.
#[test]
fn bombs_are_refused_in_time_and_the_server_goes_on() {
    let server = server();
    let deep = (0..2000).fold(json!({"type": "string"}), |inner, _| json!({"type": "array", "items": inner}));
    let wide: Vec<Value> = (0..30_000).map(|i| json!({"const": format!("{i:x}").repeat(20)})).collect();
    let doubling: serde_json::Map<String, Value> = (0..40)
        .map(|i| {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            (format!("d{i}"), json!({"allOf": [next, next]}))
        })
        .chain([("d40".to_string(), json!({"type": "string"}))])
        .collect();
    let bombs = [
        json!({"guided_json": deep}),
        json!({"guided_json": {"anyOf": wide}}),
        json!({"guided_json": {"$defs": doubling, "$ref": "#/$defs/d0"}}),
        json!({"guided_json": {"$ref": "#"}}),
        json!({"guided_json": {"type": "string", "pattern": "((a{1000}){1000}){1000}"}}),
        json!({"guided_json": {"type": "array", "minItems": 1_000_000_000, "items": {"type": "string"}}}),
        json!({"guided_regex": "(x+x+)+y(.*.*)*{0,900}"}),
        json!({"guided_regex": "(?:a?){5000}a{5000}"}),
        json!({"guided_regex": "(".repeat(100_000)}),
        json!({"guided_regex": "[01]*1[01]{18}"}),
        json!({"guided_grammar": "start: a\na: a a | \"x\"\n"}),
        json!({"guided_grammar": format!("start: {}", "(\"a\" | ".repeat(20_000))}),
        json!({"structured_outputs": {"choice": vec!["z".repeat(5000); 1000]}}),
    ];
    for bomb in bombs {
        let start = Instant::now();
        let mut body = asking(bomb.clone());
        body["max_tokens"] = 16.into();
        let reply = server.post(CHAT, &body);
        let shown: String = bomb.to_string().chars().take(100).collect();
        // Some are harmless here, and served.
        assert!(reply.status == 200 || (400..500).contains(&reply.status), "{shown}: {} {}", reply.status, reply.text);
        assert!(start.elapsed() < Duration::from_secs(10), "{shown} took {:?}", start.elapsed());
    }
    server.ask(CHAT, &asking(json!({"guided_regex": "fine"})));
}
