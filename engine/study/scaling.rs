//! `ponder study scaling`: how accuracy follows from the tokens that a model may think, s1's sweeps and their baselines. A
//! *condition* is one way of asking, a *sweep* a list of conditions. All of them are asked together.

use super::ask::ask;
use super::folder::{Folder, Journal};
use super::metrics::{self, Axis, Interval, Point, bootstrap};
use super::plot::{Chart, ChartPoint, Series, save_chart};
use super::random::Random;
use super::tasks::Problem;
pub use crate::args::SweepKind;
use crate::bench::Report;
use crate::budget::BudgetRequest;
use crate::chat::Message;
use crate::device::Device;
use crate::engine::Engine;
use crate::frontend::Request;
use crate::sampling::SamplingRequest;
use crate::sequence::{Answer, Channel, FinishReason};
use crate::steering::{SteeringRequest, Technique};
use crate::{Error, Result};
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

const BOOTSTRAP_ROUNDS: usize = 2000;
/// A step of step-conditional control stands for so many tokens (the paper's appendix E.1).
const TOKENS_PER_STEP: u32 = 100;

/// What is to be asked.
#[derive(Clone, Debug)]
pub struct Options {
    pub sweeps: Vec<SweepKind>,
    pub maxima: Vec<u32>,
    /// Ends ignored in the sweep of the maximum.
    pub ignored_at_maximum: u32,
    pub ignores: Vec<u32>,
    /// Empty: the end is suppressed and nothing takes its place.
    pub strings: Vec<String>,
    /// Ends ignored in the sweep of strings.
    pub ignored_by_string: u32,
    /// Tried one after the other.
    pub techniques: Vec<Technique>,
    /// Draws of each problem for rejection sampling and majority vote.
    pub samples: u32,
    /// At which those are drawn; everything else is greedy.
    pub temperature: f32,
    /// Most tokens of an answer, thinking included.
    pub max_tokens: Option<u32>,
    pub seed: u64,
}

/// Where answers come from, for the report.
#[derive(Clone, Debug)]
pub struct Subject {
    pub model: String,
    pub task: String,
}

/// One way of asking.
#[derive(Clone, Debug, PartialEq)]
struct Condition {
    /// Says all that follows, but for the samples; keys the journal.
    name: String,
    maximum: Option<u32>,
    n_ignore: u32,
    /// None: the model's.
    string: Option<String>,
    steering: SteeringRequest,
    exact: Option<u32>,
    /// Appended to the question.
    suffix: String,
    /// 1 unless drawn at the temperature.
    samples: u32,
}

impl Condition {
    fn new(
        maximum: Option<u32>,
        n_ignore: u32,
        string: Option<&str>,
        suffix: &str,
        sampled: Option<(u32, f32)>,
    ) -> Self {
        let mut name = maximum.map_or("no maximum".into(), |n| format!("maximum {n}"));
        if n_ignore > 0 {
            let what = match string {
                None => "the model's string".into(),
                Some("") => "nothing".into(),
                Some(string) => format!("{string:?}"),
            };
            write!(name, ", {n_ignore} x {what}").expect("a String");
        }
        if !suffix.is_empty() {
            write!(name, ", asked to {suffix:?}").expect("a String");
        }
        if let Some((_, temperature)) = sampled {
            write!(name, ", temperature {temperature}").expect("a String");
        }
        let samples = sampled.map_or(1, |(samples, _)| samples);
        let string = string.map(str::to_string);
        let (steering, suffix) = (SteeringRequest::default(), suffix.into());
        Condition { name, maximum, n_ignore, string, steering, exact: None, suffix, samples }
    }

    fn steered(technique: &Technique) -> Self {
        let name = format!("{} {}", technique.name, technique.json);
        Condition { name, steering: technique.steering.clone(), ..Condition::new(None, 0, None, "", None) }
    }

    fn exact(tokens: u32) -> Self {
        let name = format!("exactly {tokens}");
        Condition { name, exact: Some(tokens), ..Condition::new(None, 0, None, "", None) }
    }

