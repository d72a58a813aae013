//! Three things are made from kernels/: Rust bindings of the C headers, the host target (every kernel compiled twice by the
//! C++ compiler), and with the feature `cuda` one sm_90a cubin per .cu file, to be embedded. Nothing is compiled that has
//! not changed, and nothing is ever left out silently: a missing tool, a compiler warning of ptxas, or a spill is an error.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

type Result<T> = std::result::Result<T, String>;

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    if let Err(problem) = bindings().and_then(|()| host_target()).and_then(|()| cubins()) {
        for line in problem.lines() {
            println!("cargo::error={line}");
        }
    }
}

/// `params.rs` from the kernel ABI, `simt.rs` from the SIMT machine's interface, `planted.rs` from its suite of planted bugs.
fn bindings() -> Result<()> {
    /// Device-resident state is plain data that the host uploads and reads as bytes; only parameters hold pointers.
    #[derive(Debug)]
    struct PlainData;
    impl bindgen::callbacks::ParseCallbacks for PlainData {
        fn add_derives(&self, info: &bindgen::callbacks::DeriveInfo<'_>) -> Vec<String> {
            let holds_pointers = info.name.ends_with("Params")
                || info.name.starts_with("Simt")
                || ["Rope", "Prefetch", "WeightScales"].contains(&info.name);
            if holds_pointers { Vec::new() } else { vec!["bytemuck::Pod".into(), "bytemuck::Zeroable".into()] }
        }
    }

    let folder = PathBuf::from(variable("LIBCLANG_PATH"));
    println!("cargo::rerun-if-env-changed=LIBCLANG_PATH");
    if !folder.exists() {
        return Err(format!("bindgen needs libclang, and {} does not exist: run `make setup`", folder.display()));
    }
    for header in ["kernels/params.h", "kernels/simt/simt.h", "kernels/simt/planted/planted.h"] {
        let path = Path::new(header);
        if !path.exists() {
            continue;
        }
        let bindings = bindgen::Builder::default()
            .header(header)
            .clang_args(["-Ikernels", "-std=c11"])
            .allowlist_file(format!(".*{header}"))
            .rust_edition(bindgen::RustEdition::Edition2024)
            .prepend_enum_name(false)
            .derive_default(true)
            .explicit_padding(true)
            .parse_callbacks(Box::new(PlainData))
            .generate()
            .map_err(|e| format!("bindings of {header}: {e}"))?;
        write(&out().join(path.file_stem().unwrap()).with_extension("rs"), &bindings.to_string())?;
    }
    Ok(())
}

/// Kernels as C++: once plain, once with every memory access reported to the SIMT machine, which stands in for the runtime
/// of the thread sanitizer.
fn host_target() -> Result<()> {
    let asan = env::var_os("CARGO_FEATURE_ASAN").is_some();
    let compiler = || {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++20").warnings(true).extra_warnings(true).include("kernels").include("kernels/simt");
        // Baseline instruction set and no contraction of a * b + c: the same numbers on every machine.
        build.flag("-ffp-contract=off").flag("-fno-strict-aliasing").flag("-g1").debug(false);
        build
    };
    let mut plain = compiler();
    plain.opt_level(3);
    let mut checked = compiler();
    checked.opt_level(2).define("SIMT_CHECKED", "1").flag("-fsanitize=thread");
    // No calls at function entry and exit: the machine only wants memory accesses.
    if checked.get_compiler().is_like_clang() {
        checked.flag("-mllvm").flag("-tsan-instrument-func-entry-exit=0");
    } else {
        checked.flag("--param=tsan-instrument-func-entry-exit=0");
    }
    if asan {
        plain.flag("-fsanitize=address").flag("-fno-omit-frame-pointer").define("SIMT_ASAN", "1");
        println!("cargo::rustc-link-lib=asan");
    }

    if env::var_os("CARGO_FEATURE_GDB").is_some() {
        for build in [&mut plain, &mut checked] {
            build.opt_level(0).flag("-g3");
        }
    }

    let mut steps = Vec::new();
    let mut compile = |build: &cc::Build, source: &Path, kind: &str| {
        let mut command = build.get_compiler().to_command();
        command.args(["-x", "c++", "-c"]).arg(source);
        steps.push(Step::new(command, source, kind, "o"));
    };
    for folder in ["kernels", "kernels/simt/planted"] {
        for source in sources(folder, "cu") {
            compile(&plain, &source, "host");
            compile(&checked, &source, "checked");
        }
    }
    for source in sources("kernels/simt", "cpp") {
        compile(&plain, &source, "simt");
    }
    run(&steps, |_, _| Ok(()))?;

    // One self-contained binary: the C++ library goes in statically where there is an archive of it.
    let mut archive = compiler();
    let mut ask = archive.get_compiler().to_command();
    if let Ok(answer) = ask.arg("-print-file-name=libstdc++.a").output() {
        let library = PathBuf::from(String::from_utf8_lossy(&answer.stdout).trim());
        if library.is_absolute() {
            println!("cargo::rustc-link-search=native={}", library.parent().unwrap().display());
            archive.cpp_link_stdlib_static(true);
        }
    }
    archive.objects(steps.iter().map(|s| &s.output)).cargo_warnings(false).compile("ponder_host");
    Ok(())
}

