//! Every way a text can reach the cache. All must give the logits of the plain forward pass, whose measure is float64's.
//!
//! Each function takes the model, its golden, and how many of the golden's tokens to use: all on the CPU, fewer on a slow
//! device. Rows that are not the golden's text are held against the same row run alone.

use burn::tensor::Tensor;
use m1_model::{Batch, Cache, CacheError, M1, Trace};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::golden::{Golden, check_logits};
use crate::values;

/// Logits of every token of `batch`.
pub fn logits(model: &M1, batch: Batch, cache: Option<&mut Cache>) -> Tensor<2> {
    model.logits(model.forward(&batch, cache, &mut Trace::none()))
}

/// The whole text without and with a cache.
pub fn whole(model: &M1, golden: &Golden, n: usize) {
    let text = golden.tokens[..n].to_vec();
    let error = golden.check_logits(0, &logits(model, Batch::new(vec![text.clone()]), None), "whole");
    eprintln!("{:14} largest logit error {error:.1e}, bound {:.1e}", golden.name, golden.bound);
    let mut cache = Cache::new(model, 1);
    golden.check_logits(0, &logits(model, Batch::new(vec![text.clone()]), Some(&mut cache)), "whole, with a cache");
    assert_eq!(cache.tokens(0), text);
    if n == golden.cache_after {
        golden.check_cache(&cache, 0, "whole");
    }
}

/// Chunks of the sizes given, over and over, until `n` tokens are read.
pub fn chunks(model: &M1, golden: &Golden, n: usize, sizes: &[usize]) {
    let what = format!("in chunks of {sizes:?}");
    let mut cache = Cache::new(model, 1);
    let mut sizes = sizes.iter().cycle();
    let mut done = 0;
    while done < n {
        let size = sizes.next().map_or(1, |&s| s).min(n - done);
        let got = logits(model, Batch::new(vec![golden.tokens[done..done + size].to_vec()]), Some(&mut cache));
        golden.check_logits(done, &got, &what);
        done += size;
    }
    if n == golden.cache_after {
        golden.check_cache(&cache, 0, &what);
    }
}

/// A prefill in chunks without outputs, then one token at a time.
pub fn decode_after_prefill(model: &M1, golden: &Golden, n: usize, prefill: usize, chunk: usize) {
    let mut cache = Cache::new(model, 1);
    for part in golden.tokens[..prefill].chunks(chunk) {
        let none = model.forward(&Batch::new(vec![part.to_vec()]).none(), Some(&mut cache), &mut Trace::none());
        assert_eq!(none.dims()[0], 0, "a batch without outputs gives none");
    }
    for at in prefill..n {
        let got = logits(model, Batch::new(vec![vec![golden.tokens[at]]]), Some(&mut cache));
        golden.check_logits(at, &got, "decode after prefill");
    }
}

/// Only the outputs asked for, and they are the same ones.
pub fn chosen_outputs(model: &M1, golden: &Golden, n: usize) {
    let rows = || vec![golden.tokens[..n].to_vec(), golden.tokens[..n / 2].to_vec()];
    let last = logits(model, Batch::new(rows()).last(), None);
    assert_eq!(last.dims()[0], 2);
    golden.check_logits(n - 1, &last.clone().narrow(0, 0, 1), "last of row 0");
    golden.check_logits(n / 2 - 1, &last.narrow(0, 1, 1), "last of row 1");
    let at = logits(model, Batch::new(rows()).at(vec![vec![3, 0, n - 1], vec![n / 4]]), None);
    assert_eq!(at.dims()[0], 4);
    for (i, token) in [3, 0, n - 1, n / 4].into_iter().enumerate() {
        golden.check_logits(token, &at.clone().narrow(0, i, 1), "chosen outputs");
    }
}

/// A text and the logits it must give: the golden's, or those of the text run alone.
struct Row {
    text: Vec<u32>,
    want: Vec<f64>,
    read: usize,
}

impl Row {
    fn new(model: &M1, golden: &Golden, text: &[u32]) -> Self {
        let alone = logits(model, Batch::new(vec![text.to_vec()]), None);
        if golden.tokens.starts_with(text) {
            golden.check_logits(0, &alone, "alone");
        }
        Self { text: text.to_vec(), want: values(&alone), read: 0 }
    }

