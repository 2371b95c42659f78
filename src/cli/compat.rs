//! vLLM flags that change nothing here: accepted so that a vLLM command line starts unchanged, checked, and warned about.

use clap::Args;

#[derive(Args)]
#[command(next_help_heading = "Accepted for vLLM command lines")]
pub(crate) struct CompatArgs {
    /// Ignored: the scheme of every tensor is read from the checkpoint.
    #[arg(long, value_name = "METHOD", value_parser = ["awq", "awq_marlin", "fp8", "compressed-tensors", "modelopt", "modelopt_fp4"])]
    quantization: Option<String>,
    /// Ignored: nothing in a checkpoint is ever executed.
    #[arg(long)]
    trust_remote_code: bool,
    /// Ignored: ranks are processes of this program.
    #[arg(long, value_name = "BACKEND", value_parser = ["mp", "ray", "uni", "external_launcher"])]
    distributed_executor_backend: Option<String>,
    /// Ignored: prefills are always chunked.
    #[arg(long)]
    enable_chunked_prefill: bool,
    /// Ignored: preempted sequences are recomputed, never swapped.
    #[arg(long, value_name = "GIB")]
    swap_space: Option<f64>,
    /// No line in the log for each request. (What requests say is never logged.)
    #[arg(long, alias = "no-enable-log-requests")]
    pub(crate) disable_log_requests: bool,
    /// Ignored: statistics are at /metrics.
    #[arg(long)]
    disable_log_stats: bool,
    /// Ignored: tools may be called whenever a request has some.
    #[arg(long)]
    enable_auto_tool_choice: bool,
}

impl CompatArgs {
    /// Says which of the given flags change nothing.
    pub(crate) fn warn(&self) {
        let given = [
            (
                self.quantization.is_some(),
                "--quantization: the scheme of every tensor is read from the checkpoint",
            ),
            (self.trust_remote_code, "--trust-remote-code: nothing in a checkpoint is ever executed"),
            (
                self.distributed_executor_backend.is_some(),
                "--distributed-executor-backend: ranks are our own processes",
            ),
            (self.swap_space.is_some(), "--swap-space: preempted sequences are recomputed, never swapped"),
            (self.disable_log_stats, "--disable-log-stats: statistics are at /metrics, not in the log"),
        ];
        for (_, what) in given.iter().filter(|(given, _)| *given) {
            tracing::warn!("no effect: {what}");
        }
    }
}
