//! Patterns of JSON schemas, which are regular expressions of ECMA 262, in the notation of the engine that matches them.
//! Not for the `regex` of a request, which is in the engine's notation already.
//!
//! Read with the meaning of the `u` flag (characters are code points) and the leniency of Annex B where it leaves no doubt
//! (`\-`, a lone `{` or `]`, `[\w-.]`). White space, digits, word characters and `.` differ between the two notations, so
//! they are written out. What the engine cannot match is refused, and so is what means one thing in ECMA 262 and another
//! wherever else patterns are written (`\A`, `{,5}`, `a++`).

use super::pattern_class::{DIGITS, DOT, SPACES, WORDS, class, write_char, write_set};

/// Deepest nesting of groups.
const MAX_DEPTH: usize = 100;
/// Greatest count of a repetition, far above what the limits on a grammar's work let through.
const MAX_COUNT: u32 = 1_000_000;

/// What the engine cannot match, or is no regular expression.
pub(super) type Refused<T> = Result<T, String>;

/// The pattern in the engine's notation.
///
/// # Errors
/// Names the construct and the character at which it stands.
pub(super) fn translate(pattern: &str) -> Refused<String> {
    let mut reader =
        Reader { chars: pattern.chars().collect(), at: 0, out: String::with_capacity(pattern.len()) };
    let (ignore_case, dot_all) = reader.leading_flags()?;
    let mut groups = Groups { open: vec![Group::outermost(dot_all)] };
    if ignore_case {
        reader.out.push_str("(?i:");
    }
    while let Some(char) = reader.next() {
        reader.element(char, &mut groups)?;
    }
    if groups.open.len() > 1 {
        return Err("has a group without its `)`".into());
    }
    if ignore_case {
        reader.out.push(')');
    }
    Ok(reader.out)
}

/// The characters that are left, and what has been written.
pub(super) struct Reader {
    chars: Vec<char>,
    at: usize,
    pub(super) out: String,
}

/// What an element has been.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    /// Nothing in this alternative, or an anchor.
    Nothing,
    Atom,
    /// A group with an anchor inside: the engine cannot repeat it.
    Anchored,
    Repeated,
}

/// An open group, and how far its current alternative has come. The engine takes anchors at the ends of the whole pattern only.
struct Group {
    dot_all: bool,
    /// `^` may stand at its beginning.
    at_start: bool,
    last: Last,
    /// Its current alternative has more than anchors.
    has_atom: bool,
    /// Its current alternative has come to a `$`, which stands here.
    ended: Option<usize>,
    /// The same of any alternative.
    any_ended: Option<usize>,
    has_anchor: bool,
}

impl Group {
    fn outermost(dot_all: bool) -> Self {
        Self {
            dot_all,
            at_start: true,
            last: Last::Nothing,
            has_atom: false,
            ended: None,
            any_ended: None,
            has_anchor: false,
        }
    }
}

/// The open groups, the innermost last. The outermost is the pattern.
struct Groups {
    open: Vec<Group>,
}

impl Groups {
    fn innermost(&mut self) -> &mut Group {
        self.open.last_mut().expect("the outermost group is never closed")
    }

    /// Something that matches characters follows.
    fn atom(&mut self) -> Refused<()> {
        let group = self.innermost();
        if let Some(at) = group.ended {
            return Err(at_place(at, "`$` before the end of the pattern"));
        }
        (group.has_atom, group.last) = (true, Last::Atom);
        Ok(())
    }

    fn start_anchor(&mut self, at: usize) -> Refused<()> {
        let group = self.innermost();
        if !group.at_start || group.has_atom || group.ended.is_some() {
            return Err(at_place(at, "`^` behind the beginning of the pattern"));
        }
        (group.has_anchor, group.last) = (true, Last::Nothing);
        Ok(())
    }

    fn end_anchor(&mut self, at: usize) {
        let group = self.innermost();
        group.ended.get_or_insert(at);
        group.any_ended.get_or_insert(at);
        (group.has_anchor, group.last) = (true, Last::Nothing);
    }

