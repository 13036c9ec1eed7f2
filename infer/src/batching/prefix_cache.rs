//! Beginnings of texts that have been read, kept for the texts that begin alike.
//!
//! Made for this architecture: a lightning state can be entered only where it was left, so the cache holds whole
//! snapshots at few places rather than blocks at all of them. What softmax layers keep is shared between snapshots and
//! with running sequences, and is counted once. The least recently used snapshot goes first.
//!
//! An *exact* snapshot is one that reading the text from its start passes through, at a place where reading may be cut
//! ([`super::pieces`]): going on from it gives the bits of reading everything. Others (ends of replies, which were decoded
//! token by token) are right within rounding.

use super::Prefix;
use super::pieces::cut_before;
use m1_model::{BlockName, Snapshot};
use std::collections::HashMap;
use std::sync::Arc;

/// What the cache holds and how it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheStats {
    /// Snapshots held.
    pub entries: usize,
    /// Bytes that they hold, shared blocks counted once.
    pub bytes: u64,
    /// The most bytes allowed.
    pub budget: u64,
    /// Texts looked up.
    pub lookups: u64,
    /// Of these, texts of which a beginning was there.
    pub hits: u64,
    /// Snapshots dropped for room.
    pub evictions: u64,
}

/// A beginning that was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// It, without logits.
    pub prefix: Arc<Prefix>,
    /// Whether going on from it gives the bits of reading everything.
    pub exact: bool,
}

#[derive(Debug)]
struct Entry {
    found: Found,
    used: u64,
}

/// The cache.
#[derive(Debug)]
pub struct PrefixCache {
    entries: Vec<Entry>,
    /// How many entries hold a block, and its bytes.
    blocks: HashMap<BlockName, (usize, u64)>,
    clock: u64,
    stats: CacheStats,
}

impl PrefixCache {
    /// An empty cache for `budget` bytes; with 0 it stays empty.
    pub fn new(budget: u64) -> Self {
        let stats = CacheStats { budget, ..CacheStats::default() };
        Self { entries: Vec::new(), blocks: HashMap::new(), clock: 0, stats }
    }

    /// The figures.
    pub fn stats(&self) -> CacheStats {
        CacheStats { entries: self.entries.len(), ..self.stats }
    }

    /// The longest beginning of `prompt` that is held and leaves at least one token to be read.
    pub fn find(&mut self, prompt: &[u32]) -> Option<Found> {
        self.clock += 1;
        self.stats.lookups += 1;
        let most = |found: &Found| {
            if found.exact { cut_before(prompt.len(), prompt.len()) } else { prompt.len().saturating_sub(1) }
        };
        let fits = |e: &&mut Entry| {
            let tokens = e.found.prefix.tokens();
            tokens.len() <= most(&e.found) && prompt.starts_with(tokens)
        };
        let best = self.entries.iter_mut().filter(fits).max_by_key(|e| e.found.prefix.tokens().len())?;
        best.used = self.clock;
        self.stats.hits += 1;
        Some(best.found.clone())
    }

