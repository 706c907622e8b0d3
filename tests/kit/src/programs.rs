//! The programs of this kit: what stands in for a device, for a coordinator, or between them.
//!
//! Each is a program of this package. In the workspace of the kit `cargo test --workspace` builds them
//! all, and a test finds them beside itself. Cargo builds no programs of a dependency: a test of
//! another package is these programs itself, when it is started again with certain arguments. For
//! that it says once, at the top of its test file,
//!
//! ```
//! standstill_testkit::programs!();
//! ```
//!
//! or, if it has a `main` of its own, calls [`serve`] there before anything else.

mod pilot;
mod relay;
mod rogue_device;

use serde::{Deserialize, Serialize};
use standstill_coordinator::process::ProcessSpec;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

/// The name of the test that [`programs!`](crate::programs!) makes.
const TEST: &str = "standstill_testkit_programs";

/// Set by a `main` that calls [`serve`].
static SERVED: AtomicBool = AtomicBool::new(false);

/// Lets the programs of this kit run as this test program, started again. At the root of a test
/// file. It makes a test, which does nothing in an ordinary run.
#[macro_export]
macro_rules! programs {
    () => {
        #[test]
        fn standstill_testkit_programs() {
            $crate::programs::serve_as_test();
        }
    };
}

/// A program of this kit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Program {
    /// Stands between a coordinator and a device process: `relay FOLDER PROGRAM ARGUMENT…`.
    Relay,
    /// A device process that follows a [script](crate::script): `rogue-device SCRIPT`.
    RogueDevice,
    /// A coordinator in a process of its own: see [`crate::pilot`].
    Pilot,
}

impl Program {
    /// The name of the program's file. It says whose it is: a file beside a stranger's test program
    /// that has it is one of these.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Relay => "standstill-testkit-relay",
            Self::RogueDevice => "standstill-testkit-rogue-device",
            Self::Pilot => "standstill-testkit-pilot",
        }
    }

    /// Runs it in this process, to its end; what to exit with.
    #[must_use]
    pub fn run(self, arguments: &[OsString]) -> u8 {
        match self {
            Self::Relay => relay::main(arguments),
            Self::RogueDevice => rogue_device::main(arguments),
            Self::Pilot => pilot::main(arguments),
        }
    }

    /// How to start it, in the environment of `spec`.
    pub(crate) fn launched(
        self,
        spec: ProcessSpec,
        arguments: Vec<OsString>,
    ) -> Result<ProcessSpec, ProgramError> {
        Ok(match self.place()? {
            Place::File(path) => spec.replaced(path, arguments),
            Place::Inside(path) => spec.replaced(path, self.inside(arguments)?),
        })
    }

    /// How to start it from a program that is itself one of this kit's.
    pub(crate) fn command(self, arguments: Vec<OsString>) -> Result<Command, ProgramError> {
        let (path, arguments) = match self.place()? {
            Place::File(path) => (path, arguments),
            Place::Inside(path) => (path, self.inside(arguments)?),
        };
        let mut command = Command::new(path);
        command.args(arguments);
        Ok(command)
    }

    /// The arguments with which a test program is this one.
    fn inside(self, arguments: Vec<OsString>) -> Result<Vec<OsString>, ProgramError> {
        let text = |argument: OsString| argument.into_string().map_err(ProgramError::Text);
        let arguments = arguments.into_iter().map(text).collect::<Result<_, _>>()?;
        let role = serde_json::to_string(&Role { program: self, arguments })?;
        Ok(["--exact", TEST, "--nocapture", &role].map(OsString::from).into())
    }

    /// Where its file is: beside the running test's program, or in the folder above (tests run from
    /// `target/<profile>/deps`).
    ///
    /// # Errors
    ///
    /// [`ProgramError::Missing`] if it is in neither.
    pub fn file(self) -> Result<PathBuf, ProgramError> {
        self.beside(&std::env::current_exe().map_err(ProgramError::Lost)?)
    }

    fn beside(self, this: &Path) -> Result<PathBuf, ProgramError> {
        let folders = this.ancestors().skip(1).take(2);
        let files: Vec<_> = folders.map(|folder| folder.join(self.name())).collect();
        let missing = || files.last().cloned().unwrap_or_default();
        let file = files.iter().find(|file| file.is_file()).cloned();
        file.ok_or_else(|| ProgramError::Missing(missing()))
    }

    fn place(self) -> Result<Place, ProgramError> {
        let this = std::env::current_exe().map_err(ProgramError::Lost)?;
        // What this program is itself was built with it; a file may be left from an earlier build.
        if SERVED.load(Ordering::Acquire) || role().is_some() {
            return Ok(Place::Inside(this));
        }
        match self.beside(&this) {
            Ok(file) => Ok(Place::File(file)),
            Err(_) if is_a_test_with_programs(&this) => Ok(Place::Inside(this)),
            Err(missing) => Err(missing),
        }
    }
}

/// Where a program is.
enum Place {
    File(PathBuf),
    /// In the running program.
    Inside(PathBuf),
}

/// What a test program is to be, when it is started again.
#[derive(Serialize, Deserialize)]
struct Role {
    program: Program,
    arguments: Vec<String>,
}

/// A program of this kit cannot be started.
#[derive(Debug, Error)]
pub enum ProgramError {
    /// It is not there.
    #[error(
        "{} is missing. In the workspace of the kit build it with `cargo build -p \
         standstill-testkit --bins`, in the profile and target directory of this test; elsewhere \
         say `standstill_testkit::programs!();` at the root of the test file, or call \
         `standstill_testkit::programs::serve()` first in `main`",
        .0.display()
    )]
    Missing(PathBuf),
    /// The running program does not know where it is.
    #[error("cannot find the folder of this test's program: {0}")]
    Lost(#[source] io::Error),
    /// An argument cannot be passed on.
    #[error("an argument is no UTF-8: {0:?}")]
    Text(OsString),
    /// The arguments cannot be written down.
    #[error("the arguments cannot be passed on: {0}")]
    Role(#[from] serde_json::Error),
}

/// What this process was started to be, if it was started by the kit.
fn role() -> Option<Role> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [exact, test, _, role] = arguments.as_slice() else { return None };
    if exact != "--exact" || test != TEST {
        return None;
    }
    serde_json::from_str(role.to_str()?).ok()
}

/// True if this is a test program that has the test of [`programs!`](crate::programs!).
fn is_a_test_with_programs(this: &Path) -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        // Only test programs take this argument well, and only they are in such a folder. One with a
        // `main` of its own may do with it what it always does, down to this question.
        let asked = std::env::args_os().any(|argument| argument == "--list");
        if asked || this.parent().is_none_or(|folder| !folder.ends_with("deps")) {
            return false;
        }
        let list =
            Command::new(this).args(["--list", "--exact", TEST]).stdin(Stdio::null()).output();
        list.is_ok_and(|list| String::from_utf8_lossy(&list.stdout).contains(TEST))
    })
}

/// If this process was started to be a program of this kit, runs it and gives what it is to exit
/// with. To be called first in the `main` of a test program that has one.
#[must_use]
pub fn serve() -> Option<ExitCode> {
    SERVED.store(true, Ordering::Release);
    let Role { program, arguments } = role()?;
    let arguments: Vec<_> = arguments.into_iter().map(OsString::from).collect();
    Some(ExitCode::from(program.run(&arguments)))
}

/// What the test of [`programs!`](crate::programs!) does.
pub fn serve_as_test() {
    if let Some(Role { program, arguments }) = role() {
        let arguments: Vec<_> = arguments.into_iter().map(OsString::from).collect();
        std::process::exit(program.run(&arguments).into());
    }
}