/// `cubins.rs`: the name and machine code of every .cu file, compiled for sm_90a. Empty without the feature `cuda`, in which
/// case opening a GPU is an error.
fn cubins() -> Result<()> {
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let mut steps = Vec::new();
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        let nvcc = PathBuf::from(variable("CUDA_HOME")).join("bin/nvcc");
        let Ok(nvcc) = nvcc.canonicalize() else {
            return Err(format!(
                "{} does not exist: run `make setup`, which gets nvcc without root,\n\
                 or build with `--no-default-features` for the host target alone",
                nvcc.display()
            ));
        };
        println!("cargo::rerun-if-changed={}", nvcc.display());
        for source in sources("kernels", "cu") {
            let mut command = Command::new(&nvcc);
            // Not -arch=sm_90a: that adds a pass for compute_90, which knows no wgmma.
            command.args(["-cubin", "-gencode", "arch=compute_90a,code=sm_90a", "-std=c++17", "-O3", "-lineinfo"]);
            command.args(["--expt-relaxed-constexpr", "-Xptxas", "-v", "-Werror", "all-warnings", "-Ikernels"]);
            command.arg(&source);
            steps.push(Step::new(command, &source, "sm_90a", "cubin"));
        }
    }
    run(&steps, |step, log| lost_performance(log).map_or(Ok(()), |p| Err(format!("{}: {p}", step.source.display()))))?;

    let entry = |s: &Step| format!("    ({:?}, include_bytes!({:?})),\n", s.source.file_stem().unwrap(), s.output);
    let table: String = steps.iter().map(entry).collect();
    write(&out().join("cubins.rs"), &format!("pub static CUBINS: &[(&str, &[u8])] = &[\n{table}];\n"))
}

/// The first sign in ptxas's report that a kernel is slower than its source looks: serialised wgmma and ignored setmaxnreg
/// (messages C7500 to C7599), registers spilled to memory, or arrays that did not fit in registers (a stack frame).
fn lost_performance(log: &str) -> Option<String> {
    let mut kernel = "";
    for line in log.lines() {
        kernel = line.split_once("Function properties for ").map_or(kernel, |(_, name)| name);
        if line.contains("(C75") {
            return Some(line.trim().to_string());
        }
        if line.contains("bytes stack frame") && line.split(", ").any(|count| !count.trim().starts_with("0 bytes")) {
            return Some(format!("kernel {kernel} does not fit in registers: {}", line.trim()));
        }
    }
    None
}

/// One run of a compiler: made once, and again when the command line or a file that it read has changed.
struct Step {
    source: PathBuf,
    output: PathBuf,
    command: Command,
}

impl Step {
    /// `kind` keeps apart what is made from the same source.
    fn new(command: Command, source: &Path, kind: &str, extension: &str) -> Step {
        let name = format!("{kind}-{}.{extension}", source.file_stem().unwrap().to_str().unwrap());
        Step { source: source.to_path_buf(), output: out().join(name), command }
    }

    fn is_fresh(&self) -> bool {
        let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
        let Some(made) = modified(&self.output) else { return false };
        let read = fs::read_to_string(self.beside("d")).unwrap_or_default();
        // A make rule, "output: file file \ file". Its files have no spaces, or the step is taken to be stale.
        let mut files =
            read.split_once(": ").map_or("", |(_, files)| files).split_whitespace().filter(|&w| w != "\\").peekable();
        let same_command =
            fs::read_to_string(self.beside("command")).is_ok_and(|made_by| made_by == self.command_line());
        same_command && files.peek().is_some() && files.all(|f| modified(Path::new(f)).is_some_and(|m| m <= made))
    }

    /// Compiles. `check` sees what the compiler said; the output appears only if it agrees.
    fn make(&self, check: impl Fn(&Step, &str) -> Result<()>) -> Result<()> {
        let unchecked = self.beside("unchecked");
        let mut command = Command::new(self.command.get_program());
        command.args(self.command.get_args()).args(["-MD", "-MF"]).arg(self.beside("d")).arg("-o").arg(&unchecked);
        let start = std::time::SystemTime::now();
        let result = command.output().map_err(|e| format!("cannot run {:?}: {e}", command.get_program()))?;
        let log = String::from_utf8_lossy(&result.stderr) + String::from_utf8_lossy(&result.stdout);
        if !result.status.success() {
            return Err(format!("{} does not compile:\n{}\n{log}", self.source.display(), self.command_line()));
        }
        check(self, &log)?;
        for line in log.lines().filter(|l| l.contains("warning:")) {
            println!("cargo::warning={line}");
        }
        // Dated to when its sources were read, so that an edit during the compilation counts as a later one.
        fs::File::options()
            .append(true)
            .open(&unchecked)
            .and_then(|file| file.set_modified(start))
            .and_then(|()| fs::rename(&unchecked, &self.output))
            .map_err(|e| format!("cannot write {}: {e}", self.output.display()))?;
        write(&self.beside("command"), &self.command_line())
    }

    fn command_line(&self) -> String {
        let words = std::iter::once(self.command.get_program()).chain(self.command.get_args());
        words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    fn beside(&self, extension: &str) -> PathBuf {
        let mut path = self.output.clone().into_os_string();
        path.push(".");
        path.push(extension);
        path.into()
    }
}

/// Makes what is stale, as many at a time as cargo may use processors. All errors are reported, not only the first.
fn run(steps: &[Step], check: impl Fn(&Step, &str) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut problems = Vec::new();
        while let Some(step) = steps.get(next.fetch_add(1, Ordering::Relaxed)) {
            if !step.is_fresh() {
                problems.extend(step.make(&check).err());
            }
        }
        problems
    };
    let workers = variable("NUM_JOBS").parse().unwrap_or(1);
    let problems: Vec<String> = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|w| w.join().unwrap()).collect()
    });
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n")) }
}

/// Files of a folder with an extension, in the order of their names.
fn sources(folder: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    let mut files: Vec<_> = entries.filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    files.sort();
    files
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

fn out() -> PathBuf {
    PathBuf::from(variable("OUT_DIR"))
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} (see .cargo/config.toml)"))
}
