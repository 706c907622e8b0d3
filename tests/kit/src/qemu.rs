//! A real VMM with a real guest: QEMU runs Linux over the sockets of device processes, without root
//! and without KVM, on any x86-64 machine with Debian.
//!
//! A test describes a guest: its devices, the kernel modules that it loads, the files and programs
//! that it has, and a shell script that is all it does. The test reads the guest's serial console and
//! talks to QEMU by QMP meanwhile.
//!
//! ```no_run
//! use standstill_testkit::qemu::Qemu;
//! use std::path::Path;
//! use std::time::Duration;
//!
//! # fn example(socket: &Path) -> Result<(), Box<dyn std::error::Error>> {
//! let Some(qemu) = Qemu::for_tests() else { return Ok(()) };
//! let guest = qemu
//!     .guest()
//!     .vfio_user("nic0", socket)
//!     .init("cat /proc/bus/pci/devices; echo the guest is ready; read line; echo bye")
//!     .start()?;
//! guest.console().wait_for("the guest is ready", Duration::from_secs(60))?;
//! guest.stop()?;
//! guest.go_on()?;
//! guest.console().write("go")?;
//! guest.console().wait_for("bye", Duration::from_secs(60))?;
//! guest.wait(Duration::from_secs(60))?;
//! # Ok(())
//! # }
//! ```
//!
//! **What it runs.** The machine's own QEMU, if it knows `vfio-user-pci` (11.1 does; 10.0 does not);
//! else that of Debian's backports. The guest is the kernel of a fixed Debian release with busybox.
//! They are fetched once, from the mirror that the machine's own apt settings name, checked by
//! Debian's keys, and unpacked into `standstill-qemu` in the target folder: about 75 MB fetched, 180 MB
//! kept. Several test programs may want them at once: one fetches, the others wait. The variable
//! [`CACHE_VARIABLE`] names another folder, which several target folders may share.
//!
//! **Where they cannot be had** a test fails, unless [`WITHOUT_VARIABLE`] is `1`: then
//! [`Qemu::for_tests`] says that a test is left out, and gives none.
//!
//! All calls block, and each has a bound. In a test with an async runtime, use them from a thread
//! beside it (`tokio::task::spawn_blocking`), or use the
//! [blocking machine](standstill_coordinator::blocking): the coordinator must not wait with the test.

#![expect(clippy::panic, reason = "a check fails by a panic")]

mod console;
mod cpio;
mod fetch;
mod guest;
mod migration;
mod mirror;
mod modules;
mod program;
mod qmp;
mod run;
mod spawn;

pub use console::Console;
pub use fetch::{CACHE_VARIABLE, FetchError};
pub use guest::{Guest, GuestBuilder, GuestError};
pub use mirror::MirrorError;
pub use modules::ModuleError;
pub use program::ProgramFileError;
pub use qmp::{Qmp, QmpError};
pub use run::RunError;

use crate::chain;
use fetch::Part;
use run::run;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use thiserror::Error;

/// If it is `1`, tests that need QEMU are left out.
pub const WITHOUT_VARIABLE: &str = "STANDSTILL_TESTS_WITHOUT_QEMU";

/// The name of the program.
const PROGRAM: &str = "qemu-system-x86_64";
/// How long QEMU may take to say what it can do.
const ASK: Duration = Duration::from_secs(60);

