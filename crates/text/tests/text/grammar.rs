//! Grammars as a sequence meets them: what they let through, and what is refused.

mod forms;
mod limits;
mod patterns;
mod schemas;
mod tool_calls;
mod walk;
