//! Models by name: a hub on this machine that serves the tiny model, and the binary that is to fetch it from there.

use crate::cli::{QUESTION, binary};
use crate::modulo::FOLDER as MODEL;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use ponder::checkpoint::parse_file;
use ponder::hub;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "model.safetensors";
/// Of what a model has on the hub, what no answer needs.
const UNWANTED: [&str; 4] = ["README.md", "pytorch_model.bin", "consolidated.safetensors", "original/config.json"];
const TOKEN: &str = "hf_secret";

#[derive(Default)]
struct Served {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Whoever has no token is told that there is no such model, as the hub does.
    gated: bool,
    /// Weights break off after so many bytes; 0: they do not.
    breaks_after: Mutex<usize>,
    /// What was asked for, without HEAD.
    log: Mutex<Vec<String>>,
}

struct Hub {
    served: Arc<Served>,
    endpoint: String,
    home: PathBuf,
    _runtime: tokio::runtime::Runtime,
}

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.home);
    }
}

impl Hub {
    fn start(served: Served) -> Hub {
        static HUBS: AtomicU32 = AtomicU32::new(0);
        let hub = HUBS.fetch_add(1, Ordering::Relaxed);
        let home = std::env::temp_dir().join(format!("ponder-hub-{}-{hub}", std::process::id()));
        for name in [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "thinking.json",
            WEIGHTS,
        ] {
            let bytes = std::fs::read(format!("{MODEL}/{name}")).unwrap();
            served.files.lock().unwrap().insert(name.into(), bytes);
        }
        for name in UNWANTED {
            served.files.lock().unwrap().insert(name.into(), b"not wanted".into());
        }
        let served = Arc::new(served);
        let router = Router::new()
            .route("/api/models/o/m/revision/main", get(async || json!({"id": "o/m", "sha": COMMIT}).to_string()))
            .route("/api/models/o/m/tree/{commit}", get(tree))
            .route("/o/m/resolve/{revision}/{*file}", get(file))
            .route("/storage/{*file}", get(storage))
            .with_state(served.clone());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async { axum::serve(listener, router).await });
        Hub { served, endpoint, home, _runtime: runtime }
    }

    fn ponder(&self, args: &[&str], token: Option<&str>) -> Output {
        let mut command = Command::new(binary());
        command.args(["generate", "o/m", QUESTION, "--device", "host", "--max-tokens", "8"]).args(args);
        for name in
            ["HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_TOKEN_PATH", "http_proxy", "HTTP_PROXY", "ALL_PROXY"]
        {
            command.env_remove(name);
        }
        command.env("HF_HOME", &self.home).env("HF_ENDPOINT", &self.endpoint).env("NO_PROXY", "127.0.0.1");
        command.envs(token.map(|token| ("HF_TOKEN", token))).output().unwrap()
    }

    fn answers(&self, args: &[&str]) -> String {
        let output = self.ponder(args, None);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Exit code 2, and an error with each of `words`.
    #[track_caller]
    fn refuses(&self, args: &[&str], words: &[&str]) {
        let output = self.ponder(args, None);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{error}");
        for word in words {
            assert!(error.contains(word), "{error:?} does not say {word:?}");
        }
    }

    /// Since the last time.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.served.log.lock().unwrap())
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        self.served.files.lock().unwrap().insert(name.into(), bytes.into());
    }
}

async fn tree(State(hub): State<Arc<Served>>) -> String {
    let files = hub.files.lock().unwrap();
    let entry = |(name, bytes): (&String, &Vec<u8>)| json!({"type": "file", "oid": etag(name), "size": bytes.len(), "path": name});
    files.iter().map(entry).collect::<Value>().to_string()
}

fn etag(name: &str) -> String {
    name.bytes().map(|byte| format!("{byte:02x}")).collect()
}

