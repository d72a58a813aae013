//! The rules about where things may stand (ARCHITECTURE.md): who may import whom, a header on every module, asm and `unsafe`
//! in few places.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Requests, sequences, pages: never sees a device.
const LOGIC: &[&str] = &[
    "args",
    "blocks",
    "budget",
    "chat",
    "frontend",
    "guide",
    "hub",
    "sampling",
    "steering",
    "scheduler",
    "sequence",
    "structured",
    "thinking",
    "tokenizer",
];
/// Devices, kernels, the model: never sees a request.
const COMPUTE: &[&str] = &[
    "device",
    "executor",
    "kernels",
    "kv_cache",
    "loader",
    "model",
    "ops",
    "scoring",
    "simulator",
    "slots",
    "tiles",
    "tiling",
];
/// What both may use, and which uses neither: one step's work, and what the model folder says.
const SHARED: &[&str] = &["batch", "checkpoint", "config", "error", "rope"];
/// What may use both.
const MEETING: &[&str] =
    &["bench", "commands", "engine", "lib", "main", "server", "service", "stepper", "study", "telemetry"];

fn files(folder: &str, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{folder}: {e}"));
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            found.extend(files(path.to_str().unwrap(), extensions));
        } else if path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// engine/device/host.rs -> device
fn module(path: &Path) -> String {
    let first = path.strip_prefix("engine").unwrap().components().next().unwrap();
    Path::new(first.as_os_str()).file_stem().unwrap().to_str().unwrap().into()
}

/// Lines without their comments.
fn code(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| line.split("//").next().unwrap().to_string()).collect()
}

/// The modules of this crate that a file names.
fn imports(path: &Path) -> BTreeSet<String> {
    let text = code(path).join("\n");
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let (mut depth, mut start) = (0, true);
        for (i, c) in rest.char_indices() {
            match c {
                '{' => (depth, start) = (depth + 1, depth == 0),
                '}' => depth -= 1,
                ',' if depth == 1 => start = true,
                c if start && c.is_alphabetic() => {
                    let name: String = rest[i..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                    start = false;
                    if name.starts_with(char::is_lowercase) {
                        found.insert(name);
                    }
                }
                _ => {}
            }
            if depth == 0 && !start {
                break;
            }
        }
    }
    found
}

#[test]
fn the_halves_meet_in_few_places() {
    for path in files("engine", &["rs"]) {
        let name = module(&path);
        let forbidden: Vec<&[&str]> = match name.as_str() {
            n if LOGIC.contains(&n) => vec![COMPUTE, MEETING],
            n if COMPUTE.contains(&n) => vec![LOGIC, MEETING],
            n if SHARED.contains(&n) => vec![LOGIC, COMPUTE, MEETING],
            n if MEETING.contains(&n) => vec![],
            _ => panic!("{}: say in tests/layout.rs which half it belongs to", path.display()),
        };
        for import in imports(&path) {
            let allowed = !forbidden.iter().any(|half| half.contains(&import.as_str()));
            assert!(allowed, "{} must not know {import}", path.display());
        }
    }
}

#[test]
fn every_module_says_what_it_is() {
    for path in ["engine", "tests", "benches"].iter().filter(|f| Path::new(f).exists()).flat_map(|f| files(f, &["rs"]))
    {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//! "), "{} does not begin with //!", path.display());
    }
    for path in files("kernels", &["cu", "cuh", "h", "cpp"]) {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("// "), "{} does not begin with a comment", path.display());
    }
}

#[test]
fn asm_is_in_one_file() {
    for path in files("kernels", &["cu", "cuh", "h", "cpp"]) {
        if path == Path::new("kernels/sm90.cuh") || path.starts_with("kernels/simt") {
            continue;
        }
        for line in code(&path) {
            assert!(
                !line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "asm" || w == "__asm__"),
                "{}: {line}",
                path.display()
            );
        }
    }
}

#[test]
fn unsafe_is_in_few_places_and_explained() {
    for path in files("engine", &["rs"]) {
        let allowed = ["device", "kernels", "checkpoint"].contains(&module(&path).as_str());
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in code(&path).iter().enumerate() {
            if !line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe") {
                continue;
            }
            assert!(allowed, "{}:{}: unsafe", path.display(), i + 1);
            let opens = line.contains("unsafe {") || line.contains("unsafe impl");
            let explained = lines[i.saturating_sub(8)..=i].iter().any(|l| l.contains("SAFETY:"));
            assert!(!opens || explained, "{}:{}: no SAFETY: line", path.display(), i + 1);
        }
    }
}
