//! JSON objects as Go's encoding/json reads them: keys in any case, unknown keys ignored, the last duplicate wins.

use std::fmt;

use crate::net::cut;
use crate::words::written_out;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The fields of an object in the order they came, duplicates included.
#[derive(Debug, Default)]
pub struct Fields<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Fields<'a> {
    /// Reads one JSON object; the error says where it is broken.
    pub fn parse(text: &'a [u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(text)
    }

    /// The last value whose key is `name` in any case; `null` counts as absent.
    pub fn get(&self, name: &str) -> Option<&'a RawValue> {
        let found = self.0.iter().rfind(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| *value).filter(|value| value.get() != "null")
    }

    /// Keys that are none of `known`, in any case: each once, and cut where it is longer than anybody reads.
    pub fn unknown(&self, known: &[&str]) -> Vec<String> {
        let mut found: Vec<&str> = Vec::new();
        for (key, _) in &self.0 {
            if !known.iter().chain(&found).any(|name| name.eq_ignore_ascii_case(key)) {
                found.push(key);
            }
        }
        found.into_iter().map(|key| written_out(&cut(key), &[])).collect()
    }

    /// True when a key is `name` in any case, even with the value `null`.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(key, _)| key.eq_ignore_ascii_case(name))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Vec<(String, &'de RawValue)>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(fields)
            }
        }
        d.deserialize_map(Object).map(Fields)
    }
}
