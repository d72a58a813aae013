//! The command line as clap reads it. Names are those of the request fields they set; what they may hold together is judged
//! where requests are validated (`sampling.rs`, `budget.rs`), so that a server judges the same. Knows no device.

use crate::batch::{Accounting, OnEnd};
use crate::budget::BudgetRequest;
use crate::frontend::Request;
use crate::sampling::SamplingRequest;
use crate::steering::{SteeringRequest, Technique};
use crate::thinking::ThinkingChoice;
use clap::{Args as Group, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use std::path::PathBuf;

/// LLM inference with budget forcing: how long a model thinks is decided inside the sampler.
#[derive(Debug, Parser)]
#[command(name = "ponder", version, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer one prompt.
    Generate(GenerateArgs),
    /// Talk to the model. Ctrl-C stops an answer, Ctrl-D ends.
    Chat(ChatArgs),
    /// Serve the model over HTTP, as OpenAI's and Anthropic's clients ask for it.
    Serve(ServeArgs),
    /// Answer a file of requests, one JSON object a line; going on where an earlier run has ended.
    Batch(BatchArgs),
    /// Show what a model needs: memory plan, kernels with their resources, device.
    Inspect(InspectArgs),
    /// Measure kernels or a whole model.
    Bench(BenchArgs),
    /// Study how thinking budgets and inference techniques behave: a folder with results, a report and plots.
    Study(StudyArgs),
}

impl Command {
    /// The model that most commands run.
    pub fn source(&mut self) -> Option<&mut SourceArgs> {
        match self {
            Command::Generate(args) => Some(&mut args.model.source),
            Command::Chat(args) => Some(&mut args.model.source),
            Command::Serve(args) => Some(&mut args.model.source),
            Command::Batch(args) => Some(&mut args.model.source),
            Command::Inspect(args) => Some(&mut args.model.source),
            Command::Bench(args) => match &mut args.command {
                BenchCommand::Budget(args) => Some(&mut args.model.source),
                BenchCommand::Perplexity(args) => Some(&mut args.model.source),
                BenchCommand::Latency(args) => Some(&mut args.load.model),
                BenchCommand::Throughput(args) => Some(&mut args.load.model),
                BenchCommand::Kernels(_) | BenchCommand::Host(_) | BenchCommand::Load(_) | BenchCommand::Serve(_) => {
                    None
                }
            },
            Command::Study(args) => match &mut args.command {
                StudyCommand::Scaling(args) => Some(&mut args.model.source),
                StudyCommand::Ablation(_) | StudyCommand::Curate(_) => None,
            },
        }
    }
}

#[derive(Debug, Group)]
pub struct GenerateArgs {
    /// The question; read from standard input when absent.
    #[arg(value_name = "PROMPT", index = 2)]
    pub prompt: Option<String>,
    /// Read the prompt from a file.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompt_file: Option<PathBuf>,
    /// The prompt as token ids: no template, nothing added.
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["prompt", "prompt_file", "raw", "system"])]
    pub prompt_ids: Option<Vec<u32>>,
    /// Take the prompt as it is, without the chat template.
    #[arg(long, conflicts_with = "system")]
    pub raw: bool,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Report the log probability of each token and of the K most likely ones.
    #[arg(long, value_name = "K", requires = "json")]
    pub logprobs: Option<u32>,
    /// The same for each token of the prompt but the first.
    #[arg(long, value_name = "K", requires = "json")]
    pub prompt_logprobs: Option<u32>,
    /// Print one JSON object at the end instead of text.
    #[arg(long)]
    pub json: bool,
    /// Run every kernel alone and print time, GB/s, TFLOP/s and % of the roofline.
    #[arg(long, conflicts_with = "json")]
    pub profile: bool,
    #[command(flatten)]
    pub request: RequestArgs,
    #[command(flatten)]
    pub model: ModelArgs,
}

#[derive(Debug, Group)]
pub struct ChatArgs {
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[command(flatten)]
    pub request: RequestArgs,
    #[command(flatten)]
    pub model: ModelArgs,
}

