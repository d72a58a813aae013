//! Models that are given by their name on the Hugging Face hub, `organisation/model`. They are looked up in the local cache
//! that Hugging Face's own tools fill (huggingface.co/docs/huggingface_hub, "Understand caching"); asked to, `download` fills
//! it, too. Nothing else here, and nothing in the rest of the program, asks the network for anything.

use std::path::{Path, PathBuf};

/// A folder as it is given, or that of the model of this name in the cache, fetched before if `download` says so. `progress`
/// is called with bytes fetched and bytes in all.
///
/// # Errors
/// In words: a name that is neither folder nor in the cache; a download that fails.
pub fn resolve(
    model: &Path,
    download: bool,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<PathBuf, String> {
    let Some(name) = model.to_str().filter(|name| !model.is_dir() && is_name(name)) else {
        return Ok(model.into());
    };
    let cache = cache().ok_or("no such folder, and no Hugging Face cache to look in: set HF_HOME")?;
    match download {
        true => fetch(&cache, name, progress),
        false => find(&cache, name),
    }
}

fn cache() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HF_HUB_CACHE")
        .or_else(|| set("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/huggingface/hub")))
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
            "no such folder, and no model of this name in the Hugging Face cache ({} is missing): fetch it with \
             --download, or set HF_HOME",
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

