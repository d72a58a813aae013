//! Tasks: questions with the answers to compare with. Files of one JSON object a line; a generator of problems for the tiny model;
//! AIME, MATH-500 and GPQA as they are published, which the user brings.

use super::grade::Grader;
use super::random::Random;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Problem {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    pub question: String,
    pub answer: String,
    pub grader: Grader,
}

/// What stands for TASK on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskSource {
    /// `FILE`: one {question, answer, grader} a line.
    File(PathBuf),
    /// `modulo:N`.
    Modulo(usize),
    /// `aime:FILE`: JSON lines with problem and answer, however they are capitalised.
    Aime(PathBuf),
    /// `math500:FILE`: JSON lines with problem and answer.
    Math500(PathBuf),
    /// `gpqa:FILE`: the CSV with Question, Correct Answer and three Incorrect Answers, which are shuffled by the seed.
    Gpqa(PathBuf),
}

impl std::str::FromStr for TaskSource {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<TaskSource, String> {
        let file = |path: &str| match path {
            "" => Err("name a file".into()),
            path => Ok(PathBuf::from(path)),
        };
        match text.split_once(':') {
            Some(("modulo", n)) => match n.parse() {
                Ok(n @ 1..=1_000_000) => Ok(TaskSource::Modulo(n)),
                _ => Err("write modulo:N, like modulo:200".into()),
            },
            Some(("aime", path)) => file(path).map(TaskSource::Aime),
            Some(("math500", path)) => file(path).map(TaskSource::Math500),
            Some(("gpqa", path)) => file(path).map(TaskSource::Gpqa),
            _ => file(text).map(TaskSource::File),
        }
    }
}

impl TaskSource {
    /// # Errors
    /// A file that cannot be read, or a line of it that is not a problem.
    pub fn load(&self, seed: u64) -> Result<Vec<Problem>> {
        let problems = match self {
            TaskSource::File(path) => {
                lines(path, |line| serde_json::from_str::<Problem>(line).map_err(|e| e.to_string()))?
            }
            TaskSource::Modulo(n) => modulo(*n, seed),
            TaskSource::Aime(path) => lines(path, |line| published(line, Grader::Integer))?,
            TaskSource::Math500(path) => lines(path, |line| published(line, Grader::Boxed))?,
            TaskSource::Gpqa(path) => gpqa(path, seed)?,
        };
        for (i, problem) in problems.iter().enumerate() {
            let name = problem.id.clone().unwrap_or_else(|| (i + 1).to_string());
            problem.grader.check(&problem.answer).map_err(|p| Error::Usage(format!("problem {name}: answer: {p}")))?;
        }
        match problems.is_empty() {
            true => Err(Error::Usage("the task has no problems".into())),
            false => Ok(problems),
        }
    }

    pub fn name(&self) -> String {
        match self {
            TaskSource::File(path) => path.display().to_string(),
            TaskSource::Modulo(n) => format!("modulo:{n}"),
            TaskSource::Aime(path) => format!("aime:{}", path.display()),
            TaskSource::Math500(path) => format!("math500:{}", path.display()),
            TaskSource::Gpqa(path) => format!("gpqa:{}", path.display()),
        }
    }
}

/// Each line of a file that is not empty, as `read` makes something of it.
pub fn lines<T>(path: &Path, read: impl Fn(&str) -> std::result::Result<T, String>) -> Result<Vec<T>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    numbered
        .map(|(i, line)| {
            read(line).map_err(|problem| Error::Usage(format!("{} line {}: {problem}", path.display(), i + 1)))
        })
        .collect()
}

/// Published sets differ in how they write the names of their fields.
fn published(line: &str, grader: Grader) -> std::result::Result<Problem, String> {
    let value: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let fields = value.as_object().ok_or("not an object")?;
    let find = |names: &[&str]| {
        let found = names.iter().find_map(|n| fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(n)));
        found.and_then(|(_, value)| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        })
    };
    Ok(Problem {
        id: find(&["unique_id", "id"]),
        question: find(&["problem", "question"]).ok_or("no field problem")?,
        answer: find(&["answer"]).ok_or("no field answer")?,
        grader,
    })
}

/// The columns of GPQA that matter.
#[derive(Deserialize)]
struct GpqaRow {
    #[serde(rename = "Record ID")]
    id: Option<String>,
    #[serde(rename = "Question")]
    question: String,
    #[serde(rename = "Correct Answer")]
    correct: String,
    #[serde(rename = "Incorrect Answer 1")]
    incorrect_1: String,
    #[serde(rename = "Incorrect Answer 2")]
    incorrect_2: String,
    #[serde(rename = "Incorrect Answer 3")]
    incorrect_3: String,
}

fn gpqa(path: &Path, seed: u64) -> Result<Vec<Problem>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let mut random = Random::of(seed, "order of choices");
    let rows = csv::Reader::from_reader(bytes.as_slice()).into_deserialize::<GpqaRow>();
    rows.map(|row| {
        let row = row.map_err(|e| Error::Usage(format!("{}: {e}", path.display())))?;
        let mut choices = [&row.correct, &row.incorrect_1, &row.incorrect_2, &row.incorrect_3].map(|c| c.trim());
        let mut order = [0, 1, 2, 3];
        random.shuffle(&mut order);
        choices = order.map(|i| choices[i]);
        let right = order.iter().position(|&i| i == 0).expect("one of them is right");
        let listed: String = ('A'..).zip(choices).map(|(letter, choice)| format!("\n({letter}) {choice}")).collect();
        Ok(Problem {
            id: row.id,
            question: format!("{}\n{listed}", row.question.trim()),
            answer: char::from(b'A' + right as u8).into(),
            grader: Grader::Choice,
        })
    })
    .collect()
}

/// Problems as models/modulo was trained on, from the same distribution.
fn modulo(n: usize, seed: u64) -> Vec<Problem> {
    let mut random = Random::of(seed, "modulo");
    let one = |_| {
        let m = [11, 13, 17, 19, 23][random.below(5)];
        let a = 2 + random.below(usize::min(12, m - 1) - 1);
        let (b, x) = (random.below(m), random.below(m));
        let c = (a * x + b) % m;
        Problem {
            id: None,
            question: format!("Find x with {a}x + {b} = {c} (mod {m})."),
            answer: x.to_string(),
            grader: Grader::Integer,
        }
    };
    (0..n).map(one).collect()
}