#[derive(Debug, Group)]
pub struct ServeArgs {
    /// Where to listen; by default nobody but this machine can ask.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", env = "PONDER_HOST")]
    pub host: String,
    /// 0: any free one.
    #[arg(long, value_name = "PORT", default_value_t = 8000, env = "PONDER_PORT")]
    pub port: u16,
    /// What clients must send as a bearer token; better by the environment, where others cannot see it.
    #[arg(long, value_name = "KEY", env = "PONDER_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// What clients call the model [default: the name of its folder].
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Answers waiting and being made; more requests are sent away with 429.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_answers: u32,
    /// Connections; more wait.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..1 << 20))]
    pub max_connections: u32,
    /// Largest body of a request.
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_body: u32,
    /// Longest time for an answer.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..))]
    pub request_timeout: u64,
    /// How long requests may go on after SIGTERM.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub shutdown_timeout: u64,
    /// What reasoning_effort means: the most thinking tokens, or unlimited. Repeatable [default: none=0 minimal=256 low=1024
    /// medium=8192 high=32768 xhigh=unlimited max=unlimited].
    #[arg(long, value_name = "NAME=TOKENS", value_parser = parse_effort)]
    pub reasoning_effort: Vec<(String, Option<u32>)>,
    /// Where to tell what the prefix cache knows, over ZeroMQ as vLLM does, for routers: tcp://127.0.0.1:5557. Who can connect
    /// there reads the tokens of prompts.
    #[arg(long, value_name = "ADDRESS")]
    pub kv_events: Option<String>,
    /// Send a span of each request to this OpenTelemetry collector, by OTLP over HTTP: http://HOST:4318.
    #[arg(long, value_name = "URL")]
    pub otlp_traces_endpoint: Option<String>,
    /// Write the log as JSON.
    #[arg(long)]
    pub log_json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
}

#[derive(Debug, Group)]
pub struct BatchArgs {
    /// Requests: on each line an object with prompt (or messages, raw_prompt, prompt_ids), an id, and whatever differs from the
    /// flags: max_tokens, temperature, n_ignore, ...
    #[arg(value_name = "FILE", index = 2)]
    pub file: PathBuf,
    /// Answers, in the order of the requests. What is there already is not asked again.
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    #[command(flatten)]
    pub request: RequestArgs,
    #[command(flatten)]
    pub model: ModelArgs,
}

#[derive(Debug, Group)]
pub struct InspectArgs {
    #[command(flatten)]
    pub model: ModelArgs,
}

#[derive(Debug, Group)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub command: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Every kernel alone, at the shapes of real models, against the roofline.
    Kernels(KernelBenchArgs),
    /// What the host does for each decode step, by the number of sequences; needs no GPU.
    Host(HostBenchArgs),
    /// The weights from their files to the device: time and memory.
    Load(LoadBenchArgs),
    /// Ignored ends of thinking: one request against s1's loop of N + 2 calls, which gives the same tokens.
    Budget(BudgetBenchArgs),
    /// How well the model foresees a text: what a quantisation costs, as a number.
    Perplexity(PerplexityArgs),
    /// Requests that start together: time to the first token, time for each further one. Prompts are random token ids.
    Latency(LatencyArgs),
    /// Many requests at once: tokens per second. Prompts are random token ids.
    Throughput(ThroughputArgs),
    /// Requests to a running server, of this or of any other engine that speaks OpenAI's dialect.
    Serve(ServeBenchArgs),
}

#[derive(Debug, Group)]
pub struct KernelBenchArgs {
    /// Shapes, or all [default: all but the tiny ones; on the host target the tiny ones].
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub shapes: Vec<String>,
    /// Prefill products with every tile that there is a kernel for, not only the one that the cost model picks.
    #[arg(long)]
    pub all_tiles: bool,
    /// Only lines of the table that contain this text up to the kernel's name.
    #[arg(long, value_name = "TEXT")]
    pub filter: Option<String>,
    /// Time for each line.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.2, value_parser = parse_seconds, allow_negative_numbers = true)]
    pub seconds: f64,
    /// Write the results to a file, too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// host, cuda:N, or auto: a GPU if there is one, else the host target.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
}

#[derive(Debug, Group)]
pub struct HostBenchArgs {
    /// Model folder; without tokenizer.json text is made of spaces.
    #[arg(value_name = "MODEL")]
    pub path: PathBuf,
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128,256,512,1023",
        value_parser = clap::value_parser!(u32).range(1..1024))]
    pub sequences: Vec<u32>,
    /// How many steps to measure.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..1 << 16))]
    pub steps: u32,
    /// Write the results to a file, too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Debug, Group)]
