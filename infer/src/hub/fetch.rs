//! Fetching. hf-hub transfers a file and goes on with one that was cut off; around it stand what it leaves to its
//! callers: a commit for the whole model, blobs that another revision has brought already, a length that is checked, and
//! another try where the network fails for a while.

use super::cached::{plain, shards};
use super::{HubError, ModelId, Need, Settings};
use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use indicatif::{HumanBytes, ProgressBar, ProgressFinish, ProgressStyle};
use m1_model::checkpoint::{CONFIG, INDEX, SINGLE};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

/// Beside the weights; all but the first may be absent.
const TEXTS: [&str; 6] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Longest waits for the hub to be reached, and to say what a model consists of.
const CONNECT: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_secs(30);

/// Tries in a row that bring nothing before it is given up; the pauses between them double from half a second.
const TRIES: u32 = 6;

/// A model at one commit, as the hub lists it.
pub struct Commit {
    hash: String,
    /// Names, and lengths where they are told.
    files: BTreeMap<String, Option<u64>>,
}

/// A model on the hub.
pub struct Hub<'a> {
    id: &'a ModelId,
    settings: &'a Settings,
    api: Api,
}

impl<'a> Hub<'a> {
    /// Opens no connection.
    pub fn new(id: &'a ModelId, settings: &'a Settings) -> Result<Self, HubError> {
        let builder = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
            .with_endpoint(settings.endpoint.clone())
            .with_token(settings.token.clone())
            .with_user_agent("m1", env!("CARGO_PKG_VERSION"));
        match builder.build() {
            Ok(api) => Ok(Self { id, settings, api }),
            Err(error) => Err(HubError::Unreachable {
                id: id.clone(),
                file: CONFIG.into(),
                endpoint: settings.endpoint.clone(),
                cause: error.to_string(),
            }),
        }
    }

