//! Packages of Debian, fetched and unpacked into a folder that tests share: no root, and nothing of
//! the machine's own packages is touched.

use super::mirror::{MirrorError, mirror};
use super::run::{RunError, run};
use rustix::event::{Timespec, poll};
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Names another folder for what is fetched.
pub const CACHE_VARIABLE: &str = "STANDSTILL_QEMU_CACHE";

/// The release that all packages are of, whatever release the machine has: the same QEMU and the same
/// guest everywhere.
const RELEASE: &str = "trixie";
/// Where it has a QEMU that knows vfio-user.
const BACKPORTS: &str = "trixie-backports";
/// Who signs the release: one of these, as the package debian-archive-keyring has it.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];
/// Changes when what is in the folder is another: an older one is left alone.
const LAYOUT: u32 = 1;
/// What is used of the shared files of packages; documentation and translations are not kept.
const SHARED_FILES: [&str; 2] = ["qemu", "seabios"];

/// How long an index or packages may take.
const FETCH: Duration = Duration::from_secs(600);
/// How long a package may take to be unpacked, or apt to find one.
const UNPACK: Duration = Duration::from_secs(120);
/// How long another process may fetch meanwhile.
const OTHERS: Duration = Duration::from_secs(1800);
/// How often it is asked whether the other one has ended.
const INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Packages cannot be had.
#[derive(Debug, Error)]
pub enum FetchError {
    /// There is no folder for them.
    #[error(
        "no folder for what is fetched: this program is in no target folder of cargo, and \
         {CACHE_VARIABLE} does not name another"
    )]
    NoFolder,
    /// They are of another architecture.
    #[error("the packages are for x86-64, this machine is {0}")]
    Architecture(&'static str),
    /// The machine does not know who signs Debian.
    #[error("{} is missing, install the package debian-archive-keyring", KEYRINGS[0])]
    Keyring,
    /// It is not known where to fetch them.
    #[error("no mirror to fetch from")]
    Mirror(#[from] MirrorError),
    /// Apt or dpkg did not do it.
    #[error("{what}")]
    Program {
        /// What was to be done.
        what: &'static str,
        /// Why it was not.
        source: RunError,
    },
    /// The folder cannot be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
    /// Somebody else fetches and does not end.
    #[error("another process has been fetching into {} for {OTHERS:?}", .0.display())]
    Busy(PathBuf),
    /// The packages are not as they were.
    #[error("{what} is not in the packages that were fetched")]
    Missing {
        /// What was looked for.
        what: String,
    },
}

impl FetchError {
    fn io(path: &Path) -> impl Fn(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { path: path.clone(), source }
    }

    fn program(what: &'static str) -> impl Fn(RunError) -> Self {
        move |source| Self::Program { what, source }
    }
}

/// Packages that are fetched and unpacked together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// QEMU and all libraries that it needs.
    Qemu,
    /// A guest's kernel with its modules, and busybox.
    Guest,
}

impl Part {
    const fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Guest => "guest",
        }
    }

    const fn what(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU (about 40 MB)",
            Self::Guest => "a guest's kernel and busybox (about 35 MB)",
        }
    }

    /// The folder into which it is unpacked; fetched if need be, by one process for all.
    ///
    /// # Errors
    ///
    /// If it is not there and cannot be fetched.
    pub(super) fn folder(self) -> Result<PathBuf, FetchError> {
        let cache = cache()?;
        let ready = cache.join(format!("{}-{RELEASE}-{LAYOUT}", self.name()));
        if ready.is_dir() {
            return Ok(ready);
        }
        fs::create_dir_all(&cache).map_err(FetchError::io(&cache))?;
        let _lock = lock(&cache.join("lock"))?;
        // Somebody else may have fetched it meanwhile.
        if ready.is_dir() {
            return Ok(ready);
        }
        if std::env::consts::ARCH != "x86_64" {
            return Err(FetchError::Architecture(std::env::consts::ARCH));
        }
        // Not by a macro, whose output a test program keeps to itself. Nobody need hear it.
        let _ = writeln!(io::stderr(), "fetching {} into {}", self.what(), cache.display());
        let unfinished = cache.join("unfinished");
        let _ = fs::remove_dir_all(&unfinished);
        let root = unfinished.join("root");
        fs::create_dir_all(&root).map_err(FetchError::io(&root))?;
        let packages = Apt::new(&unfinished.join("apt"))?.fetch(self)?;
        for package in packages {
            let mut dpkg = Command::new("dpkg-deb");
            dpkg.arg("--extract").arg(&package).arg(&root);
            run(&mut dpkg, UNPACK).map_err(FetchError::program("cannot unpack a package"))?;
        }
        forget_documentation(&root)?;
        fs::rename(&root, &ready).map_err(FetchError::io(&ready))?;
        fs::remove_dir_all(&unfinished).map_err(FetchError::io(&unfinished))?;
        Ok(ready)
    }
}