pub struct LoadBenchArgs {
    /// Model folder; needs no tokenizer.
    #[arg(value_name = "MODEL")]
    pub path: PathBuf,
    /// host, cuda:N, or auto: a GPU if there is one, else the host target.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
    /// Write the results to a file, too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Debug, Group)]
pub struct BudgetBenchArgs {
    /// How many ends are ignored.
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', default_value = "0,1,2,4,6",
        value_parser = clap::value_parser!(u32).range(0..1000))]
    pub n_ignore: Vec<u32>,
    /// What the model is asked.
    #[arg(long, value_name = "TEXT", default_value = "Find x with 7x + 4 = 1 (mod 11).")]
    pub question: String,
    /// Write the results to a file, too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub model: ModelArgs,
}

#[derive(Debug, Group)]
pub struct PerplexityArgs {
    /// A text, UTF-8.
    #[arg(value_name = "FILE", index = 2)]
    pub file: PathBuf,
    /// Tokens that are computed together [default: 2048, or as many as the model or the KV cache has room for].
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    /// How far one window is from the next; so many tokens of each are judged [default: half of the context].
    #[arg(long, value_name = "TOKENS")]
    pub stride: Option<usize>,
    /// Write the results to a file, too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub model: ModelArgs,
}

#[derive(Debug, Group)]
pub struct LatencyArgs {
    /// Requests that start together.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    #[command(flatten)]
    pub load: LoadArgs,
}

#[derive(Debug, Group)]
pub struct ThroughputArgs {
    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub requests: u32,
    #[command(flatten)]
    pub load: LoadArgs,
}

#[derive(Debug, Group)]
pub struct ServeBenchArgs {
    /// The server: http://HOST:PORT.
    #[arg(value_name = "URL")]
    pub server: String,
    /// Model to ask for [default: the first that the server names].
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub served_model: String,
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Ask /v1/chat/completions, with as many words as prompts are to have tokens, instead of /v1/completions with exactly so
    /// many token ids.
    #[arg(long)]
    pub chat: bool,
    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub requests: u32,
    /// Requests that come each second, whether those before have ended or not [default: all at once].
    #[arg(long, value_name = "RATE", default_value = "inf", hide_default_value = true, value_parser = parse_positive)]
    pub request_rate: f64,
    /// How evenly they come: 1 is a Poisson process, less comes in bursts.
    #[arg(long, value_name = "SHAPE", default_value_t = 1.0, value_parser = parse_positive)]
    pub burstiness: f64,
    /// Requests under way at a time [default: no limit].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_concurrency: Option<u32>,
    /// Length of each prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..1 << 20))]
    pub input_tokens: u32,
    /// Length of each answer; the end of sequence is ignored.
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..1 << 20))]
    pub output_tokens: u32,
    /// Draw lengths evenly from (1 - RATIO) to (1 + RATIO) of those.
    #[arg(long, value_name = "RATIO", default_value_t = 0.0, value_parser = parse_share)]
    pub range_ratio: f64,
    /// Times and lengths from a file instead: on each line {"timestamp": MILLISECONDS, "input_length": N, "output_length": N}.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["request_rate", "burstiness", "input_tokens", "output_tokens", "range_ratio"])]
    pub trace: Option<PathBuf>,
    /// Fields on top of each request's body, as a JSON object: '{"thinking_token_budget": 64}'.
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = parse_object)]
    pub extra_body: JsonObject,
    /// What a good answer keeps, for the goodput: ttft:200, tpot:50, e2el:3000 (milliseconds).
    #[arg(long, value_name = "GOALS", num_args = 1..)]
    pub goodput: Vec<String>,
    /// Requests one after the other before all, which do not count.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub warmup: u32,
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
    /// Write the results to a file, in the shape of vLLM's `bench serve`.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What a model is given to do in a bench. Prompts are random token ids; answers have exactly the length asked for.
#[derive(Debug, Group)]
pub struct LoadArgs {
    /// Length of each prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..1 << 20))]
    pub input_tokens: u32,
    /// Length of each answer.
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..1 << 20))]
    pub output_tokens: u32,
    /// Measured repetitions.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub iterations: u32,
    /// Repetitions before them that do not count.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub warmup: u32,
    /// Write the results to a file, too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub model: SourceArgs,
}

