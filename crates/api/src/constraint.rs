//! The hook through which a grammar restricts sampling. The grammar itself lives elsewhere (`spark-text`).

/// A constraint on the next token, kept on rank 0 and driven by the engine.
///
/// A constrained sequence joins the next step only after its last token is known, so `mask` and `commit` alternate. Both are
/// called on threads beside the engine's: one that takes long makes its own sequence sit out steps, and no other.
pub trait TokenConstraint: Send {
    /// Clears in `allowed` (bit `i` of word `i / 32` is token `i`; all set on entry) every token that may not follow.
    ///
    /// # Errors
    /// When the constraint can no longer be computed; the request then fails (it never falls back to free text).
    fn mask(&mut self, allowed: &mut [u32]) -> Result<(), ConstraintError>;

    /// Accepts the token that was sampled under the last mask. `true` means that the constraint is complete.
    ///
    /// # Errors
    /// When the token is not one that the mask allowed.
    fn commit(&mut self, token: crate::TokenId) -> Result<bool, ConstraintError>;
}

/// Why a constraint failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("output constraint failed: {0}")]
pub struct ConstraintError(pub String);