    fn alternative(&mut self) {
        let group = self.innermost();
        (group.last, group.has_atom, group.ended) = (Last::Nothing, false, None);
    }

    fn enter(&mut self, at: usize, dot_all: bool) -> Refused<()> {
        if self.open.len() > MAX_DEPTH {
            return Err(at_place(at, &format!("groups nested deeper than {MAX_DEPTH} levels")));
        }
        let outer = self.innermost();
        let at_start = outer.at_start && !outer.has_atom;
        self.atom()?;
        self.open.push(Group { at_start, ..Group::outermost(dot_all) });
        Ok(())
    }

    fn leave(&mut self, at: usize) -> Refused<()> {
        if self.open.len() == 1 {
            return Err(at_place(at, "a `)` without its group"));
        }
        let Some(inner) = self.open.pop() else { return Ok(()) };
        let outer = self.innermost();
        outer.ended = inner.any_ended;
        outer.any_ended = outer.any_ended.or(inner.any_ended);
        outer.has_anchor |= inner.has_anchor;
        outer.last = if inner.has_anchor { Last::Anchored } else { Last::Atom };
        Ok(())
    }

    fn repeat(&mut self, at: usize, text: &str) -> Refused<()> {
        let group = self.innermost();
        match group.last {
            Last::Atom => {
                group.last = Last::Repeated;
                Ok(())
            }
            Last::Nothing => Err(at_place(at, &format!("`{text}` with nothing to repeat"))),
            Last::Anchored => Err(at_place(at, &format!("`{text}` behind a group with `^` or `$`"))),
            Last::Repeated => {
                Err(at_place(at, &format!("`{text}` behind a repetition; put that into a group")))
            }
        }
    }
}

impl Reader {
    pub(super) fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    pub(super) fn peek_second(&self) -> Option<char> {
        self.chars.get(self.at + 1).copied()
    }

    pub(super) fn next(&mut self) -> Option<char> {
        let char = self.peek()?;
        self.at += 1;
        Some(char)
    }

    pub(super) fn eat(&mut self, text: &str) -> bool {
        let found = text.chars().enumerate().all(|(i, char)| self.chars.get(self.at + i) == Some(&char));
        if found {
            self.at += text.chars().count();
        }
        found
    }

    /// Where the character that was read last stands, from 1.
    pub(super) fn place(&self) -> usize {
        self.at
    }

    /// `(?i)`, `(?s)`: the form that other languages have of ES2025's groups with flags, at the beginning of a pattern.
    fn leading_flags(&mut self) -> Refused<(bool, bool)> {
        let before = self.at;
        if self.eat("(?") {
            let (mut ignore_case, mut dot_all) = (false, false);
            while let Some(flag @ ('i' | 's')) = self.peek() {
                self.at += 1;
                (ignore_case, dot_all) = (ignore_case || flag == 'i', dot_all || flag == 's');
            }
            if (ignore_case || dot_all) && self.eat(")") {
                return Ok((ignore_case, dot_all));
            }
        }
        self.at = before;
        Ok((false, false))
    }

    fn element(&mut self, char: char, groups: &mut Groups) -> Refused<()> {
        let at = self.place();
        match char {
            '^' => groups.start_anchor(at)?,
            '$' => groups.end_anchor(at),
            '|' => groups.alternative(),
            '(' => return self.group(at, groups),
            ')' => groups.leave(at)?,
            '*' | '+' | '?' => {
                groups.repeat(at, &char.to_string())?;
                self.out.push(char);
                self.eat("?");
                return Ok(());
            }
            '{' if self.counts(at, groups)? => return Ok(()),
            '.' => {
                groups.atom()?;
                self.out.push_str(if groups.innermost().dot_all { "(?s:.)" } else { DOT });
                return Ok(());
            }
            '[' => {
                groups.atom()?;
                return class(self);
            }
            '\\' => {
                groups.atom()?;
                return self.escape(at);
            }
            _ => {
                groups.atom()?;
                write_char(&mut self.out, char);
                return Ok(());
            }
        }
        self.out.push(char);
        Ok(())
    }

