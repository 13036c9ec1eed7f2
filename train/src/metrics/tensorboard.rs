//! The numbers of a run as TensorBoard reads them: `events.out.tfevents.*`.
//!
//! An event file is a row of TFRecords (length, its checksum, a protobuf `Event`, its checksum). Only three kinds of
//! event are written: the version, the start of a session and scalars; their encoding is a few lines, so no protobuf
//! compiler is asked for. A resumed run starts a file of its own whose first event tells TensorBoard to forget the
//! steps that follow in older files: they are done again.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;

use super::Row;

/// An open event file.
#[derive(Debug)]
pub struct EventWriter {
    file: BufWriter<File>,
    path: PathBuf,
    prefix: String,
}

impl EventWriter {
    /// Starts an event file in `folder` for a run that has done `step` steps (0: a new run). Tags begin with `prefix`:
    /// `rl` gives `rl/reward`.
    pub fn create(folder: &Path, prefix: &str, step: u64) -> io::Result<Self> {
        let seconds = now() as u64;
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host: String = host.trim().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        let host = if host.is_empty() { "localhost" } else { &host };
        // TensorBoard reads a folder's files in the order of their names. Two of one second are told apart by a count.
        let (path, file) = (0..)
            .map(|n| folder.join(format!("events.out.tfevents.{seconds:010}.{host}.m1.{n}")))
            .find_map(|path| match File::create_new(&path) {
                Ok(file) => Some(Ok((path, file))),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => None,
                Err(e) => Some(Err(e)),
            })
            .expect("the counts do not end")?;
        let mut writer = Self { file: BufWriter::new(file), path, prefix: prefix.to_owned() };
        writer.event(0, |event| bytes(event, 3, b"brain.Event:2"))?;
        if step > 0 {
            // SessionLog { status: START }
            writer.event(step + 1, |event| bytes(event, 7, &[0x08, 1]))?;
        }
        writer.file.flush()?;
        Ok(writer)
    }

    /// Writes every number of a row: fields as `prefix/name`, those of a map as `prefix/name/key`. What is no number
    /// (NaN, an evaluation that was not made) is left out.
    pub fn push<R: Row>(&mut self, row: &R) -> io::Result<()> {
        let scalars = scalars(row)?;
        let prefix = self.prefix.clone();
        self.event(row.step(), |event| {
            let mut summary = Vec::new();
            for (name, number) in &scalars {
                let mut value = Vec::new();
                bytes(&mut value, 1, format!("{prefix}/{name}").as_bytes());
                value.push(2 << 3 | 5);
                value.extend((*number as f32).to_le_bytes());
                bytes(&mut summary, 1, &value);
            }
            bytes(event, 5, &summary);
        })?;
        // A reader follows the file while it grows.
        self.file.flush()
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn event(&mut self, step: u64, what: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let mut event = vec![1 << 3 | 1];
        event.extend(now().to_le_bytes());
        event.push(2 << 3);
        varint(&mut event, step);
        what(&mut event);
        let length = (event.len() as u64).to_le_bytes();
        self.file.write_all(&length)?;
        self.file.write_all(&masked_crc(&length).to_le_bytes())?;
        self.file.write_all(&event)?;
        self.file.write_all(&masked_crc(&event).to_le_bytes())
    }
}

/// The checksum of a TFRecord: CRC-32C, rotated and offset so that a checksum of checksums is none.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The numbers of a row by name, in the order of its fields, the step left out.
fn scalars(row: &impl Serialize) -> io::Result<Vec<(String, f64)>> {
    let mut all = Vec::new();
    if let Value::Object(fields) = serde_json::to_value(row)? {
        for (name, value) in fields.into_iter().filter(|(name, _)| name != "step") {
            match value {
                Value::Number(n) => all.extend(n.as_f64().map(|v| (name, v))),
                Value::Object(map) => {
                    all.extend(map.iter().filter_map(|(key, v)| Some((format!("{name}/{key}"), v.as_f64()?))));
                }
                _ => {}
            }
        }
    }
    Ok(all)
}

/// A protobuf field that is a text or a message.
fn bytes(out: &mut Vec<u8>, field: u8, data: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, data.len() as u64);
    out.extend(data);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::metrics::RlMetrics;