/// The folder for all that is fetched.
fn cache() -> Result<PathBuf, FetchError> {
    if let Some(folder) = std::env::var_os(CACHE_VARIABLE).filter(|folder| !folder.is_empty()) {
        // Apt runs in another working directory.
        return std::path::absolute(folder).map_err(|_| FetchError::NoFolder);
    }
    let program = std::env::current_exe().map_err(|_| FetchError::NoFolder)?;
    // Cargo writes this file into each target folder.
    let target = program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    Ok(target.ok_or(FetchError::NoFolder)?.join("standstill-qemu"))
}

/// Waits for the lock that whoever fetches has. It ends with the file.
fn lock(path: &Path) -> Result<File, FetchError> {
    let failed = FetchError::io(path);
    let file = File::options().create(true).truncate(false).write(true).open(path);
    let file = file.map_err(&failed)?;
    let end = Instant::now() + OTHERS;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
            Err(TryLockError::WouldBlock) if Instant::now() >= end => {
                return Err(FetchError::Busy(path.to_owned()));
            }
            // Nothing tells when a file lock is free, except a wait for it that has no bound.
            Err(TryLockError::WouldBlock) => drop(poll(&mut [], Some(&INTERVAL))),
        }
    }
}

/// Removes what takes most of the room and is used by nobody.
fn forget_documentation(root: &Path) -> Result<(), FetchError> {
    let shared = root.join("usr/share");
    let failed = FetchError::io(&shared);
    for file in fs::read_dir(&shared).map_err(&failed)? {
        let file = file.map_err(&failed)?;
        if SHARED_FILES.iter().any(|kept| file.file_name() == *kept) {
            continue;
        }
        let folder = file.file_type().map_err(&failed)?.is_dir();
        let path = file.path();
        let gone = if folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        gone.map_err(FetchError::io(&path))?;
    }
    Ok(())
}

/// Apt with a state of its own: it knows of no package that is installed, and of one mirror.
struct Apt {
    folder: PathBuf,
    configuration: PathBuf,
}

