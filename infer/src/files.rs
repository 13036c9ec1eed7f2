//! Files that are there whole or not at all: written under a temporary name, then renamed. What is there already and is
//! no regular file (a device, a pipe) is never replaced.

use std::fs::File;
use std::io::{Error, ErrorKind, Result, Write};
use std::path::{Path, PathBuf};

/// Writes `bytes` to `path`; straight into it where it is no regular file.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if is_special(path) {
        return File::options().write(true).open(path)?.write_all(bytes);
    }
    let mut new = NewFile::create(path)?;
    new.file().write_all(bytes)?;
    new.finish()
}

/// A file under a temporary name beside its place, which [`NewFile::finish`] puts there.
#[derive(Debug)]
pub struct NewFile {
    temporary: tempfile::NamedTempFile,
    path: PathBuf,
}

impl NewFile {
    /// An empty file for `path`, or for what the symbolic link `path` leads to.
    pub fn create(path: &Path) -> Result<Self> {
        if is_special(path) {
            return Err(Error::new(ErrorKind::InvalidInput, "not a regular file, which is wanted here"));
        }
        let path = if path.is_symlink() { path.canonicalize()? } else { path.to_path_buf() };
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Made as every new file is (a temporary file is private to its owner), or as the one that it replaces.
        let temporary = tempfile::Builder::new()
            .make_in(dir, |path| File::options().read(true).write(true).create_new(true).open(path))?;
        if let Ok(old) = path.metadata() {
            temporary.as_file().set_permissions(old.permissions())?;
        }
        Ok(Self { temporary, path })
    }

    /// The file to write to; its errors do not tell the temporary name.
    pub fn file(&mut self) -> &mut File {
        self.temporary.as_file_mut()
    }

    /// Gives it its name.
    pub fn finish(self) -> Result<()> {
        self.temporary.persist(&self.path).map_err(|e| e.error)?;
        Ok(())
    }
}

/// Whether something is there that must not be replaced: a device, a pipe, a directory.
fn is_special(path: &Path) -> bool {
    path.metadata().is_ok_and(|there| !there.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_the_file_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let error = write(&dir.path().join("no/such"), b"").unwrap_err().to_string();
        assert!(!error.contains("tmp"), "{error}");
    }

    #[test]
    fn what_is_no_regular_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("folder");
        std::fs::create_dir(&path).unwrap();
        assert!(write(&path, b"x").is_err());
        assert!(NewFile::create(&path).unwrap_err().to_string().contains("not a regular file"));
        assert!(path.is_dir());
    }

    #[cfg(unix)]
    #[test]
    fn pipes_links_and_modes_stay() {
        use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || std::fs::read(pipe).unwrap()
        });
        write(&pipe, b"through").unwrap();
        assert_eq!(reader.join().unwrap(), b"through");
        assert!(pipe.metadata().unwrap().file_type().is_fifo());

        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        let plain = dir.path().join("plain");
        write(&file, b"one").unwrap();
        std::fs::write(&plain, b"").unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode();
        assert_eq!(mode(&file), mode(&plain), "as the umask has it");
        symlink(&file, &link).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        write(&link, b"two").unwrap();
        assert!(link.is_symlink());
        assert_eq!((std::fs::read(&file).unwrap(), mode(&file) & 0o777), (b"two".to_vec(), 0o600));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4, "nothing but these");
    }
}
