//! How much a model may think: `reasoning_effort` and `thinking_token_budget`, and the constraint that ends its thoughts.

use std::sync::Arc;

use serde_json::{Map, Value};
use spark_api::{ConstraintError, TokenConstraint, TokenId};
use spark_text::{ReasoningStart, THINK_CLOSE, THINK_OPEN, THINKING_SWITCH, Tokenizer};

use crate::ApiError;
use crate::body::Body;
use crate::tools::Formats;

const EFFORT: &str = "reasoning_effort";
const BUDGET: &str = "thinking_token_budget";
/// Tokens of thought that an effort allows; `None`: as many as the answer has room for.
const EFFORTS: [(&str, Option<usize>); 6] = [
    ("minimal", Some(256)),
    ("low", Some(1024)),
    ("medium", Some(8192)),
    ("high", None),
    ("xhigh", None),
    ("max", None),
];

/// Reads both fields; returns the budget and sets the template's switch, unless the request has set that itself.
///
/// # Errors
/// An unknown effort, or one that this model cannot make.
pub(crate) fn read(
    body: &mut Body,
    formats: Formats,
    kwargs: &mut Map<String, Value>,
) -> Result<Option<usize>, ApiError> {
    // -1 is vLLM's way to say "no bound".
    let budget = body.integer(BUDGET, -1, i64::from(i32::MAX))?;
    if budget.is_some() && !formats.reasoning {
        return Err(ApiError::field(BUDGET, format!("{BUDGET}: this model does not think; leave it out")));
    }
    let of_effort = match body.string(EFFORT, 64)? {
        Some(effort) => read_effort(&effort, formats, kwargs)?,
        None => None,
    };
    Ok(match budget {
        Some(budget) => usize::try_from(budget).ok(),
        None => of_effort,
    })
}

fn read_effort(
    effort: &str,
    formats: Formats,
    kwargs: &mut Map<String, Value>,
) -> Result<Option<usize>, ApiError> {
    let refuse = |rule: &str| Err(ApiError::field(EFFORT, format!("{EFFORT} is {effort:?}; {rule}")));
    let found = EFFORTS.iter().find(|(name, _)| *name == effort);
    match (effort, found) {
        ("none", _) if !formats.reasoning => return Ok(None),
        ("none", _) if !formats.thinking_switch => {
            return refuse("this model always thinks: thinking_token_budget can shorten that");
        }
        ("none", _) | (_, Some(_)) => {}
        _ => {
            return refuse(
                "it must be \"none\", \"minimal\", \"low\", \"medium\", \"high\", \"xhigh\" or \"max\"",
            );
        }
    }
    if !formats.reasoning {
        return refuse("this model does not think; leave it out");
    }
    if formats.thinking_switch {
        kwargs.entry(THINKING_SWITCH).or_insert(Value::Bool(found.is_some()));
    }
    // Templates that know more than a switch read this name.
    kwargs.entry(EFFORT).or_insert_with(|| Value::from(effort));
    Ok(found.and_then(|(_, budget)| *budget))
}

/// Ends the thoughts of a sequence after so many tokens, by allowing nothing but `</think>`. Another constraint, on the
/// answer behind it, holds all the while.
pub(crate) struct ThinkingBudget<C> {
    answer: Option<C>,
    open: TokenId,
    close: TokenId,
    newlines: Arc<[TokenId]>,
    place: Place,
    left: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Before,
    Inside,
    Behind,
}

