//! benches/gpu.sh with stand-ins for the binaries: whatever its parts do, it ends with a report, and what has passed is not run
//! again. And the Python beside it is Python.

use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

const KERNELS: &str = r#"{"schema": "ponder-bench-kernels", "device": "stand-in", "roofline": null, "results": [
    {"name": "qkv", "model": "tiny", "op": "gemm", "kernel": "gemm_n128", "shape": {"rows": 5, "n": 64, "k": 128},
     "us": {"median": 4.0, "min": 3.0, "max": 6.0, "runs": 5}, "bytes": 100, "flops": 200, "gb_per_s": 1.0,
     "tflop_per_s": 2.0, "roofline_percent": null}]}"#;
const YARDSTICKS: &str = r#"{"results": [
    {"name": "qkv", "model": "tiny", "op": "gemm", "shape": {"k": 128, "n": 64, "rows": 5}, "yardstick": "cublas",
     "what": "torch.mm", "us": {"median": 6.0, "min": 5.0, "max": 7.0, "runs": 5}}]}"#;

const BUDGET: &str = r#"{"results": [{"n_ignore": 2, "tokens": 90, "calls": 4,
    "one_request": {"seconds": 2.0, "prefilled_tokens": 10},
    "calls_alone": {"seconds": 3.0, "prefilled_tokens": 150},
    "calls_with_prefix_cache": {"seconds": 2.5, "prefilled_tokens": 90}}]}"#;

const AGREEMENT: &str = r#"{"results": {"ours against float32": {"decode": {"places": 7, "same_token": 0.9, "mean_regret": 0.01,
    "p99_regret": 0.2, "largest_regret": 0.3, "largest_error": 0.4}}}}"#;

/// The folder of a rehearsal: stand-ins, which write down how they are called, and results. Removed when dropped.
struct Rehearsal(PathBuf);

