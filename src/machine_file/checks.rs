//! Looks at what a machine file speaks of: whether programs can be executed, sockets made, files
//! opened.

use super::device::{DeviceEntry, Program};
use super::diagnostic::{Problem, Problems};
use super::fields::Placed;
use super::{HookEntry, MachineFile, QmpEntry};
use rustix::fs::{Access, AtFlags, CWD};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use standstill::coordinator::record::MAX_SOCKET_PATH;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// How the machine is going to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// Its devices are started.
    Start,
    /// They run already and serve on their sockets.
    TakeOver,
}

impl MachineFile {
    /// Notes what stands in the way of the machine.
    pub(crate) fn check(&self, beginning: Beginning, problems: &mut Problems) {
        for device in &self.devices {
            device.check(beginning, &self.folder, problems);
        }
        for Placed { value, span } in &self.ram {
            if let Err(why) = open_ram(value) {
                let message = format!("{} cannot be declared as guest RAM", value.display());
                problems.add(Problem::new(message, span.clone()).label(why.to_string()));
            }
        }
        if let Some(QmpEntry { path: Placed { value, span }, .. }) = &self.qmp {
            // It need not be there yet: QEMU makes it when all its devices are there.
            let kind = value.metadata().map(|metadata| metadata.file_type());
            if kind.is_ok_and(|kind| !kind.is_socket()) {
                let message = format!("{} is no socket", value.display());
                let help = "QEMU serves QMP there: -qmp unix:PATH,server=on,wait=off";
                problems.add(Problem::new(message, span.clone()).help(help));
            }
        }
        for HookEntry { stop, start, .. } in &self.hooks {
            for command in [stop, start].into_iter().flatten() {
                check_program(&command.program, problems);
            }
        }
    }
}

impl DeviceEntry {
    /// Notes what stands in the way of the device; `folder` is the machine's, which is made at its
    /// start.
    pub(crate) fn check(&self, beginning: Beginning, folder: &Path, problems: &mut Problems) {
        if let Some(Program::Other(program)) = &self.program {
            check_program(program, problems);
        }
        if let (Some(socket), Beginning::Start) = (&self.socket, beginning) {
            check_socket(socket, folder, problems);
        }
    }
}

/// Opens a file that is to be declared as guest RAM.
pub(crate) fn open_ram(path: &Path) -> io::Result<File> {
    // O_NONBLOCK: what is there may be a pipe.
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = File::options().read(true).write(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("it is no regular file"))
    }
}

fn check_program(program: &Placed<PathBuf>, problems: &mut Problems) {
    let Placed { value: path, span } = program;
    let (message, label) = match find_program(path) {
        Ok(()) => return,
        Err(why) => (format!("program {} cannot be executed", path.display()), why),
    };
    problems.add(Problem::new(message, span.clone()).label(label));
}

/// Whether a program can be executed; a bare name is looked up in `PATH`.
fn find_program(path: &Path) -> Result<(), String> {
    if path.as_os_str().as_encoded_bytes().contains(&b'/') {
        return executable(path);
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&folders).any(|folder| executable(&folder.join(path)).is_ok());
    if found { Ok(()) } else { Err("it is in no folder of PATH".to_owned()) }
}

fn executable(path: &Path) -> Result<(), String> {
    let metadata = path.metadata().map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("it is no file".to_owned());
    }
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(
        |errno| match errno {
            Errno::ACCESS => "it is not executable for this user (chmod +x)".to_owned(),
            errno => errno.to_string(),
        },
    )
}

fn check_socket(socket: &Placed<PathBuf>, own: &Path, problems: &mut Problems) {
    let Placed { value: path, span } = socket;
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return;
    }
    let problem =
        |message: &str| Problem::new(format!("{} {message}", path.display()), span.clone());
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let folder = path.parent().unwrap_or(Path::new("/"));
            if folder != own
                && let Err(why) = writable_folder(folder)
            {
                problems.add(problem("cannot be made").label(why));
            }
            return;
        }
        Err(error) => return problems.add(problem("cannot be examined").label(error.to_string())),
    };
    if !metadata.file_type().is_socket() {
        return problems.add(
            problem("exists and is no socket")
                .label("left alone")
                .help("choose another path, or remove what is there"),
        );
    }
    match somebody_listens(path) {
        // Stale: the device replaces it.
        Ok(false) => {}
        Ok(true) => problems.add(problem("is served by another process").help(
            "end that process, or choose another path; if it is a device of this machine \
                       that was left behind, use `standstill run --attach`",
        )),
        Err(errno) => problems.add(problem("cannot be examined").label(errno.to_string())),
    }
}

/// Whether somebody listens on a socket.
pub(crate) fn somebody_listens(path: &Path) -> rustix::io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&probe, &SocketAddrUnix::new(path)?) {
        // A full backlog is somebody's, too, and so is a socket of another type.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Whether files can be made in a folder.
fn writable_folder(folder: &Path) -> Result<(), String> {
    match rustix::fs::accessat(CWD, folder, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
        Ok(()) => Ok(()),
        Err(errno) => Err(format!("folder {}: {errno}", folder.display())),
    }
}