type JsonObject = serde_json::Map<String, serde_json::Value>;

fn parse_object(text: &str) -> Result<JsonObject, String> {
    serde_json::from_str(text).map_err(|e| format!("no JSON object: {e}"))
}

fn parse_positive(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|&n: &f64| n > 0.0).ok_or_else(|| "write a number above 0, or inf".into())
}

fn parse_share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|n| (0.0..=1.0).contains(n)).ok_or_else(|| "write a number from 0 to 1".into())
}

#[derive(Debug, Group)]
pub struct StudyArgs {
    #[command(subcommand)]
    pub command: StudyCommand,
}

#[derive(Debug, Subcommand)]
pub enum StudyCommand {
    /// Accuracy against thinking tokens: sweeps of the budget, s1's metrics, baselines.
    Scaling(Box<ScalingArgs>),
    /// The same requests with one acceleration technique after the other turned off; where the time of a decode step goes.
    Ablation(AblationArgs),
    /// Few good questions out of many, as s1K was made: quality, decontamination, difficulty, diversity.
    Curate(CurateArgs),
}

#[derive(Debug, Group)]
pub struct ScalingArgs {
    /// FILE: on each line an object with question, answer and grader (exact, integer, boxed, choice, regex). modulo:N: made-up
    /// problems for models/modulo. aime:FILE, math500:FILE, gpqa:FILE: these sets as they are published.
    #[arg(value_name = "TASK", index = 2)]
    pub task: String,
    /// Folder for results, report and plots. What it knows already is not asked again.
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
    /// What is swept.
    #[arg(
        long,
        value_enum,
        value_name = "KINDS",
        value_delimiter = ',',
        default_value = "maximum,ignore,string,technique,token,step,class,rejection,parallel"
    )]
    pub sweeps: Vec<SweepKind>,
    /// Maxima of sweep `maximum`, and limits of the baselines.
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', default_value = "500,1000,2000,4000,8000,16000")]
    pub max_thinking_tokens: Vec<u32>,
    /// Ends ignored in sweep `maximum`.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub ignored_at_maximum: u32,
    /// How many ends sweep `ignore` ignores.
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', default_value = "0,1,2,4,6")]
    pub n_ignore: Vec<u32>,
    /// What sweep `string` puts in the place of an ignored end; an empty one: nothing. The others use the first.
    #[arg(long, value_name = "TEXTS", value_delimiter = ',', default_value = "Wait,Hmm,Alternatively,")]
    pub ignore_strings: Vec<String>,
    /// Ends ignored in sweep `string`.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub ignored_by_string: u32,
    /// What sweep `technique` tries, beside exact lengths. Repeatable; parameters as in requests (thinking_steering).
    #[arg(long = "technique", value_name = "NAME=JSON", default_values = [
        r#"NoWait={"avoid_words": ["default"]}"#,
        r#"TIP={"switch_penalty": 3}"#,
        r#"end bias={"end_bias": 2}"#,
        r#"ramped end bias={"end_bias_ramp": 5}"#,
        r#"ThinkBrake={"brake_margin": 1}"#,
        r#"confidence={"stop_confidence": 0.95}"#,
        r#"loop break={"loop_repeats": 4}"#,
    ])]
    pub techniques: Vec<Technique>,
    /// Draws of each problem in sweeps `rejection` and `parallel`.
    #[arg(long, value_name = "K", default_value_t = 16)]
    pub samples: u32,
    /// At which those are drawn; the other sweeps are greedy.
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    pub temperature: f32,
    /// Most tokens of an answer, thinking included [default: up to the context].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// Of made-up problems, of draws, of bootstrap intervals.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub model: ModelArgs,
}

/// What `study scaling` sweeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SweepKind {
    /// Budget forcing: the maximum.
    Maximum,
    /// Budget forcing without a maximum: how many ends are ignored.
    Ignore,
    /// What replaces an ignored end.
    String,
    /// Steering: one technique after the other, without a maximum; and exact lengths.
    Technique,
    /// Baseline: the prompt names a number of tokens; without and with budget forcing.
    Token,
    /// Baseline: the prompt names a number of steps; without and with budget forcing.
    Step,
    /// Baseline: the prompt asks for short or long thinking.
    Class,
    /// Baseline: answers are drawn until one has thought no longer than the maximum.
    Rejection,
    /// Majority vote of answers drawn in parallel.
    Parallel,
}

