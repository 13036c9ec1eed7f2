//! Files that are there whole or not at all: written under a temporary name, then renamed.

use std::io::{Result, Write};
use std::path::Path;

/// Writes `bytes` to `path`.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = create(path)?;
    file.write_all(bytes)?;
    finish(file, path)
}

/// A temporary file beside `path`, which [`finish`] puts in its place.
pub fn create(path: &Path) -> Result<tempfile::NamedTempFile> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    tempfile::NamedTempFile::new_in(dir)
}

/// Renames a file made by [`create`] to `path`, readable as other new files are.
pub fn finish(file: tempfile::NamedTempFile, path: &Path) -> Result<()> {
    // Temporary files are private to their owner; what others are to read must not stay so.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn nothing_but_the_file_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        super::write(&path, b"one").unwrap();
        super::write(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(super::write(&dir.path().join("no/such"), b"").is_err());
    }
}
