//! The devices that are measured: processes, each with an image of its own.

use super::program::Failure;
use standstill::coordinator::blocking::Machine;
use standstill::coordinator::{DeviceSpec, MachineBuilder};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a device may take until it can be connected to.
const START: Duration = Duration::from_secs(20);

/// An image full of data; returns its path.
///
/// All of it is in the page cache then, and none of it has still to be written.
pub(crate) fn image(folder: &Path, name: &str, size: u64) -> Result<PathBuf, Failure> {
    let path = folder.join(name);
    let mut file = File::create(&path)?;
    let mut random = fastrand::Rng::with_seed(7);
    let mut piece = vec![0; 1 << 20];
    for _ in 0..size / piece.len() as u64 {
        random.fill(&mut piece);
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    Ok(path)
}

/// The device of this project, under a coordinator.
pub(crate) struct Ours {
    pub(crate) machine: Machine,
    pub(crate) socket: PathBuf,
}

impl Ours {
    /// Starts it with these further arguments.
    pub(crate) fn start(
        folder: &Path,
        image: &Path,
        direct: bool,
        arguments: &[&str],
    ) -> Result<Self, Failure> {
        let socket = folder.join("ours");
        let device = DeviceSpec::new("disk", env!("CARGO_BIN_EXE_standstill"))
            .args(["device", "vhost-user-blk", "--file"])
            .arg(image)
            .arg("--socket")
            .arg(&socket)
            .args(direct.then_some("--direct"))
            .args(arguments);
        let machine = MachineBuilder::new("bench").devices([device]).start_blocking()?;
        Ok(Self { machine, socket })
    }
}

/// `qemu-storage-daemon`, with one vhost-user-blk export.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Daemon {
    /// Starts it for a block device, in the words of its `--blockdev`.
    pub(crate) fn start(
        program: &str,
        folder: &Path,
        name: &str,
        block_device: &str,
    ) -> Result<Self, Failure> {
        let socket = folder.join(name);
        let path = socket.to_str().ok_or("the path of a socket is no text")?;
        let child = Command::new(program)
            .args(["--object", "iothread,id=thread"])
            .args(["--blockdev", &format!("{block_device},node-name=disk")])
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,iothread=thread,writable=on,\
                 num-queues=1,addr.type=unix,addr.path={path}"
            ))
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| {
                format!("{program} (Debian: qemu-utils of trixie-backports): {error}")
            })?;
        let mut daemon = Self { child, socket };
        let begin = Instant::now();
        while !daemon.socket.exists() {
            if let Some(status) = daemon.child.try_wait()? {
                return Err(format!("{program} has ended: {status}").into());
            }
            if begin.elapsed() > START {
                return Err(format!("{program} does not listen").into());
            }
            std::thread::yield_now();
        }
        Ok(daemon)
    }

    /// The same, for an image.
    pub(crate) fn of_image(
        program: &str,
        folder: &Path,
        image: &Path,
        direct: bool,
    ) -> Result<Self, Failure> {
        let image = image.to_str().ok_or("the path of an image is no text")?;
        let direct = if direct { "on" } else { "off" };
        let device = format!("driver=file,filename={image},aio=io_uring,cache.direct={direct}");
        Self::start(program, folder, "daemon", &device)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // It is there as long as somebody listens.
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Returns once somebody listens at a socket that is there only then.
pub(crate) fn wait_for(socket: &Path) -> Result<(), Failure> {
    let begin = Instant::now();
    while !socket.exists() {
        if begin.elapsed() > START {
            return Err(format!("nobody listens at {}", socket.display()).into());
        }
        std::thread::yield_now();
    }
    Ok(())
}