    /// The next `n` tokens, or what is left.
    fn next(&self, n: usize) -> Vec<u32> {
        self.text[self.read..(self.read + n).min(self.text.len())].to_vec()
    }

    fn left(&self) -> usize {
        self.text.len() - self.read
    }
}

/// Feeds each row `take[i]` more tokens in one batch and holds each against itself alone.
fn advance(model: &M1, golden: &Golden, rows: &mut [Row], take: &[usize], cache: Option<&mut Cache>, what: &str) {
    let new: Vec<Vec<u32>> = rows.iter().zip(take).map(|(row, &n)| row.next(n)).collect();
    let lengths: Vec<usize> = new.iter().map(Vec::len).collect();
    let vocab = golden.config.vocab_size;
    let got = values(&logits(model, Batch::new(new), cache));
    assert_eq!(got.len(), lengths.iter().sum::<usize>() * vocab, "{what}: one row of logits per token");
    let mut start = 0;
    for (i, (row, n)) in rows.iter_mut().zip(lengths).enumerate() {
        let size = n * vocab;
        let want = &row.want[row.read * vocab..row.read * vocab + size];
        check_logits(
            &got[start..start + size],
            want,
            vocab,
            golden.bound,
            &format!("{what}: row {i} from token {}", row.read),
        );
        start += size;
        row.read += n;
    }
}

/// Texts of different lengths, of which the first and the last are the golden's.
fn texts(model: &M1, golden: &Golden, n: usize) -> Vec<Row> {
    let t = &golden.tokens;
    let backwards: Vec<u32> = t[..n / 3].iter().rev().copied().collect();
    [&t[..n / 2 + 1], &backwards, &t[n / 4..n / 2], &t[n - 1..n], &t[..n]]
        .map(|text| Row::new(model, golden, text))
        .into()
}

/// Rows of different lengths in one batch, with and without a cache; an empty row among them.
pub fn uneven_rows(model: &M1, golden: &Golden, n: usize) {
    let all = vec![usize::MAX / 2; 5];
    advance(model, golden, &mut texts(model, golden, n), &all, None, "uneven rows");
    let mut cache = Cache::new(model, 5);
    advance(model, golden, &mut texts(model, golden, n), &all, Some(&mut cache), "uneven rows, with a cache");
    if n == golden.cache_after {
        golden.check_cache(&cache, 4, "uneven rows");
    }
}

/// Rows at different depths: at every step each row gets nothing, one token or many, as a seeded generator says.
pub fn different_depths(model: &M1, golden: &Golden, n: usize) {
    let mut rows = texts(model, golden, n);
    let mut cache = Cache::new(model, rows.len());
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    while rows.iter().any(|row| row.left() > 0) {
        let take: Vec<usize> = rows
            .iter()
            .map(|_| match rng.random_range(0..4) {
                0 => 0,
                1 => 1,
                2 => rng.random_range(2..=n / 6),
                _ => rng.random_range(n / 6..=n / 2),
            })
            .collect();
        advance(model, golden, &mut rows, &take, Some(&mut cache), "different depths");
    }
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(cache.tokens(i), row.text);
    }
    if n == golden.cache_after {
        golden.check_cache(&cache, 4, "different depths");
    }
}