    /// What follows `(`. Groups capture nothing here, so their names mean nothing.
    fn group(&mut self, at: usize, groups: &mut Groups) -> Refused<()> {
        let mut dot_all = groups.innermost().dot_all;
        let mut open = "(?:".to_owned();
        if self.eat("?") {
            if ["=", "!", "<=", "<!"].iter().any(|kind| self.eat(kind)) {
                let text: String = self.chars[at - 1..self.at].iter().collect();
                return Err(at_place(at, &format!("look-around, `{text}...)`")));
            }
            match self.next() {
                Some(':') => {}
                Some('<') => self.group_name(at)?,
                Some(flag) => open = self.flags(at, flag, &mut dot_all)?,
                None => return Err(at_place(at, "a group without its `)`")),
            }
        }
        groups.enter(at, dot_all)?;
        self.out.push_str(&open);
        Ok(())
    }

    fn group_name(&mut self, at: usize) -> Refused<()> {
        let is_part = |char: char| char.is_alphanumeric() || char == '_' || char == '$';
        let start = self.at;
        while self.peek().is_some_and(is_part) {
            self.at += 1;
        }
        match self.at > start && self.eat(">") {
            true => Ok(()),
            false => Err(at_place(at, "a group with a name that is none")),
        }
    }

    /// `i-s:` of ES2025's `(?i-s:...)`: its opening for the engine. Of `m` there is no use without look-around.
    fn flags(&mut self, at: usize, first: char, dot_all: &mut bool) -> Refused<String> {
        let (mut flag, mut on, mut ignore_case) = (first, true, None);
        while flag != ':' {
            match flag {
                '-' if on => on = false,
                'i' => ignore_case = Some(on),
                's' => *dot_all = on,
                _ => return Err(at_place(at, &format!("a group of an unknown kind, `(?{flag}`"))),
            }
            flag = self.next().ok_or_else(|| at_place(at, "a group without its `)`"))?;
        }
        Ok(match ignore_case {
            Some(true) => "(?i:".into(),
            Some(false) => "(?-i:".into(),
            None => "(?:".into(),
        })
    }

    /// `{2}`, `{2,}`, `{2,3}`; `false`: the brace stands for itself.
    fn counts(&mut self, at: usize, groups: &mut Groups) -> Refused<bool> {
        let is_part = |char: &&char| char.is_ascii_digit() || **char == ',';
        let length = self.chars[self.at..].iter().take_while(is_part).count();
        if self.chars.get(self.at + length) != Some(&'}') {
            return Ok(false);
        }
        let text: String = self.chars[self.at..self.at + length].iter().collect();
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let (least, most) = text.split_once(',').map_or((&*text, Some(&*text)), |(least, most)| {
            (least, Some(most).filter(|most| !most.is_empty()))
        });
        if least.is_empty() && most.is_some_and(is_number) {
            return Err(at_place(at, &format!("`{{{text}}}`; say `{{0{text}}}`")));
        }
        if !is_number(least) || !most.is_none_or(is_number) {
            return Ok(false);
        }
        let number = |text: &str| text.parse::<u32>().ok().filter(|&count| count <= MAX_COUNT);
        let (least, most) = match (number(least), most.map(number)) {
            (Some(least), None) => (least, None),
            (Some(least), Some(Some(most))) if least <= most => (least, Some(most)),
            _ => return Err(at_place(at, &format!("`{{{text}}}`, which is no count up to {MAX_COUNT}"))),
        };
        groups.repeat(at, &format!("{{{text}}}"))?;
        let most = most.map_or(String::new(), |most| most.to_string());
        self.out.push_str(&format!("{{{least},{most}}}"));
        self.at += length + 1;
        self.eat("?");
        Ok(true)
    }