impl Apt {
    fn new(folder: &Path) -> Result<Self, FetchError> {
        let keyring = KEYRINGS.iter().find(|path| Path::new(path).is_file());
        let sources = format!(
            "Types: deb\nURIs: {}\nSuites: {RELEASE} {BACKPORTS}\nComponents: main\n\
             Architectures: amd64\nTargets: Packages\nSigned-By: {}\n",
            mirror()?,
            keyring.ok_or(FetchError::Keyring)?,
        );
        for part in ["state/lists/partial", "cache/archives/partial", "empty", "packages"] {
            let part = folder.join(part);
            fs::create_dir_all(&part).map_err(FetchError::io(&part))?;
        }
        let configuration = folder.join("apt.conf");
        let files = [
            (folder.join("state/status"), String::new()),
            (folder.join("debian.sources"), sources),
            (configuration.clone(), settings(&folder.display().to_string())),
        ];
        for (path, text) in files {
            fs::write(&path, text).map_err(FetchError::io(&path))?;
        }
        let apt = Self { folder: folder.to_owned(), configuration };
        run(apt.command("apt-get").arg("update"), FETCH)
            .map_err(FetchError::program("cannot fetch the index of the packages"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // A configuration that is given this way counts after all of the machine's own, which may
        // have a proxy that is needed.
        command.arg("-q").arg("-c").arg(&self.configuration).env("LC_ALL", "C");
        command.current_dir(self.folder.join("packages"));
        command
    }

    /// The packages of a part, each one a file.
    fn fetch(&self, part: Part) -> Result<Vec<PathBuf>, FetchError> {
        let failed = FetchError::program("cannot fetch packages");
        match part {
            Part::Qemu => {
                let mut install = self.command("apt-get");
                install.args(["install", "--yes", "--download-only", "--no-install-recommends"]);
                install.args(["-t", BACKPORTS, "qemu-system-x86", "seabios"]);
                run(&mut install, FETCH).map_err(failed)?;
                packages(&self.folder.join("cache/archives"))
            }
            Part::Guest => {
                let kernel = self.kernel()?;
                let mut download = self.command("apt-get");
                download.args(["download", "-t", RELEASE, "busybox-static", &kernel]);
                run(&mut download, FETCH).map_err(failed)?;
                packages(&self.folder.join("packages"))
            }
        }
    }

    /// The name of the package of the kernel that the release has at present.
    fn kernel(&self) -> Result<String, FetchError> {
        const LATEST: &str = "linux-image-cloud-amd64";
        let mut show = self.command("apt-cache");
        show.arg("-o").arg(format!("APT::Default-Release={RELEASE}"));
        show.args(["--no-all-versions", "show", LATEST]);
        let text = run(&mut show, UNPACK).map_err(FetchError::program("cannot find a kernel"))?;
        let text = String::from_utf8_lossy(&text);
        let words =
            text.lines().filter_map(|line| line.strip_prefix("Depends: ")).flat_map(|line| {
                line.split([',', ' ']).filter(|word| word.starts_with("linux-image-"))
            });
        let missing = || FetchError::Missing { what: format!("what {LATEST} depends on") };
        words.map(str::to_owned).next().ok_or_else(missing)
    }
}

/// The files of packages in a folder.
fn packages(folder: &Path) -> Result<Vec<PathBuf>, FetchError> {
    let failed = FetchError::io(folder);
    let files = fs::read_dir(folder).map_err(&failed)?.collect::<Result<Vec<_>, _>>();
    let mut files: Vec<_> = files.map_err(failed)?.into_iter().map(|file| file.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
    files.sort();
    Ok(files)
}

/// What apt is to do otherwise than the machine's own configuration says.
fn settings(folder: &str) -> String {
    format!(
        r#"Dir::State "{folder}/state";
Dir::State::status "{folder}/state/status";
Dir::Cache "{folder}/cache";
Dir::Cache::archives "archives";
Dir::Etc::sourcelist "{folder}/debian.sources";
Dir::Etc::sourceparts "{folder}/empty";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "{folder}/empty";
#clear APT::Architectures;
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
#clear APT::Default-Release;
// Hooks are for the machine's own packages.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Update::Error-Mode "any";
// Root must not become another user, who may not write here.
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn one_fetches_and_the_others_wait_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let mine = lock(&path).unwrap();
        let (begins, began) = channel();
        let (has_it, had_it) = channel();
        let other = std::thread::spawn(move || {
            begins.send(()).unwrap();
            let lock = lock(&path).unwrap();
            has_it.send(()).unwrap();
            drop(lock);
        });
        began.recv().unwrap();
        assert!(had_it.recv_timeout(Duration::from_millis(250)).is_err(), "two have it");
        drop(mine);
        had_it.recv_timeout(Duration::from_secs(30)).unwrap();
        other.join().unwrap();
    }

    #[test]
    fn apt_is_told_of_no_folder_but_its_own() {
        let settings = settings("/a/folder");
        for line in settings.lines().filter(|line| line.starts_with("Dir::")) {
            let path = line.split('"').nth(1).unwrap();
            let own = path.starts_with("/a/folder/") || ["/dev/null", "archives"].contains(&path);
            assert!(own, "{line}");
        }
    }
}