/// Rows reordered, dropped, added and repeated between steps.
pub fn changing_rows(model: &M1, golden: &Golden, n: usize) {
    let mut rows = texts(model, golden, n);
    let mut cache = Cache::new(model, rows.len());
    advance(model, golden, &mut rows, &[n / 3, n / 4, n / 5, 1, n / 6], Some(&mut cache), "before the change");

    let mut kept: Vec<Option<Row>> = rows.into_iter().map(Some).collect();
    let mut rows: Vec<Row> = [4, 2, 0].map(|i| kept[i].take().expect("each row once")).into();
    cache.select(&[4, 2, 0]);
    advance(model, golden, &mut rows, &[5, 1, 3], Some(&mut cache), "reordered, two dropped");

    rows.push(Row::new(model, golden, &golden.tokens[..n / 2]));
    assert_eq!(cache.push_row(), 3);
    advance(model, golden, &mut rows, &[1, 0, 2, n / 3], Some(&mut cache), "one added");

    // The first row twice: from here the copy goes another way.
    let mut fork = golden.tokens[..rows[0].read].to_vec();
    fork.extend(golden.tokens[..n / 4].iter().rev());
    let mut copy = Row::new(model, golden, &fork);
    copy.read = rows[0].read;
    rows.push(copy);
    cache.select(&[0, 1, 2, 3, 0]);
    for take in [[1, 1, 1, 1, 1], [7, 1, 0, 2, n / 5], [n, n, n, n, n]] {
        advance(model, golden, &mut rows, &take, Some(&mut cache), "one repeated");
    }
    assert!(rows.iter().all(|row| row.left() == 0));

    cache.select(&[]);
    assert_eq!(cache.rows(), 0);
    cache.push_row();
    let mut rows = vec![Row::new(model, golden, &golden.tokens[..n / 3])];
    advance(model, golden, &mut rows, &[n], Some(&mut cache), "a first row after the last was dropped");
}

/// Snapshots: restored in place and into another cache, truncated to, and refused where the text is another.
pub fn snapshots(model: &M1, golden: &Golden, n: usize) {
    let text = &golden.tokens;
    let (early, middle) = (n / 4, n / 2);
    let mut cache = Cache::new(model, 1);
    let feed = |cache: &mut Cache, from: usize, to: usize, what: &str| {
        golden.check_logits(from, &logits(model, Batch::new(vec![text[from..to].to_vec()]), Some(cache)), what);
    };
    feed(&mut cache, 0, early, "to the first snapshot");
    let first = cache.snapshot(0);
    feed(&mut cache, early, middle, "to the second snapshot");
    let second = cache.snapshot(0);
    assert_eq!(second.tokens(), &text[..middle]);

    // A clone goes its own way and leaves both the original and the snapshots alone.
    let mut clone = cache.clone();
    let aside: Vec<u32> = text[..early].iter().rev().copied().collect();
    logits(model, Batch::new(vec![aside.clone()]), Some(&mut clone));
    feed(&mut cache, middle, middle + 2, "beside a clone");

    logits(model, Batch::new(vec![aside]), Some(&mut cache));
    cache.restore(0, &second);
    assert_eq!(cache.tokens(0), &text[..middle]);
    feed(&mut cache, middle, middle + 3, "restored");
    feed(&mut cache, middle + 3, n, "restored and continued");

    cache.truncate(0, &second).expect("the snapshot is of this text");
    assert_eq!(cache.len(0), middle);
    feed(&mut cache, middle, middle + 1, "truncated");
    cache.truncate(0, &first).expect("the snapshot is of this text");
    feed(&mut cache, early, early + 1, "truncated twice");

    // Shorter than the second snapshot now, and later on another way.
    let length = cache.len(0);
    let refused = CacheError::OtherText { row: 0, tokens: length, snapshot: middle };
    assert_eq!(cache.truncate(0, &second), Err(refused));
    let other = (text[length] + 1) % golden.config.vocab_size as u32;
    logits(model, Batch::new(vec![vec![other; middle]]), Some(&mut cache));
    assert!(cache.truncate(0, &second).is_err(), "a snapshot of another text is refused");
    assert_eq!(cache.len(0), length + middle, "a refusal leaves the row as it was");

    let mut rows = Cache::new(model, 2);
    logits(model, Batch::new(vec![text[..5].to_vec(), text[5..9].to_vec()]), Some(&mut rows));
    rows.restore(1, &first);
    let both = logits(model, Batch::new(vec![text[5..8].to_vec(), text[early..n].to_vec()]), Some(&mut rows));
    golden.check_logits(5, &both.clone().narrow(0, 0, 3), "beside a restored row");
    golden.check_logits(early, &both.narrow(0, 3, n - early), "restored into a row of another cache");
    if n == golden.cache_after {
        golden.check_cache(&rows, 1, "restored into a row of another cache");
    }
}
