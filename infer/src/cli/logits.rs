//! `m1 logits`: the model's numbers for given ids, for comparing with other implementations. The rows are one batch
//! through one cache; logits go to the file slab by slab, so that memory does not grow with the text.

use super::common::{ModelArgs, whole};
use crate::assets::load_model;
use crate::engine::to_host;
use crate::files::NewFile;
use anyhow::{Context, bail, ensure};
use burn::tensor::Tensor;
use m1_model::{Batch, Cache, M1, Trace};
use serde_json::{Value, json};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes of logits held at once.
const SLAB: usize = 64 << 20;

/// Flags of `m1 logits`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  echo '[[1, 5, 7, 9], [4, 4]]' > ids.json
  m1 logits --model DIR --tokens ids.json --out out.safetensors
  m1 logits --model DIR --tokens ids.json --out out.safetensors --chunk 256 --decode-from 600

ids.json is an array of arrays of token ids: one batch, whose rows may differ in length; each row's logits equal those of
the row alone. The file gets f32 tensors logits_0, logits_1, … of shape [tokens of the row, vocabulary]. No tokenizer
is needed. Where a logit is not finite the file is written too, and the exit status is 1.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON file with the token ids: [[…], […], …]
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// safetensors file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Prefill N tokens of each row at a time: bounds memory
    #[arg(long, value_name = "N", default_value_t = 512, allow_negative_numbers = true,
        value_parser = clap::value_parser!(i64).range(1..))]
    chunk: i64,
    /// Run each row's tokens from its token K on one at a time (a shorter row is all prefill)
    #[arg(long, value_name = "K", allow_negative_numbers = true, value_parser = whole::<usize>)]
    decode_from: Option<usize>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let name = args.tokens.display().to_string();
    let rows = read_rows(&args.tokens).context(name.clone())?;
    let dir = args.model.directory()?;
    let device = args.model.weights.open_device()?;
    let settings = args.model.weights.settings(None);
    let model = load_model(&dir, &device, &settings)?;
    let vocab = model.config().vocab_size;
    for (r, row) in rows.iter().enumerate() {
        if let Some(t) = row.iter().position(|&id| id as usize >= vocab) {
            bail!("{name}: row {r}, token {t}: id {} is outside the vocabulary (0 to {})", row[t], vocab - 1);
        }
    }
    let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
    let out = args.out.display().to_string();
    let mut file = LogitsFile::create(&args.out, &lengths, vocab).context(out.clone())?;
    let chunk = usize::try_from(args.chunk).unwrap_or(usize::MAX);
    // The first in the order of rows and tokens, which is not that of the calculation.
    let mut not_finite: Option<(usize, usize, usize, f32)> = None;
    for_all_tokens(&model, &rows, chunk, args.decode_from, &mut |r, start, logits| {
        if let Some(i) = logits.iter().position(|l| !l.is_finite()) {
            let found = (r, start + i / vocab, i % vocab, logits[i]);
            let before = |old: &(usize, usize, usize, f32)| (old.0, old.1, old.2) < (found.0, found.1, found.2);
            not_finite = not_finite.filter(before).or(Some(found));
        }
        file.put(r, start, logits).context(out.clone())
    })?;
    file.finish().context(out.clone())?;
    if let Some((r, t, id, value)) = not_finite {
        bail!(
            "{out}: written, but the logit of id {id} after row {r}, token {t} is {value}: the weights are damaged or overflow their dtype"
        );
    }
    Ok(())
}

/// Reads `[[id, …], …]`.
fn read_rows(path: &Path) -> anyhow::Result<Vec<Vec<u32>>> {
    let value: Value = serde_json::from_str(&std::fs::read_to_string(path)?).context("not JSON")?;
    let Value::Array(rows) = value else { bail!("an array of arrays of token ids is wanted, as in [[1, 2], [3]]") };
    ensure!(!rows.is_empty(), "there are no rows: an array of arrays of token ids is wanted, as in [[1, 2], [3]]");
    rows.iter()
        .enumerate()
        .map(|(r, row)| {
            let Value::Array(row) = row else { bail!("row {r} is {row}, and must be an array of token ids") };
            let id = |(t, id): (usize, &Value)| {
                let id32 = id.as_u64().and_then(|id| u32::try_from(id).ok());
                id32.with_context(|| format!("row {r}, token {t}: {id} is not a token id"))
            };
            row.iter().enumerate().map(id).collect()
        })
        .collect()
}

/// Takes (row, first token, logits `[tokens, vocab]`).
type Put<'a> = &'a mut dyn FnMut(usize, usize, &[f32]) -> anyhow::Result<()>;

