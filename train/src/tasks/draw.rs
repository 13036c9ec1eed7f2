//! Randomness for the data: a ChaCha8 stream addressed by (seed, index, domain), the same on every machine and in every
//! version. The helpers are written out here because `rand` does not promise equal draws across its versions.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A stream of random draws.
pub struct Draw(ChaCha8Rng);

impl Draw {
    /// The stream of (seed, index, domain). The ChaCha key is seed, index and [`text_hash`] of the domain, each as
    /// 8 little-endian bytes, and 8 zero bytes.
    pub fn new(seed: u64, index: u64, domain: &str) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&index.to_le_bytes());
        key[16..24].copy_from_slice(&text_hash(domain).to_le_bytes());
        Self(ChaCha8Rng::from_seed(key))
    }

    /// A number in 0..n, 0 for n = 0. (The bias of the multiplication is below n / 2^64.)
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    /// A number in low..=high.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below((high - low + 1) as usize) as u64
    }

    /// A number of exactly that many decimal digits; of one digit, 0 does not come up.
    pub fn digits(&mut self, count: u32) -> u64 {
        self.range(10u64.pow(count - 1), 10u64.pow(count) - 1)
    }

    /// True in `percent` of 100 draws.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of the items.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// The index of one of the weights, drawn in proportion to them; 0 if all are zero.
    pub fn weighted(&mut self, weights: &[f64]) -> usize {
        let unit = (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = unit * weights.iter().sum::<f64>();
        for (index, weight) in weights.iter().enumerate() {
            left -= weight;
            if left < 0.0 {
                return index;
            }
        }
        weights.iter().rposition(|&weight| weight > 0.0).unwrap_or(0)
    }

    /// Puts the items in random order (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// 64-bit FNV-1a, mixed once more (SplitMix64's finisher) so that its low bits may be used as a small hash.
pub fn text_hash(text: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_fixed_and_apart() {
        let eight = |seed, index, domain: &str| {
            let mut draw = Draw::new(seed, index, domain);
            (0..8).map(|_| draw.below(1000)).collect::<Vec<_>>()
        };
        assert_eq!(eight(1, 2, "a"), eight(1, 2, "a"));
        assert_ne!(eight(1, 2, "a"), eight(2, 2, "a"));
        assert_ne!(eight(1, 2, "a"), eight(1, 3, "a"));
        assert_ne!(eight(1, 2, "a"), eight(1, 2, "b"));
    }

    #[test]
    fn draws_stay_in_range_and_reach_its_ends() {
        let mut draw = Draw::new(3, 0, "range");
        let mut seen = [0; 10];
        for _ in 0..1000 {
            seen[draw.range(0, 9) as usize] += 1;
            assert!((10..=99).contains(&draw.digits(2)));
        }
        assert!(seen.iter().all(|&count| (60..=140).contains(&count)), "{seen:?}");
        let mut counts = [0; 3];
        (0..4000).for_each(|_| counts[draw.weighted(&[1.0, 0.0, 3.0])] += 1);
        assert!((850..1150).contains(&counts[0]) && counts[1] == 0, "{counts:?}");
        let mut items: Vec<_> = (0..20).collect();
        draw.shuffle(&mut items);
        assert_ne!(items, (0..20).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..20).collect::<Vec<_>>());
    }
}
