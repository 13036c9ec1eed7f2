//! One safetensors file, mapped: its header is checked when it is opened, its data is read only when asked for.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap};
use safetensors::tensor::{Metadata, SafeTensorError, SafeTensors, TensorInfo};

use super::error::CheckpointError;

/// A mapped file whose header is sound: offsets in order, without gaps or overlaps, up to the end of the file.
///
/// The file must not be shortened while it is mapped. Files that this crate writes are renamed into place, so writing
/// a checkpoint over one that is in use is safe.
#[derive(Debug)]
pub struct Container {
    path: PathBuf,
    map: Mmap,
    data_start: usize,
    metadata: Metadata,
}

impl Container {
    /// Maps a file and checks its header; reads no tensor.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(CheckpointError::io(path, "open"))?;
        // SAFETY: the map is only read. See the type's note on files that change underneath.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::io(path, "map"))?;
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| CheckpointError::Container { path: path.into(), problem: problem(error, &map) })?;
        Ok(Self { path: path.into(), data_start: 8 + header, map, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All names, in the order of their data.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Dtype, shape and place of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.metadata.info(name)
    }

    /// Some bytes of the data section: `range` is counted from its start, as a tensor's `data_offsets`.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.map[self.data_start + range.start..self.data_start + range.end]
    }

    /// Says that these bytes will all be read soon.
    pub(crate) fn fetch(&self, range: Range<usize>) {
        #[cfg(unix)]
        let _ = self.map.advise_range(Advice::WillNeed, self.data_start + range.start, range.len());
    }

    /// Lets the pages of these bytes go: they no longer count as this process's memory.
    pub(crate) fn release(&self, range: Range<usize>) {
        let (start, len) = (self.data_start + range.start, range.len());
        // SAFETY: the map is a read-only view of a file; pages dropped here are read again if anyone looks.
        #[cfg(unix)]
        let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) };
    }
}

/// What the header's reader found, in words that say what would be right.
fn problem(error: SafeTensorError, map: &[u8]) -> String {
    let len = map.len();
    match error {
        SafeTensorError::HeaderTooSmall => format!("{len} bytes are too few for a header"),
        SafeTensorError::HeaderTooLarge => "the header claims to be larger than 100 MB".into(),
        SafeTensorError::InvalidHeaderLength => {
            let claimed = map.first_chunk::<8>().map_or(0, |n| u64::from_le_bytes(*n));
            format!("the header claims {claimed} bytes and the file has {len}: truncated or corrupt")
        }
        SafeTensorError::InvalidHeader(error) => format!("the header is not UTF-8: {error}"),
        SafeTensorError::InvalidHeaderDeserialization(error) => {
            format!("the header is not as expected: {error}")
        }
        SafeTensorError::InvalidOffset(tensor) => {
            format!("the data of tensor `{tensor}` overlaps another's or leaves a gap before it")
        }
        SafeTensorError::TensorInvalidInfo => {
            format!("a tensor's offsets disagree with its shape and dtype{}", culprit(map))
        }
        SafeTensorError::ValidationOverflow => {
            format!("a tensor's shape is beyond any memory{}", culprit(map))
        }
        SafeTensorError::MetadataIncompleteBuffer => match described_len(map) {
            Some(described) if described > len as u128 => {
                format!("truncated: the header describes {described} bytes and the file has {len}")
            }
            Some(described) => {
                format!("the header describes {described} bytes and the file has {len}")
            }
            None => format!("the header does not describe the file's {len} bytes"),
        },
        other => other.to_string(),
    }
}

/// The entries of a header that did parse as JSON.
fn entries(map: &[u8]) -> Option<serde_json::Map<String, serde_json::Value>> {
    let n = usize::try_from(u64::from_le_bytes(*map.first_chunk::<8>()?)).ok()?;
    serde_json::from_slice(map.get(8..8usize.checked_add(n)?)?).ok()
}

/// The length that the file would have if its header were right.
fn described_len(map: &[u8]) -> Option<u128> {
    let header = u64::from_le_bytes(*map.first_chunk::<8>()?);
    let ends = entries(map)?.into_iter().filter_map(|(_, info)| info["data_offsets"][1].as_u64());
    Some(8 + u128::from(header) + u128::from(ends.max().unwrap_or(0)))
}