    fn request(&self, engine: &Engine, options: &Options, problem: &Problem, key: &Key) -> Result<Request> {
        let question = match self.suffix.is_empty() {
            true => problem.question.clone(),
            false => format!("{}\n\n{}", problem.question, self.suffix),
        };
        let temperature = if self.samples > 1 { options.temperature } else { 0.0 };
        let seed = Random::of(options.seed, &format!("{} {}", key.problem, key.sample)).word();
        let strings = |string: &String| if string.is_empty() { vec![] } else { vec![string.clone()] };
        Ok(Request {
            prompt: engine.frontend.encode_chat(&[Message::new("user", question)])?,
            max_tokens: options.max_tokens,
            sampling: SamplingRequest { temperature: Some(temperature), seed: Some(seed), ..Default::default() },
            budget: BudgetRequest {
                exact_thinking_tokens: self.exact,
                max_thinking_tokens: self.maximum,
                n_ignore: self.n_ignore,
                steering: self.steering.clone(),
                ignore_strings: self.string.as_ref().map(strings),
                ..Default::default()
            },
            ..Default::default()
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Key {
    condition: String,
    problem: usize,
    sample: u32,
}

/// An answer, as the journal has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    key: Key,
    thinking_tokens: u32,
    /// All tokens of the answer.
    tokens: usize,
    ignores_used: u32,
    max_hit: bool,
    #[serde(default)]
    stopped: bool,
    /// As [`FinishReason::name`].
    finish: String,
    answer: String,
    vote: Option<String>,
    right: bool,
}

impl Record {
    fn new(key: Key, problem: &Problem, answer: &Answer) -> Record {
        let text = answer.channel(Channel::Answer);
        let last = answer.tokens.last();
        Record {
            key,
            thinking_tokens: last.map_or(0, |t| t.reasoning_tokens),
            tokens: answer.tokens.len(),
            ignores_used: last.map_or(0, |t| t.ignores_used),
            max_hit: last.is_some_and(|t| t.max_hit),
            stopped: last.is_some_and(|t| t.stopped),
            finish: answer.finish.map_or("", FinishReason::name).into(),
            vote: problem.grader.vote(&text),
            right: problem.grader.is_right(&problem.answer, &text),
            answer: text,
        }
    }
}

/// A list of points to be, each with how it is made of answers.
struct Sweep {
    kind: SweepKind,
    name: String,
    rows: Vec<Row>,
}

struct Row {
    label: String,
    condition: usize,
    of: Of,
    least: Limit,
    most: Limit,
}

/// How the answers of a condition become one point.
#[derive(Clone, Copy)]
enum Of {
    /// All of them.
    All,
    /// Of each problem, the first within so many thinking tokens.
    FirstWithin(u32),
    /// The most frequent vote among the first so many of each problem.
    Majority(u32),
}

/// Of the thinking tokens, for Control.
#[derive(Clone, Copy, PartialEq)]
enum Limit {
    None,
    Tokens(u32),
    /// What the condition thinks on average.
    AverageOf(usize),
}

/// One point of a sweep.
#[derive(Clone, Debug, Serialize)]
pub struct RowResult {
    pub label: String,
    pub condition: String,
    /// Answers, or votes.
    pub answers: usize,
    /// Of these many problems; rejection sampling may find no answer for some.
    pub problems: usize,
    pub accuracy: f64,
    pub accuracy_interval: Option<Interval>,
    /// Average, of all draws that it took together where there are several.
    pub thinking_tokens: f64,
    pub limit: Option<f64>,
    /// Whether the average is within the limit.
    pub controlled: Option<bool>,
    /// Percent of the answers within the limit.
    pub answers_controlled: Option<f64>,
    /// Percent of the answers that the maximum has ended.
    pub max_hit: f64,
    /// Percent of the answers whose thinking a technique has ended.
    pub stopped: f64,
    pub ignores_used: f64,
    /// Draws for one answer.
    pub draws: f64,
}

/// A sweep with s1's metrics.
#[derive(Clone, Debug, Serialize)]
pub struct SweepResult {
    pub kind: SweepKind,
    pub name: String,
    /// Percent of the conditions whose average is within their limits, as in the paper. None: there were no limits.
    pub control: Option<f64>,
    /// Points per doubling of the thinking tokens.
    pub scaling: Option<f64>,
    pub scaling_interval: Option<Interval>,
    /// Points per 1000 thinking tokens.
    pub scaling_linear: Option<f64>,
    pub scaling_linear_interval: Option<Interval>,
    pub performance: Option<f64>,
    pub performance_interval: Option<Interval>,
    pub rows: Vec<RowResult>,
}

/// All of results.json but what every report says.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    pub model: String,
    pub task: String,
    pub problems: usize,
    pub seed: u64,
    pub sweeps: Vec<SweepResult>,
}

/// Asks what the folder does not know yet, and writes results, report and plots.
///
/// # Errors
/// Options that ask for nothing, problems that the engine has no room for, a device that fails, a folder that cannot be written
/// or belongs to another study.
pub fn run(
    engine: &mut Engine,
    device: &Device,
    subject: &Subject,
    problems: &[Problem],
    options: &Options,
    folder: &Folder,
    bar: &ProgressBar,
) -> Result<Results> {
    let (conditions, sweeps) = plan(options)?;
    let task = blake3::hash(serde_json::to_string(problems).expect("plain data").as_bytes()).to_hex();
    let settings = json!({
        "study": "scaling",
        "model": subject.model,
        "device": device.describe(),
        "task": subject.task,
        "task_blake3": task.as_str(),
        "seed": options.seed,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
    });
    let (mut journal, known) = Journal::open::<Record>(&folder.path("answers.jsonl"), &settings)?;
    let mut answers: HashMap<Key, Record> = known.into_iter().map(|record| (record.key.clone(), record)).collect();
    let keys = |c: usize, condition: &Condition| {
        let name = condition.name.clone();
        let samples = condition.samples;
        let key = move |problem, sample| Key { condition: name.clone(), problem, sample };
        (0..problems.len()).flat_map(move |p| (0..samples).map(move |s| (c, p, s))).map(move |(c, p, s)| (c, key(p, s)))
    };
    let all: Vec<(usize, Key)> = conditions.iter().enumerate().flat_map(|(c, condition)| keys(c, condition)).collect();
    bar.set_length(all.len() as u64);
    let missing: Vec<(usize, Key)> = all.into_iter().filter(|(_, key)| !answers.contains_key(key)).collect();
    bar.set_position(bar.length().unwrap_or(0) - missing.len() as u64);
    bar.reset_eta();
    let requests: Vec<Result<(Key, Request)>> = missing
        .into_iter()
        .map(|(c, key)| Ok((key.clone(), conditions[c].request(engine, options, &problems[key.problem], &key)?)))
        .collect();
    ask(engine, requests, |key, answer| {
        let record = Record::new(key.clone(), &problems[key.problem], &answer);
        journal.append(&record)?;
        answers.insert(key, record);
        bar.inc(1);
        Ok(())
    })?;

    let table = Table { conditions: &conditions, answers: &answers, problems: problems.len() };
    let results = Results {
        model: subject.model.clone(),
        task: subject.task.clone(),
        problems: problems.len(),
        seed: options.seed,
        sweeps: sweeps.iter().map(|sweep| table.sweep(sweep, options.seed)).collect(),
    };
    let mut report = Report::new("ponder-study-scaling", device, results);
    report.args = Some(settings);
    folder.write_results(&report)?;
    plots(&report.results, folder)?;
    folder.write("report.md", &markdown(&report))?;
    Ok(report.results)
}

fn plan(options: &Options) -> Result<(Vec<Condition>, Vec<Sweep>)> {
    let mut conditions = Vec::<Condition>::new();
    let mut sweeps = Vec::new();
    let sampled = Some((options.samples, options.temperature));
    let needs_samples = |kind| matches!(kind, SweepKind::Rejection | SweepKind::Parallel);
    if options.sweeps.iter().any(|&kind| needs_samples(kind)) && (options.samples < 2 || options.temperature <= 0.0) {
        let problem = "rejection sampling and majority vote need at least two --samples and a --temperature above 0";
        return Err(Error::Usage(problem.into()));
    }
    let mut place = |condition: Condition| match conditions.iter().position(|c| *c == condition) {
        Some(known) => known,
        None => {
            conditions.push(condition);
            conditions.len() - 1
        }
    };
    let row = |label: String, condition, most| Row { label, condition, of: Of::All, least: Limit::None, most };
    let (ignored, string) = (options.ignored_at_maximum, options.strings.first().map(String::as_str));
    let mut kinds = options.sweeps.clone();
    kinds.sort();
    kinds.dedup();
    for kind in kinds {
        let mut add = |name: String, rows: Vec<Row>| sweeps.push(Sweep { kind, name, rows });
        match kind {
            SweepKind::Maximum => {
                let string = string.filter(|_| ignored > 0);
                let rows = options.maxima.iter().map(|&n| {
                    row(n.to_string(), place(Condition::new(Some(n), ignored, string, "", None)), Limit::Tokens(n))
                });
                let rows = rows.collect();
                add(format!("Budget forcing: the maximum, {ignored} ends ignored"), rows);
            }
            SweepKind::Ignore => {
                let rows = options.ignores.iter().map(|&n| {
                    let condition = Condition::new(None, n, string.filter(|_| n > 0), "", None);
                    row(format!("{n} x"), place(condition), Limit::None)
                });
                let rows = rows.collect();
                add("Budget forcing: ends ignored, no maximum".into(), rows);
            }
            SweepKind::String => {
                let n = options.ignored_by_string;
                let rows = options.strings.iter().map(|string| {
                    let label = if string.is_empty() { "none" } else { string };
                    row(label.into(), place(Condition::new(None, n, Some(string), "", None)), Limit::None)
                });
                let rows = rows.collect();
                add(format!("What replaces an ignored end, {n} times"), rows);
            }
            SweepKind::Technique => {
                let none = row("none".into(), place(Condition::new(None, 0, None, "", None)), Limit::None);
                let steered = options
                    .techniques
                    .iter()
                    .map(|technique| row(technique.name.clone(), place(Condition::steered(technique)), Limit::None));
                let mut rows: Vec<Row> = std::iter::once(none).chain(steered).collect();
                rows.extend(options.maxima.iter().map(|&n| Row {
                    least: Limit::Tokens(n),
                    ..row(format!("exactly {n}"), place(Condition::exact(n)), Limit::Tokens(n))
                }));
                add("Steering: techniques that act on the draws".into(), rows);
            }
            SweepKind::Token => {
                for forced in [false, true] {
                    let rows = options.maxima.iter().filter(|&&n| n > 0).map(|&n| {
                        let suffix = format!("Think for up to {n} tokens.");
                        let condition = Condition::new(forced.then_some(n), 0, None, &suffix, None);
                        row(n.to_string(), place(condition), Limit::Tokens(n))
                    });
                    let rows = rows.collect();
                    add(format!("Token-conditional control{}", if forced { " and budget forcing" } else { "" }), rows);
                }
            }
            SweepKind::Step => {
                let mut steps: Vec<u32> = options.maxima.iter().map(|n| n.div_ceil(TOKENS_PER_STEP).max(1)).collect();
                steps.dedup();
                for forced in [false, true] {
                    let rows = steps.iter().map(|&n| {
                        let (suffix, most) = (format!("Think for up to {n} steps."), n * TOKENS_PER_STEP);
                        let condition = Condition::new(forced.then_some(most), 0, None, &suffix, None);
                        row(format!("{n} steps"), place(condition), Limit::Tokens(most))
                    });
                    let rows = rows.collect();
                    add(format!("Step-conditional control{}", if forced { " and budget forcing" } else { "" }), rows);
                }
            }
            SweepKind::Class => {
                let free = place(Condition::new(None, 0, None, "", None));
                let short = Condition::new(None, 0, None, "Think only briefly before you answer.", None);
                let long =
                    Condition::new(None, 0, None, "Think for a long time and check your work before you answer.", None);
                let short = row("short".into(), place(short), Limit::AverageOf(free));
                let long = Row { least: Limit::AverageOf(free), ..row("long".into(), place(long), Limit::None) };
                add("Class-conditional control".into(), vec![short, long]);
            }
            SweepKind::Rejection => {
                let drawn = place(Condition::new(None, 0, None, "", sampled));
                let within = |&n: &u32| Row { of: Of::FirstWithin(n), ..row(n.to_string(), drawn, Limit::Tokens(n)) };
                add("Rejection sampling".into(), options.maxima.iter().map(within).collect());
            }
            SweepKind::Parallel => {
                let drawn = place(Condition::new(None, 0, None, "", sampled));
                let powers = (0..).map(|p| 1 << p).take_while(|&k| k <= options.samples);
                let of = |k| Row { of: Of::Majority(k), ..row(format!("of {k}"), drawn, Limit::None) };
                add("Majority vote".into(), powers.map(of).collect());
            }
        }
    }
    match sweeps.iter().all(|s| s.rows.is_empty()) {
        true => Err(Error::Usage("nothing is to be swept: name --sweeps and their values".into())),
        false => Ok((conditions, sweeps)),
    }
}

/// What is known of everything that was asked.
struct Table<'a> {
    conditions: &'a [Condition],
    answers: &'a HashMap<Key, Record>,
    problems: usize,
}

/// What one problem adds to a point.
#[derive(Clone, Copy)]
struct Cell {
    right: bool,
    tokens: f64,
    max_hit: bool,
    stopped: bool,
    ignores_used: f64,
    draws: f64,
    /// Of the answer that counts.
    thinking_tokens: f64,
}

impl Table<'_> {
    fn answer(&self, condition: usize, problem: usize, sample: u32) -> &Record {
        let key = Key { condition: self.conditions[condition].name.clone(), problem, sample };
        &self.answers[&key]
    }

