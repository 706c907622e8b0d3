//! Traces a process, as a debugger does that somebody has attached: `standstill-testkit-tracer PID`.
//!
//! It says `traced` on its standard output, and lets go when its standard input ends. What becomes of the
//! process meanwhile it does not look at, so that nobody else learns how it ends before that.

#![forbid(unsafe_code)]

use nix::sys::ptrace::{Options, seize};
use nix::unistd::Pid;
use std::error::Error;
use std::io::{self, Write};

fn main() -> Result<(), Box<dyn Error>> {
    let pid = std::env::args().nth(1).ok_or("which process?")?.parse()?;
    seize(Pid::from_raw(pid), Options::empty())?;
    let mut stdout = io::stdout();
    writeln!(stdout, "traced")?;
    stdout.flush()?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}
