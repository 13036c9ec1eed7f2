//! `--model owner/name[@revision]`: a checkpoint of the Hugging Face hub, through the cache that all of its tools share.
//!
//! A directory of that name wins. What the revision stands for is asked first and is a commit from then on, so that
//! files of two commits never meet in one directory. Only what a checkpoint needs is fetched, and nothing that the
//! cache has; weights come last: where they are whole, so is the rest.

mod cached;
mod fetch;

use self::fetch::Hub;
use std::fmt;
use std::path::{Path, PathBuf};

/// How much of a checkpoint is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// All that running it takes.
    Weights,
    /// What describes it: of a sharded checkpoint the index, without the shards.
    Description,
}

/// Why there is no directory.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither a directory nor an id.
    #[error(
        "{0}: no such directory (--model takes the directory of a checkpoint, with config.json in it, or a Hugging Face id, owner/name)"
    )]
    NotADirectory(String),
    /// Nothing says where the cache is.
    #[error("{0}: there is no home directory to keep a cache in: set HF_HOME")]
    NoHome(ModelId),
    /// Without the network, and the cache lacks it.
    #[error("{id}: {file} is not in the cache {} and was not to be fetched: leave --offline (HF_HUB_OFFLINE) out, or give --model DIR", cache.display())]
    NotCached {
        /// The model.
        id: ModelId,
        /// The first file that is lacking.
        file: String,
        /// Where it was looked for.
        cache: PathBuf,
    },
    /// No connection, or one that fails again and again.
    #[error(
        "{id}: {file} could not be fetched from {endpoint} ({cause}): --model DIR takes a directory, --offline what is in the cache"
    )]
    Unreachable {
        /// The model.
        id: ModelId,
        /// The file.
        file: String,
        /// The hub.
        endpoint: String,
        /// What went wrong.
        cause: String,
    },
    /// The hub does not know the model, or does not show it.
    #[error(
        "{id}: no such directory, and no such model at {endpoint} (status {status}): mind the spelling; if it is private or gated, set HF_TOKEN to a token that may read it"
    )]
    NoModel {
        /// The model.
        id: ModelId,
        /// The hub.
        endpoint: String,
        /// The HTTP status.
        status: u16,
    },
    /// The model is there, the revision is not.
    #[error("{id}: {endpoint} knows the model, but no revision `{}` (a branch, a tag or a commit)", id.revision())]
    NoRevision {
        /// The model.
        id: ModelId,
        /// The hub.
        endpoint: String,
    },
    /// Gated, private, or a wrong token.
    #[error("{id}: {endpoint} refuses {file} (status {status}): accept the model's terms at {endpoint}/{}, and set HF_TOKEN to a token that may read it", id.repo)]
    Refused {
        /// The model.
        id: ModelId,
        /// The file.
        file: String,
        /// The hub.
        endpoint: String,
        /// The HTTP status.
        status: u16,
    },
    /// The model lacks a file of a checkpoint.
    #[error(
        "{id}: there is no {file} at {endpoint}: a checkpoint in Hugging Face form has config.json, and weights in safetensors"
    )]
    NoFile {
        /// The model.
        id: ModelId,
        /// The file, or the choice of files.
        file: String,
        /// The hub.
        endpoint: String,
    },
    /// The index can't be used.
    #[error("{}: {problem}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The cache can't be read or written.
    #[error("{}: {error}", path.display())]
    Cache {
        /// File or folder.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
}

/// A model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelId {
    /// `owner/name`.
    repo: String,
    revision: Option<String>,
}

impl ModelId {
    /// Reads `owner/name` or `owner/name@revision`; `None` if the text is neither.
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = match text.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (text, None),
        };
        let plain = |part: &str, others: &str| {
            !part.is_empty()
                && !part.starts_with(['.', '-'])
                && !part.ends_with(['.', '-'])
                && !part.contains("..")
                && part.chars().all(|c| c.is_ascii_alphanumeric() || others.contains(c))
        };
        let (owner, name) = repo.split_once('/')?;
        let sound = plain(owner, "-_.") && plain(name, "-_.") && repo.len() <= 96;
        // A branch may have slashes: refs/pr/1.
        let sound = sound && revision.is_none_or(|revision| revision.split('/').all(|part| plain(part, "-_.+")));
        sound.then(|| Self { repo: repo.into(), revision: revision.map(String::from) })
    }

    /// Branch, tag or commit; `main` if none was given.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// Whether the revision can't move.
    fn is_commit(&self) -> bool {
        self.revision().len() == 40 && self.revision().chars().all(|c| c.is_ascii_hexdigit())
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let at = self.revision.iter().map(|revision| format!("@{revision}"));
        write!(f, "{}{}", self.repo, at.collect::<String>())
    }
}

/// What Hugging Face's environment variables say, with its own defaults.
#[derive(Clone, PartialEq)]
struct Settings {
    /// `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else of `~/.cache/huggingface`.
    cache: PathBuf,
    /// `HF_TOKEN`, else the file that logging in leaves.
    token: Option<String>,
    /// `HF_ENDPOINT`.
    endpoint: String,
    /// `HF_HUB_OFFLINE`, or the flag.
    offline: bool,
}