    fn cell(&self, row: &Row, problem: usize) -> Option<Cell> {
        let samples = self.conditions[row.condition].samples;
        let cell = |record: &Record, right, tokens, draws| Cell {
            right,
            tokens,
            max_hit: record.max_hit,
            stopped: record.stopped,
            ignores_used: f64::from(record.ignores_used),
            draws,
            thinking_tokens: f64::from(record.thinking_tokens),
        };
        let draw = |sample| self.answer(row.condition, problem, sample);
        match row.of {
            Of::All => {
                let record = draw(0);
                Some(cell(record, record.right, f64::from(record.thinking_tokens), 1.0))
            }
            Of::FirstWithin(most) => {
                let found = (0..samples).find(|&s| draw(s).thinking_tokens <= most)?;
                let record = draw(found);
                // As in the paper, the tokens are those of the answer that is kept.
                Some(cell(record, record.right, f64::from(record.thinking_tokens), f64::from(found + 1)))
            }
            Of::Majority(k) => {
                let mut votes = BTreeMap::<&str, (u32, u32)>::new();
                for (s, vote) in (0..k).filter_map(|s| Some((s, draw(s).vote.as_deref()?))) {
                    votes.entry(vote).or_insert((0, s)).0 += 1;
                }
                // The one that came first where several are as frequent.
                let winner = votes.values().max_by_key(|(count, first)| (*count, std::cmp::Reverse(*first)));
                let record = draw(winner.map_or(0, |w| w.1));
                let tokens = (0..k).map(|s| f64::from(draw(s).thinking_tokens)).sum();
                Some(cell(record, record.right, tokens, f64::from(k)))
            }
        }
    }

