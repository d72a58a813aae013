//! Graders: whether an answer is right, by the rules of s1's evaluation. What counts is the text of the last `\boxed{}`, else what
//! follows the last "Answer:", else all of the answer. Where s1 asks a language model whether two texts mean the same, here they
//! must be the same after normalisation.

use regex::Regex;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grader {
    /// The same text, but for the space around it.
    Exact,
    /// The same integer: AIME. Of several in the text that counts, the last.
    Integer,
    /// The same LaTeX expression after normalisation: MATH.
    Boxed,
    /// The same letter: GPQA.
    Choice,
    /// A regular expression that the whole answer is searched for.
    Regex,
}

impl Grader {
    /// What is wrong with an answer to compare with, in words.
    pub fn check(self, truth: &str) -> Result<(), String> {
        match self {
            Grader::Regex => Regex::new(truth).map(drop).map_err(|e| format!("not a regular expression: {e}")),
            _ if self.canonical(truth).is_some() => Ok(()),
            _ => Err(format!("{truth:?} is no answer that grader {self:?} could find")),
        }
    }

    /// `truth`: checked.
    pub fn is_right(self, truth: &str, answer: &str) -> bool {
        match self {
            Grader::Regex => Regex::new(truth).is_ok_and(|pattern| pattern.is_match(answer)),
            _ => self.vote(answer).is_some_and(|vote| self.canonical(truth) == Some(vote)),
        }
    }

    /// What an answer says, the same text for the same meaning: two answers with the same vote are both right or both wrong.
    /// None: nothing is said.
    pub fn vote(self, answer: &str) -> Option<String> {
        match self {
            Grader::Regex => Some(answer.trim().into()),
            _ => self.canonical(final_text(answer)),
        }
    }

    fn canonical(self, text: &str) -> Option<String> {
        let canonical = match self {
            Grader::Exact | Grader::Regex => text.trim().into(),
            Grader::Integer => last_integer(text)?,
            Grader::Boxed => normalize_latex(text),
            Grader::Choice => choice(text)?.to_string(),
        };
        (!canonical.is_empty()).then_some(canonical)
    }
}

/// The part of an answer that counts.
pub fn final_text(answer: &str) -> &str {
    if let Some(boxed) = last_boxed(answer) {
        return boxed.trim();
    }
    let pattern = Regex::new(r"(?i)answer\s*:").expect("a valid pattern");
    pattern.find_iter(answer).last().map_or(answer, |found| &answer[found.end()..]).trim()
}

/// What stands in the last `\boxed{...}`, braces balanced. None: there is none, or it is not closed.
fn last_boxed(text: &str) -> Option<&str> {
    let start = text.rfind("\\boxed{").or_else(|| text.rfind("\\fbox{"))?;
    let inside = start + text[start..].find('{')? + 1;
    let mut depth = 1;
    for (i, c) in text[inside..].char_indices() {
        depth += match c {
            '{' => 1,
            '}' => -1,
            _ => 0,
        };
        if depth == 0 {
            return Some(&text[inside..inside + i]);
        }
    }
    None
}

/// Without separators, leading zeros and plus.
fn last_integer(text: &str) -> Option<String> {
    let text = text.replace("\\!", "").replace("{,}", ",");
    let pattern = Regex::new(r"-?\d+(?:,\d{3})*(?:\.\d+)?").expect("a valid pattern");
    let found = pattern.find_iter(&text).last()?.as_str().replace(',', "");
    let (whole, fraction) = found.split_once('.').unwrap_or((&found, ""));
    if fraction.contains(|c| c != '0') {
        return None;
    }
    let (sign, digits) = whole.strip_prefix('-').map_or(("", whole), |digits| ("-", digits));
    match digits.trim_start_matches('0') {
        "" => Some("0".into()),
        digits => Some(format!("{sign}{digits}")),
    }
}

/// The letter of "C", "(C)", "\text{C}", "C) because", "The answer is C."; the last one that stands alone. Small ones only where
/// there is nothing else, since "a" is also a word.
fn choice(text: &str) -> Option<char> {
    let alone = Regex::new(r"\b[A-J]\b").expect("a valid pattern");
    let trimmed = text.trim_matches(|c: char| !c.is_alphanumeric());
    match trimmed.len() {
        1 => trimmed.to_uppercase().chars().next().filter(|c| ('A'..='J').contains(c)),
        _ => {
            // A letter that opens the text names the choice, and what follows explains it.
            let opens = Regex::new(r"^\W*(?:\\text(?:bf)?\{)?\W*([A-J])(?:\W*$|\s*[).:},]|\W+because\b)")
                .expect("a valid pattern");
            let found = opens.captures(text).map(|c| c[1].to_string());
            found.or_else(|| alone.find_iter(text).last().map(|m| m.as_str().into()))?.chars().next()
        }
    }
}

/// The same text for what the MATH benchmark takes for the same expression: no spaces, no sizes of brackets, no units, fractions and
/// roots with braces.
fn normalize_latex(text: &str) -> String {
    let mut s = text.trim().trim_matches('$').trim_end_matches('.').to_string();
    let cut = [
        "\\left",
        "\\right",
        "\\!",
        "\\,",
        "\\;",
        "\\:",
        "\\ ",
        "~",
        "^{\\circ}",
        "^\\circ",
        "\\$",
        "\\%",
        "%",
        "$",
        "\\displaystyle",
    ];
    for what in cut {
        s = s.replace(what, "");
    }
    s.retain(|c| !c.is_whitespace());
    s = s.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac").replace("\\cfrac", "\\frac");
    let replace = |pattern: &str, with: &str, s: &str| {
        Regex::new(pattern).expect("a valid pattern").replace_all(s, with).into_owned()
    };
    // A unit after a number goes; text that is all there is stays.
    s = replace(r"(\d)\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?$", "$1", &s);
    s = replace(r"\\(?:text|textbf|mbox|mathrm|mathbf)\{([^{}]*)\}", "$1", &s);
    s = replace(r"\\frac(\d)(\d)", "\\frac{$1}{$2}", &s);
    s = replace(r"\\frac(\d)\{", "\\frac{$1}{", &s);
    s = replace(r"\\sqrt(\w)", "\\sqrt{$1}", &s);
    s = replace(r"(\d),(\d{3})\b", "$1$2", &s);
    s = replace(r"^(-?)(\d+)/(\d+)$", "$1\\frac{$2}{$3}", &s);
    // "x = 5" says 5.
    if let Some((name, value)) = s.split_once('=')
        && name.len() <= 2
        && !value.contains('=')
    {
        s = value.into();
    }
    s = replace(r"(^|[^\d.])\.(\d)", "${1}0.$2", &s);
    replace(r"^(-?\d+)\.0+$", "$1", &s)
}
