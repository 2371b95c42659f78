//! The `spark-engine` program: command line, logging, exit codes. What the commands do is in `cli/`.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::from_arguments();
    cli.init_logging();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if cli::is_closed_output(&error) => ExitCode::from(cli::OUTPUT_CLOSED),
        Err(error) => {
            // The chain's texts already say what, where and what to do; a backtrace would hide them.
            cli::print_error(&error);
            ExitCode::FAILURE
        }
    }
}
