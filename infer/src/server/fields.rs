//! The fields of a request's JSON object, taken out one by one. Whatever is left at the end is refused: a field is
//! honoured or named in an error, never ignored. `null` is as good as absent.

use super::error::ApiError;
use serde_json::{Map, Value};

/// What is left of an object.
#[derive(Debug)]
pub struct Fields {
    map: Map<String, Value>,
    /// Where the object stands, as `stream_options`; empty for the body itself.
    path: String,
}

impl Fields {
    /// The body of a request.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|e| ApiError::json(format!("the body is not UTF-8: {e}")))?;
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Self { map, path: String::new() }),
            Ok(other) => Err(ApiError::json(format!("the body is {}, and must be a JSON object", shown(&other)))),
            Err(e) => Err(ApiError::json(format!("the body is not JSON: {e}"))), // with line and column
        }
    }

    /// The full name of a field.
    pub fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_string() } else { format!("{}.{key}", self.path) }
    }

    /// Takes any value.
    pub fn value(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    /// Takes what `read` makes of a value; where that is nothing, the error says that the field must be `expected`.
    pub fn take<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| wrong(&self.name(key), &value, expected))
    }

    /// Takes a number.
    pub fn number(&mut self, key: &str) -> Result<Option<f32>, ApiError> {
        self.take(key, "a number", |value| value.as_f64().map(|x| x as f32))
    }

    /// Takes a whole number from `range`.
    pub fn whole(&mut self, key: &str, range: std::ops::RangeInclusive<usize>) -> Result<Option<usize>, ApiError> {
        let (least, most) = (*range.start(), *range.end());
        let expected = if most == usize::MAX {
            format!("a whole number from {least} on")
        } else {
            format!("a whole number from {least} to {most}")
        };
        let read = |value: &Value| usize::try_from(value.as_u64()?).ok().filter(|n| range.contains(n));
        self.take(key, &expected, read)
    }

    /// Takes true or false.
    pub fn flag(&mut self, key: &str) -> Result<Option<bool>, ApiError> {
        self.take(key, "true or false", Value::as_bool)
    }

    /// Takes a text.
    pub fn text(&mut self, key: &str) -> Result<Option<String>, ApiError> {
        self.take(key, "a string", |value| value.as_str().map(str::to_string))
    }

    /// Takes a list.
    pub fn list(&mut self, key: &str) -> Result<Option<Vec<Value>>, ApiError> {
        self.take(key, "a list", |value| value.as_array().cloned())
    }

    /// Takes an object, whose own fields are to be taken.
    pub fn object(&mut self, key: &str) -> Result<Option<Self>, ApiError> {
        let path = self.name(key);
        let map = self.take(key, "an object", |value| value.as_object().cloned())?;
        Ok(map.map(|map| Self { map, path }))
    }

    /// Refuses a field of OpenAI's that would change the output, unless its value is `harmless`.
    pub fn refuse(&mut self, key: &str, why: &str, harmless: impl Fn(&Value) -> bool) -> Result<(), ApiError> {
        match self.value(key) {
            Some(value) if !harmless(&value) => Err(ApiError::unsupported(self.name(key), why)),
            _ => Ok(()),
        }
    }

    /// Refuses what was not taken.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            Some((key, _)) => Err(ApiError::unknown(self.name(key))),
            None => Ok(()),
        }
    }
}

/// A field with a wrong value.
pub fn wrong(name: &str, value: &Value, expected: &str) -> ApiError {
    ApiError::field(name, format!("{name} is {}, and must be {expected}", shown(value)))
}

/// A value in one short piece.
pub fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn a_body_that_is_no_object_says_where() {
        let message = |body: &[u8]| Fields::parse(body).unwrap_err().message;
        assert!(message(b"{\"a\": 1,\n \"b\": }").contains("line 2 column 7"), "{}", message(b"{\"a\": 1,\n \"b\": }"));
        assert!(message(b"").contains("not JSON"));
        assert!(message(b"[1]").contains("the body is [1], and must be a JSON object"));
        assert!(message(b"{\"\xff\": 1}").contains("not UTF-8"));
        assert!(message(&[b"{\"a\":".repeat(500), b"1".to_vec()].concat()).contains("recursion limit"));
    }

    #[test]
    fn what_is_not_taken_is_refused_by_name() {
        let mut f = fields(r#"{"a": 1, "b": null, "c": {"d": true, "e": 2}}"#);
        assert_eq!(f.whole("a", 0..=5), Ok(Some(1)));
        let mut c = f.object("c").unwrap().unwrap();
        assert_eq!(c.flag("d"), Ok(Some(true)));
        let error = c.finish().unwrap_err();
        assert_eq!((error.param.as_deref(), error.code), (Some("c.e"), Some("unknown_parameter")));
        assert_eq!(f.finish(), Ok(()));
    }

    #[test]
    fn wrong_values_name_the_field_and_what_would_be_right() {
        let mut f =
            fields(&format!(r#"{{"n": 0, "t": "hot", "m": 1.5, "big": -1, "s": [{}]}}"#, "1,".repeat(99) + "1"));
        let message = |key: &str, error: ApiError| {
            assert_eq!(error.param.as_deref(), Some(key));
            error.message
        };
        let n = f.whole("n", 1..=128).unwrap_err();
        assert_eq!(message("n", n), "n is 0, and must be a whole number from 1 to 128");
        let t = f.number("t").unwrap_err();
        assert_eq!(message("t", t), "t is \"hot\", and must be a number");
        let m = f.whole("m", 1..=usize::MAX).unwrap_err();
        assert_eq!(message("m", m), "m is 1.5, and must be a whole number from 1 on");
        assert!(f.whole("big", 0..=usize::MAX).is_err());
        let s = f.text("s").unwrap_err();
        assert!(message("s", s).ends_with("…, and must be a string"));
    }

    #[test]
    fn fields_that_would_change_the_output_are_refused_unless_they_ask_for_nothing() {
        let mut f = fields(r#"{"best_of": 1, "suffix": "x"}"#);
        assert_eq!(f.refuse("best_of", "why", |v| v == 1), Ok(()));
        let error = f.refuse("suffix", "why", |_| false).unwrap_err();
        assert_eq!(error.message, "suffix is not supported: why");
        assert_eq!(error.code, Some("unsupported_parameter"));
    }
}