/// Names the first tensor whose shape does not fill its offsets, with what they say.
fn culprit(map: &[u8]) -> String {
    let wrong = |info: &serde_json::Value| {
        let info: TensorInfo = serde_json::from_value(info.clone()).ok()?;
        let elements = info.shape.iter().try_fold(1u128, |n, &dim| n.checked_mul(dim as u128));
        let bytes = elements.and_then(|n| n.checked_mul(info.dtype.bitsize() as u128)).map(|bits| bits / 8);
        let (start, end) = info.data_offsets;
        let held = end.saturating_sub(start) as u128;
        let (shape, dtype) = (&info.shape, info.dtype);
        (bytes != Some(held)).then(|| format!("{shape:?} of {dtype} in {held} bytes"))
    };
    let found = entries(map).and_then(|all| all.iter().find_map(|(name, info)| Some((name.clone(), wrong(info)?))));
    found.map_or_else(String::new, |(name, what)| format!(": tensor `{name}`, {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::{Dtype, TensorView};

    fn sound() -> Vec<u8> {
        let data: Vec<u8> = (0..64).collect();
        let view = |range: std::ops::Range<usize>, shape: &[usize], dtype| {
            TensorView::new(dtype, shape.to_vec(), &data[range]).unwrap()
        };
        let tensors = [
            ("model.norm.weight", view(0..32, &[8], Dtype::F32)),
            ("lm_head.weight", view(32..48, &[2, 4], Dtype::BF16)),
            ("model.embed_tokens.weight", view(48..64, &[4, 2], Dtype::BF16)),
        ];
        safetensors::serialize(tensors, None).unwrap()
    }

    /// Opens these bytes as a file; if that works, every tensor must be whole and readable.
    fn open(folder: &tempfile::TempDir, bytes: &[u8]) -> Result<usize, CheckpointError> {
        let path = folder.path().join("x.safetensors");
        std::fs::write(&path, bytes).unwrap();
        let container = Container::open(&path)?;
        let mut covered = 0;
        for name in container.names() {
            let info = container.info(&name).unwrap();
            let (start, end) = info.data_offsets;
            let bits = info.shape.iter().product::<usize>() * info.dtype.bitsize();
            assert_eq!(8 * (end - start), bits, "{name}");
            covered += container.bytes(start..end).len();
        }
        Ok(covered)
    }

    #[test]
    fn data_is_where_the_header_says() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(open(&folder, &sound()).unwrap(), 64);
        let container = Container::open(&folder.path().join("x.safetensors")).unwrap();
        let (start, end) = container.info("model.norm.weight").unwrap().data_offsets;
        for _ in 0..2 {
            container.fetch(start..end);
            assert_eq!(container.bytes(start..end), (0..32).collect::<Vec<u8>>());
            container.release(start..end);
        }
    }

    #[test]
    fn each_kind_of_damage_has_its_words() {
        let folder = tempfile::tempdir().unwrap();
        let sound = sound();
        let header = String::from_utf8(sound[8..sound.len() - 64].to_vec()).unwrap();
        let with = |from: &str, to: &str| {
            assert!(header.contains(from), "{header}");
            let header = header.replacen(from, to, 1);
            [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &sound[sound.len() - 64..]].concat()
        };
        let long = [&u64::MAX.to_le_bytes()[..], &sound[8..]].concat();
        let beyond = [&9999u64.to_le_bytes()[..], &sound[8..]].concat();
        for (bytes, expected) in [
            (vec![], "0 bytes are too few"),
            (sound[..7].to_vec(), "7 bytes are too few"),
            (long, "larger than 100 MB"),
            (beyond, "truncated or corrupt"),
            (sound[..sound.len() - 1].to_vec(), "truncated: the header describes"),
            ([&sound[..], &[0]].concat(), "the header describes"),
            (with("{", "["), "not as expected"),
            (with("F32", "F33"), "not as expected"),
            (with("[0,32]", "[0,33]"), "offsets disagree with its shape and dtype: tensor `model.norm.weight`"),
            (with("[32,48]", "[33,49]"), "leaves a gap"),
            (with("[32,48]", "[16,32]"), "overlaps another's or leaves a gap"),
            (with("[8]", "[4294967296,4294967296,8]"), "beyond any memory: tensor `model.norm.weight`"),
        ] {
            let said = open(&folder, &bytes).unwrap_err().to_string();
            assert!(said.contains("x.safetensors: not a sound safetensors file: "), "{said}");
            assert!(said.contains(expected) && !said.contains('\n'), "{said} instead of {expected}");
        }
        let absent = Container::open(&folder.path().join("absent.safetensors")).unwrap_err().to_string();
        assert!(absent.contains("absent.safetensors: cannot open"), "{absent}");
        let folder = Container::open(folder.path()).unwrap_err().to_string();
        assert!(folder.contains("cannot map"), "{folder}");
    }

    /// Thousands of damaged headers: refused, or still a sound description of the file; never a panic.
    #[test]
    fn damaged_headers_never_panic() {
        let folder = tempfile::tempdir().unwrap();
        let sound = sound();
        let header = sound.len() - 64;
        let mut random = 0x2545_f491_4f6c_dd1du64;
        let mut below = |n: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % n as u64) as usize
        };
        let mut refused = 0;
        for _ in 0..4000 {
            let mut bytes = sound.clone();
            for _ in 0..1 + below(3) {
                let at = if below(4) == 0 { below(8) } else { below(header) };
                let at = at.min(bytes.len() - 1);
                match below(5) {
                    0 => bytes[at] = below(256) as u8,
                    1 => bytes[at] ^= 1 << below(8),
                    2 => bytes[at] = b"0123456789[]{},:\""[below(17)],
                    3 => bytes.truncate(at + 1),
                    _ => _ = bytes.remove(at),
                }
                if bytes.is_empty() {
                    break;
                }
            }
            if let Err(error) = open(&folder, &bytes) {
                refused += 1;
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
        assert!(refused > 3000, "only {refused} of 4000 refused");
    }
}