    /// Asks what the revision stands for, and which files that has.
    pub fn look_up(&self) -> Result<Commit, HubError> {
        #[derive(Deserialize)]
        struct Listing {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
            size: Option<u64>,
        }
        let request = self.api.repo(self.repo(self.id.revision())).info_request().query("blobs", "true").config();
        let request = request.timeout_connect(Some(CONNECT)).timeout_global(Some(ANSWER)).http_status_as_error(false);
        let mut response = request.build().call().map_err(|error| self.unreachable(CONFIG, &error.to_string()))?;
        let (id, endpoint) = (self.id.clone(), self.settings.endpoint.clone());
        let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok());
        match response.status().as_u16() {
            200 => {}
            404 if code == Some("RevisionNotFound") => return Err(HubError::NoRevision { id, endpoint }),
            // To those without a token the hub answers 401 for what it does not have, too.
            status @ (401 | 404) => return Err(HubError::NoModel { id, endpoint, status }),
            status @ 403 => return Err(HubError::Refused { id, file: CONFIG.into(), endpoint, status }),
            status => return Err(self.unreachable(CONFIG, &format!("status {status}"))),
        }
        let listing: Listing =
            response.body_mut().read_json().map_err(|error| self.unreachable(CONFIG, &error.to_string()))?;
        if plain(&listing.sha).is_none() {
            return Err(self.unreachable(CONFIG, &format!("its commit is `{}`", listing.sha)));
        }
        let files = listing.siblings.into_iter().map(|file| (file.rfilename, file.size));
        Ok(Commit { hash: listing.sha, files: files.collect() })
    }

    /// Brings what is needed of the commit into the cache, and says in which directory it is.
    pub fn fetch(&self, commit: &Commit, need: Need) -> Result<PathBuf, HubError> {
        let dir = self.cache(&commit.hash).pointer_path(&commit.hash);
        if !commit.files.contains_key(CONFIG) {
            return Err(self.absent(CONFIG));
        }
        let has = |name: &&str| commit.files.contains_key(*name);
        let weights = [SINGLE, INDEX].into_iter().find(has);
        let weights = weights.ok_or_else(|| self.absent(&format!("{SINGLE} or {INDEX}")))?;
        let files = TEXTS.into_iter().filter(has).chain([weights]);
        // A commit that is whole stays the one without a network until the new one is.
        let path = self.ref_path();
        if !path.exists() {
            self.note_commit(&path, &commit.hash)?;
        }
        self.fetch_files(commit, &dir, files.map(String::from))?;
        if weights == INDEX && need == Need::Weights {
            let shards = shards(&dir.join(INDEX))?;
            if let Some(absent) = shards.iter().find(|shard| !commit.files.contains_key(*shard)) {
                return Err(self.absent(absent));
            }
            self.fetch_files(commit, &dir, shards)?;
        }
        self.note_commit(&path, &commit.hash)?;
        Ok(dir)
    }

    /// Fetches those files that the snapshot `dir` lacks.
    fn fetch_files(
        &self,
        commit: &Commit,
        dir: &Path,
        files: impl IntoIterator<Item = String>,
    ) -> Result<(), HubError> {
        let length_of = |name: &str| commit.files.get(name).copied().flatten();
        let is_here = |name: &str| {
            let here = length(&dir.join(name));
            here.is_some() && length_of(name).is_none_or(|wanted| here == Some(wanted))
        };
        let missing: Vec<String> = files.into_iter().filter(|name| !is_here(name)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let total = missing.iter().filter_map(|name| length_of(name)).sum();
        let word = if missing.len() == 1 { "file" } else { "files" };
        note!("{}: fetching {} {word}, {}", self.id, missing.len(), HumanBytes(total));
        let bar = ProgressBar::new(total).with_finish(ProgressFinish::AndClear);
        if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
            bar.set_style(style);
        }
        let (cache, remote) = (self.cache(&commit.hash), self.api.repo(self.repo(&commit.hash)));
        let mut done = 0;
        for name in &missing {
            bar.set_message(name.clone());
            let transfer = Transfer { hub: self, cache: &cache, remote: &remote, dir, name };
            done += transfer.run(&Bar { bar: bar.clone(), done })?;
        }
        Ok(())
    }

    /// Remembers for a time without the network what the revision stands for.
    fn note_commit(&self, path: &Path, commit: &str) -> Result<(), HubError> {
        if self.id.is_commit() || fs::read_to_string(path).is_ok_and(|old| old == commit) {
            return Ok(());
        }
        let made = self.cache(self.id.revision()).create_ref(commit);
        made.map_err(|error| HubError::Cache { path: path.into(), error })
    }

    fn ref_path(&self) -> PathBuf {
        let folder = self.repo(self.id.revision()).folder_name();
        self.settings.cache.join(folder).join("refs").join(self.id.revision())
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.repo.clone(), RepoType::Model, revision.into())
    }

    fn cache(&self, revision: &str) -> CacheRepo {
        Cache::new(self.settings.cache.clone()).repo(self.repo(revision))
    }

    fn absent(&self, file: &str) -> HubError {
        HubError::NoFile { id: self.id.clone(), file: file.into(), endpoint: self.settings.endpoint.clone() }
    }

    fn unreachable(&self, file: &str, cause: &str) -> HubError {
        let (id, endpoint) = (self.id.clone(), self.settings.endpoint.clone());
        HubError::Unreachable { id, file: file.into(), endpoint, cause: cause.into() }
    }
}

/// One file on its way.
struct Transfer<'a> {
    hub: &'a Hub<'a>,
    cache: &'a CacheRepo,
    remote: &'a ApiRepo,
    /// The snapshot.
    dir: &'a Path,
    name: &'a str,
}

/// Why a try ended without the file.
enum Failure {
    /// Another try may help.
    Passing(String),
    /// Another process is at it.
    Busy,
    Final(HubError),
}