impl Settings {
    /// Reads them through `var`; `None` if the cache has no place.
    fn new(offline: bool, home: Option<PathBuf>, var: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let var = |name: &str| var(name).map(|value| value.trim().to_string()).filter(|value| !value.is_empty());
        let path = |name: &str| var(name).map(PathBuf::from);
        let caches = path("XDG_CACHE_HOME").or_else(|| Some(home?.join(".cache")));
        let home = path("HF_HOME").or_else(|| Some(caches?.join("huggingface")));
        let in_home = |name: &str| home.as_ref().map(|home| home.join(name));
        let token_file = path("HF_TOKEN_PATH").or_else(|| in_home("token"));
        let token_file = || Some(std::fs::read_to_string(token_file?).ok()?.trim().to_string());
        let is_on = |value: String| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str());
        Some(Self {
            cache: path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).or_else(|| in_home("hub"))?,
            token: var("HF_TOKEN").or_else(token_file).filter(|token| !token.is_empty()),
            endpoint: var("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".into(), |endpoint| endpoint.trim_end_matches('/').to_string()),
            offline: offline || var("HF_HUB_OFFLINE").is_some_and(is_on),
        })
    }
}

/// The directory of a checkpoint that `--model` names: a directory itself, or what of a Hugging Face id the cache holds,
/// fetched first where it lacks something. With `offline`, or `HF_HUB_OFFLINE`, nothing is fetched.
///
/// # Errors
/// One line each for what is neither, for a hub that can't be reached or refuses, and for a cache without the files.
pub fn directory(model: &Path, need: Need, offline: bool) -> Result<PathBuf, HubError> {
    if model.is_dir() {
        return Ok(model.into());
    }
    let id = model.to_str().filter(|_| !model.exists()).and_then(ModelId::parse);
    let id = id.ok_or_else(|| HubError::NotADirectory(model.display().to_string()))?;
    let settings = Settings::new(offline, std::env::home_dir(), |name| std::env::var(name).ok());
    resolve(&id, need, &settings.ok_or_else(|| HubError::NoHome(id.clone()))?)
}

/// What the model is called: its id, or the name of its directory.
pub fn name(model: &Path) -> String {
    match model.canonicalize() {
        Ok(path) => path.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned()),
        Err(_) => model.display().to_string(),
    }
}

fn resolve(id: &ModelId, need: Need, settings: &Settings) -> Result<PathBuf, HubError> {
    let cached = cached::whole(id, need, &settings.cache);
    if settings.offline || (id.is_commit() && cached.is_ok()) {
        return cached;
    }
    let hub = Hub::new(id, settings)?;
    match hub.look_up() {
        Ok(commit) => hub.fetch(&commit, need),
        Err(HubError::Unreachable { endpoint, cause, .. }) if cached.is_ok() => {
            note!("{id}: {endpoint} can't be reached ({cause}); what is in the cache is taken");
            cached
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_what_is_none() {
        for (text, repo, revision) in [
            ("MiniMaxAI/MiniMax-M1-40k", "MiniMaxAI/MiniMax-M1-40k", "main"),
            ("a/b@v1.0", "a/b", "v1.0"),
            ("a_b/c.d@refs/pr/1", "a_b/c.d", "refs/pr/1"),
        ] {
            let id = ModelId::parse(text).unwrap();
            assert_eq!((&*id.repo, id.revision(), id.to_string()), (repo, revision, text.to_string()));
            assert!(!id.is_commit());
        }
        assert!(ModelId::parse("a/b@0123456789abcdef0123456789abcdef01234567").unwrap().is_commit());
        let long = format!("a/{}", "b".repeat(95));
        for text in [
            "", "gpt2", "/a/b", "a/b/c", "a/", "/b", "./b", "../b", "a/..", "a/b..c", "-a/b", "a b/c", "a/b@",
            "a/b@../x", "a/b@/x", "a/b@x//y", "a/b@x@y", "ä/b", "a\\b/c", &long,
        ] {
            assert_eq!(ModelId::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_environment_is_that_of_hugging_faces_tools() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(dir.path().join("token"), "from-file\n").unwrap();
        std::fs::write(dir.path().join("other"), "from-other").unwrap();
        let settings = |vars: &[(&str, &str)]| {
            let var = |name: &str| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
            Settings::new(false, Some("/home/x".into()), var).unwrap()
        };
        let plain = settings(&[("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", ""), ("HF_HOME", " ")]);
        assert_eq!(plain.cache, Path::new("/home/x/.cache/huggingface/hub"));
        assert_eq!((&*plain.endpoint, plain.token, plain.offline), ("https://huggingface.co", None, false));
        assert_eq!(settings(&[("XDG_CACHE_HOME", "/c")]).cache, Path::new("/c/huggingface/hub"));

        let home = at("");
        let here = settings(&[("HF_HOME", &home), ("HF_ENDPOINT", "http://127.0.0.1:1/"), ("HF_HUB_OFFLINE", "TRUE")]);
        assert_eq!(here.cache, dir.path().join("hub"));
        assert_eq!(
            (&*here.endpoint, here.token.as_deref(), here.offline),
            ("http://127.0.0.1:1", Some("from-file"), true)
        );
        let vars = [("HF_HOME", &*home), ("HF_HUB_CACHE", "/elsewhere"), ("HF_TOKEN", "given")];
        assert_eq!(settings(&vars).cache, Path::new("/elsewhere"));
        assert_eq!(settings(&vars).token.as_deref(), Some("given"));
        assert_eq!(settings(&[("HF_TOKEN_PATH", &at("other"))]).token.as_deref(), Some("from-other"));

        assert!(Settings::new(false, None, |_| None).is_none());
        assert!(Settings::new(true, None, |name| (name == "HF_HOME").then(|| "/h".into())).unwrap().offline);
    }

    #[test]
    fn a_directory_wins_and_a_file_is_neither() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(directory(dir.path(), Need::Weights, false).unwrap(), dir.path());
        let file = dir.path().join("x");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(directory(&file, Need::Weights, true), Err(HubError::NotADirectory(_))));
        assert_eq!(name(dir.path()), dir.path().file_name().unwrap().to_str().unwrap());
        assert_eq!(name(Path::new("no-such-owner/name@v1")), "no-such-owner/name@v1");
    }
}
