//! Recognises JSON character by character, so that a mistake is found where it stands. Makes no values.

/// Deepest nesting, as `serde_json`'s.
const MAX_DEPTH: usize = 128;

/// A recogniser of one JSON value.
#[derive(Debug, Default)]
pub(super) struct JsonScanner {
    /// What each open container is closed with.
    open: Vec<char>,
    state: State,
}

/// What may come next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum State {
    /// A value.
    #[default]
    Value,
    /// A value, or the end of an empty array.
    ValueOrEnd,
    /// A key.
    Key,
    /// A key, or the end of an empty object.
    KeyOrEnd,
    /// The colon behind a key.
    Colon,
    /// A comma, or the end of the container.
    CommaOrEnd,
    /// Inside a string.
    String { is_key: bool },
    /// Behind a backslash.
    Escape { is_key: bool },
    /// So many hexadecimal digits.
    Hex { left: u8, is_key: bool },
    /// Inside a number.
    Number(Number),
    /// The rest of `true`, `false` or `null`.
    Literal(&'static str),
    /// Nothing but white space.
    Done,
}

/// Where in a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    E,
    Sign,
    Exponent,
}

impl JsonScanner {
    /// What may come next.
    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Open containers.
    pub(super) fn depth(&self) -> usize {
        self.open.len()
    }

    /// The next character; false if no JSON text goes on so. After that the scanner is used up.
    pub(super) fn push(&mut self, char: char) -> bool {
        match self.next(char) {
            Some(state) => self.state = state,
            None => return false,
        }
        true
    }

    fn next(&mut self, char: char) -> Option<State> {
        match self.state {
            State::String { is_key } => Self::string(char, is_key),
            State::Escape { is_key } => match char {
                '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => Some(State::String { is_key }),
                'u' => Some(State::Hex { left: 4, is_key }),
                _ => None,
            },
            State::Hex { left, is_key } if char.is_ascii_hexdigit() => Some(match left {
                1 => State::String { is_key },
                _ => State::Hex { left: left - 1, is_key },
            }),
            State::Hex { .. } => None,
            State::Literal(rest) => {
                let rest = rest.strip_prefix(char)?;
                Some(if rest.is_empty() { self.after_value() } else { State::Literal(rest) })
            }
            State::Number(place) => self.number(place, char),
            // Of white space, JSON has these four.
            state if matches!(char, ' ' | '\n' | '\r' | '\t') => Some(state),
            State::Value => self.value(char),
            State::ValueOrEnd if char == ']' => self.close(char),
            State::ValueOrEnd => self.value(char),
            State::Key | State::KeyOrEnd if char == '"' => Some(State::String { is_key: true }),
            State::KeyOrEnd if char == '}' => self.close(char),
            State::Key | State::KeyOrEnd => None,
            State::Colon => (char == ':').then_some(State::Value),
            State::CommaOrEnd if char == ',' => match self.open.last()? {
                '}' => Some(State::Key),
                _ => Some(State::Value),
            },
            State::CommaOrEnd => self.close(char),
            State::Done => None,
        }
    }

    fn string(char: char, is_key: bool) -> Option<State> {
        match char {
            '"' if is_key => Some(State::Colon),
            // Nothing is a value without a container here: the caller's outermost value is an object.
            '"' => Some(State::CommaOrEnd),
            '\\' => Some(State::Escape { is_key }),
            '\0'..='\u{1f}' => None,
            _ => Some(State::String { is_key }),
        }
    }

    fn value(&mut self, char: char) -> Option<State> {
        match char {
            '{' => self.open('}', State::KeyOrEnd),
            '[' => self.open(']', State::ValueOrEnd),
            '"' => Some(State::String { is_key: false }),
            't' => Some(State::Literal("rue")),
            'f' => Some(State::Literal("alse")),
            'n' => Some(State::Literal("ull")),
            '-' => Some(State::Number(Number::Minus)),
            '0' => Some(State::Number(Number::Zero)),
            '1'..='9' => Some(State::Number(Number::Integer)),
            _ => None,
        }
    }

    fn number(&mut self, place: Number, char: char) -> Option<State> {
        let next = match (place, char) {
            (Number::Minus, '0') => Number::Zero,
            (Number::Minus, '1'..='9') | (Number::Integer, '0'..='9') => Number::Integer,
            (Number::Zero | Number::Integer, '.') => Number::Point,
            (Number::Point | Number::Fraction, '0'..='9') => Number::Fraction,
            (Number::Zero | Number::Integer | Number::Fraction, 'e' | 'E') => Number::E,
            (Number::E, '+' | '-') => Number::Sign,
            (Number::E | Number::Sign | Number::Exponent, '0'..='9') => Number::Exponent,
            (Number::Zero | Number::Integer | Number::Fraction | Number::Exponent, _) => {
                self.state = self.after_value();
                return self.next(char);
            }
            _ => return None,
        };
        Some(State::Number(next))
    }

    fn open(&mut self, close: char, inside: State) -> Option<State> {
        (self.open.len() < MAX_DEPTH).then(|| self.open.push(close))?;
        Some(inside)
    }

    fn close(&mut self, char: char) -> Option<State> {
        self.open.pop_if(|close| *close == char)?;
        Some(self.after_value())
    }

    fn after_value(&self) -> State {
        if self.open.is_empty() { State::Done } else { State::CommaOrEnd }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Whether a whole text is an object.
    fn accepts(text: &str) -> bool {
        let mut scanner = JsonScanner::default();
        text.chars().all(|char| scanner.push(char)) && scanner.state() == State::Done
    }

    #[test]
    fn agrees_with_serde_json_on_objects() {
        for body in [
            "",
            "\"a\":1",
            "\"a\":1,",
            "\"a\":[]",
            "\"a\":[1,]",
            "\"a\":[1,2]",
            "\"a\":{\"b\":null}",
            "\"a\":01",
            "\"a\":-0.5e+3",
            "\"a\":-",
            "\"a\":1.",
            "\"a\":1e",
            "\"a\":tru",
            "\"a\":true",
            "\"a\":nul1",
            "a:1",
            "\"a\" : \"\\u00e9\\n\" ",
            "\"a\":\"\\x\"",
            "\"a\":\"\n\"",
            "\"a\":\"é\"",
            "\"a\":]",
            ",",
            "\"a\"",
            "\"a\":\"\\u12\"",
        ] {
            let text = format!("{{{body}}}");
            let valid = serde_json::from_str::<serde_json::Value>(&text).is_ok();
            assert_eq!(accepts(&text), valid, "{text}");
        }
        assert!(!accepts("{} {}"));
        let nested = |depth: usize| format!("{}{}", "{\"a\":".repeat(depth), "}".repeat(depth));
        assert!(!accepts(&nested(MAX_DEPTH + 1)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn agrees_with_serde_json_on_noise(body in "[\\[\\]{},:\"a0-9.eE+ntrue\\\\ -]{0,14}") {
            let text = format!("{{\"k\":{body}}}");
            let number_overflow = body.contains(['e', 'E']);
            prop_assume!(!number_overflow || !body.contains(|char: char| char.is_ascii_digit()));
            let valid = serde_json::from_str::<serde_json::Value>(&text).is_ok();
            prop_assert_eq!(accepts(&text), valid, "{}", text);
        }
    }
}
