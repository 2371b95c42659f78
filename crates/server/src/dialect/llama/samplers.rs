//! `samplers` of llama-server: which of them are used, and in which order. What they do is the engine's.

use serde_json::{Map, Value, json};

use crate::ApiError;
use crate::body::{Body, wrong_type};

const NAME: &str = "samplers";
/// llama-server's, in its order, with the letters that it has for them.
const THEIRS: [(&str, char); 9] = [
    ("penalties", 'e'),
    ("dry", 'd'),
    ("top_n_sigma", 's'),
    ("top_k", 'k'),
    ("typ_p", 'y'),
    ("top_p", 'p'),
    ("min_p", 'm'),
    ("xtc", 'x'),
    ("temperature", 't'),
];
/// How many are read: each may stand once, so where there are more the order is wrong.
const MAX_READ: usize = THEIRS.len() + 1;
/// Those that are here too, in the engine's order.
pub(super) const OURS: [&str; 5] = ["penalties", "temperature", "min_p", "top_k", "top_p"];
/// Fields of a completion that are penalties, and the values that switch them off.
pub(super) const PENALTIES: [(&str, f32); 3] =
    [("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)];

/// The samplers that a request wants.
pub(super) struct Samplers(Vec<&'static str>);

impl Samplers {
    /// Reads `samplers`: a list of names or a string of letters. Names of samplers that are not here may stand in it,
    /// because the fields that would switch them on are refused.
    ///
    /// # Errors
    /// An unknown name, one that stands there twice, or an order that is neither llama-server's nor the engine's.
    pub(super) fn read(body: &mut Body) -> Result<Option<Self>, ApiError> {
        let names: Vec<&'static str> = match body.take(NAME) {
            None => return Ok(None),
            Some(Value::String(letters)) => {
                letters.chars().take(MAX_READ).map(by_letter).collect::<Result<_, _>>()?
            }
            Some(Value::Array(items)) => {
                items.iter().take(MAX_READ).map(by_name).collect::<Result<_, _>>()?
            }
            Some(other) => return Err(wrong_type(NAME, "a list of names or a string of letters", &other)),
        };
        let theirs = THEIRS.map(|(name, _)| name);
        let used: Vec<_> = names.iter().copied().filter(|name| OURS.contains(name)).collect();
        if is_in_order(&names, &theirs) || is_in_order(&used, &OURS) {
            return Ok(Some(Self(used)));
        }
        let message = format!(
            "{NAME}: the order cannot be changed; each may stand once, as in {} or {}",
            theirs.join(", "),
            OURS.join(", ")
        );
        Err(ApiError::field(NAME, message))
    }

    /// Whoever names samplers does without the others.
    pub(super) fn switch_off_others(&self, fields: &mut Map<String, Value>) {
        for (name, neutral) in [("temperature", 1.0), ("top_k", 0.0), ("top_p", 1.0), ("min_p", 0.0)] {
            if !self.0.contains(&name) {
                fields.insert(name.to_owned(), json!(neutral));
            }
        }
        if !self.0.contains(&"penalties") {
            without_penalties(fields);
        }
    }
}

/// Switches all penalties off, those too that the operator has chosen.
pub(super) fn without_penalties(fields: &mut Map<String, Value>) {
    fields.extend(PENALTIES.map(|(name, neutral)| (name.to_owned(), json!(neutral))));
}

fn is_in_order(names: &[&str], order: &[&str]) -> bool {
    let mut rest = order.iter();
    names.iter().all(|name| rest.any(|known| known == name))
}

fn by_letter(letter: char) -> Result<&'static str, ApiError> {
    let found = THEIRS.iter().find(|(_, known)| *known == letter);
    found.map(|(name, _)| *name).ok_or_else(|| unknown(&letter.to_string()))
}

fn by_name(item: &Value) -> Result<&'static str, ApiError> {
    let Value::String(name) = item else {
        return Err(wrong_type(NAME, "a list of names or a string of letters", item));
    };
    let canonical = if name == "typical_p" { "typ_p" } else { name };
    let found = THEIRS.iter().find(|(known, _)| *known == canonical);
    found.map(|(name, _)| *name).ok_or_else(|| unknown(name))
}

fn unknown(name: &str) -> ApiError {
    let name: String = name.chars().take(64).collect();
    let known = THEIRS.map(|(name, letter)| format!("{name} ({letter})")).join(", ");
    ApiError::field(NAME, format!("{NAME} has {name:?}; known here: {known}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(samplers: &Value) -> Result<Option<Vec<&'static str>>, ApiError> {
        let samplers = Samplers::read(&mut Body::new(json!({"samplers": samplers}))?)?;
        Ok(samplers.map(|samplers| samplers.0))
    }

    #[test]
    fn both_orders_and_parts_of_them_are_taken() {
        let all = ["penalties", "top_k", "top_p", "min_p", "temperature"];
        for (samplers, used) in [
            (json!(null), None),
            (json!(THEIRS.map(|(name, _)| name)), Some(&all[..])),
            (json!("edskypmxt"), Some(&all[..])),
            (json!(["dry", "top_k", "typical_p", "top_p", "min_p", "xtc", "temperature"]), Some(&all[1..])),
            (json!(OURS), Some(&OURS[..])),
            (json!(["temperature", "top_p"]), Some(&["temperature", "top_p"])),
            (json!("kt"), Some(&["top_k", "temperature"])),
            (json!([]), Some(&[])),
        ] {
            assert_eq!(read(&samplers).unwrap(), used.map(<[_]>::to_vec), "{samplers}");
        }
    }

    #[test]
    fn other_orders_and_names_are_refused() {
        for samplers in [
            json!(["top_p", "top_k"]),
            json!(["top_k", "top_k"]),
            json!("tt"),
            json!(["infill"]),
            json!("z"),
            json!([1]),
            json!({}),
        ] {
            let error = read(&samplers).expect_err(&samplers.to_string()).to_json();
            assert_eq!(error["error"]["param"], NAME);
        }
    }

    #[test]
    fn what_is_not_named_is_off() {
        let mut fields = Map::new();
        fields.insert("top_k".into(), json!(5));
        fields.insert("min_p".into(), json!(0.1));
        Samplers(vec!["top_k", "temperature"]).switch_off_others(&mut fields);
        let off = json!({"top_k": 5, "min_p": 0.0, "top_p": 1.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0});
        assert_eq!(Value::Object(fields), off);
    }
}
