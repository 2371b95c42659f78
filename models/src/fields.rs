//! Typed access to the fields of a JSON object, with errors that name the field. Knows no model.

use serde_json::Value;

use crate::{Error, Result};

/// Typed access to one JSON object, with errors that name the field.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub(crate) value: &'a Value,
    pub(crate) path: &'static str,
}

/// No size in a real configuration comes near this; it keeps products of a few sizes inside 64 bits.
const MAX_SIZE: u64 = 1 << 24;

impl<'a> Fields<'a> {
    pub(crate) fn error(&self, field: &str, problem: impl Into<String>) -> Error {
        Error::config(format!("{}{field}", self.path), problem)
    }

    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.value.get(field).filter(|value| !value.is_null())
    }

    pub(crate) fn child(&self, field: &str, path: &'static str) -> Result<Fields<'a>> {
        match self.get(field) {
            Some(value @ Value::Object(_)) => Ok(Fields { value, path }),
            _ => Err(self.error(field, "missing, or not an object")),
        }
    }

    /// A size; 0 is none.
    pub(crate) fn size(&self, field: &str) -> Result<usize> {
        let value = self.get(field).ok_or_else(|| self.error(field, "missing"))?;
        match value.as_u64() {
            Some(n) if (1..=MAX_SIZE).contains(&n) => Ok(n as usize),
            _ => Err(self.error(field, format!("{value} is not a whole number between 1 and {MAX_SIZE}"))),
        }
    }

    /// A size below a tighter bound, for what is counted one by one or multiplied several times.
    pub(crate) fn small_size(&self, field: &str, most: usize) -> Result<usize> {
        match self.size(field)? {
            n if n <= most => Ok(n),
            n => Err(self.error(field, format!("{n} is over {most}"))),
        }
    }

    pub(crate) fn size_or(&self, field: &str, default: usize) -> Result<usize> {
        if self.get(field).is_some() { self.size(field) } else { Ok(default) }
    }

    pub(crate) fn sizes(&self, field: &str) -> Result<Vec<usize>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let items = value.as_array().ok_or_else(|| self.error(field, "must be a list of whole numbers"))?;
        let size = |item: &Value| item.as_u64().filter(|&n| n <= MAX_SIZE).map(|n| n as usize);
        items
            .iter()
            .map(|i| size(i).ok_or_else(|| self.error(field, format!("{i} is not a whole number"))))
            .collect()
    }

    pub(crate) fn float(&self, field: &str) -> Result<f32> {
        let value = self.get(field).ok_or_else(|| self.error(field, "missing"))?;
        let number = value.as_f64().filter(|x| x.is_finite() && *x >= 0.0);
        number
            .map(|x| x as f32)
            .ok_or_else(|| self.error(field, format!("{value} is not a non-negative number")))
    }

    pub(crate) fn float_or(&self, field: &str, default: f32) -> Result<f32> {
        if self.get(field).is_some() { self.float(field) } else { Ok(default) }
    }

    pub(crate) fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => {
                value.as_bool().ok_or_else(|| self.error(field, format!("{value} is not true or false")))
            }
        }
    }

    pub(crate) fn string(&self, field: &str) -> Result<String> {
        let value = self.get(field).ok_or_else(|| self.error(field, "missing"))?;
        value.as_str().map(str::to_owned).ok_or_else(|| self.error(field, format!("{value} is not a string")))
    }

    pub(crate) fn token(&self, field: &str) -> Result<u32> {
        let value = self.get(field).ok_or_else(|| self.error(field, "missing"))?;
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| self.error(field, format!("{value} is not a token id")))
    }

    pub(crate) fn expect_str(&self, field: &str, only: &str) -> Result<()> {
        match self.get(field) {
            Some(value) if value.as_str() != Some(only) => {
                Err(self.error(field, format!("{value} is not supported, only {only:?} is")))
            }
            _ => Ok(()),
        }
    }
}