/// What to call the model in this folder: its name on the hub if it lies in the hub's cache, else the folder's own.
pub fn model_name(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.into());
    let last = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let snapshots = folder.parent().filter(|parent| parent.ends_with("snapshots"));
    let cached = snapshots.and_then(Path::parent).and_then(last);
    match cached.as_deref().and_then(|cached| cached.strip_prefix("models--")) {
        Some(cached) => cached.replacen("--", "/", 1),
        None => last(&folder).unwrap_or_else(|| "ponder".into()),
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

#[cfg(not(feature = "hub"))]
fn fetch(_: &Path, _: &str, _: impl Fn(u64, u64)) -> Result<PathBuf, String> {
    Err("this ponder was built without feature hub, and cannot download: fetch the model with `hf download`".into())
}

#[cfg(feature = "hub")]
use download::fetch;

#[cfg(feature = "hub")]
mod download {
    use crate::checkpoint::parse_index;
    use crate::config::ModelConfig;
    use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
    use hf_hub::{HFClient, HFClientSync, HFError};
    use std::collections::HashMap;
    use std::error::Error;
    use std::path::{Path, PathBuf};
    use std::sync::Mutex;

    const CONFIG: &str = "config.json";
    const GENERATION_CONFIG: &str = "generation_config.json";
    const INDEX: &str = "model.safetensors.index.json";
    const ONE_SHARD: &str = "model.safetensors";
    /// What is read beside the weights.
    const FILES: [&str; 7] = [
        CONFIG,
        GENERATION_CONFIG,
        INDEX,
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "thinking.json",
    ];

    /// Fetches what the cache lacks of the model's main revision. Only when all of it is there is the revision named in the
    /// cache: one that was interrupted is never taken for a model.
    ///
    /// # Errors
    /// In words: what the hub said; a model that cannot be run, which is found out before its weights are fetched.
    pub fn fetch(
        cache: &Path,
        name: &str,
        progress: impl Fn(u64, u64) + Send + Sync + 'static,
    ) -> Result<PathBuf, String> {
        if let Ok(offline) = std::env::var("HF_HUB_OFFLINE")
            && !matches!(&offline[..], "" | "0")
        {
            return Err(format!("--download asks for what HF_HUB_OFFLINE={offline} forbids: take one of them away"));
        }
        let client = HFClient::builder().cache_dir(cache).user_agent(concat!("ponder/", env!("CARGO_PKG_VERSION")));
        let client = client.build().map_err(|e| format!("HF_ENDPOINT: {}", with_causes(&e)))?;
        let page = format!("{}/{name}", client.endpoint());
        let client = HFClientSync::from_inner(client).map_err(|e| with_causes(&e))?;
        let (organisation, model) = name.split_once('/').expect("organisation/model");
        let repository = client.model(organisation, model);
        let read = |file: &str| match repository.download_file_to_bytes().filename(file).send() {
            Ok(bytes) => Ok(Some(bytes)),
            Err(HFError::EntryNotFound { .. }) => Ok(None),
            Err(e) => Err(refusal(&e, &page)),
        };

        let address = |file: &str| PathBuf::from(format!("{page}/{file}"));
        let config = read(CONFIG)?.ok_or_else(|| format!("{page} has no {CONFIG}: it is no model that can be run"))?;
        ModelConfig::parse(&config, &address(CONFIG), read(GENERATION_CONFIG)?.as_deref(), &address(GENERATION_CONFIG))
            .map_err(|e| format!("not fetched, since it cannot be run: {e}"))?;
        let mut wanted: Vec<String> = match read(INDEX)? {
            Some(index) => parse_index(&index).map_err(|e| format!("{page}/{INDEX}: {e}"))?.into_values().collect(),
            None => vec![ONE_SHARD.into()],
        };
        wanted.sort();
        wanted.dedup();
        let shards = wanted.clone();
        wanted.extend(FILES.map(String::from));

        let snapshot = repository.snapshot_download().allow_patterns(wanted).progress(Bytes::new(progress));
        let folder = snapshot.send().map_err(|e| refusal(&e, &page))?;
        match shards.iter().find(|&shard| !folder.join(shard).is_file()) {
            Some(shard) => Err(format!("{page} has no {shard}: weights must be safetensors")),
            None => Ok(folder),
        }
    }

    /// What the hub's answer means to whoever asked.
    fn refusal(error: &HFError, page: &str) -> String {
        let said = with_causes(error);
        match error {
            // The hub does not tell strangers which of the two it is.
            HFError::AuthRequired { .. } | HFError::Forbidden { .. } | HFError::RepoNotFound { .. } => format!(
                "{page} is not to be had ({said}): check the name; if it is right, accept its terms on that page, and set \
                 HF_TOKEN to a token that may read it"
            ),
            HFError::RateLimited { .. } => format!("{page}: {said}: wait, or set HF_TOKEN"),
            HFError::Io(_) => format!("{said}: what has been fetched of it is kept; HF_HOME says where"),
            _ => format!(
                "cannot fetch {page}: {said}. Files that had come are kept; without --download a model in the cache is used \
                 as it is"
            ),
        }
    }

    fn with_causes(error: &dyn Error) -> String {
        let mut said = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !said.contains(&text) {
                said += &format!(": {text}");
            }
            cause = error.source();
        }
        said
    }

    /// The hub tells of each file, or of several at once; `report` is told of all: bytes that have come, bytes in all.
    struct Bytes<F> {
        report: F,
        counted: Mutex<Counted>,
    }

    #[derive(Default)]
    struct Counted {
        files: HashMap<String, u64>,
        at_once: u64,
        total: u64,
    }

    impl<F> Bytes<F> {
        fn new(report: F) -> Self {
            Bytes { report, counted: Mutex::default() }
        }
    }

    impl<F: Fn(u64, u64) + Send + Sync> ProgressHandler for Bytes<F> {
        fn on_progress(&self, event: &ProgressEvent) {
            let ProgressEvent::Download(event) = event else { return };
            let mut counted = self.counted.lock().expect("no other thread panicked");
            match event {
                DownloadEvent::Start { total_bytes, .. } => counted.total = counted.total.max(*total_bytes),
                DownloadEvent::Progress { files } => {
                    counted.files.extend(files.iter().map(|file| (file.filename.clone(), file.bytes_completed)));
                }
                DownloadEvent::AggregateProgress { bytes_completed, .. } => counted.at_once = *bytes_completed,
                DownloadEvent::Complete => {}
            }
            // Files that came at once are told of one by one when they are complete.
            let done = counted.files.values().sum::<u64>().max(counted.at_once);
            (self.report)(done.min(counted.total), counted.total);
        }
    }
}
