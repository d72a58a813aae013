//! The folder of a study: results.json, report.md, plots, and a journal: one JSON object a line, the settings first, appended as
//! things become known, so that a study that was interrupted goes on where it ended.

use crate::bench::Report;
use crate::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

pub struct Folder(PathBuf);

impl Folder {
    /// # Errors
    /// A folder that cannot be made.
    pub fn create(path: &Path) -> Result<Folder> {
        std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))?;
        Ok(Folder(path.into()))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        std::fs::write(self.path(name), text).map_err(Error::Output)
    }

    /// # Errors
    /// As [`Folder::write`].
    pub fn write_results<T: Serialize>(&self, report: &Report<T>) -> Result<()> {
        let text = serde_json::to_string_pretty(report).expect("numbers and strings alone");
        self.write("results.json", &(text + "\n"))
    }
}

/// A file of entries that only grows.
pub struct Journal {
    file: File,
    /// Written before the first entry: a study that fails before it knows anything leaves its folder to one with other settings.
    settings: Option<Value>,
}

impl Journal {
    /// Opens or begins it; what is in it already. A last line that was cut short is removed.
    ///
    /// # Errors
    /// A file that cannot be read, belongs to a study with other settings, or is no journal.
    pub fn open<Entry: DeserializeOwned>(path: &Path, settings: &Value) -> Result<(Journal, Vec<Entry>)> {
        let io = |e| Error::io(path, e);
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        // Bytes: a line may have been cut inside a character.
        let (mut reader, mut line) = (BufReader::new(&file), Vec::new());
        let (mut bytes, mut number, mut entries) = (0, 0, Vec::new());
        while reader.read_until(b'\n', &mut line).map_err(io)? > 0 && line.ends_with(b"\n") {
            number += 1;
            let bad = |problem: String| {
                Error::Usage(format!("{} line {number}: {problem}: name another folder", path.display()))
            };
            if number == 1 {
                let found: Value = serde_json::from_slice(&line).map_err(|e| bad(e.to_string()))?;
                if &found != settings {
                    return Err(bad(format!("it is of another study, {found}, and this one is {settings}")));
                }
            } else {
                entries.push(serde_json::from_slice(&line).map_err(|e| bad(e.to_string()))?);
            }
            bytes += line.len() as u64;
            line.clear();
        }
        file.set_len(bytes).map_err(Error::Output)?;
        file.seek(SeekFrom::End(0)).map_err(Error::Output)?;
        let settings = (number == 0).then(|| settings.clone());
        Ok((Journal { file, settings }, entries))
    }

    /// # Errors
    /// A file that cannot be written.
    pub fn append<Entry: Serialize>(&mut self, entry: &Entry) -> Result<()> {
        let line = serde_json::to_string(entry).expect("plain data") + "\n";
        let head = self.settings.take().map(|settings| settings.to_string() + "\n").unwrap_or_default();
        self.file.write_all((head + &line).as_bytes()).map_err(Error::Output)
    }
}
