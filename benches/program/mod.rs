//! What the programs of all benchmarks have in common: options, errors, and how they end.

use std::error::Error;
use std::process::ExitCode;

/// Why a benchmark does not come to its end.
pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// What follows an option, if it is there. (`cargo bench` passes `--bench`, which is none of ours.)
pub(crate) fn option<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    let at = arguments.iter().position(|argument| argument == name)?;
    arguments.get(at + 1).map(String::as_str)
}

/// How the process exits; says why if it has failed.
pub(crate) fn end(done: Result<(), Failure>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("failed: {error}");
            ExitCode::FAILURE
        }
    }
}
