//! Rust (and CUDA) source split into code and comments, so that no check is fooled by a string or a comment. Not a
//! parser: it knows literals, comments and balanced brackets, which is all that the checks need.

use std::ops::Range;

/// A source file in two views of the same line structure.
pub(crate) struct Source {
    /// Code: comments are blanks, the content of literals is `"`.
    pub(crate) code: String,
    /// Comments: everything else is blanks.
    pub(crate) comments: String,
}

/// A function with a body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Function {
    /// Its name.
    pub(crate) name: String,
    /// Line of `fn`, from 1.
    pub(crate) line: usize,
    /// Lines between the braces that hold code.
    pub(crate) num_lines: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Code,
    Comment,
    Literal,
}

impl Source {
    /// Splits `text`.
    pub(crate) fn new(text: &str) -> Self {
        let chars: Vec<char> = text.chars().collect();
        let (mut code, mut comments) = (String::with_capacity(text.len()), String::with_capacity(text.len()));
        let mut at = 0;
        while at < chars.len() {
            let (kind, end) = next_part(&chars, at);
            for &c in &chars[at..end] {
                let (in_code, in_comments) = match kind {
                    _ if c == '\n' => ('\n', '\n'),
                    Kind::Code => (c, ' '),
                    Kind::Comment => (' ', c),
                    Kind::Literal => ('"', ' '),
                };
                code.push(in_code);
                comments.push(in_comments);
            }
            at = end;
        }
        Self { code, comments }
    }

    /// Lines of code, comments and blanks, without inline `#[cfg(test)]` modules.
    pub(crate) fn num_lines_without_tests(&self) -> usize {
        let tests: usize = self.test_modules().into_iter().map(|lines| lines.len()).sum();
        self.code.lines().count() - tests
    }

    /// Line ranges (from 0) of inline test modules.
    fn test_modules(&self) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        let mut from = 0;
        while let Some(start) = self.code[from..].find("#[cfg(test)]").map(|at| at + from) {
            from = start + "#[cfg(test)]".len();
            let item = self.code[from..].trim_start();
            let is_module = item.starts_with("mod ")
                || item.starts_with("pub mod ")
                || item.starts_with("pub(crate) mod ");
            let open = self.code[from..].find(['{', ';']).map(|at| at + from);
            let Some(open) = open.filter(|&open| is_module && self.code.as_bytes()[open] == b'{') else {
                continue;
            };
            let end = closing_brace(&self.code, open);
            found.push(line_of(&self.code, start)..line_of(&self.code, end) + 1);
            from = end;
        }
        found
    }

    /// All functions that have a body, in order.
    pub(crate) fn functions(&self) -> Vec<Function> {
        let mut functions = Vec::new();
        for (at, word) in words(&self.code) {
            if word != "fn" {
                continue;
            }
            let rest = self.code[at + 2..].trim_start();
            let name: String = rest.chars().take_while(|&c| is_word(c)).collect();
            let Some(open) = body(&self.code, at).filter(|_| !name.is_empty()) else { continue };
            let inside = &self.code[open + 1..closing_brace(&self.code, open)];
            let num_lines = inside.lines().filter(|line| !line.trim().is_empty()).count();
            functions.push(Function { name, line: line_of(&self.code, at) + 1, num_lines });
        }
        functions
    }
}

/// Words (identifiers, keywords, numbers) of `code` with their byte offsets.
pub(crate) fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    // The pieces are slices of `code`: the distance of their starts is the offset.
    let offset = |word: &str| word.as_ptr() as usize - code.as_ptr() as usize;
    code.split(|c| !is_word(c)).filter(|word| !word.is_empty()).map(move |word| (offset(word), word))
}