#[derive(Debug, Group)]
pub struct AblationArgs {
    /// Folder for results, report and plots. What it knows already is not run again.
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
    /// Requests, submitted together. Prompts are random token ids.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub requests: u32,
    /// Length of each prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..1 << 20))]
    pub input_tokens: u32,
    /// How many of them all prompts begin with.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub shared_tokens: u32,
    /// Length of each answer.
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..1 << 20))]
    pub output_tokens: u32,
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Model folder: config.json, safetensors.
    #[arg(value_name = "MODEL")]
    pub path: PathBuf,
    /// host, cuda:N, sim:h100,instant, or auto: a GPU if there is one, else the host target.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
    /// Where the weights come from.
    #[arg(long, value_enum, default_value = "safetensors", value_name = "FORMAT")]
    pub load_format: LoadFormat,
}

#[derive(Debug, Group)]
pub struct CurateArgs {
    /// On each line an object with question, trace, answer, domain and, perhaps, id, grader [default: boxed], trace_tokens, and
    /// solved: for each model that has tried, whether it was right.
    #[arg(value_name = "POOL")]
    pub pool: PathBuf,
    /// Folder for selected.jsonl, results, report and plots. What it knows already is not asked again.
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
    /// How many to select.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub select: usize,
    /// Tasks, written as for `study scaling`, with which no question may share eight words in a row. Repeatable.
    #[arg(long, value_name = "TASK")]
    pub against: Vec<String>,
    /// Folders of models that try every question that is left; what one of them answers is too easy. Repeatable.
    #[arg(long, value_name = "MODEL")]
    pub model: Vec<PathBuf>,
    /// Most tokens that they think.
    #[arg(long, value_name = "N")]
    pub max_thinking_tokens: Option<u32>,
    /// Most tokens of their answers, thinking included [default: up to the context].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// host, cuda:N, or auto: a GPU if there is one, else the host target.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// Bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => Some(1.0),
        "kb" => Some(1e3),
        "mb" => Some(1e6),
        "gb" => Some(1e9),
        "k" | "kib" => Some(1024.0),
        "m" | "mib" => Some(1024.0 * 1024.0),
        "g" | "gib" => Some(1024.0 * 1024.0 * 1024.0),
        _ => None,
    };
    let bytes = number.parse().ok().zip(unit).map(|(number, unit): (f64, f64)| number * unit);
    let bytes = bytes.filter(|bytes| (1.0..1e15).contains(bytes));
    bytes.map(|bytes| bytes as u64).ok_or_else(|| "write a size like 8GiB or 500MB".into())
}

fn parse_fraction(text: &str) -> Result<f64, String> {
    let fraction = text.parse().ok().filter(|f| *f > 0.0 && *f <= 1.0);
    fraction.ok_or_else(|| "write a number above 0 and up to 1".into())
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|s| (0.0..=3600.0).contains(s));
    seconds.ok_or_else(|| "write a number of seconds from 0 to 3600".into())
}

#[derive(Debug, Group)]
#[command(next_help_heading = "Model and device")]
pub struct ModelArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    /// Longest sequence, prompt and answer together [default: the model's own, or what memory allows].
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..))]
    pub max_context: Option<u32>,
    /// KV cache size in pages of 64 tokens [default: enough for one longest sequence, more on a GPU].
    #[arg(long, value_name = "PAGES", value_parser = clap::value_parser!(u32).range(1..))]
    pub kv_pages: Option<u32>,
    /// KV cache size in bytes, like 8GiB or 500MB.
    #[arg(long, value_name = "SIZE", conflicts_with = "kv_pages", value_parser = parse_size)]
    pub kv_memory: Option<u64>,
    /// How much of the device's whole memory may be taken, weights and everything else included, 0 to 1 [default: 15/16 of
    /// what is free; on the host target half of it at the most].
    #[arg(long, value_name = "F", value_parser = parse_fraction)]
    pub gpu_memory_utilization: Option<f64>,
    /// Requests that run at a time; others wait [default: 64].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..1024))]
    pub max_sequences: Option<u32>,
    /// Make each answer depend on its request alone, whatever else runs: nothing is preempted, and only what prompts have
    /// computed is shared.
    #[arg(long)]
    pub deterministic: bool,
    /// Thinking delimiters: s1 (<|im_start|>think ... <|im_start|>answer), deepseek-r1 or think-tags (<think> ... </think>), none, or auto:
    /// what the model folder says.
    #[arg(long, default_value = "auto", value_name = "KIND", value_parser = ThinkingChoice::named)]
    thinking: ThinkingChoice,
    /// Explicit delimiter that opens the thinking.
    #[arg(long, value_name = "TEXT", requires = "thinking_end", conflicts_with = "thinking")]
    thinking_start: Option<String>,
    /// Explicit delimiter that closes it.
    #[arg(long, value_name = "TEXT", requires = "thinking_start", conflicts_with = "thinking")]
    thinking_end: Option<String>,
}

