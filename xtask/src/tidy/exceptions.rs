//! The one list of exceptions to tidy's rules, in public view. An entry that is no longer needed fails tidy.

/// A file that may break a rule.
pub(crate) struct Exception {
    /// Name of the rule, as tidy prints it in brackets.
    pub(crate) rule: &'static str,
    /// The file.
    pub(crate) path: &'static str,
    /// Why it may, and until when.
    #[cfg_attr(not(test), expect(dead_code, reason = "read by people; a test checks that it is there"))]
    pub(crate) reason: &'static str,
}

/// All exceptions.
pub(crate) const EXCEPTIONS: &[Exception] = &[Exception {
    rule: "words",
    path: "xtask/src/tidy/words.rs",
    reason: "spells out the words that it looks for, and its tests use them",
}];
