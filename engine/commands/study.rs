//! `ponder study`: experiments on thinking budgets and inference techniques, each a folder with results.json, report.md and plots.

use super::output::Printer;
use crate::args::{AblationArgs, CurateArgs, LoadFormat, ScalingArgs, StudyArgs, StudyCommand};
use crate::budget::BudgetRequest;
use crate::chat::Message;
use crate::checkpoint::Checkpoint;
use crate::device::Device;
use crate::executor::ExecutorOptions;
use crate::frontend::{Frontend, Request};
use crate::sampling::SamplingRequest;
use crate::sequence::Channel;
use crate::study::ablation;
use crate::study::ask::ask;
use crate::study::curate::{self, Pool, Verdict};
use crate::study::folder::Folder;
use crate::study::scaling::{self, Options, Subject};
use crate::study::tasks::TaskSource;
use crate::thinking::ThinkingChoice;
use crate::{Error, Result, hub};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;

pub fn run(args: &StudyArgs) -> Result<()> {
    match &args.command {
        StudyCommand::Scaling(args) => run_scaling(args),
        StudyCommand::Ablation(args) => run_ablation(args),
        StudyCommand::Curate(args) => run_curate(args),
    }
}

fn parse_task(text: &str) -> Result<TaskSource> {
    text.parse().map_err(|problem| Error::Usage(format!("task {text}: {problem}")))
}

fn progress(what: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    let style = format!("{{bar:40}} {{pos}} of {{len}} {what}, {{eta}} left");
    bar.set_style(ProgressStyle::with_template(&style).expect("a valid template"));
    bar
}

fn done(out: &Path) -> Result<()> {
    Printer::new().write(&format!("{}\n", out.join("report.md").display()))
}

fn run_scaling(args: &ScalingArgs) -> Result<()> {
    let task = parse_task(&args.task)?;
    let problems = task.load(args.seed)?;
    let (frontend, checkpoint, device) = super::open(&args.model)?;
    if frontend.delimiters.is_none() {
        let problem =
            "this model has no thinking delimiters, so there is no budget to sweep: say --thinking s1 or think-tags";
        return Err(Error::Usage(problem.into()));
    }
    let folder = Folder::create(&args.out)?;
    let mut options = super::options(&args.model);
    // What an interrupted study asks again would otherwise depend on what ran beside it.
    options.deterministic = true;
    let mut engine = super::load(frontend, checkpoint.as_ref(), &device, &options)?;
    let subject = Subject { model: hub::model_name(&args.model.source.path), task: task.name() };
    let study = Options {
        sweeps: args.sweeps.clone(),
        maxima: args.max_thinking_tokens.clone(),
        ignored_at_maximum: args.ignored_at_maximum,
        ignores: args.n_ignore.clone(),
        strings: args.ignore_strings.clone(),
        ignored_by_string: args.ignored_by_string,
        techniques: args.techniques.clone(),
        samples: args.samples,
        temperature: args.temperature,
        max_tokens: args.max_tokens,
        seed: args.seed,
    };
    let bar = progress("answers");
    scaling::run(&mut engine, &device, &subject, &problems, &study, &folder, &bar)?;
    bar.finish_and_clear();
    done(&args.out)
}

fn run_curate(args: &CurateArgs) -> Result<()> {
    let against = args.against.iter().map(|task| parse_task(task)).collect::<Result<Vec<_>>>()?;
    let benchmarks: Vec<_> = against.iter().map(|task| task.load(args.seed)).collect::<Result<Vec<_>>>()?.concat();
    let mut pool = Pool::new(curate::read_pool(&args.pool)?, &benchmarks);
    let device = Device::open(args.device.parse()?)?;
    let folder = Folder::create(&args.out)?;
    let subject = curate::Subject {
        pool: args.pool.display().to_string(),
        models: args.model.iter().map(|path| hub::model_name(path)).collect(),
        benchmarks: against.iter().map(TaskSource::name).collect(),
    };
    let limits = json!({
        "device": device.describe(),
        "max_thinking_tokens": args.max_thinking_tokens,
        "max_tokens": args.max_tokens,
    });
    let (mut journal, verdicts) = curate::journal(&folder, &pool, &subject, limits)?;
    let mut known: HashMap<(String, usize), bool> =
        verdicts.into_iter().map(|v| ((v.model, v.item), v.right)).collect();
    let bar = progress("answers");
    bar.set_length((pool.problems().count() * args.model.len()) as u64);
    for (path, model) in args.model.iter().zip(&subject.models) {
        let missing: Vec<_> = pool.problems().filter(|(i, _)| !known.contains_key(&(model.clone(), *i))).collect();
        bar.inc((pool.problems().count() - missing.len()) as u64);
        if missing.is_empty() {
            continue;
        }
        let frontend = Frontend::open(path, &ThinkingChoice::Auto)?;
        let checkpoint = Checkpoint::open(path)?;
        let options = ExecutorOptions { deterministic: true, ..ExecutorOptions::default() };
        let mut engine = super::load(frontend, Some(&checkpoint), &device, &options)?;
        let requests: Vec<_> = missing
            .into_iter()
            .map(|(i, problem)| {
                let request = Request {
                    prompt: engine.frontend.encode_chat(&[Message::new("user", problem.question.clone())])?,
                    max_tokens: args.max_tokens,
                    sampling: SamplingRequest { temperature: Some(0.0), ..Default::default() },
                    budget: BudgetRequest { max_thinking_tokens: args.max_thinking_tokens, ..Default::default() },
                    ..Default::default()
                };
                Ok(((i, problem), request))
            })
            .collect();
        ask(&mut engine, requests, |(item, problem), answer| {
            let right = problem.grader.is_right(&problem.answer, &answer.channel(Channel::Answer));
            journal.append(&Verdict { model: model.clone(), item, right })?;
            known.insert((model.clone(), item), right);
            bar.inc(1);
            Ok(())
        })?;
    }
    bar.finish_and_clear();
    pool.solved(
        known.into_iter().filter(|((model, _), _)| subject.models.contains(model)).map(|((_, i), right)| (i, right)),
    );
    let (selected, results) = pool.select(args.select, args.seed, subject);
    curate::write(&folder, &device, &selected, results)?;
    done(&args.out)
}

fn run_ablation(args: &AblationArgs) -> Result<()> {
    let checkpoint = match args.load_format {
        LoadFormat::Safetensors => Some(Checkpoint::open(&args.path)?),
        LoadFormat::Dummy => None,
    };
    let device = Device::open(args.device.parse()?)?;
    let folder = Folder::create(&args.out)?;
    let work = ablation::Work {
        requests: args.requests,
        input_tokens: args.input_tokens,
        shared_tokens: args.shared_tokens,
        output_tokens: args.output_tokens,
        seed: args.seed,
    };
    let name = hub::model_name(&args.path);
    let subject =
        ablation::Subject { name, folder: &args.path, checkpoint: checkpoint.as_ref(), device: &device, work };
    let bar = progress("variants");
    ablation::run(&subject, &folder, &bar)?;
    bar.finish_and_clear();
    done(&args.out)
}
