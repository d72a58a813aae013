//! What the two halves share: one step's work as plain numbers, and what came of it. Logic fills a [`Batch`], compute turns
//! it into launches; the sampler's records come back as [`TokenEvent`]s. Neither half sees the other's types.

/// What is launched at once: the changes to device state that must precede it, then prefill chunks or decode steps.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Slots that get a new sequence, written before anything else.
    pub admissions: Vec<SlotSetup>,
    /// Slots that become inactive (cancelled); finished slots deactivate themselves on the device.
    pub releases: Vec<u32>,
    /// Slots whose thinking is to end now.
    pub thinking_ends: Vec<ThinkingEnd>,
    /// New entries of block tables.
    pub pages: Vec<PageEntry>,
    /// Pages to copy before the work: sequences that part where they were one.
    pub copies: Vec<PageCopy>,
    pub work: Work,
}

#[derive(Clone, Debug, Default)]
pub enum Work {
    #[default]
    Nothing,
    /// Chunks of prompts, ragged.
    Prefill(Vec<PrefillChunk>),
    /// A token for each of these slots in each of so many steps. A slot that finishes before does nothing from then on.
    Decode { slots: Vec<u32>, steps: u32 },
}

/// The maximum of a running sequence becomes `at`, which it has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThinkingEnd {
    pub slot: u32,
    pub at: u32,
}

/// Block table entry: tokens `index * 64 ..` of the sequence in `slot` lie in `page`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry {
    pub slot: u32,
    pub index: u32,
    pub page: u32,
}

/// All that is in page `from` is to be in page `to` as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    pub from: u32,
    pub to: u32,
}

/// Consecutive tokens of one prompt; of a sequence that was preempted, what had been generated belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefillChunk {
    pub slot: u32,
    pub tokens: Vec<u32>,
    /// Position of the first of them in the sequence.
    pub position: u32,
    /// The chunk ends the prompt: its last row's logits are sampled.
    pub last: bool,
    pub scoring: Option<Scoring>,
}

/// Asks for the log probabilities of prompt tokens: of the one after each token of the chunk, as far as there is one. Only in chunks
/// of prompts that are computed from their beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scoring {
    /// As many as the chunk has, or, where it ends the prompt, one less.
    pub next: Vec<u32>,
    /// How many of the most likely tokens to report as well.
    pub top: u32,
}

/// How likely a token of the prompt was after those before it; natural logs, of the model's own distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    pub token: u32,
    pub logprob: f32,
    /// 1: none was more likely.
    pub rank: u32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Everything the sampler needs to know about a sequence, as the request and the model define it.
#[derive(Clone, Debug)]
pub struct SlotSetup {
    pub slot: u32,
    /// Echoed in every [`TokenEvent`]; never reused while the engine lives.
    pub serial: u32,
    /// The prompt.
    pub tokens: Vec<u32>,
    pub max_generated: u32,
    /// Tokens of prompt and answer together that fit: the context length.
    pub max_length: u32,
    pub eos_ids: Vec<u32>,
    pub sampling: SamplingParams,
    pub budget: Option<BudgetParams>,
}

/// Sampling parameters of one request, validated (`sampling.rs`).
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub seed: u64,
    /// How many of the most likely tokens to report beside the chosen one.
    pub logprobs: Option<u32>,
    /// The same for the tokens of the prompt, from the second on.
    pub prompt_logprobs: Option<u32>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Only these tokens may be drawn.
    pub allowed: Option<Vec<u32>>,
    /// End the answer, like EOS.
    pub stop_ids: Vec<u32>,
    pub ignore_eos: bool,
    /// EOS and stop ids are masked before that many tokens.
    pub min_tokens: u32,
}

/// How thinking tokens are counted (DESIGN section 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accounting {
    /// Every token between the delimiters, injected ones included.
    #[default]
    Strict,
    /// Per round; an inserted ignore string counts; cut to the maximum at the end.
    S1Harness,
    /// Overall; a sampled end counts, an ignore string does not.
    S1Readme,
}

/// What happens to an end of thinking that is not allowed yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnEnd {
    /// It is drawn, dropped and replaced (s1).
    #[default]
    Replace,
    /// It is masked: the next best token is taken.
    Mask,
}

/// Budget forcing of one request, validated (`budget.rs`), as token ids.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BudgetParams {
    pub start: Vec<u32>,
    pub end: Vec<u32>,
    /// What stands in the output after a natural end; begins with `end`.
    pub close: Vec<u32>,
    /// Forced at the maximum.
    pub end_string: Vec<u32>,
    /// Forced before `end_string` when the text does not end with a newline.
    pub newline: Option<u32>,
    pub ignore_strings: Vec<Vec<u32>>,
    pub max_thinking_tokens: Option<u32>,
    pub min_thinking_tokens: u32,
    pub n_ignore: u32,
    pub accounting: Accounting,
    pub on_end: OnEnd,
    /// The prompt already ends inside a thinking block.
    pub starts_thinking: bool,
    /// The token before the first generated one ends with a newline.
    pub prompt_ends_with_newline: bool,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// EOS or a stop id (the last token).
    Stop,
    /// `max_generated` or the context is reached.
    Length,
    /// The logits were not finite, or no token was left to draw: this event carries no token.
    Error,
}

/// One token of one sequence, as the sampler reports it.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    pub serial: u32,
    pub slot: u32,
    pub token: u32,
    /// Forced, not drawn.
    pub injected: bool,
    /// Stands between the thinking delimiters.
    pub reasoning: bool,
    /// Part of a delimiter (start, end, close or end string).
    pub delimiter: bool,
    pub max_hit: bool,
    pub finish: Option<Finish>,
    /// Tokens generated, this one included.
    pub generated: u32,
    pub ignores_used: u32,
    pub reasoning_tokens: u32,
    /// Natural log; before temperature, after bias, masks and penalties.
    pub logprob: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
    /// With the first token: the prompt's from the second on, if they were asked for.
    pub prompt: Vec<Score>,
}