    /// A field of a protobuf message, as its number and what it holds.
    #[derive(Debug, PartialEq)]
    enum Field {
        Varint(u64),
        Double(f64),
        Float(f32),
        Bytes(Vec<u8>),
    }

    fn take_varint(data: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = data[0];
            *data = &data[1..];
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return value;
            }
        }
    }

    fn fields(mut data: &[u8]) -> Vec<(u64, Field)> {
        let mut all = Vec::new();
        while !data.is_empty() {
            let key = take_varint(&mut data);
            let take = |data: &mut &[u8], n: usize| {
                let (head, rest) = data.split_at(n);
                *data = rest;
                head.to_vec()
            };
            let field = match key & 7 {
                0 => Field::Varint(take_varint(&mut data)),
                1 => Field::Double(f64::from_le_bytes(take(&mut data, 8).try_into().unwrap())),
                2 => {
                    let n = take_varint(&mut data) as usize;
                    Field::Bytes(take(&mut data, n))
                }
                5 => Field::Float(f32::from_le_bytes(take(&mut data, 4).try_into().unwrap())),
                other => panic!("wire type {other}"),
            };
            all.push((key >> 3, field));
        }
        all
    }

    /// The events of a file as fields, its checksums verified.
    fn events(path: &Path) -> Vec<Vec<(u64, Field)>> {
        let data = fs::read(path).unwrap();
        let mut rest = &data[..];
        let mut all = Vec::new();
        while !rest.is_empty() {
            let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let unmask = |crc: u32| crc.wrapping_sub(0xa282_ead8).rotate_left(15);
            assert_eq!(unmask(word(8)), crc32c::crc32c(&rest[..8]));
            let event = &rest[12..12 + length];
            assert_eq!(unmask(word(12 + length)), crc32c::crc32c(event));
            all.push(fields(event));
            rest = &rest[16 + length..];
        }
        all
    }

    /// The scalars of an event by tag.
    fn tags(event: &[(u64, Field)]) -> BTreeMap<String, f32> {
        let Some((_, Field::Bytes(summary))) = event.iter().find(|(n, _)| *n == 5) else {
            return BTreeMap::new();
        };
        let value = |(n, field): (u64, Field)| {
            let Field::Bytes(value) = field else { panic!("a message") };
            assert_eq!(n, 1);
            match &fields(&value)[..] {
                [(1, Field::Bytes(tag)), (2, Field::Float(number))] => {
                    (String::from_utf8(tag.clone()).unwrap(), *number)
                }
                other => panic!("{other:?}"),
            }
        };
        fields(summary).into_iter().map(value).collect()
    }

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked_crc(&[0; 32]), 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }

    #[test]
    fn scalars_are_read_back_and_a_resumed_run_has_a_file_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let row = |step| RlMetrics {
            step,
            reward: step as f64 / 10.0,
            loss: f64::NAN,
            pass_rate_by_task: [("clock".to_owned(), 0.25)].into(),
            ..RlMetrics::default()
        };
        let mut first = EventWriter::create(dir.path(), "rl", 0).unwrap();
        (1..=300).for_each(|s| first.push(&row(s)).unwrap());
        let mut second = EventWriter::create(dir.path(), "rl", 200).unwrap();
        second.push(&RlMetrics { eval_pass_rate: Some(0.5), ..row(201) }).unwrap();
        assert!(first.path() < second.path(), "TensorBoard reads them in this order");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);

        let read = events(first.path());
        assert_eq!(read.len(), 301);
        assert_eq!(read[0][2], (3, Field::Bytes(b"brain.Event:2".to_vec())));
        assert_eq!(read[300][1], (2, Field::Varint(300)), "a step of two bytes");
        let (1, Field::Double(wall)) = read[300][0] else { panic!("wall time") };
        assert!((now() - wall).abs() < 600.0);
        let last = tags(&read[300]);
        assert_eq!(last["rl/reward"], 30.0);
        assert_eq!(last["rl/pass_rate_by_task/clock"], 0.25);
        assert!(!last.contains_key("rl/loss") && !last.contains_key("rl/eval_pass_rate"));
        assert!(!last.contains_key("rl/step"));

        let read = events(second.path());
        assert_eq!(read[1][1..], [(2, Field::Varint(201)), (7, Field::Bytes(vec![8, 1]))], "a session starts at 201");
        assert_eq!(tags(&read[2])["rl/eval_pass_rate"], 0.5);
    }
}
