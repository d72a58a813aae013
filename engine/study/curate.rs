//! `ponder study curate`: few questions out of many, as s1K was made (arXiv 2501.19393, section 2): filters for quality, 8-gram
//! decontamination, difficulty by what models cannot answer, and diversity by domain with draws that prefer long traces.
//!
//! Invariant: the same items, models and seed give the same selection; every item is kept or counted in exactly one step.

use super::folder::{Folder, Journal};
use super::grade::Grader;
use super::plot::{Waterfall, save_waterfall};
use super::random::Random;
use super::tasks::Problem;
use crate::bench::Report;
use crate::device::Device;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Write;

/// Words in a row that a question may not share with a benchmark.
const GRAM: usize = 8;

/// A line of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Item {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    pub question: String,
    /// The thinking that led to an answer.
    pub trace: String,
    /// What answers are graded against.
    pub answer: String,
    #[serde(default = "boxed")]
    pub grader: Grader,
    pub domain: String,
    /// Of the trace; without it its words are counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace_tokens: Option<u64>,
    /// For each model that has tried, whether its answer was right.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub solved: Vec<bool>,
}

fn boxed() -> Grader {
    Grader::Boxed
}

impl Item {
    fn length(&self) -> u64 {
        self.trace_tokens.unwrap_or_else(|| self.trace.split_whitespace().count() as u64)
    }

    fn problem(&self) -> Problem {
        let Item { id, question, answer, grader, .. } = self.clone();
        Problem { id, question, answer, grader }
    }
}

/// Why an item is not selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dropped {
    /// No question, trace or usable answer.
    Empty,
    /// Text that is broken, refers to a picture, or is drawn with characters.
    Format,
    /// The same question came before.
    Duplicate,
    /// Eight words in a row are in a benchmark.
    Contaminated,
    /// A model has answered it.
    Easy,
    /// Good enough, but not drawn.
    NotDrawn,
}

impl Dropped {
    fn name(self) -> &'static str {
        match self {
            Dropped::Empty => "no question, trace or usable answer",
            Dropped::Format => "broken text, pictures, drawings in characters",
            Dropped::Duplicate => "question came before",
            Dropped::Contaminated => "8 words in a row are in a benchmark",
            Dropped::Easy => "a model has answered it",
            Dropped::NotDrawn => "not drawn",
        }
    }
}

/// A step of the pipeline and what it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    pub dropped: Dropped,
    pub before: usize,
    pub after: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Results {
    pub pool: String,
    pub items: usize,
    pub selected: usize,
    pub seed: u64,
    pub models: Vec<String>,
    pub benchmarks: Vec<String>,
    pub steps: Vec<Step>,
    /// Items of each domain: in the pool, after the filters, selected.
    pub domains: BTreeMap<String, [usize; 3]>,
    /// Tokens of all selected traces.
    pub trace_tokens: u64,
}

/// What the report says of where items came from.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    pub pool: String,
    pub models: Vec<String>,
    pub benchmarks: Vec<String>,
}

/// A pool that the filters have seen: what may still be selected, and what happened to the others.
pub struct Pool {
    items: Vec<Item>,
    /// Indices, ascending.
    kept: Vec<usize>,
    steps: Vec<Step>,
}

impl Pool {
    /// Filters for quality, and by `benchmarks`.
    pub fn new(items: Vec<Item>, benchmarks: &[Problem]) -> Pool {
        let mut pool = Pool { kept: (0..items.len()).collect(), items, steps: Vec::new() };
        pool.keep(Dropped::Empty, |item| {
            let filled = |text: &str| !text.trim().is_empty();
            filled(&item.question) && filled(&item.trace) && item.grader.check(&item.answer).is_ok()
        });
        pool.keep(Dropped::Format, |item| is_plain(&item.question) && is_plain(&item.trace));
        let mut seen = HashSet::new();
        pool.keep(Dropped::Duplicate, |item| seen.insert(words(&item.question)));
        let known: HashSet<Vec<String>> = benchmarks.iter().flat_map(|p| grams(&p.question)).collect();
        pool.keep(Dropped::Contaminated, |item| !grams(&item.question).any(|gram| known.contains(&gram)));
        pool
    }

