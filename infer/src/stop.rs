//! Stop strings in a stream of text. A stop string may begin in one token and end in another, so text that could
//! be its beginning is held back until it is known not to be.

/// Cuts a stream of text before the first of some stop strings.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Watches for `stops`; empty strings are left out, as they would stop at once.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), ..Self::default() }
    }

    /// Takes the next piece of text and returns what may be shown. After a stop string nothing more is returned.
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop string has come.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The text still held back: call it when the stream ends without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length in bytes of the longest end of `text` that is a beginning of `stop` (shorter than the whole of it).
pub(crate) fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(i, _)| i).rev().find(|&n| text.ends_with(&stop[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let mut stop = StopStrings::new(stops.iter().map(|s| s.to_string()));
        let shown = pieces.iter().map(|p| stop.push(p)).collect();
        let rest = stop.finish();
        (shown, rest, stop.stopped())
    }

    #[test]
    fn a_stop_split_over_pieces_never_shows() {
        assert_eq!(
            run(&["\nUser:"], &["Hi.", "\n", "Us", "er", ": no"]),
            (vec!["Hi.".into(), "".into(), "".into(), "".into(), "".into()], "".into(), true)
        );
    }

    #[test]
    fn a_false_beginning_comes_later_and_whole() {
        assert_eq!(run(&["aab"], &["a", "a", "a", "c"]).0.concat(), "aaac");
        assert_eq!(
            run(&["aab"], &["a", "a", "a", "b", "x"]),
            (vec!["".into(), "".into(), "a".into(), "".into(), "".into()], "".into(), true)
        );
        assert_eq!(run(&["END"], &["the EN"]), (vec!["the ".into()], "EN".into(), false));
    }

    #[test]
    fn the_earliest_of_several_wins_and_multibyte_text_is_safe() {
        assert_eq!(run(&["上海", "b"], &["a上", "京上", "海b"]).0.concat(), "a上京");
        assert_eq!(run(&["xyz", "y"], &["axyz"]).0.concat(), "a");
        assert_eq!(run(&[""], &["all"]), (vec!["all".into()], "".into(), false));
    }

    #[test]
    fn every_split_of_a_text_gives_the_same() {
        let text = "one </s> two <|end|> three";
        for at in 0..=text.len() {
            for then in at..=text.len() {
                let (shown, rest, stopped) = run(&["<|end|>", "</x>"], &[&text[..at], &text[at..then], &text[then..]]);
                assert_eq!((shown.concat() + &rest, stopped), ("one </s> two ".into(), true));
            }
        }
    }
}
