//! What the cache holds of a model: `models--owner--name/{refs,snapshots,blobs}`. A snapshot is a directory of links to
//! blobs; a ref says which commit a branch was at when it was looked up last.

use super::{HubError, ModelId, Need};
use hf_hub::{Repo, RepoType};
use m1_model::checkpoint::{CONFIG, INDEX, SINGLE};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The snapshot that the revision stood for last, if it has all that is needed.
pub fn whole(id: &ModelId, need: Need, cache: &Path) -> Result<PathBuf, HubError> {
    let lacks = |file: String| HubError::NotCached { id: id.clone(), file, cache: cache.into() };
    let folder = cache.join(Repo::new(id.repo.clone(), RepoType::Model).folder_name());
    let snapshots = folder.join("snapshots");
    let commit = std::fs::read_to_string(folder.join("refs").join(id.revision()));
    let commit = commit.unwrap_or_else(|_| id.revision().into());
    // A commit is a plain name; what else a ref might hold leads nowhere.
    let commit = plain(commit.trim()).ok_or_else(|| lacks(CONFIG.into()))?;
    let dir = snapshots.join(commit);
    match lacking(&dir, need)? {
        None => Ok(dir),
        Some(file) => Err(lacks(file)),
    }
}

/// The first file that a checkpoint needs and the directory lacks.
fn lacking(dir: &Path, need: Need) -> Result<Option<String>, HubError> {
    if !dir.join(CONFIG).exists() {
        return Ok(Some(CONFIG.into()));
    }
    let index = dir.join(INDEX);
    match (dir.join(SINGLE).exists(), index.exists(), need) {
        (false, false, _) => Ok(Some(format!("{SINGLE} or {INDEX}"))),
        (false, true, Need::Weights) => Ok(shards(&index)?.into_iter().find(|shard| !dir.join(shard).exists())),
        _ => Ok(None),
    }
}

/// The shards that an index names.
pub fn shards(index: &Path) -> Result<BTreeSet<String>, HubError> {
    let wrong = |problem: String| HubError::Index { path: index.into(), problem };
    let text = std::fs::read_to_string(index).map_err(|error| HubError::Cache { path: index.into(), error })?;
    let value: Value = serde_json::from_str(&text).map_err(|error| wrong(format!("not JSON: {error}")))?;
    let map = value.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| wrong("no object `weight_map`: expected tensor names with their shards".into()))?;
    map.iter()
        .map(|(tensor, shard)| {
            // An index must not reach outside its directory.
            let name = shard.as_str().and_then(plain);
            Ok(name.ok_or_else(|| wrong(format!("tensor `{tensor}` is in {shard}: expected a file name")))?.into())
        })
        .collect()
}

/// A name without a path.
pub fn plain(name: &str) -> Option<&str> {
    Path::new(name).file_name().is_some_and(|plain| plain == name).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A file of the snapshot `commit`.
    fn put(cache: &Path, commit: &str, name: &str, text: &str) {
        let dir = cache.join("models--a--b/snapshots").join(commit);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(name), text).unwrap();
    }

    #[test]
    fn whole_by_ref_or_commit_and_what_is_lacking() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path();
        let find = |id: &str, need| match whole(&ModelId::parse(id).unwrap(), need, cache) {
            Ok(path) => path.file_name().unwrap().to_string_lossy().into_owned(),
            Err(HubError::NotCached { file, .. }) => format!("lacks {file}"),
            Err(error) => error.to_string(),
        };
        assert_eq!(find("a/b", Need::Weights), "lacks config.json");
        put(cache, "c1", "config.json", "{}");
        fs::create_dir_all(cache.join("models--a--b/refs/pr")).unwrap();
        fs::write(cache.join("models--a--b/refs/main"), "c1\n").unwrap();
        fs::write(cache.join("models--a--b/refs/pr/1"), "c2").unwrap();
        assert_eq!(find("a/b", Need::Description), format!("lacks {SINGLE} or {INDEX}"));
        put(cache, "c1", SINGLE, "");
        assert_eq!(find("a/b", Need::Weights), "c1");
        assert_eq!(find("a/b@c1", Need::Weights), "c1", "without a ref");

        put(cache, "c2", "config.json", "{}");
        put(
            cache,
            "c2",
            INDEX,
            r#"{"weight_map": {"x": "1.safetensors", "y": "2.safetensors", "z": "1.safetensors"}}"#,
        );
        put(cache, "c2", "1.safetensors", "");
        assert_eq!(find("a/b@pr/1", Need::Description), "c2");
        assert_eq!(find("a/b@pr/1", Need::Weights), "lacks 2.safetensors");
        put(cache, "c2", "2.safetensors", "");
        assert_eq!(find("a/b@pr/1", Need::Weights), "c2");

        fs::write(cache.join("models--a--b/refs/main"), "../../secret").unwrap();
        assert_eq!(find("a/b", Need::Weights), "lacks config.json");
    }

    #[test]
    fn an_index_names_plain_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(INDEX);
        for (text, wanted) in [
            ("{", "not JSON"),
            ("{}", "no object `weight_map`"),
            (r#"{"weight_map": {"x": 1}}"#, "tensor `x` is in 1: expected a file name"),
            (r#"{"weight_map": {"x": "../y"}}"#, "expected a file name"),
            (r#"{"weight_map": {"x": "/etc/passwd"}}"#, "expected a file name"),
            (r#"{"weight_map": {"x": ".."}}"#, "expected a file name"),
        ] {
            fs::write(&path, text).unwrap();
            let error = shards(&path).unwrap_err().to_string();
            assert!(error.contains(wanted) && error.contains(INDEX), "{error}");
        }
    }
}