    fn keep(&mut self, dropped: Dropped, mut good: impl FnMut(&Item) -> bool) {
        let before = self.kept.len();
        self.kept.retain(|&i| good(&self.items[i]));
        self.steps.push(Step { dropped, before, after: self.kept.len() });
    }

    /// The questions that are left, by their places in the pool.
    pub fn problems(&self) -> impl Iterator<Item = (usize, Problem)> + '_ {
        self.kept.iter().map(|&i| (i, self.items[i].problem()))
    }

    /// Notes what models made of the items: their places and whether the answer was right.
    pub fn solved(&mut self, verdicts: impl IntoIterator<Item = (usize, bool)>) {
        for (i, right) in verdicts {
            self.items[i].solved.push(right);
        }
    }

    /// Drops what any model has solved; then draws `n`: a domain, each as likely, and of it an item with weight 2^-rank, the
    /// longest having rank 0. Items in the order in which they were drawn, and all that was counted.
    pub fn select(mut self, n: usize, seed: u64, subject: Subject) -> (Vec<Item>, Results) {
        self.keep(Dropped::Easy, |item| !item.solved.contains(&true));
        let mut domains = BTreeMap::<&str, Vec<usize>>::new();
        for &i in &self.kept {
            domains.entry(&self.items[i].domain).or_default().push(i);
        }
        let mut counts = BTreeMap::<String, [usize; 3]>::new();
        for item in &self.items {
            counts.entry(item.domain.clone()).or_default()[0] += 1;
        }
        let mut open: Vec<(&str, Vec<usize>)> = domains.into_iter().collect();
        for (domain, items) in &mut open {
            counts.get_mut(*domain).expect("counted above")[1] = items.len();
            items.sort_by_key(|&i| (std::cmp::Reverse(self.items[i].length()), i));
        }
        let mut random = Random::of(seed, "curate");
        let mut drawn = Vec::new();
        while drawn.len() < n && !open.is_empty() {
            let d = random.below(open.len());
            let (domain, items) = &mut open[d];
            drawn.push(items.remove(halving_rank(items.len(), &mut random)));
            counts.get_mut(*domain).expect("counted above")[2] += 1;
            if items.is_empty() {
                open.remove(d);
            }
        }
        let selected: Vec<Item> = drawn.iter().map(|&i| self.items[i].clone()).collect();
        self.steps.push(Step { dropped: Dropped::NotDrawn, before: self.kept.len(), after: selected.len() });
        let results = Results {
            pool: subject.pool,
            items: self.items.len(),
            selected: selected.len(),
            seed,
            models: subject.models,
            benchmarks: subject.benchmarks,
            steps: self.steps,
            domains: counts,
            trace_tokens: selected.iter().map(Item::length).sum(),
        };
        (selected, results)
    }
}

/// 0 .. n, each half as likely as the one before.
fn halving_rank(n: usize, random: &mut Random) -> usize {
    let all = 1.0 - 0.5f64.powi(n.min(1000) as i32);
    // Inverse of the distribution function 1 - 2^-(rank + 1).
    let rank = -(1.0 - random.unit() * all).log2();
    (rank as usize).min(n - 1)
}

fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty());
    words.map(str::to_lowercase).collect()
}

fn grams(text: &str) -> impl Iterator<Item = Vec<String>> {
    let words = words(text);
    (0..(words.len() + 1).saturating_sub(GRAM)).map(move |i| words[i..i + GRAM].to_vec())
}

/// Whether text alone says all: no replacement characters, no pictures, no three lines in a row that are mere strokes.
fn is_plain(text: &str) -> bool {
    let pictures = ["![", "<img", "\\includegraphics", "[asy]"];
    let strokes = |line: &str| {
        let line = line.trim();
        line.len() >= 3 && line.chars().all(|c| " |+-_/\\*=.".contains(c)) && line.contains(['|', '+', '/', '\\'])
    };
    let mut row = 0;
    let drawn = text.lines().any(|line| {
        row = if strokes(line) { row + 1 } else { 0 };
        row == 3
    });
    !drawn && !text.contains('\u{fffd}') && !pictures.iter().any(|p| text.contains(p))
}

