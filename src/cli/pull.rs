//! `spark-engine pull`: a checkpoint from a Hugging Face hub into the local cache, where the other commands find it.

use std::io::Write;
use std::sync::Arc;

use clap::Args;
use spark_weights::{PullOptions, pull};

use super::{progress::ByteBar, trust};

/// Download a checkpoint; continues where an earlier download was stopped.
#[derive(Args)]
#[command(
    after_help = "Environment: HF_TOKEN for gated and private models, HF_HOME or HF_HUB_CACHE for where the \
    files go, HF_ENDPOINT for another hub, SSL_CERT_FILE for certificates (PEM) that are trusted instead of the public \
    authorities. Prints the folder of the checkpoint."
)]
pub(crate) struct PullArgs {
    /// A Hugging Face id: OWNER/NAME.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Branch, tag or commit.
    #[arg(long)]
    revision: Option<String>,
    /// Files that are downloaded at the same time.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    connections: u8,
}

pub(crate) fn run(args: PullArgs) -> anyhow::Result<()> {
    let bar = ByteBar::new("downloading");
    let progress = bar.clone();
    let mut options = PullOptions {
        revision: args.revision,
        connections: usize::from(args.connections),
        progress: Some(Arc::new(move |now| progress.update(now.bytes_done, now.bytes_total))),
        ..PullOptions::from_env()
    };
    options.tls = trust::for_requests_to(&options.endpoint)?;
    let pulled = pull(&args.model, &options);
    bar.finish();
    let pulled = pulled?;
    tracing::info!(
        files = pulled.files,
        bytes = pulled.bytes,
        bytes_downloaded = pulled.bytes_downloaded,
        commit = %pulled.commit,
        "the checkpoint is complete"
    );
    writeln!(std::io::stdout().lock(), "{}", pulled.dir.display())?;
    Ok(())
}