/// Which model, where, and how it is run.
#[derive(Debug, Group)]
#[command(next_help_heading = "Model and device")]
pub struct SourceArgs {
    /// Model folder: config.json, safetensors, tokenizer.json; or the name of a model in the Hugging Face cache.
    #[arg(value_name = "MODEL", index = 1, help_heading = None::<&str>)]
    pub path: PathBuf,
    /// Fetch what the cache lacks of the newest version of the model of this name from the Hugging Face hub, which is never asked
    /// without this flag. HF_TOKEN, HF_HOME and HF_ENDPOINT are heeded.
    #[arg(long)]
    pub download: bool,
    /// host, cuda:N, sim:h100 (no model runs: tokens are made up in the time that a GPU would take), or auto: a GPU if there is
    /// one, else the host target.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
    /// Where the weights come from.
    #[arg(long, value_enum, default_value = "safetensors", value_name = "FORMAT")]
    pub load_format: LoadFormat,
    /// What keys and values are kept as. fp8 (e4m3, with the checkpoint's k_scale and v_scale where it has them) takes half the
    /// memory, at some cost in precision.
    #[arg(long, value_enum, default_value = "auto", value_name = "TYPE")]
    pub kv_cache_dtype: KvCacheDtype,
    /// Makes the matrices of the layers fp8 (e4m3, a scale for each row) while they are loaded: half the memory, and half the bytes
    /// that a decode step reads. Activations become fp8, too. Those that are fp8 in the checkpoint need no flag.
    #[arg(long, value_enum, value_name = "TYPE", alias = "quantization")]
    pub quantize: Option<Quantize>,
    /// Launch decode steps kernel by kernel instead of replaying recorded ones.
    #[arg(long)]
    pub no_graphs: bool,
    /// Most prompt tokens in one step; at most 256 while answers are running, so that those do not wait long.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub prefill_chunk: u32,
    /// How decode steps follow one another while nothing else is to be done.
    #[arg(long, value_enum, value_name = "KIND", default_value = "step", conflicts_with = "no_graphs")]
    pub decode_loop: DecodeLoopKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvCacheDtype {
    /// As activations: bf16.
    Auto,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Quantize {
    Fp8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DecodeLoopKind {
    /// The host launches each. The default until a GPU has compared them.
    Step,
    /// The host launches four at a time.
    Multi,
    /// The device loops by itself; the host breaks in when there is something else to do.
    Device,
}

impl DecodeLoopKind {
    pub fn name(self) -> &'static str {
        match self {
            DecodeLoopKind::Step => "step",
            DecodeLoopKind::Multi => "multi",
            DecodeLoopKind::Device => "device",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The folder's files.
    Safetensors,
    /// Random ones made on the device from config.json alone, for benches.
    Dummy,
}

impl LoadFormat {
    pub fn name(self) -> &'static str {
        match self {
            LoadFormat::Safetensors => "safetensors",
            LoadFormat::Dummy => "dummy",
        }
    }
}

impl ModelArgs {
    pub fn thinking(&self) -> ThinkingChoice {
        match (&self.thinking_start, &self.thinking_end) {
            (Some(start), Some(end)) => ThinkingChoice::Explicit { start: start.clone(), end: end.clone() },
            _ => self.thinking.clone(),
        }
    }
}

/// What can be asked for beside the prompt.
#[derive(Debug, Group)]
#[command(next_help_heading = "Answer")]
pub struct RequestArgs {
    /// Most tokens to generate, thinking included [default: up to the context].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// End the answer where this text would begin; it is not shown. Thinking counts. Repeatable.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    #[command(flatten)]
    pub budget: BudgetArgs,
    #[command(flatten)]
    pub steering: SteeringArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

impl RequestArgs {
    /// Everything but the prompt.
    pub fn request(&self) -> Request {
        let RequestArgs { max_tokens, stop, budget, steering, sampling } = self;
        Request {
            prompt: Vec::new(),
            max_tokens: *max_tokens,
            stop: stop.clone(),
            sampling: SamplingRequest {
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                min_p: sampling.min_p,
                repetition_penalty: sampling.repetition_penalty,
                presence_penalty: sampling.presence_penalty,
                frequency_penalty: sampling.frequency_penalty,
                seed: sampling.seed,
                logprobs: None,
                prompt_logprobs: None,
                logit_bias: sampling.logit_bias.clone(),
                allowed_ids: sampling.allowed_ids.clone(),
                stop_ids: sampling.stop_ids.clone(),
                ignore_eos: sampling.ignore_eos,
                min_tokens: sampling.min_tokens,
            },
            budget: BudgetRequest {
                exact_thinking_tokens: budget.exact_thinking_tokens,
                max_thinking_tokens: budget.max_thinking_tokens,
                min_thinking_tokens: budget.min_thinking_tokens,
                n_ignore: budget.n_ignore,
                ignore_strings: (!budget.ignore_string.is_empty()).then(|| budget.ignore_string.clone()),
                end_string: budget.end_string.clone(),
                accounting: budget.accounting.into(),
                on_end: budget.on_end.into(),
                thinking: None,
                steering: steering.request(),
            },
            ..Request::default()
        }
    }
}

#[derive(Debug, Group)]
#[command(next_help_heading = "Budget forcing")]
pub struct BudgetArgs {
    /// End the thinking after that many tokens by forcing the end string.
    #[arg(long, value_name = "N")]
    pub max_thinking_tokens: Option<u32>,
    /// Ignore ends of thinking before that many tokens.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub min_thinking_tokens: u32,
    /// Minimum and maximum at once.
    #[arg(long, value_name = "N")]
    pub exact_thinking_tokens: Option<u32>,
    /// Ignore the first N ends of thinking.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub n_ignore: u32,
    /// Takes the place of an ignored end. Repeatable: in turns; empty: the end is just suppressed [default: the model's, Wait].
    #[arg(long, value_name = "TEXT")]
    pub ignore_string: Vec<String>,
    /// Forced at the maximum [default: the model's closing delimiter and "Final Answer:" or its like].
    #[arg(long, value_name = "TEXT")]
    pub end_string: Option<String>,
    /// How thinking tokens are counted.
    #[arg(long, value_enum, value_name = "MODE", default_value = "strict")]
    pub accounting: AccountingKind,
    /// What happens to an end that is to be ignored.
    #[arg(long, value_enum, value_name = "MODE", default_value = "replace")]
    pub on_end: OnEndKind,
}

/// An end of thinking that one of these brings about can be ignored like the model's own.
#[derive(Debug, Group)]
#[command(next_help_heading = "Steering of thinking")]
pub struct SteeringArgs {
    /// NoWait: words that may not be drawn while the model thinks; "default": wait, but, however and 14 more.
    #[arg(long, value_name = "WORDS", value_delimiter = ',')]
    pub avoid_words: Vec<String>,
    /// TIP: what words that begin another thought lose of their logit (the paper's best: 3).
    #[arg(long, value_name = "LOGIT")]
    pub switch_penalty: Option<f32>,
    /// For so many thinking tokens from the last of them [default: 600].
    #[arg(long, value_name = "N")]
    pub switch_window: Option<u32>,
    /// Those words [default: alternatively].
    #[arg(long, value_name = "WORDS", value_delimiter = ',')]
    pub switch_words: Vec<String>,
    /// ThinkBrake: end the thinking after a sentence where the end's log-probability is as close to the best one.
    #[arg(long, value_name = "LOGPROB")]
    pub brake_margin: Option<f32>,
    /// Added to the logit of the end of thinking.
    #[arg(long, value_name = "LOGIT", allow_negative_numbers = true)]
    pub end_bias: Option<f32>,
    /// Added to it for each 1000 thinking tokens.
    #[arg(long, value_name = "LOGIT", allow_negative_numbers = true)]
    pub end_bias_ramp: Option<f32>,
    /// End the thinking after a streak of draws whose most likely token had this probability.
    #[arg(long, value_name = "P")]
    pub stop_confidence: Option<f32>,
    /// How long the streak is [default: 30].
    #[arg(long, value_name = "N")]
    pub stop_streak: Option<u32>,
    /// And not before so many thinking tokens [default: 400].
    #[arg(long, value_name = "N")]
    pub stop_after: Option<u32>,
    /// End the thinking where its last tokens are the same thing so many times in a row.
    #[arg(long, value_name = "N")]
    pub loop_repeats: Option<u32>,
}

impl SteeringArgs {
    pub fn request(&self) -> SteeringRequest {
        SteeringRequest {
            avoid_words: self.avoid_words.clone(),
            switch_penalty: self.switch_penalty,
            switch_window: self.switch_window,
            switch_words: self.switch_words.clone(),
            brake_margin: self.brake_margin,
            end_bias: self.end_bias,
            end_bias_ramp: self.end_bias_ramp,
            stop_confidence: self.stop_confidence,
            stop_streak: self.stop_streak,
            stop_after: self.stop_after,
            loop_repeats: self.loop_repeats,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum AccountingKind {
    /// Every token between the delimiters, injected ones included.
    Strict,
    /// As s1's evaluation: per round, the ignore string included, cut to the maximum at the end.
    S1Harness,
    /// As s1's README: over all rounds, the dropped end included, the ignore string not.
    S1Readme,
}

impl From<AccountingKind> for Accounting {
    fn from(kind: AccountingKind) -> Accounting {
        match kind {
            AccountingKind::Strict => Accounting::Strict,
            AccountingKind::S1Harness => Accounting::S1Harness,
            AccountingKind::S1Readme => Accounting::S1Readme,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OnEndKind {
    /// It is drawn, dropped and replaced by an ignore string.
    Replace,
    /// It is masked: the next best token is taken.
    Mask,
}

impl From<OnEndKind> for OnEnd {
    fn from(kind: OnEndKind) -> OnEnd {
        match kind {
            OnEndKind::Replace => OnEnd::Replace,
            OnEndKind::Mask => OnEnd::Mask,
        }
    }
}

#[derive(Debug, Group)]
#[command(next_help_heading = "Sampling (defaults from the model's generation_config.json, else greedy)")]
pub struct SamplingArgs {
    /// 0 is greedy.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Draw from the K most likely tokens.
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Draw from the most likely tokens whose probabilities sum to P.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Draw from the tokens at least P times as likely as the most likely one.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Logits of tokens that have occurred are divided by X, or multiplied where negative.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Taken from the logits of generated tokens.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Taken from the logits of generated tokens, once for each time.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// The same seed gives the same answer.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Added to the logit of a token. Repeatable.
    #[arg(long, value_name = "ID=X", value_parser = parse_bias, allow_hyphen_values = true)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Draw only these tokens.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub allowed_ids: Option<Vec<u32>>,
    /// End the answer at these tokens, too.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub stop_ids: Vec<u32>,
    /// No end before that many tokens.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub min_tokens: u32,
    /// Go on after the model's end of sequence.
    #[arg(long)]
    pub ignore_eos: bool,
}

/// None: unlimited.
fn parse_effort(text: &str) -> Result<(String, Option<u32>), String> {
    let entry = text.split_once('=').filter(|(name, _)| !name.is_empty()).and_then(|(name, budget)| {
        let budget = if budget == "unlimited" { None } else { Some(budget.parse().ok()?) };
        Some((name.into(), budget))
    });
    entry.ok_or_else(|| "write NAME=TOKENS, like medium=4096, or NAME=unlimited".into())
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let pair = text.split_once('=').and_then(|(id, bias)| Some((id.parse().ok()?, bias.parse().ok()?)));
    pair.ok_or_else(|| "write ID=VALUE, like 42=-1.5".into())
}