/// What a model made of an item, as the journal has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verdict {
    pub model: String,
    /// Place in the pool.
    pub item: usize,
    pub right: bool,
}

/// The journal of verdicts of this pool.
///
/// # Errors
/// As [`Journal::open`].
pub fn journal(
    folder: &Folder,
    pool: &Pool,
    subject: &Subject,
    limits: serde_json::Value,
) -> Result<(Journal, Vec<Verdict>)> {
    let hash = blake3::hash(serde_json::to_string(&pool.items).expect("plain data").as_bytes()).to_hex();
    let settings = json!({"study": "curate", "pool": subject.pool, "pool_blake3": hash.as_str(), "limits": limits});
    Journal::open(&folder.path("answers.jsonl"), &settings)
}

/// Writes selected.jsonl, results, report and plots. `device`: None where no model was asked.
///
/// # Errors
/// A folder that cannot be written.
pub fn write(folder: &Folder, device: &Device, selected: &[Item], results: Results) -> Result<()> {
    let line = |item: &Item| serde_json::to_string(item).expect("plain data") + "\n";
    folder.write("selected.jsonl", &selected.iter().map(line).collect::<String>())?;
    let report = Report::new("ponder-study-curate", device, results);
    folder.write_results(&report)?;
    let r = &report.results;
    let bars = std::iter::once(("the pool".to_string(), 0.0, r.items as f64, r.items.to_string()))
        .chain(r.steps.iter().map(|s| {
            (s.dropped.name().to_string(), s.after as f64, s.before as f64, format!("-{}", s.before - s.after))
        }))
        .chain([("selected".to_string(), 0.0, r.selected as f64, r.selected.to_string())]);
    let waterfall = Waterfall { title: format!("What became of {}", r.pool), x: "items".into(), bars: bars.collect() };
    save_waterfall(&waterfall, &folder.path("steps"))?;
    folder.write("report.md", &markdown(&report))
}

fn markdown(report: &Report<Results>) -> String {
    let r = &report.results;
    let list = |names: &[String]| if names.is_empty() { "none".into() } else { names.join(", ") };
    let mut text = format!(
        "# {} of {} questions of {}\n\nSeed {}. Models asked: {}. Benchmarks: {}. Device: {}. Commit: {}. {}.\n\n![steps](steps.png)\n\n\
         | step | before | dropped | after |\n|---|---|---|---|\n",
        r.selected,
        r.items,
        r.pool,
        r.seed,
        list(&r.models),
        list(&r.benchmarks),
        report.device,
        report.commit,
        report.date
    );
    for s in &r.steps {
        let _ = writeln!(text, "| {} | {} | {} | {} |", s.dropped.name(), s.before, s.before - s.after, s.after);
    }
    let _ = write!(
        text,
        "\nDrawn: a domain, each as likely, and of it an item with weight 2^-rank, the longest trace having rank 0. {} tokens of traces \
         are selected.\n\n| domain | pool | after the filters | selected |\n|---|---|---|---|\n",
        r.trace_tokens
    );
    for (domain, [all, kept, selected]) in &r.domains {
        let _ = writeln!(text, "| {domain} | {all} | {kept} | {selected} |");
    }
    text
}

/// The pool and the questions of benchmarks that are to be kept out of it.
///
/// # Errors
/// A file that cannot be read, or a line that is no item.
pub fn read_pool(path: &std::path::Path) -> Result<Vec<Item>> {
    let items = super::tasks::lines(path, |line| serde_json::from_str::<Item>(line).map_err(|e| e.to_string()))?;
    let ids: Vec<&str> = items.iter().filter_map(|item| item.id.as_deref()).collect();
    if ids.iter().collect::<BTreeSet<_>>().len() < ids.len() {
        return Err(Error::Usage(format!("{}: an id stands twice: name each item once", path.display())));
    }
    Ok(items)
}