impl Rehearsal {
    fn new() -> Rehearsal {
        let folder = std::env::temp_dir().join(format!("ponder-scripts-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        Rehearsal(folder)
    }

    fn stand_in(&self, name: &str, script: &str) {
        let path = self.0.join(name);
        let script = format!("#!/bin/bash\necho {name} \"$@\" >>'{}/calls'\n{script}\n", self.0.display());
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The exit code, the report, and the calls of the stand-ins.
    fn run(&self, environment: &[(&str, &str)]) -> (i32, Value, Vec<String>) {
        let _ = fs::remove_file(self.0.join("calls"));
        let mut command = Command::new("benches/gpu.sh");
        command.env("TEST_DEVICE", "host").env("SECONDS_TOTAL", "30").env_remove("FORCE").env_remove("RESULTS");
        command.env("OUT", self.0.join("out")).env("BUNDLE", &self.0).env("PYTHON", self.0.join("python"));
        let output = command.envs(environment.iter().copied()).output().expect("run from the repository's root");
        let report = fs::read_to_string(self.0.join("out/gpu.json"));
        let report = report.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
        let calls = fs::read_to_string(self.0.join("calls")).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("gemm_n128") && text.contains("6.00 cublas"), "no table: {text}");
        let calls = calls.lines().filter(|call| !call.contains("report.py")).map(String::from).collect();
        (output.status.code().unwrap(), serde_json::from_str(&report).unwrap(), calls)
    }
}

impl Drop for Rehearsal {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn status<'a>(report: &'a Value, part: &str) -> &'a str {
    let parts = report["parts"].as_array().unwrap();
    parts.iter().find(|p| p["name"] == part).unwrap_or_else(|| panic!("no part {part}"))["status"].as_str().unwrap()
}

#[test]
fn the_gpu_script_always_ends_with_a_report_and_resumes() {
    let rehearsal = Rehearsal::new();
    // The whole set of tests hangs, deaf to being told to stop; racecheck fails the first time.
    let tests = "case \"$*\" in *--skip*) trap '' TERM; while :; do sleep 0.1; done ;; esac
[ ! -e \"$OUT/racecheck.part\" ] || [ -e \"$OUT/synccheck.part\" ] || exit 9
echo 'test result: ok. 7 passed'";
    rehearsal.stand_in("tests", tests);
    let ponder = |latency: &str| {
        format!(
            "while [ $# -gt 0 ]; do [ \"$1\" != --json ] || json=$2; kind=${{kind:-$2}}; shift; done
case $kind in latency) {latency} ;; budget) echo '{BUDGET}' >\"$json\" ;; kernels) [ -z \"$json\" ] || echo '{KERNELS}' >\"$json\" ;; esac"
        )
    };
    rehearsal.stand_in("ponder", &ponder("exit 3"));
    let python = format!(
        "case $1 in
*yardsticks.py) echo '{YARDSTICKS}' >\"${{@: -1}}\" ;;
*agreement.py) echo '{AGREEMENT}' >\"${{@: -1}}\" ;;
*transformers_decode.py) echo 'skipped: no torch'; exit 77 ;;
*) exec python3 \"$@\" ;;
esac"
    );
    rehearsal.stand_in("python", &python);

    let (code, report, calls) = rehearsal.run(&[]);
    assert_eq!(code, 1);
    assert!(status(&report, "tests").starts_with("stopped after"), "{report}");
    assert_eq!(status(&report, "racecheck"), "failed (exit code 9)");
    assert_eq!(status(&report, "modulo"), "failed (exit code 3)");
    assert_eq!(status(&report, "torch-modulo"), "skipped: no torch");
    for part in ["memcheck", "synccheck", "kernels", "yardsticks", "budget", "agreement", "profile"] {
        assert_eq!(status(&report, part), "passed", "{part}");
    }
    assert_eq!(report["kernels"][0]["yardsticks"][0]["yardstick"], "cublas");
    assert_eq!(report["kernels"][0]["ratio"], 1.5);
    assert_eq!(report["budget"][0]["calls"], 4);
    assert_eq!(report["agreement"]["results"]["ours against float32"]["decode"]["mean_regret"], 0.01);
    assert!(calls.iter().filter(|c| c.starts_with("ponder bench kernels")).count() > 5, "{calls:?}");

    // Again: what has passed is not repeated, and the report still has it.
    let parts = ["tests", "racecheck", "modulo", "torch-modulo"];
    let (code, report, calls) = rehearsal.run(&[]);
    assert_eq!((code, status(&report, "racecheck"), status(&report, "kernels")), (1, "passed", "passed"));
    assert_eq!(calls.len(), parts.len(), "{calls:?}");

    // Other binaries: everything once more.
    rehearsal.stand_in("tests", "echo 'test result: ok. 7 passed'");
    rehearsal.stand_in("ponder", &ponder("exit 0"));
    let (code, report, _) = rehearsal.run(&[]);
    assert_eq!((code, status(&report, "tests"), status(&report, "modulo")), (0, "passed", "passed"));
    assert_eq!(rehearsal.run(&[]).2.len(), 1, "only what was skipped");
    rehearsal.stand_in("tests", "echo 'test result: ok. 0 passed'");
    assert_eq!(status(&rehearsal.run(&[]).1, "tests"), "failed (no tests)");
}

#[test]
fn the_python_is_python() {
    let folders = ["benches", "models/golden"].map(|folder| fs::read_dir(folder).unwrap());
    let scripts = folders.into_iter().flatten().map(|entry| entry.unwrap().path());
    let scripts: Vec<PathBuf> = scripts.filter(|path| path.extension().is_some_and(|e| e == "py")).collect();
    assert!(scripts.len() >= 7);
    let parse = "import ast, sys\nfor path in sys.argv[1:]: ast.parse(open(path).read(), path)";
    let output = Command::new("python3").args(["-c", parse]).args(&scripts).output().expect("python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