/// Large files lie elsewhere, as on the hub.
async fn file(
    State(hub): State<Arc<Served>>,
    UrlPath((_, name)): UrlPath<(String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    if method != Method::HEAD {
        hub.log.lock().unwrap().push(name.clone());
    }
    if hub.gated && headers.get("authorization").is_none_or(|header| header != format!("Bearer {TOKEN}").as_str()) {
        return (StatusCode::UNAUTHORIZED, [("x-error-code", "RepoNotFound")]).into_response();
    }
    let Some(bytes) = hub.files.lock().unwrap().get(&name).cloned() else {
        return (StatusCode::NOT_FOUND, [("x-error-code", "EntryNotFound")]).into_response();
    };
    let (etag, size) = (format!("\"{}\"", etag(&name)), bytes.len().to_string());
    match name.ends_with(".safetensors") {
        true => {
            let headers = [
                ("location", format!("/storage/{name}")),
                ("x-repo-commit", COMMIT.into()),
                ("x-linked-etag", etag),
                ("x-linked-size", size),
            ];
            (StatusCode::FOUND, headers).into_response()
        }
        false => ([("x-repo-commit", COMMIT.into()), ("etag", etag)], bytes).into_response(),
    }
}

async fn storage(State(hub): State<Arc<Served>>, UrlPath(name): UrlPath<String>, method: Method) -> Response {
    if method != Method::HEAD {
        hub.log.lock().unwrap().push(format!("storage/{name}"));
    }
    let bytes = hub.files.lock().unwrap()[&name].clone();
    let headers = [
        ("etag", format!("\"{}\"", etag(&name))),
        ("x-repo-commit", COMMIT.into()),
        ("content-length", bytes.len().to_string()),
    ];
    match *hub.breaks_after.lock().unwrap() {
        0 => (headers, bytes).into_response(),
        n => {
            let pieces = [Ok(bytes[..n].to_vec()), Err(std::io::Error::other("planted"))];
            (headers, Body::from_stream(futures_util::stream::iter(pieces))).into_response()
        }
    }
}

#[test]
fn a_model_is_fetched_once_and_answers_without_the_hub() {
    let hub = Hub::start(Served::default());
    hub.refuses(&[], &["o/m", "--download", "HF_HOME"]);
    assert_eq!(hub.asked(), [""; 0], "nothing without the flag");

    let here =
        Command::new(binary()).args(["generate", MODEL, QUESTION, "--device", "host", "--max-tokens", "8"]).output();
    let here = String::from_utf8(here.unwrap().stdout).unwrap();
    assert_eq!(hub.answers(&["--download"]), here);
    let asked = hub.asked();
    assert!(asked.contains(&format!("storage/{WEIGHTS}")), "{asked:?}");
    for unwanted in UNWANTED {
        assert!(!asked.iter().any(|name| name == unwanted), "{asked:?}");
    }
    assert_eq!(hub.answers(&[]), here);
    assert_eq!(hub.asked(), [""; 0], "nothing without the flag");
    assert_eq!(hub.answers(&["--download"]), here);
    let asked = hub.asked();
    assert!(!asked.iter().any(|name| name.contains(WEIGHTS)), "they are here: {asked:?}");

    let folder = hub::find(&hub.home.join("hub"), "o/m").unwrap();
    assert_eq!(hub::model_name(&folder), "o/m");
    assert_eq!(hub::model_name(Path::new(MODEL)), "modulo");
    let mut offline = Command::new(binary());
    offline.args(["generate", "o/m", QUESTION, "--download"]).env("HF_HOME", &hub.home).env("HF_HUB_OFFLINE", "1");
    let output = offline.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("HF_HUB_OFFLINE=1"));
}

#[test]
fn shards_are_those_that_the_index_names() {
    const INDEX: &str = "model.safetensors.index.json";
    let weights = std::fs::read(format!("{MODEL}/{WEIGHTS}")).unwrap();
    let (_, tensors) = parse_file(&weights).unwrap();
    let hub_with_index = |shard: &str| {
        let map = tensors.iter().map(|(name, _)| (name.clone(), json!(shard)));
        let hub = Hub::start(Served::default());
        hub.put("of-one.safetensors", &weights);
        hub.put(INDEX, json!({"weight_map": Value::Object(map.collect())}).to_string().as_bytes());
        hub
    };
    hub_with_index("../of-one.safetensors").refuses(&["--download"], &[INDEX, "../of-one.safetensors"]);
    hub_with_index("missing.safetensors").refuses(&["--download"], &["missing.safetensors", "must be safetensors"]);
    let hub = hub_with_index("of-one.safetensors");
    hub.answers(&["--download"]);
    let asked = hub.asked();
    assert!(asked.iter().any(|name| name == "storage/of-one.safetensors"), "{asked:?}");
    assert!(!asked.iter().any(|name| name == WEIGHTS), "not in the index: {asked:?}");
}

#[test]
fn weights_that_break_off_are_no_model() {
    let hub = Hub::start(Served { breaks_after: Mutex::new(100_000), ..Served::default() });
    hub.refuses(&["--download"], &["cannot fetch", &hub.endpoint, "o/m"]);
    hub.refuses(&[], &["no model of this name", "--download"]);
    *hub.served.breaks_after.lock().unwrap() = 0;
    hub.answers(&["--download"]);
}

#[test]
fn what_cannot_be_run_is_not_fetched() {
    let hub = Hub::start(Served::default());
    let config = std::fs::read_to_string(format!("{MODEL}/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["architectures"] = json!(["MambaForCausalLM"]);
    hub.put("config.json", config.to_string().as_bytes());
    hub.refuses(&["--download"], &["not fetched", "config.json", "MambaForCausalLM"]);
    hub.served.files.lock().unwrap().remove("config.json");
    hub.refuses(&["--download"], &["no config.json"]);
    let asked = hub.asked();
    assert!(!asked.iter().any(|name| name.contains(WEIGHTS)), "{asked:?}");
}

#[test]
fn a_gated_model_asks_for_a_token() {
    let hub = Hub::start(Served { gated: true, ..Served::default() });
    hub.refuses(&["--download"], &["o/m", "HF_TOKEN", "check the name"]);
    let output = hub.ponder(&["--download"], Some(TOKEN));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let error = hub.ponder(&["--download"], Some("hf_other"));
    assert!(!String::from_utf8_lossy(&error.stderr).contains("hf_other"), "it is secret");
    assert_eq!(error.status.code(), Some(2));
}
