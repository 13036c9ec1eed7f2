//! The words that the tasks are about: few enough that a small model can learn how each is spelled.

/// Common nouns of 3 to 8 letters, at least ten to a length from 3 to 6.
pub(super) const WORDS: [&str; 96] = [
    "ant", "bee", "cat", "dog", "egg", "fox", "hat", "ice", "jar", "key", "owl", "pen", "sun", "tea", "van", //
    "apple", "beach", "berry", "bread", "chair", "daisy", "eagle", "field", "grass", "happy", "juice", "knee", "lemon",
    "mango", "night", "ocean", "piano", "queen", "river", "sheep", "table", "uncle", "wheel", "zebra", //
    "bear", "book", "cake", "deer", "duck", "fish", "goat", "hill", "iron", "kite", "lamp", "moon", "nest", "oven",
    "pear", "road", "seed", "tree", "wolf", "yard", //
    "banana", "bottle", "butter", "carrot", "cheese", "coffee", "dinner", "engine", "flower", "garden", "hammer",
    "island", "jungle", "kitten", "letter", "monkey", "orange", "pepper", "rabbit", "spring", "turtle",
    "window", //
    "balloon", "cabbage", "chicken", "giraffe", "mustard", "penguin", "village", "weather", //
    "bookshop", "calendar", "elephant", "mountain", "sandwich", "tomorrow", "umbrella",
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn words_are_distinct_and_plain() {
        assert_eq!(WORDS.iter().collect::<HashSet<_>>().len(), WORDS.len());
        assert!(WORDS.iter().all(|word| word.bytes().all(|b| b.is_ascii_lowercase())));
        for length in 3..=8 {
            assert!(WORDS.iter().filter(|word| word.len() == length).count() >= 7, "{length}");
        }
    }
}
