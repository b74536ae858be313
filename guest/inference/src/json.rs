//! JSON as a tree, read by `serde_json`.
//!
//! One type of value for every document, instead of a derived type each, keeps the guest small:
//! it saves 40 KB of readers and of the error messages of derived types.

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::fmt;

pub enum Json {
    /// null, true or false: nothing here asks for them.
    Other,
    Number(f64),
    Text(String),
    /// An array of numbers only (or an empty one): pixels come in thousands.
    Numbers(Vec<f64>),
    /// Any other array.
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    pub fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(text)
    }

    /// The value of a key, if this is an object that has it.
    pub fn get(&self, key: &str) -> Option<&Json> {
        match self {
            Self::Object(fields) => fields.iter().find(|(name, _)| name == key).map(|(_, v)| v),
            _ => None,
        }
    }

    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn numbers(&self) -> Option<&[f64]> {
        match self {
            Self::Numbers(numbers) => Some(numbers),
            _ => None,
        }
    }
}

/// A number as an unsigned integer, if it is one that `u32` holds.
pub fn integer(number: f64) -> Option<u32> {
    let integer = number as u32;
    (f64::from(integer) == number).then_some(integer)
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Other)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Json, E> {
        Ok(Json::Other)
    }

    fn visit_u64<E>(self, number: u64) -> Result<Json, E> {
        Ok(Json::Number(number as f64))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Json, E> {
        Ok(Json::Number(number as f64))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Json, E> {
        Ok(Json::Number(number))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Json, E> {
        let mut copy = String::new();
        copy.try_reserve_exact(text.len()).map_err(|_| full())?;
        copy.push_str(text);
        Ok(Json::Text(copy))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Json, A::Error> {
        let (mut numbers, mut values) = (Vec::new(), Vec::new());
        while let Some(value) = elements.next_element()? {
            match value {
                Json::Number(number) if values.is_empty() => {
                    reserve(&mut numbers)?;
                    numbers.push(number);
                }
                value => {
                    for number in numbers.drain(..) {
                        reserve(&mut values)?;
                        values.push(Json::Number(number));
                    }
                    reserve(&mut values)?;
                    values.push(value);
                }
            }
        }
        Ok(if values.is_empty() { Json::Numbers(numbers) } else { Json::Array(values) })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Json, A::Error> {
        let mut fields = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            reserve(&mut fields)?;
            fields.push(entry);
        }
        Ok(Json::Object(fields))
    }
}

/// Room for one more value.
fn reserve<T, E: Error>(values: &mut Vec<T>) -> Result<(), E> {
    values.try_reserve(1).map_err(|_| full())
}

/// A document that memory can't hold is an error, not an abort.
fn full<E: Error>() -> E {
    E::custom("it does not fit in the guest's memory")
}