/// Runs all rows through one cache and hands out `(row, first token, logits)`: prefill in steps of `chunk` tokens a
/// row, then one token a row from token `decode_from` on.
fn for_all_tokens(
    model: &M1,
    rows: &[Vec<u32>],
    chunk: usize,
    decode_from: Option<usize>,
    put: Put,
) -> anyhow::Result<()> {
    let vocab = model.config().vocab_size;
    let slab = (SLAB / (4 * vocab)).max(1);
    let mut cache = Cache::new(model, rows.len());
    let mut done = vec![0; rows.len()];
    let mut step = |done: &mut Vec<usize>, until: &dyn Fn(usize, usize) -> usize| -> anyhow::Result<bool> {
        let new: Vec<Vec<u32>> =
            rows.iter().zip(&*done).enumerate().map(|(r, (row, &at))| row[at..until(r, at).max(at)].to_vec()).collect();
        let lengths: Vec<usize> = new.iter().map(Vec::len).collect();
        if lengths.iter().all(|&n| n == 0) {
            return Ok(false);
        }
        let hidden = model.forward(&Batch::new(new), Some(&mut cache), &mut Trace::none());
        let mut first = 0;
        for (r, &n) in lengths.iter().enumerate() {
            for start in (0..n).step_by(slab) {
                let end = (start + slab).min(n);
                let part: Tensor<2> = hidden.clone().narrow(0, first + start, end - start);
                put(r, done[r] + start, &to_host(model.logits(part))?)?;
            }
            first += n;
            done[r] += n;
        }
        Ok(true)
    };
    let prefill: Vec<usize> = rows.iter().map(|row| decode_from.map_or(row.len(), |k| k.min(row.len()))).collect();
    while step(&mut done, &|r, at| at.saturating_add(chunk).min(prefill[r]))? {}
    while step(&mut done, &|r, at| (at + 1).min(rows[r].len()))? {}
    Ok(())
}

/// A safetensors file whose header is written first, as all shapes are known, and whose tensors are filled in place.
struct LogitsFile {
    new: NewFile,
    /// Where each row's tensor begins.
    starts: Vec<u64>,
    vocab: usize,
}

impl LogitsFile {
    fn create(path: &Path, lengths: &[usize], vocab: usize) -> std::io::Result<Self> {
        let mut header = serde_json::Map::new();
        let (mut at, mut starts) = (0u64, Vec::new());
        for (r, &n) in lengths.iter().enumerate() {
            let end = at + (n * vocab * 4) as u64;
            let entry = json!({"dtype": "F32", "shape": [n, vocab], "data_offsets": [at, end]});
            header.insert(format!("logits_{r}"), entry);
            starts.push(at);
            at = end;
        }
        let mut header = Value::Object(header).to_string();
        header += &" ".repeat(header.len().next_multiple_of(8) - header.len()); // the data is aligned to 8 bytes
        let mut new = NewFile::create(path)?;
        let file = new.file();
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        let data = 8 + header.len() as u64;
        file.set_len(data + at)?;
        Ok(Self { new, starts: starts.into_iter().map(|s| s + data).collect(), vocab })
    }

    /// Writes logits of row `r` from its token `start` on.
    fn put(&mut self, r: usize, start: usize, logits: &[f32]) -> std::io::Result<()> {
        let file = self.new.file();
        file.seek(SeekFrom::Start(self.starts[r] + (start * self.vocab * 4) as u64))?;
        let bytes: Vec<u8> = logits.iter().flat_map(|l| l.to_le_bytes()).collect();
        file.write_all(&bytes)
    }

    fn finish(self) -> std::io::Result<()> {
        self.new.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_ids_are_told_by_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.json");
        for (text, wanted) in [
            ("[[1, 2", "not JSON"),
            ("{}", "array of arrays"),
            ("[]", "no rows"),
            ("[1]", "row 0 is 1"),
            ("[[1], [2, -3]]", "row 1, token 1: -3"),
            ("[[1.5]]", "row 0, token 0: 1.5"),
            ("[[4294967296]]", "row 0, token 0"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = format!("{:#}", read_rows(&path).unwrap_err());
            assert!(error.contains(wanted), "{error}");
        }
        std::fs::write(&path, "[[], [7]]").unwrap();
        assert_eq!(read_rows(&path).unwrap(), [vec![], vec![7]]);
    }

    #[test]
    fn the_file_is_safetensors_also_with_an_empty_row() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.safetensors");
        let mut file = LogitsFile::create(&path, &[2, 0, 1], 3).unwrap();
        file.put(2, 0, &[7.0, 8.0, 9.0]).unwrap();
        file.put(0, 1, &[4.0, 5.0, 6.0]).unwrap();
        file.put(0, 0, &[1.0, 2.0, 3.0]).unwrap();
        file.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let read = |name: &str| {
            let view = tensors.tensor(name).unwrap();
            let values: Vec<f32> =
                view.data().chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            (view.shape().to_vec(), values)
        };
        assert_eq!(read("logits_0"), (vec![2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        assert_eq!(read("logits_1"), (vec![0, 3], vec![]));
        assert_eq!(read("logits_2"), (vec![1, 3], vec![7.0, 8.0, 9.0]));
    }
}