    fn sweep(&self, sweep: &Sweep, seed: u64) -> SweepResult {
        let cells: Vec<Vec<Option<Cell>>> =
            sweep.rows.iter().map(|row| (0..self.problems).map(|p| self.cell(row, p)).collect()).collect();
        let point = |cells: &[Option<Cell>], drawn: &[usize]| {
            let cells = || drawn.iter().filter_map(|&p| cells[p]);
            let n = cells().count() as f64;
            (n > 0.0).then(|| Point {
                tokens: cells().map(|c| c.tokens).sum::<f64>() / n,
                accuracy: 100.0 * cells().filter(|c| c.right).count() as f64 / n,
            })
        };
        let points = |drawn: &[usize]| cells.iter().filter_map(|c| point(c, drawn)).collect::<Vec<Point>>();
        let everyone: Vec<usize> = (0..self.problems).collect();
        let interval = |what: &str, of: &dyn Fn(&[usize]) -> Option<f64>| {
            let mut random = Random::of(seed, &format!("{} {what}", sweep.name));
            bootstrap(self.problems, BOOTSTRAP_ROUNDS, &mut random, of)
        };
        let average = |condition: usize| {
            let tokens = (0..self.problems).map(|p| f64::from(self.answer(condition, p, 0).thinking_tokens));
            tokens.sum::<f64>() / self.problems as f64
        };
        let tokens = |limit| match limit {
            Limit::None => None,
            Limit::Tokens(n) => Some(f64::from(n)),
            Limit::AverageOf(condition) => Some(average(condition)),
        };
        let rows: Vec<RowResult> = sweep
            .rows
            .iter()
            .zip(&cells)
            .map(|(row, cells)| {
                let found: Vec<Cell> = cells.iter().flatten().copied().collect();
                let n = found.len() as f64;
                let mean = |of: fn(&Cell) -> f64| if n > 0.0 { found.iter().map(of).sum::<f64>() / n } else { 0.0 };
                let at = point(cells, &everyone);
                let (least, most) = (tokens(row.least), tokens(row.most));
                let limited = least.is_some() || most.is_some();
                let each = metrics::control(found.iter().map(|c| (c.thinking_tokens, least, most)));
                let together = at.and_then(|p| metrics::control([(p.tokens, least, most)]));
                RowResult {
                    label: row.label.clone(),
                    condition: self.conditions[row.condition].name.clone(),
                    answers: found.len(),
                    problems: self.problems,
                    accuracy: at.map_or(0.0, |p| p.accuracy),
                    accuracy_interval: interval(&row.label, &|drawn| point(cells, drawn).map(|p| p.accuracy)),
                    thinking_tokens: at.map_or(0.0, |p| p.tokens),
                    limit: most.or(least),
                    controlled: together.filter(|_| limited).map(|share| share > 0.0),
                    answers_controlled: each.filter(|_| limited),
                    max_hit: 100.0 * mean(|c| f64::from(u8::from(c.max_hit))),
                    stopped: 100.0 * mean(|c| f64::from(u8::from(c.stopped))),
                    ignores_used: mean(|c| c.ignores_used),
                    draws: mean(|c| c.draws),
                }
            })
            .collect();
        let limited: Vec<bool> = rows.iter().filter_map(|row| row.controlled).collect();
        let kept = limited.iter().filter(|kept| **kept).count() as f64;
        let all = points(&everyone);
        SweepResult {
            kind: sweep.kind,
            name: sweep.name.clone(),
            control: (!limited.is_empty()).then(|| 100.0 * kept / limited.len() as f64),
            scaling: metrics::scaling(&all, Axis::Log2),
            scaling_interval: interval("scaling", &|drawn| metrics::scaling(&points(drawn), Axis::Log2)),
            scaling_linear: metrics::scaling(&all, Axis::Linear),
            scaling_linear_interval: interval("linear", &|drawn| metrics::scaling(&points(drawn), Axis::Linear)),
            performance: metrics::performance(&all),
            performance_interval: interval("performance", &|drawn| metrics::performance(&points(drawn))),
            rows,
        }
    }
}

