//! `ponder inspect`: the model, what it needs, the kernels, the device.

use super::output::Printer;
use crate::Result;
use crate::args::InspectArgs;
use crate::config::{LayerTypes, ModelConfig};
use crate::executor::{BUCKETS, MemoryPlan};
use crate::frontend::Frontend;
use crate::kernels;
use crate::kernels::params::PAGE_TOKENS;
use crate::model::{self, Weights};
use crate::thinking::Delimiters;

/// Registers, shared memory and instruction counts of every kernel, as nvcc compiled it; a test keeps the table true.
const RESOURCES: &str = include_str!("../../tests/resources.txt");

pub fn run(args: &InspectArgs) -> Result<()> {
    let (mut frontend, checkpoint, device) = super::open(&args.model)?;
    let options = super::options(&args.model);
    let weights = checkpoint.as_ref().map_or(Weights::Dummy, Weights::Checkpoint);
    frontend.config.weight_types = weights.types(&frontend.config, options.quantize)?;
    let plan = MemoryPlan::new(&device, &frontend.config, &options)?;
    let mut text = model(&frontend);
    text += &format!("\ndevice        {}\n", device.describe());
    if let Some(telemetry) = super::telemetry(&args.model.source, &device) {
        text += &format!("              {}\n", telemetry.describe());
    }
    text += &memory(&plan);
    text += &format!(
        "\nkernels       {} ({}); decode steps of {BUCKETS:?} sequences are recorded\n\n{RESOURCES}",
        kernels::ALL.len(),
        if kernels::CUBINS.is_empty() { "built for the host target only" } else { "host target and sm_90a" },
    );
    Printer::new().write(&text)
}

fn model(frontend: &Frontend) -> String {
    let c = &frontend.config;
    let in_bf16 = ModelConfig { weight_types: vec![LayerTypes::default(); c.num_layers], ..c.clone() };
    let parameters = model::weight_bytes(&in_bf16) as f64 / 2.0;
    let parameters = if parameters < 1e9 {
        format!("{:.1} million", parameters / 1e6)
    } else {
        format!("{:.1} billion", parameters / 1e9)
    };
    let thinking = frontend.delimiters.as_ref().map_or("none".into(), |d| delimiters(frontend, d));
    format!(
        "model         {:?}, {parameters} parameters in {}\n\
         layers        {}, hidden {}, intermediate {}\n\
         heads         {} of {} elements, {} for K and V\n\
         vocabulary    {}{}\n\
         positions     {}, RoPE {:?}\n\
         windows       {}\n\
         thinking      {thinking}\n",
        c.architecture,
        if c.is_fp8() { "fp8 and bf16" } else { "bf16" },
        c.num_layers,
        c.hidden_size,
        c.intermediate_size,
        c.num_heads,
        c.head_dim,
        c.num_kv_heads,
        c.vocab_size,
        if c.tie_word_embeddings { ", input and output share their table" } else { "" },
        c.max_position_embeddings,
        c.rope,
        windows(&c.windows),
    )
}

fn windows(layers: &[Option<u32>]) -> String {
    let mut sizes: Vec<u32> = layers.iter().flatten().copied().collect();
    let count = sizes.len();
    sizes.dedup();
    match sizes.as_slice() {
        [] => "none".into(),
        sizes => format!("of {sizes:?} tokens in {count} of {} layers", layers.len()),
    }
}

fn delimiters(frontend: &Frontend, d: &Delimiters) -> String {
    let text = |ids: &[u32]| format!("{:?}", frontend.tokenizer.decode(ids));
    let ignored: Vec<String> = d.ignore_strings.iter().map(|s| text(s)).collect();
    format!(
        "from {}{} to {}, closed by {}\n              forced end {}; ignored ends become {}",
        text(&d.start),
        if d.start_in_prompt { " (in the prompt)" } else { "" },
        text(&d.end),
        text(&d.close),
        text(&d.end_string),
        if ignored.is_empty() { "nothing".into() } else { ignored.join(", ") },
    )
}

pub fn memory(plan: &MemoryPlan) -> String {
    let line = |name: &str, bytes: u64, what: String| {
        format!("              {:>10.1} MiB  {name}{what}\n", bytes as f64 / (1 << 20) as f64)
    };
    let mut text = "memory\n".to_string();
    text += &line("weights", plan.weights, String::new());
    text += &line(
        "KV cache",
        plan.kv_cache,
        format!(
            ": {} pages of {PAGE_TOKENS} tokens in {}, sequences of up to {} tokens",
            plan.pages - 1,
            plan.kv_type.name(),
            plan.context
        ),
    );
    text += &line("workspace", plan.workspace, format!(": {} prompt tokens in a step", plan.prefill_chunk));
    text += &line("slots", plan.slot_states, format!(": {} sequences at a time", plan.slots - 1));
    text += &line("together", plan.bytes(), String::new());
    text +=
        &line("free before", plan.free, "; recorded steps take some of the rest, which is said when they are".into());
    text + &line("host memory", plan.ring, ": the ring of tokens".into())
}

/// The same in one line, for those that go on to do something.
pub fn memory_line(plan: &MemoryPlan) -> String {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
    format!(
        "memory: weights {}, KV cache {} ({} pages in {}), workspace {}, slots {}, recorded steps {}; {} were free",
        mib(plan.weights),
        mib(plan.kv_cache),
        plan.pages - 1,
        plan.kv_type.name(),
        mib(plan.workspace),
        mib(plan.slot_states),
        plan.graphs.map_or("none".into(), mib),
        mib(plan.free)
    )
}
