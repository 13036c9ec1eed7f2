//! Where the reading of a prompt may be cut so that the cut changes no bit of the result.
//!
//! Lightning attention sums in blocks that end at multiples of [`BLOCK`] positions, so a cut there changes nothing; softmax
//! attention may be cut anywhere. A single token is no piece: it would go through the kernels of decoding, which sum in
//! another order. Only a text that is one token long is read that way.

use m1_kernels::lightning_attention::BLOCK;

/// Reading may be cut at multiples of this many tokens.
pub const STRIDE: usize = BLOCK;

/// The last place up to `end` at which a text of `total` tokens may be cut so that the rest is read as it would be
/// without the cut; 0 where there is none.
pub fn cut_before(end: usize, total: usize) -> usize {
    end.min(total.saturating_sub(2)) / STRIDE * STRIDE
}

/// Where the next piece of a text ends, which has been read up to `start` and ends at `total`, when about `budget` tokens
/// may be read at once. At most `BLOCK + 1` more are.
pub(crate) fn piece_end(start: usize, total: usize, budget: usize) -> usize {
    if total - start <= budget {
        return total;
    }
    let end = ((start + budget) / BLOCK * BLOCK).max((start + 2).next_multiple_of(BLOCK));
    if end + 1 >= total { total } else { end }
}

/// Ends of pieces for several texts, `(start, total)` each, that share `budget` tokens: a text that needs less than its
/// share leaves the rest to those that need more. No share is so small that a text would not get on.
pub(crate) fn shared_ends(texts: &[(usize, usize)], budget: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|&i| texts[i].1 - texts[i].0);
    let (mut left, mut ends) = (budget, vec![0; texts.len()]);
    for (done, &i) in order.iter().enumerate() {
        let (start, total) = texts[i];
        ends[i] = piece_end(start, total, left / (texts.len() - done));
        left = left.saturating_sub(ends[i] - start);
    }
    ends
}

/// Texts worth reading side by side with `budget` tokens: each should get a block.
pub(crate) fn most_texts(budget: usize) -> usize {
    (budget / BLOCK).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_blocks_and_none_is_a_single_token() {
        for total in 1..400 {
            for budget in [1, 2, 10, 63, 64, 65, 100, 128, 512] {
                for begin in [0, 1, 62, 63, 64, 65].into_iter().filter(|&b| b < total) {
                    let mut start = begin;
                    while start < total {
                        let end = piece_end(start, total, budget);
                        assert!(end > start && end <= total, "{begin} {total} {budget}");
                        assert!(end == total || end.is_multiple_of(BLOCK));
                        assert!(end - start > 1 || total - begin == 1, "{begin} {total} {budget}: {start}..{end}");
                        assert!(end - start <= budget + BLOCK + 1);
                        start = end;
                    }
                }
            }
        }
    }

    #[test]
    fn a_cut_leaves_two_tokens() {
        let cuts = [0, 1, 2, 65, 66, 67, 129, 130].map(|n| cut_before(n, n));
        assert_eq!(cuts, [0, 0, 0, 0, 64, 64, 64, 128]);
        assert_eq!((cut_before(64, 1000), cut_before(63, 1000), cut_before(500, 100)), (64, 0, 64));
    }

    #[test]
    fn what_a_short_text_leaves_goes_to_the_longer_ones() {
        assert_eq!(shared_ends(&[(0, 1000), (0, 20), (0, 300)], 512), [256, 20, 192]);
        assert_eq!(shared_ends(&[(0, 1000)], 512), [512]);
        assert_eq!(shared_ends(&[(0, 30), (0, 30)], 512), [30, 30]);
        assert_eq!(shared_ends(&[(0, 500), (64, 500)], 16), [64, 128]);
        assert_eq!((most_texts(16), most_texts(512)), (1, 8));
    }
}