impl<C: TokenConstraint> ThinkingBudget<C> {
    /// A budget of so many tokens for a sequence that begins with `start`.
    ///
    /// # Errors
    /// When the markers are no tokens: then there is no one token that ends the thoughts.
    pub(crate) fn new(
        tokenizer: &Tokenizer,
        start: ReasoningStart,
        budget: usize,
        answer: Option<C>,
    ) -> Result<Self, ApiError> {
        let (Some(open), Some(close)) =
            (tokenizer.token_to_id(THINK_OPEN), tokenizer.token_to_id(THINK_CLOSE))
        else {
            let message =
                format!("{BUDGET}: {THINK_OPEN} and {THINK_CLOSE} are no tokens of this model; leave it out");
            return Err(ApiError::field(BUDGET, message));
        };
        let newlines = ["\n", "\n\n"].into_iter().filter_map(|text| match tokenizer.encode_trusted(text) {
            Ok(ids) if ids.len() == 1 => ids.first().copied(),
            _ => None,
        });
        let place = match start {
            ReasoningStart::Inside => Place::Inside,
            ReasoningStart::Outside => Place::Before,
        };
        Ok(Self { answer, open, close, newlines: newlines.collect(), place, left: budget })
    }
}

impl<C: TokenConstraint> TokenConstraint for ThinkingBudget<C> {
    fn mask(&mut self, allowed: &mut [u32]) -> Result<(), ConstraintError> {
        if let Some(answer) = &mut self.answer {
            answer.mask(allowed)?;
        }
        if self.place == Place::Inside && self.left == 0 {
            let close = self.close as usize;
            for (i, word) in allowed.iter_mut().enumerate() {
                *word &= if i == close / 32 { 1 << (close % 32) } else { 0 };
            }
        }
        Ok(())
    }

    fn commit(&mut self, token: TokenId) -> Result<bool, ConstraintError> {
        self.place = match self.place {
            Place::Before if token == self.open => Place::Inside,
            Place::Before if self.newlines.contains(&token) => Place::Before,
            Place::Inside if token != self.close => {
                self.left = self.left.saturating_sub(1);
                Place::Inside
            }
            Place::Before | Place::Inside | Place::Behind => Place::Behind,
        };
        match &mut self.answer {
            Some(answer) => answer.commit(token),
            None => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read_with(body: Value, thinks: bool, has_switch: bool) -> Result<(Option<usize>, Value), ApiError> {
        let formats = Formats { tools: None, reasoning: thinks, thinking_switch: has_switch };
        let mut kwargs = Map::new();
        let budget = read(&mut Body::new(body)?, formats, &mut kwargs)?;
        Ok((budget, Value::Object(kwargs)))
    }

    #[test]
    fn an_effort_is_a_switch_and_a_budget() {
        let on = |effort: &str| json!({"enable_thinking": true, "reasoning_effort": effort});
        for (body, wanted) in [
            (json!({}), (None, json!({}))),
            (json!({"reasoning_effort": "low"}), (Some(1024), on("low"))),
            (json!({"reasoning_effort": "high"}), (None, on("high"))),
            (json!({"reasoning_effort": "high", "thinking_token_budget": 7}), (Some(7), on("high"))),
            (json!({"reasoning_effort": "low", "thinking_token_budget": -1}), (None, on("low"))),
            (json!({"thinking_token_budget": 0}), (Some(0), json!({}))),
            (
                json!({"reasoning_effort": "none"}),
                (None, json!({"enable_thinking": false, "reasoning_effort": "none"})),
            ),
        ] {
            assert_eq!(read_with(body.clone(), true, true), Ok(wanted), "{body}");
        }
        assert_eq!(read_with(json!({"reasoning_effort": "none"}), false, false), Ok((None, json!({}))));
    }

    #[test]
    fn what_the_model_cannot_do_is_refused_by_name() {
        for (body, thinks, rule) in [
            (json!({"reasoning_effort": "none"}), true, "always thinks"),
            (json!({"reasoning_effort": "much"}), true, "must be \"none\""),
            (json!({"reasoning_effort": "low"}), false, "does not think"),
            (json!({"thinking_token_budget": 5}), false, "does not think"),
            (json!({"thinking_token_budget": -2}), true, "between -1"),
        ] {
            let error = read_with(body.clone(), thinks, false).unwrap_err();
            assert!(error.to_string().contains(rule), "{error}");
            let name = body.as_object().unwrap().keys().next().unwrap().clone();
            assert_eq!(error.to_json()["error"]["param"], json!(name));
        }
    }
}