impl Transfer<'_> {
    /// Tries until it is there; returns its length.
    fn run(&self, bar: &Bar) -> Result<u64, HubError> {
        let (mut fruitless, mut waiting) = (0, false);
        loop {
            let mut brought = false;
            match self.attempt(bar, &mut brought) {
                Ok(length) => return Ok(length),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Busy) => {
                    if !waiting {
                        note!("{}: another process is fetching {}; waiting for it", self.hub.id, self.name);
                    }
                    waiting = true;
                }
                Err(Failure::Passing(cause)) => {
                    fruitless = if brought { 1 } else { fruitless + 1 };
                    if fruitless == TRIES {
                        return Err(self.hub.unreachable(self.name, &cause));
                    }
                    sleep(Duration::from_millis(250 << fruitless));
                }
            }
        }
    }

    /// One try. `brought` says whether it came further than the one before.
    fn attempt(&self, bar: &Bar, brought: &mut bool) -> Result<u64, Failure> {
        let metadata = self.hub.api.metadata(&self.remote.url(self.name)).map_err(|error| self.failure(error))?;
        let wanted = metadata.size() as u64;
        let etag = metadata.etag();
        if plain(etag.trim_start_matches("W/")).is_none() {
            return Err(Failure::Passing(format!("its etag is `{etag}`")));
        }
        let (blob, link) = (self.cache.blob_path(etag), self.dir.join(self.name));
        let at = |path: &Path| {
            let path = path.to_path_buf();
            |error| Failure::Final(HubError::Cache { path, error })
        };
        // A link that leads nowhere would be in the way.
        if link.is_symlink() && !link.exists() {
            fs::remove_file(&link).map_err(at(&link))?;
        }
        // Another revision, or another process, may have brought it.
        if length(&blob) == Some(wanted) {
            fs::create_dir_all(self.dir).map_err(at(self.dir))?;
            if !link.exists() {
                make_link(etag, &blob, &link).map_err(at(&link))?;
            }
            return Ok(wanted);
        }
        let part = blob.with_extension("part");
        // hf-hub asks for what comes after it, which there is not.
        if length(&part).is_some_and(|there| there >= wanted)
            && File::create(blob.with_extension("lock")).is_ok_and(|lock| lock.try_lock().is_ok())
        {
            fs::remove_file(&part).map_err(at(&part))?;
        }
        let before = length(&part);
        let result = self.remote.download_with_progress(self.name, bar.clone());
        *brought = length(&part) > before;
        let path = result.map_err(|error| self.failure(error))?;
        let found = length(&path).unwrap_or(0);
        if found != wanted {
            // It is not kept: what comes next begins anew.
            fs::remove_file(&blob).and_then(|()| fs::remove_file(&path)).map_err(at(&blob))?;
            return Err(Failure::Passing(format!("{found} bytes came instead of {wanted}")));
        }
        Ok(wanted)
    }

    fn failure(&self, error: ApiError) -> Failure {
        let (id, endpoint, file) = (self.hub.id.clone(), self.hub.settings.endpoint.clone(), self.name.to_string());
        match error {
            ApiError::LockAcquisition(_) => Failure::Busy,
            ApiError::RequestError(error) => match *error {
                ureq::Error::StatusCode(status @ (401 | 403)) => {
                    Failure::Final(HubError::Refused { id, file, endpoint, status })
                }
                ureq::Error::StatusCode(404) => Failure::Final(self.hub.absent(self.name)),
                other => Failure::Passing(other.to_string()),
            },
            // The disk's, not the network's.
            ApiError::IoError(error)
                if matches!(
                    error.kind(),
                    ErrorKind::StorageFull
                        | ErrorKind::QuotaExceeded
                        | ErrorKind::PermissionDenied
                        | ErrorKind::ReadOnlyFilesystem
                        | ErrorKind::NotADirectory
                ) =>
            {
                Failure::Final(HubError::Cache { path: self.hub.settings.cache.clone(), error })
            }
            ApiError::IoError(error) => Failure::Passing(error.to_string()),
            other => Failure::Passing(other.to_string()),
        }
    }
}

/// `snapshots/COMMIT/NAME` leads to `blobs/ETAG`, as every tool of the hub has it.
#[cfg(unix)]
fn make_link(etag: &str, _blob: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(Path::new("../../blobs").join(etag), link)
}

/// The same where symbolic links are a privilege.
#[cfg(not(unix))]
fn make_link(_etag: &str, blob: &Path, link: &Path) -> io::Result<()> {
    fs::hard_link(blob, link)
}

fn length(path: &Path) -> Option<u64> {
    Some(path.metadata().ok()?.len())
}

/// The bar of all files, as hf-hub moves it for one.
#[derive(Clone)]
struct Bar {
    bar: ProgressBar,
    /// Bytes of the files before.
    done: u64,
}

impl Progress for Bar {
    fn init(&mut self, _size: usize, _name: &str) {
        self.bar.set_position(self.done);
    }

    fn update(&mut self, bytes: usize) {
        self.bar.inc(bytes as u64);
    }

    fn finish(&mut self) {}
}