fn plots(results: &Results, folder: &Folder) -> Result<()> {
    let series = |sweep: &SweepResult| {
        let rows = sweep.rows.iter().filter(|row| row.answers > 0);
        let points = rows.map(|row| ChartPoint {
            x: row.thinking_tokens,
            y: row.accuracy,
            error: row.accuracy_interval.map(|i| (i.low, i.high)),
            label: row.label.clone(),
        });
        let is_curve = !matches!(sweep.kind, SweepKind::String | SweepKind::Technique | SweepKind::Class);
        Series { name: sweep.name.clone(), is_curve, points: points.collect() }
    };
    let chart = |title: String, series| Chart {
        title,
        x: "average thinking tokens".into(),
        y: "accuracy, %".into(),
        log_x: true,
        y_range: 0.0..100.0,
        series,
    };
    for (i, sweep) in results.sweeps.iter().enumerate() {
        save_chart(&chart(sweep.name.clone(), vec![series(sweep)]), &folder.path(&plot_name(i, sweep)))?;
    }
    let all = results.sweeps.iter().map(series).collect();
    save_chart(&chart(format!("{} on {}", results.model, results.task), all), &folder.path("scaling"))
}

/// Without an extension.
fn plot_name(index: usize, sweep: &SweepResult) -> String {
    let kind = clap::ValueEnum::to_possible_value(&sweep.kind).expect("every kind has a name");
    format!("{}-{}", index + 1, kind.get_name())
}

