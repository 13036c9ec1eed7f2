//! JSON read character by character, to know at every place whether it can still become valid and where one stands.
//! (RFC 8259; nesting up to [`DEPTH`].)

/// The deepest nesting, that of `serde_json`: what passes here every client can read.
const DEPTH: usize = 127;

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    /// A value.
    Value,
    /// A value, or the end of an array that just began.
    FirstItem,
    /// A key, or the end of an object that just began.
    FirstKey,
    /// A key.
    Key,
    /// The colon after a key.
    Colon,
    /// A comma or the end of what is open.
    After,
    /// More of a string.
    String {
        /// Whether it is a key.
        key: bool,
        escape: Escape,
    },
    /// More of a number.
    Number(Number),
    /// The rest of `true`, `false` or `null`.
    Word(&'static str),
    /// Nothing but blanks: the value is complete.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Escape {
    None,
    Backslash,
    /// So many hexadecimal digits are missing.
    Hex(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    Sign,
    Power,
}

/// The reader.
#[derive(Debug, Clone)]
pub(super) struct Json {
    at: At,
    /// What is open; true for objects.
    open: Vec<bool>,
}

/// The text can't become JSON any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotJson;

impl Json {
    /// Before the first character.
    pub(super) fn new() -> Self {
        Self { at: At::Value, open: Vec::new() }
    }

    /// What comes next.
    pub(super) fn at(&self) -> At {
        self.at
    }

    /// How many objects and arrays are open.
    pub(super) fn depth(&self) -> usize {
        self.open.len()
    }

    /// Whether the place is inside a string.
    pub(super) fn in_string(&self) -> bool {
        matches!(self.at, At::String { .. })
    }

    /// Takes the next character.
    pub(super) fn push(&mut self, c: char) -> Result<(), NotJson> {
        if let At::Number(number) = self.at {
            match number_after(number, c) {
                Some(next) => self.at = At::Number(next),
                None if matches!(number, Number::Zero | Number::Digits | Number::Fraction | Number::Power) => {
                    self.close_value(); // the character belongs to what follows the number
                    return self.push(c);
                }
                None => return Err(NotJson),
            }
            return Ok(());
        }
        if let At::String { key, escape } = self.at {
            return self.push_in_string(c, key, escape);
        }
        if let At::Word(rest) = self.at {
            let rest = rest.strip_prefix(c).ok_or(NotJson)?;
            if rest.is_empty() {
                self.close_value()
            } else {
                self.at = At::Word(rest)
            }
            return Ok(());
        }
        if matches!(c, ' ' | '\t' | '\n' | '\r') {
            return Ok(());
        }
        match (self.at, c) {
            (At::FirstItem, ']') | (At::FirstKey, '}') => self.close(),
            (At::Value | At::FirstItem, _) => self.open_value(c)?,
            (At::Key | At::FirstKey, '"') => self.at = At::String { key: true, escape: Escape::None },
            (At::Colon, ':') => self.at = At::Value,
            (At::After, ',') => self.at = if self.open.last() == Some(&true) { At::Key } else { At::Value },
            (At::After, '}') if self.open.last() == Some(&true) => self.close(),
            (At::After, ']') if self.open.last() == Some(&false) => self.close(),
            _ => return Err(NotJson),
        }
        Ok(())
    }

    fn push_in_string(&mut self, c: char, key: bool, escape: Escape) -> Result<(), NotJson> {
        let escape = match (escape, c) {
            (Escape::None, '"') => {
                if key {
                    self.at = At::Colon
                } else {
                    self.close_value()
                }
                return Ok(());
            }
            (Escape::None, '\\') => Escape::Backslash,
            (Escape::None, c) if c >= ' ' => Escape::None,
            (Escape::Backslash, 'u') => Escape::Hex(4),
            (Escape::Backslash, '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => Escape::None,
            (Escape::Hex(1), c) if c.is_ascii_hexdigit() => Escape::None,
            (Escape::Hex(n), c) if c.is_ascii_hexdigit() => Escape::Hex(n - 1),
            _ => return Err(NotJson),
        };
        self.at = At::String { key, escape };
        Ok(())
    }

    fn open_value(&mut self, c: char) -> Result<(), NotJson> {
        self.at = match c {
            '{' | '[' if self.open.len() == DEPTH => return Err(NotJson),
            '{' => {
                self.open.push(true);
                At::FirstKey
            }
            '[' => {
                self.open.push(false);
                At::FirstItem
            }
            '"' => At::String { key: false, escape: Escape::None },
            '-' => At::Number(Number::Minus),
            '0' => At::Number(Number::Zero),
            '1'..='9' => At::Number(Number::Digits),
            't' => At::Word("rue"),
            'f' => At::Word("alse"),
            'n' => At::Word("ull"),
            _ => return Err(NotJson),
        };
        Ok(())
    }

    fn close(&mut self) {
        self.open.pop();
        self.close_value();
    }

    fn close_value(&mut self) {
        self.at = if self.open.is_empty() { At::End } else { At::After };
    }
}

fn number_after(number: Number, c: char) -> Option<Number> {
    use Number::*;
    Some(match (number, c) {
        (Minus, '0') => Zero,
        (Minus, '1'..='9') | (Digits, '0'..='9') => Digits,
        (Zero | Digits, '.') => Point,
        (Point | Fraction, '0'..='9') => Fraction,
        (Zero | Digits | Fraction, 'e' | 'E') => Exponent,
        (Exponent, '+' | '-') => Sign,
        (Exponent | Sign | Power, '0'..='9') => Power,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether `text` and a blank after it (which ends a number) are one JSON value.
    fn valid(text: &str) -> bool {
        let mut json = Json::new();
        text.chars().chain([' ']).all(|c| json.push(c).is_ok()) && json.at() == At::End
    }

    #[test]
    fn it_agrees_with_serde_json() {
        let good = [
            r#"{"a": [1, -2.5e+3, 0, 0.1, 1E5, true, false, null, "x\"\\\/\b\f\n\r\té"], "b": {}, "c": []}"#,
            r#""\u00e9 <tag>""#,
            " [ [ ] , { } ] ",
            "-0",
            "{\"\":{\"\":\"\"}}",
        ];
        let bad = [
            "",
            "{",
            "}",
            "[1,]",
            "{\"a\":1,}",
            "{\"a\"}",
            "{a:1}",
            "01",
            "1.",
            ".5",
            "-",
            "+1",
            "1e",
            "1e+",
            "tru",
            "truex",
            "nul",
            "\"\\x\"",
            "\"\\u12g4\"",
            "\"a\nb\"",
            "[1}",
            "{\"a\":1]",
            "1 2",
            "{} x",
            "[1 2]",
            "{\"a\" 1}",
            "'a'",
            "NaN",
            "\"",
            "{,}",
            "[,]",
            "{1:2}",
        ];
        for text in good.iter().chain(&bad) {
            assert_eq!(valid(text), serde_json::from_str::<serde_json::Value>(text).is_ok(), "{text}");
        }
        assert!(good.iter().all(|text| valid(text)) && !bad.iter().any(|text| valid(text)));
    }

    #[test]
    fn every_mutation_of_a_text_is_judged_as_serde_json_does() {
        let text = r#"{"k": [1, -0.5e3, "a\u0041\n", null], "m": {"x": true}}"#;
        for at in 0..text.len() {
            for with in
                ["", "\"", "{", "}", "[", "]", ",", ":", "0", "1", "-", ".", "e", "\\", " ", "\n", "t", "u", "é"]
            {
                let mut changed = text.to_string();
                changed.replace_range(at..at + 1, with);
                let wanted = serde_json::from_str::<serde_json::Value>(&changed).is_ok();
                assert_eq!(valid(&changed), wanted, "{changed}");
            }
        }
    }

    #[test]
    fn nesting_has_a_bound() {
        let nested = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert!(valid(&nested(DEPTH)) && serde_json::from_str::<serde_json::Value>(&nested(DEPTH)).is_ok());
        assert!(!valid(&nested(DEPTH + 1)) && serde_json::from_str::<serde_json::Value>(&nested(DEPTH + 1)).is_err());
    }
}
