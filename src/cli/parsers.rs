//! Flags about what is read out of a model's text: tool calls and reasoning. The parsers are `spark-text`'s.

use clap::{Args, ValueEnum};
use spark_engine::server::{Options, ReasoningParser, ToolCallParser};
use spark_text::ToolFormat;

#[derive(Args, Clone, Copy)]
#[command(next_help_heading = "Tools and reasoning")]
pub(crate) struct ParserArgs {
    /// How tool calls are found in an answer: as the chat template shows them to the model (`auto`), as JSON (`hermes`),
    /// as XML (`qwen3_xml`), or not at all.
    #[arg(long, value_enum, default_value = "auto", value_name = "PARSER")]
    tool_call_parser: ToolCallArg,
    /// How reasoning is told from an answer: by <think> if the chat template knows it (`auto`), always (`qwen3`), or not
    /// at all.
    #[arg(long, value_enum, default_value = "auto", value_name = "PARSER")]
    reasoning_parser: ReasoningArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum ToolCallArg {
    Auto,
    Hermes,
    #[value(name = "qwen3_xml", alias = "qwen3_coder")]
    Qwen3Xml,
    None,
}

#[derive(Clone, Copy, ValueEnum)]
enum ReasoningArg {
    Auto,
    #[value(alias = "deepseek_r1")]
    Qwen3,
    None,
}

impl ParserArgs {
    /// Sets the options of the front end.
    pub(crate) fn apply(self, options: &mut Options) {
        options.tool_call_parser = match self.tool_call_parser {
            ToolCallArg::Auto => ToolCallParser::Auto,
            ToolCallArg::Hermes => ToolCallParser::Format(ToolFormat::Hermes),
            ToolCallArg::Qwen3Xml => ToolCallParser::Format(ToolFormat::Xml),
            ToolCallArg::None => ToolCallParser::None,
        };
        options.reasoning_parser = match self.reasoning_parser {
            ReasoningArg::Auto => ReasoningParser::Auto,
            ReasoningArg::Qwen3 => ReasoningParser::Qwen3,
            ReasoningArg::None => ReasoningParser::None,
        };
    }
}
