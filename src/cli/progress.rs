//! Progress bars on stderr, on terminals only.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar of bytes and bytes per second.
#[derive(Clone)]
pub(crate) struct ByteBar(ProgressBar);

impl ByteBar {
    pub(crate) fn new(prefix: &'static str) -> Self {
        Self(bar("{prefix} [{bar:40}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left", prefix))
    }

    pub(crate) fn update(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// A bar that counts things of which no speed is worth showing.
pub(crate) fn count_bar(prefix: &'static str) -> ProgressBar {
    bar("{prefix} [{bar:40}] {pos} of {len}, {eta} left", prefix)
}

/// A bar that counts requests.
pub(crate) fn request_bar(total: u64, done: u64) -> ProgressBar {
    let bar = bar("{prefix} [{bar:40}] {pos} of {len}, {per_sec}, {eta} left", "batch");
    bar.set_length(total);
    bar.set_position(done);
    bar.reset_eta();
    bar
}

fn bar(template: &str, prefix: &'static str) -> ProgressBar {
    // `stderr` draws nothing unless it is a terminal.
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("=> "));
    bar.set_prefix(prefix);
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}