/// QEMU or the guest cannot be had.
#[derive(Debug, Error)]
pub enum QemuError {
    /// They are not there and cannot be fetched.
    #[error(
        "no QEMU with vfio-user-pci and no guest for it can be fetched; {WITHOUT_VARIABLE}=1 leaves \
         out the tests that need them"
    )]
    Fetch(#[from] FetchError),
    /// What was fetched does not run.
    #[error("the QEMU that was fetched cannot be used")]
    Program(#[from] RunError),
    /// What was fetched lacks what it was fetched for.
    #[error("the QEMU that was fetched does not know the device vfio-user-pci")]
    NoVfioUser,
    /// The guest's modules cannot be read.
    #[error("the modules of the guest's kernel cannot be used")]
    Modules(#[from] ModuleError),
}

/// A QEMU that can be run, and what belongs to a guest.
#[derive(Debug)]
pub struct Qemu {
    program: PathBuf,
    /// What comes before the arguments of a machine.
    arguments: Vec<OsString>,
    /// Whether it can end when its parent does.
    ends_with_parent: bool,
    kernel: PathBuf,
    busybox: PathBuf,
    modules: modules::Modules,
}

impl Qemu {
    /// For a test that needs QEMU. `None` if such tests are to be left out, which this says on standard
    /// error then.
    ///
    /// # Panics
    ///
    /// Where [`find`](Self::find) fails; the message says why and how such tests are left out.
    #[must_use]
    pub fn for_tests() -> Option<Self> {
        if std::env::var_os(WITHOUT_VARIABLE).is_none_or(|value| value != "1") {
            return match Self::find() {
                Ok(qemu) => Some(qemu),
                Err(error) => panic!("{}", chain(&error)),
            };
        }
        let test = std::thread::current();
        let test = test.name().unwrap_or("a test");
        // Not by a macro, whose output a test program keeps to itself. Nobody need hear it.
        let _ = writeln!(io::stderr(), "LEFT OUT, since {WITHOUT_VARIABLE}=1: {test} needs QEMU");
        None
    }

    /// Finds QEMU and a guest; fetches what is not there, which takes up to some minutes once.
    ///
    /// # Errors
    ///
    /// [`QemuError`].
    pub fn find() -> Result<Self, QemuError> {
        let guest = Part::Guest.folder()?;
        let missing = |what: &str| FetchError::Missing { what: what.to_owned() };
        let busybox = ["usr/bin/busybox", "bin/busybox"].map(|path| guest.join(path));
        let busybox = busybox.into_iter().find(|path| path.is_file());
        let busybox = busybox.ok_or_else(|| missing("busybox"))?;
        let kernel = only(&guest.join("boot"), "vmlinuz-")?;
        let modules = ["usr/lib/modules", "lib/modules"].map(|path| guest.join(path));
        let modules = modules.into_iter().find(|path| path.is_dir());
        let modules = only(&modules.ok_or_else(|| missing("the modules"))?, "")?;
        let modules = modules::Modules::new(&modules, &busybox)?;
        let (program, arguments) = match system() {
            Some(found) => found,
            None => fetched()?,
        };
        let help = run(Command::new(&program).args(&arguments).arg("-help"), ASK)?;
        let ends_with_parent = String::from_utf8_lossy(&help).contains("exit-with-parent");
        Ok(Self { program, arguments, ends_with_parent, kernel, busybox, modules })
    }

    /// Describes a guest.
    #[must_use]
    pub fn guest(&self) -> GuestBuilder<'_> {
        GuestBuilder::new(self)
    }

    /// QEMU without any argument of a machine.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        command
    }
}

/// A program and the arguments that it always has.
type Program = (PathBuf, Vec<OsString>);

/// The machine's own QEMU, if it knows the device.
fn system() -> Option<Program> {
    let mut ask = Command::new(PROGRAM);
    ask.args(["-device", "vfio-user-pci,help"]);
    run(&mut ask, ASK).ok().map(|_| (PROGRAM.into(), Vec::new()))
}

/// The fetched one: by its own dynamic linker, since the machine's libraries are of another release.
fn fetched() -> Result<Program, QemuError> {
    let root = Part::Qemu.folder()?;
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut arguments: Vec<OsString> =
        vec!["--library-path".into(), libraries.into(), root.join("usr/bin").join(PROGRAM).into()];
    for folder in ["usr/share/qemu", "usr/share/seabios"] {
        arguments.extend(["-L".into(), root.join(folder).into()]);
    }
    let linker = root.join("usr/lib64/ld-linux-x86-64.so.2");
    run(Command::new(&linker).args(&arguments).arg("--version"), ASK)?;
    let mut ask = Command::new(&linker);
    ask.args(&arguments).args(["-device", "vfio-user-pci,help"]);
    run(&mut ask, ASK).map_err(|_| QemuError::NoVfioUser)?;
    Ok((linker, arguments))
}

/// The file in a folder whose name begins so.
fn only(folder: &Path, prefix: &str) -> Result<PathBuf, FetchError> {
    let failed = |source| FetchError::Io { path: folder.to_owned(), source };
    for file in fs::read_dir(folder).map_err(failed)? {
        let file = file.map_err(failed)?;
        if file.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(file.path());
        }
    }
    Err(FetchError::Missing { what: format!("{}/{prefix}*", folder.display()) })
}