/// The line (from 0) that holds byte `at`.
pub(crate) fn line_of(text: &str, at: usize) -> usize {
    text[..at.min(text.len())].matches('\n').count()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The kind of the part that starts at `at`, and where it ends.
fn next_part(chars: &[char], at: usize) -> (Kind, usize) {
    let peek = |ahead: usize| chars.get(at + ahead).copied().unwrap_or('\0');
    match (chars[at], peek(1)) {
        ('/', '/') => {
            (Kind::Comment, chars[at..].iter().position(|&c| c == '\n').map_or(chars.len(), |n| at + n))
        }
        ('/', '*') => (Kind::Comment, block_comment_end(chars, at)),
        ('"', _) => (Kind::Literal, quoted_end(chars, at, '"')),
        ('\'', '\\') => (Kind::Literal, quoted_end(chars, at, '\'')),
        ('\'', _) if peek(2) == '\'' => (Kind::Literal, at + 3),
        ('r', _) if at == 0 || !is_word(chars[at - 1]) || "bc".contains(chars[at - 1]) => {
            match raw_string_end(chars, at) {
                Some(end) => (Kind::Literal, end),
                None => (Kind::Code, at + 1),
            }
        }
        _ => (Kind::Code, at + 1),
    }
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let (mut depth, mut at) = (0, start);
    while at + 1 < chars.len() {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => (depth, at) = (depth + 1, at + 2),
            ('*', '/') => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

fn quoted_end(chars: &[char], start: usize, quote: char) -> usize {
    let mut at = start + 1;
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            c if c == quote => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

/// End of a raw string that starts with the `r` at `start`, if there is one.
fn raw_string_end(chars: &[char], start: usize) -> Option<usize> {
    let num_hashes = chars[start + 1..].iter().take_while(|&&c| c == '#').count();
    let open = start + 1 + num_hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let closes = |at: usize| {
        chars[at] == '"'
            && chars[at + 1..].iter().take(num_hashes).filter(|&&c| c == '#').count() == num_hashes
    };
    Some((open + 1..chars.len()).find(|&at| closes(at)).map_or(chars.len(), |at| at + 1 + num_hashes))
}

/// The opening brace of the body of the function whose `fn` is at `start`; `None` for a declaration.
fn body(code: &str, start: usize) -> Option<usize> {
    let mut depth = 0;
    for (at, c) in code[start..].char_indices() {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth -= 1,
            '{' if depth == 0 => return Some(start + at),
            ';' if depth == 0 => return None,
            _ => {}
        }
        if depth < 0 {
            return None;
        }
    }
    None
}

/// The brace that closes the one at `open`, or the end of the text.
fn closing_brace(code: &str, open: usize) -> usize {
    let mut depth = 0;
    for (at, c) in code[open..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return open + at;
        }
    }
    code.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_comments_are_not_code() {
        let text = "let a = \"// no {\"; // yes }\nlet b = r#\"{ \"quoted\" /*\"#; /* one /* two */ { */ let c = '{';\n";
        let source = Source::new(text);
        assert!(!source.code.contains('{') && !source.code.contains('}'), "{}", source.code);
        assert!(source.code.contains("let c"));
        assert!(source.comments.contains("yes }") && !source.comments.contains("no {"));
        assert_eq!(source.code.lines().count(), 2);
    }

    #[test]
    fn lifetimes_and_escapes_are_told_from_characters() {
        let source = Source::new("fn f<'a>(x: &'a str) { g('\\'', b'\\\\', '\"', br\"{\"); } fn h() {}");
        let names: Vec<_> = source.functions().into_iter().map(|f| f.name).collect();
        assert_eq!(names, ["f", "h"]);
    }

    #[test]
    fn function_lines_are_code_lines_of_the_body() {
        let text = "trait T {\n    fn declared(&self, x: [u8; 3]) -> u8;\n}\n\nfn counted(\n    x: [u8; 2],\n) -> fn(u8) {\n    // a comment {\n    a();\n\n    b(\"\n  }\n\");\n}\n";
        let functions = Source::new(text).functions();
        assert_eq!(functions, [Function { name: "counted".into(), line: 5, num_lines: 4 }]);
    }

    #[test]
    fn inline_tests_do_not_count() {
        let text = "fn a() {}\n\n#[cfg(test)]\nmod tests {\n    fn t() { \"}\"; }\n}\n";
        assert_eq!(Source::new(text).num_lines_without_tests(), 2);
        assert_eq!(Source::new("#[cfg(test)]\nmod tests;\nfn a() {}\n").num_lines_without_tests(), 3);
        assert_eq!(Source::new("#[cfg(test)]\nfn helper() {\n}\nfn a() {}\n").num_lines_without_tests(), 4);
    }

    #[test]
    fn words_have_offsets() {
        let found: Vec<_> = words("a.bc(d_1)").collect();
        assert_eq!(found, [(0, "a"), (2, "bc"), (5, "d_1")]);
    }
}
