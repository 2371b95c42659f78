//! Classes of characters in a pattern of ECMA 262 (`[^a-z\s]`), for `pattern`, which reads what is around them.

use std::fmt::Write as _;

use super::pattern::{Reader, Refused, at_place};

/// `\d`, inside of a class of the engine, as are the next two.
pub(super) const DIGITS: &str = "0-9";
/// `\w`.
pub(super) const WORDS: &str = "0-9A-Za-z_";
/// `\s`: the white space and the line terminators of ECMA 262, which has U+FEFF and not U+0085.
pub(super) const SPACES: &str =
    r"\x{9}-\x{d} \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}";
/// `.`: anything but line terminators.
pub(super) const DOT: &str = r"[^\n\r\x{2028}\x{2029}]";
/// A class of nothing.
const NOTHING: &str = "[a&&b]";
/// Halves of surrogate pairs, which no text has.
const SURROGATES: (u32, u32) = (0xD800, 0xDFFF);

/// What may stand at an end of a range.
enum Item {
    Code(u32),
    Set(String),
}

/// What follows `[`, up to its `]`.
pub(super) fn class(reader: &mut Reader) -> Refused<()> {
    let open = reader.place();
    let is_negated = reader.eat("^");
    let mut items = String::new();
    loop {
        match reader.next() {
            None => return Err(at_place(open, "a class without its `]`")),
            Some(']') => break,
            Some(char) => {
                let first = item(reader, char)?;
                let is_range =
                    reader.peek() == Some('-') && reader.peek_second().is_some_and(|end| end != ']');
                match (first, is_range) {
                    (Item::Code(first), true) => range(reader, first, &mut items)?,
                    // A set is no end of a range: `-` stands for itself.
                    (Item::Set(set), _) => items.push_str(&set),
                    (Item::Code(code), false) => write_range(&mut items, code, code),
                }
            }
        }
    }
    match (items.is_empty(), is_negated) {
        (true, false) => reader.out.push_str(NOTHING),
        (true, true) => reader.out.push_str("(?s:.)"),
        (false, _) => {
            let _ = write!(reader.out, "[{}{items}]", if is_negated { "^" } else { "" });
        }
    }
    Ok(())
}

/// What follows the first end of a range: `-` and the second end. Where that is a set all three stand for themselves.
fn range(reader: &mut Reader, first: u32, items: &mut String) -> Refused<()> {
    reader.next();
    let at = reader.place();
    let Some(end) = reader.next() else { return Err(at_place(at, "a class without its `]`")) };
    match item(reader, end)? {
        Item::Code(last) if first <= last => write_range(items, first, last),
        Item::Code(_) => return Err(at_place(at, "a range whose end comes before its beginning")),
        Item::Set(set) => {
            write_range(items, first, first);
            write_range(items, u32::from('-'), u32::from('-'));
            items.push_str(&set);
        }
    }
    Ok(())
}

fn item(reader: &mut Reader, char: char) -> Refused<Item> {
    if char != '\\' {
        return Ok(Item::Code(u32::from(char)));
    }
    if reader.eat("b") {
        return Ok(Item::Code(0x08));
    }
    Ok(match reader.set()? {
        Some(set) => Item::Set(set),
        None => Item::Code(reader.code_point()?),
    })
}

/// One character outside of a class.
pub(super) fn write_set(out: &mut String, code: u32) {
    match char::from_u32(code) {
        Some(char) => write_char(out, char),
        None => out.push_str(NOTHING),
    }
}

/// A range inside of a class, less the halves of surrogate pairs.
fn write_range(items: &mut String, first: u32, last: u32) {
    let (low, high) = SURROGATES;
    for (first, last) in [(first, last.min(low - 1)), (first.max(high + 1), last)] {
        if let (true, Some(first), Some(last)) = (first <= last, char::from_u32(first), char::from_u32(last))
        {
            write_char(items, first);
            if first < last {
                items.push('-');
                write_char(items, last);
            }
        }
    }
}

/// A character that stands for itself, inside of a class or outside.
pub(super) fn write_char(out: &mut String, char: char) {
    match char {
        '_' | ' ' | '"' | '\'' | '%' | ',' | ':' | ';' | '=' | '@' | '!' => out.push(char),
        _ if char.is_ascii_punctuation() && !"/<>".contains(char) => out.extend(['\\', char]),
        _ if char.is_alphanumeric() => out.push(char),
        _ => {
            let _ = write!(out, "\\x{{{:x}}}", u32::from(char));
        }
    }
}