    /// Keeps a snapshot, unless it is too large; others go for it where they must.
    pub fn insert(&mut self, snapshot: Snapshot, exact: bool) {
        self.clock += 1;
        if snapshot.tokens().is_empty() {
            return;
        }
        if let Some(at) = self.entries.iter().position(|e| e.found.prefix.tokens() == snapshot.tokens()) {
            // The exact one of two stays; of two alike the one that is here, which others may share already.
            if self.entries[at].found.exact || !exact {
                self.entries[at].used = self.clock;
                return;
            }
            self.remove(at);
        }
        let alone = snapshot.state_bytes() + snapshot.blocks().map(|(_, bytes)| bytes).sum::<u64>();
        if alone > self.stats.budget {
            return;
        }
        for (name, bytes) in snapshot.blocks() {
            let (holders, _) = self.blocks.entry(name).or_insert((0, bytes));
            *holders += 1;
            if *holders == 1 {
                self.stats.bytes += bytes;
            }
        }
        self.stats.bytes += snapshot.state_bytes();
        let prefix = Arc::new(Prefix { snapshot, logits: Vec::new() });
        self.entries.push(Entry { found: Found { prefix, exact }, used: self.clock });
        while self.stats.bytes > self.stats.budget {
            let Some((oldest, _)) = self.entries.iter().enumerate().min_by_key(|(_, e)| e.used) else { break };
            self.remove(oldest);
            self.stats.evictions += 1;
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.blocks.clear();
        self.stats.bytes = 0;
    }

    fn remove(&mut self, at: usize) {
        let Entry { found, .. } = self.entries.swap_remove(at);
        let snapshot = &found.prefix.snapshot;
        self.stats.bytes -= snapshot.state_bytes();
        for (name, bytes) in snapshot.blocks() {
            if let Some((holders, _)) = self.blocks.get_mut(&name) {
                *holders -= 1;
                if *holders == 0 {
                    self.blocks.remove(&name);
                    self.stats.bytes -= bytes;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Engine, tests::tiny};
    use m1_model::{Batch, Cache, Trace};

    /// Snapshots of one text on the way, at these lengths.
    fn snapshots(engine: &Engine, text: &[u32], at: &[usize]) -> Vec<Snapshot> {
        let model = engine.model();
        let mut cache = Cache::new(model, 1);
        let mut start = 0;
        at.iter()
            .map(|&end| {
                let batch = Batch::new(vec![text[start..end].to_vec()]).none();
                model.forward(&batch, Some(&mut cache), &mut Trace::none());
                start = end;
                cache.snapshot(0)
            })
            .collect()
    }

    fn text(n: usize, salt: usize) -> Vec<u32> {
        (0..n).map(|i| ((i * 7 + salt * 31 + i * i % 11) % 96) as u32).collect()
    }

    fn found(cache: &mut PrefixCache, prompt: &[u32]) -> Option<(usize, bool)> {
        cache.find(prompt).map(|f| (f.prefix.tokens().len(), f.exact))
    }

    #[test]
    fn the_longest_beginning_is_found_and_never_another_text() {
        let engine = tiny(96, 4000);
        let mut cache = PrefixCache::new(1 << 30);
        let a = text(700, 1);
        let [x, y, end]: [Snapshot; 3] = snapshots(&engine, &a, &[64, 320, 333]).try_into().unwrap();
        assert_eq!(found(&mut cache, &a), None);
        cache.insert(x, true);
        cache.insert(y, true);
        cache.insert(end, false);
        assert_eq!(found(&mut cache, &a), Some((333, false)));
        assert_eq!(found(&mut cache, &a[..334]), Some((333, false)));
        assert_eq!(found(&mut cache, &a[..333]), Some((320, true)));
        // An exact beginning leaves two tokens, an inexact one leaves one.
        assert_eq!(found(&mut cache, &a[..322]), Some((320, true)));
        assert_eq!(found(&mut cache, &a[..321]), Some((64, true)));
        assert_eq!(found(&mut cache, &a[..65]), None);
        // An edit in the middle, another text, and the empty one.
        let edited = [&a[..200], &text(300, 2)].concat();
        assert_eq!(found(&mut cache, &edited), Some((64, true)));
        let early = [&[(a[0] + 1) % 96], &a[1..]].concat();
        assert_eq!(found(&mut cache, &early), None);
        assert_eq!(found(&mut cache, &[]), None);
        let stats = cache.stats();
        assert_eq!((stats.lookups, stats.hits, stats.entries), (10, 6, 3));
    }

    #[test]
    fn the_exact_one_of_two_stays() {
        let engine = tiny(96, 4000);
        let a = text(200, 3);
        let one = || snapshots(&engine, &a, &[64]).remove(0);
        let mut cache = PrefixCache::new(1 << 30);
        cache.insert(one(), false);
        assert_eq!(found(&mut cache, &a), Some((64, false)));
        cache.insert(one(), true);
        assert_eq!(found(&mut cache, &a), Some((64, true)));
        cache.insert(one(), false);
        assert_eq!((found(&mut cache, &a), cache.stats().entries), (Some((64, true)), 1));
    }

    #[test]
    fn the_budget_holds_and_the_least_recently_used_goes() {
        let engine = tiny(96, 4000);
        let texts: Vec<Vec<u32>> = (0..4).map(|i| text(300, 10 + i)).collect();
        let made: Vec<Snapshot> = texts.iter().map(|t| snapshots(&engine, t, &[256]).remove(0)).collect();
        let size = made[0].state_bytes() + made[0].blocks().map(|b| b.1).sum::<u64>();
        let mut cache = PrefixCache::new(3 * size);
        made[..3].iter().for_each(|s| cache.insert(s.clone(), true));
        assert_eq!(cache.stats().bytes, 3 * size);
        assert!(cache.find(&texts[0]).is_some());
        cache.insert(made[3].clone(), true);
        assert_eq!((cache.stats().bytes, cache.stats().evictions), (3 * size, 1));
        let there: Vec<bool> = texts.iter().map(|t| cache.find(t).is_some()).collect();
        assert_eq!(there, [true, false, true, true]);
        // Too large for all of the cache: nothing goes for it.
        let mut small = PrefixCache::new(size);
        small.insert(made[0].clone(), true);
        let long = snapshots(&engine, &text(600, 1), &[576]).remove(0);
        small.insert(long, true);
        assert_eq!((small.stats().entries, small.stats().evictions), (1, 0));
        let mut none = PrefixCache::new(0);
        none.insert(made[0].clone(), true);
        assert_eq!(none.stats(), CacheStats::default());
        cache.clear();
        assert_eq!((cache.stats().entries, cache.stats().bytes), (0, 0));
    }

    #[test]
    fn shared_blocks_are_counted_once() {
        let engine = tiny(96, 4000);
        let a = text(600, 5);
        let made = snapshots(&engine, &a, &[256, 320, 576]);
        let (state, block) = (made[0].state_bytes(), made[0].blocks().next().unwrap().1);
        let mut cache = PrefixCache::new(1 << 30);
        // 256 tokens are a block; 320 share it and begin another, which is copied on the way to 576, which begins a third, twice
        // as large.
        let wanted = [state + block, 2 * (state + block), 3 * state + 5 * block];
        for (snapshot, bytes) in made.into_iter().zip(wanted) {
            cache.insert(snapshot, true);
            assert_eq!(cache.stats().bytes, bytes);
        }
        let (first, _) = cache.entries.iter().enumerate().min_by_key(|(_, e)| e.used).unwrap();
        cache.remove(first);
        assert_eq!(cache.stats().bytes, 2 * state + 5 * block, "the others hold its block still");
    }
}
