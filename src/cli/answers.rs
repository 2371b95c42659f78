//! Flags about what the answers of a server say besides the answer. Names and meanings are vLLM's.

use clap::Args;
use spark_engine::server::Options;

#[derive(Args, Clone, Copy)]
#[command(next_help_heading = "Answers")]
pub(crate) struct AnswerArgs {
    /// Every chunk of every stream has its usage, whether it was asked for or not.
    #[arg(long)]
    enable_force_include_usage: bool,
    /// Answers of one choice say what they took (`metrics`: first token, generation, queue), in vLLM's words too.
    #[arg(long)]
    enable_per_request_metrics: bool,
    /// Show the tokenizer's settings and the chat template at /tokenizer_info, and the template at /props.
    #[arg(long)]
    enable_tokenizer_info_endpoint: bool,
    /// Name tokens in log-probabilities `token_id:N` instead of by their text, unless a request says otherwise.
    #[arg(long)]
    return_tokens_as_token_ids: bool,
}

impl AnswerArgs {
    /// Sets the options of the front end.
    pub(crate) fn apply(self, options: &mut Options) {
        options.force_include_usage = self.enable_force_include_usage;
        options.per_request_metrics = self.enable_per_request_metrics;
        options.tokenizer_info = self.enable_tokenizer_info_endpoint;
        options.tokens_as_token_ids = self.return_tokens_as_token_ids;
    }
}