fn markdown(report: &Report<Results>) -> String {
    let r = &report.results;
    let number = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.1}"));
    let range =
        |interval: Option<Interval>| interval.map_or(String::new(), |i| format!(" [{:.1}, {:.1}]", i.low, i.high));
    let mut text = format!(
        "# Test-time scaling of {} on {}\n\n{} problems, seed {}. Device: {}. Commit: {}. {}.\n\n![all sweeps](scaling.png)\n\n\
         ## Metrics\n\n\
         As in s1 (arXiv 2501.19393). Control: conditions whose average of thinking tokens is within their limit. Scaling: average \
         slope over pairs of conditions, in points of accuracy per doubling of the thinking tokens (the convention that gives the \
         paper's own values), beside it per 1000 tokens. Performance: the best accuracy. In brackets: 95 % bootstrap intervals \
         over the problems, {BOOTSTRAP_ROUNDS} rounds.\n\n\
         | sweep | conditions | Control, % | Scaling, per doubling | Scaling, per 1000 | Performance, % |\n|---|---|---|---|---|---|\n",
        r.model, r.task, r.problems, r.seed, report.device, report.commit, report.date
    );
    for s in &r.sweeps {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {}{} | {}{} | {}{} |",
            s.name,
            s.rows.len(),
            number(s.control),
            number(s.scaling),
            range(s.scaling_interval),
            number(s.scaling_linear),
            range(s.scaling_linear_interval),
            number(s.performance),
            range(s.performance_interval)
        );
    }
    for (i, s) in r.sweeps.iter().enumerate() {
        let _ = write!(
            text,
            "\n## {}\n\n![{}]({}.png)\n\n{}\n\n\
             | | accuracy, % | thinking tokens | limit | answers within it, % | ended by the maximum, % | by a technique, % | ends ignored | draws | answers |\n\
             |---|---|---|---|---|---|---|---|---|---|\n",
            s.name,
            s.name,
            plot_name(i, s),
            in_words(s)
        );
        for row in &s.rows {
            let _ = writeln!(
                text,
                "| {} | {:.1}{} | {:.1} | {} | {} | {:.1} | {:.1} | {:.2} | {:.2} | {} of {} |",
                row.label,
                row.accuracy,
                range(row.accuracy_interval),
                row.thinking_tokens,
                number(row.limit),
                number(row.answers_controlled),
                row.max_hit,
                row.stopped,
                row.ignores_used,
                row.draws,
                row.answers,
                row.problems
            );
        }
    }
    text + "\nThinking tokens are those that the sampler counted; injected ones included; a maximum that falls inside a character waits up to \
            four tokens for its end. Rejection sampling draws from one pool for all \
            maxima: of each problem counts the first draw within the maximum, and problems without one are left out. Majority vote \
            counts the tokens of all its draws.\n"
}

/// What the rows of a sweep say.
fn in_words(s: &SweepResult) -> String {
    let (Some(first), Some(last)) = (s.rows.first(), s.rows.last()) else { return String::new() };
    let ordered = !matches!(s.kind, SweepKind::String | SweepKind::Technique | SweepKind::Class);
    let rises = s.rows.windows(2).filter(|pair| pair[1].accuracy > pair[0].accuracy).count();
    let mut text = match ordered {
        true => format!(
            "From {} to {} accuracy goes from {:.1} % to {:.1} %; it rises in {rises} of {} steps.",
            first.label,
            last.label,
            first.accuracy,
            last.accuracy,
            s.rows.len() - 1
        ),
        false => {
            let best = s.rows.iter().max_by(|a, b| a.accuracy.total_cmp(&b.accuracy)).expect("there are rows");
            format!("The best is {}, {:.1} %.", best.label, best.accuracy)
        }
    };
    if let Some(control) = s.control {
        let _ = write!(text, " Control is {control:.0} %.");
    }
    text
}
