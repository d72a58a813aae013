//! Where a model lies that is given by its name on the Hugging Face hub, `organisation/model`: in the local cache that
//! Hugging Face's own tools fill (huggingface.co/docs/huggingface_hub, "Understand caching"). Fetches nothing.

use std::path::{Path, PathBuf};

/// A folder as it is given, or that of the model of this name in the cache.
///
/// # Errors
/// A name that is no folder and not in the cache; in words.
pub fn resolve(model: &str) -> Result<PathBuf, String> {
    let folder = PathBuf::from(model);
    if folder.is_dir() || !is_name(model) {
        return Ok(folder);
    }
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("HF_HUB_CACHE")
        .or_else(|| set("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/huggingface/hub")));
    match cache {
        Some(cache) => find(&cache, model),
        None => Err("no such folder, and no Hugging Face cache to look in: set HF_HOME".into()),
    }
}

/// The model's main revision in a cache folder.
///
/// # Errors
/// It is not there; in words.
pub fn find(cache: &Path, name: &str) -> Result<PathBuf, String> {
    let model = cache.join(format!("models--{}", name.replace('/', "--")));
    let main = model.join("refs/main");
    let Ok(commit) = std::fs::read_to_string(&main) else {
        return Err(format!(
            "no such folder, and no model of this name in the Hugging Face cache ({} is missing): fetch it first, with \
             `hf download {name}`, or set HF_HOME",
            main.display()
        ));
    };
    let commit = commit.trim();
    let folder = model.join("snapshots").join(commit);
    match !commit.is_empty() && commit.chars().all(|c| c.is_ascii_hexdigit()) && folder.is_dir() {
        true => Ok(folder),
        false => Err(format!(
            "{} names {commit:?}, which is no folder of {}",
            main.display(),
            model.join("snapshots").display()
        )),
    }
}

/// As the hub allows: one slash, letters, digits, dashes, dots and underscores.
fn is_name(model: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
    };
    model.split_once('/').is_some_and(|(organisation, name)| part(organisation) && part(name))
}