    /// What follows a backslash outside of a class.
    fn escape(&mut self, at: usize) -> Refused<()> {
        match self.peek() {
            Some(letter @ ('b' | 'B')) => {
                Err(at_place(at, &format!("a word boundary, `\\{letter}`, which is look-around")))
            }
            Some(char @ ('1'..='9' | 'k')) => Err(at_place(at, &format!("a back-reference, `\\{char}`"))),
            _ => match self.set()? {
                Some(set) => {
                    self.out.push_str(&set);
                    Ok(())
                }
                None => {
                    let code = self.code_point()?;
                    write_set(&mut self.out, code);
                    Ok(())
                }
            },
        }
    }

    /// The class of an escape that is one: `\d`, `\p{L}`.
    pub(super) fn set(&mut self) -> Refused<Option<String>> {
        let at = self.place();
        let Some(letter @ ('d' | 'D' | 'w' | 'W' | 's' | 'S' | 'p' | 'P')) = self.peek() else {
            return Ok(None);
        };
        self.at += 1;
        let not = if letter.is_ascii_uppercase() { "^" } else { "" };
        let ranges = match letter.to_ascii_lowercase() {
            'd' => DIGITS,
            'w' => WORDS,
            's' => SPACES,
            _ => return self.property(at, letter).map(Some),
        };
        Ok(Some(format!("[{not}{ranges}]")))
    }

    /// `{L}` of `\p{L}`. Which properties there are is for the engine to say.
    fn property(&mut self, at: usize, letter: char) -> Refused<String> {
        let is_part = |char: &char| char.is_ascii_alphanumeric() || "_=".contains(*char);
        if self.eat("{") {
            let name: String = self.chars[self.at..].iter().take_while(|char| is_part(char)).collect();
            self.at += name.len();
            if !name.is_empty() && self.eat("}") {
                return Ok(format!("\\{letter}{{{name}}}"));
            }
        }
        Err(at_place(at, &format!("`\\{letter}` without a property in braces")))
    }

    /// What an escape of one character stands for: a code point, perhaps half a surrogate pair.
    pub(super) fn code_point(&mut self) -> Refused<u32> {
        let at = self.place();
        let Some(char) = self.next() else { return Err(at_place(at, "a `\\` with nothing behind it")) };
        let digit = |char: Option<char>| char.is_some_and(|char| char.is_ascii_digit());
        let code = match char {
            'f' => Some(0x0C),
            'n' => Some(0x0A),
            'r' => Some(0x0D),
            't' => Some(0x09),
            'v' => Some(0x0B),
            '0' if !digit(self.peek()) => Some(0),
            'c' => {
                let letter = self.next().filter(char::is_ascii_alphabetic);
                letter.map(|letter| u32::from(letter) % 32)
            }
            'x' => self.hex(2),
            'u' => self.unicode(),
            other if !other.is_ascii_alphanumeric() => Some(u32::from(other)),
            _ => None,
        };
        code.ok_or_else(|| at_place(at, &format!("`\\{char}`, which ECMA 262 has not in this place")))
    }

    fn hex(&mut self, count: usize) -> Option<u32> {
        let digits = self.chars.get(self.at..self.at + count)?;
        let value = digits.iter().try_fold(0, |value, char| Some(value * 16 + char.to_digit(16)?))?;
        self.at += count;
        Some(value)
    }

    /// What follows `\u`: four digits, twice that for a surrogate pair, or any number in braces.
    fn unicode(&mut self) -> Option<u32> {
        if self.eat("{") {
            let length = self.chars[self.at..].iter().take(7).position(|&char| char == '}')?;
            let value = self.hex(length).filter(|_| length > 0)?;
            return Some(value).filter(|&value| value <= u32::from(char::MAX) && self.eat("}"));
        }
        let first = self.hex(4)?;
        let after = self.at;
        if (0xD800..0xDC00).contains(&first) && self.eat("\\u") {
            match self.hex(4) {
                Some(second @ 0xDC00..0xE000) => {
                    return Some(0x1_0000 + ((first - 0xD800) << 10) + (second - 0xDC00));
                }
                _ => self.at = after,
            }
        }
        Some(first)
    }
}

/// A construct with its place.
pub(super) fn at_place(at: usize, what: &str) -> String {
    format!("has {what}, at character {at}")
}

#[cfg(test)]
#[path = "pattern_tests.rs"]
mod tests;
