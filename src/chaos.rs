//! `standstill chaos`: devices of a machine of copy engines, or of a disk and copy engines, die, hang and lie,
//! as plans say, and what becomes of the machine is compared with a table that was written by hand.
//!
//! What is done and judged is [`standstill_testkit::sweep`]; here is the machine that it is done to, and
//! what a person and a program get to see. A program without the feature `fault-injection` has only the
//! words that say how to build one that has it.

#[cfg(feature = "fault-injection")]
mod attempt;
#[cfg(feature = "fault-injection")]
mod disk;
mod options;
#[cfg(feature = "fault-injection")]
mod subject;
#[cfg(feature = "fault-injection")]
mod summary;

#[cfg(feature = "fault-injection")]
pub(crate) use attempt::run;
pub(crate) use options::ChaosArgs;

/// Says how to build a program that can do this.
#[cfg(not(feature = "fault-injection"))]
pub(crate) fn run(args: &ChaosArgs) -> std::process::ExitCode {
    use std::io::Write;

    let text = "standstill: chaos is not possible: this program was built without fault injection\n  \
                its devices take no orders to fail. Build one whose devices do, for tests only:\n  \
                cargo run --release --features fault-injection -- chaos";
    // Nobody is left to be told if standard error is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
    if args.json {
        let object = serde_json::json!({ "ok": false, "error": "built without fault-injection" });
        let _ = writeln!(std::io::stdout(), "{object}");
    }
    std::process::ExitCode::from(options::NOT_BUILT_FOR_IT)
}
