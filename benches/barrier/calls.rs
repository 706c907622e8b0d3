//! System calls, counted by strace in rounds of their own: whoever is traced runs many times slower.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long strace may take to attach to all processes.
const PATIENCE: Duration = Duration::from_secs(20);

/// A strace that writes down each call of some processes.
pub(crate) struct Tracing {
    strace: Child,
    folder: TempDir,
}

/// How often each call was made, by process.
pub(crate) struct Calls(BTreeMap<u32, BTreeMap<String, usize>>);

impl Tracing {
    /// Begins to trace all threads of these processes; `None` if there is no strace here.
    pub(crate) fn begin(pids: &[u32]) -> Result<Option<Self>, Box<dyn Error + Send + Sync>> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new("strace");
        // A file for each thread, so that no line is cut by another's.
        command.args(["-ff", "-qqq", "-e", "signal=none", "-o"]).arg(folder.path().join("calls"));
        for pid in pids {
            command.arg("-p").arg(pid.to_string());
        }
        let strace = match command.stdin(Stdio::null()).spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            strace => strace?,
        };
        let mut tracing = Self { strace, folder };
        let began = Instant::now();
        for pid in pids {
            while !is_traced(*pid)? {
                if began.elapsed() > PATIENCE || tracing.strace.try_wait()?.is_some() {
                    return Err("strace does not attach (ptrace may be forbidden here)".into());
                }
                std::thread::yield_now();
            }
        }
        Ok(Some(tracing))
    }

    /// Lets the processes go.
    pub(crate) fn end(mut self) -> Result<Calls, Box<dyn Error + Send + Sync>> {
        let strace = rustix::process::Pid::from_child(&self.strace);
        rustix::process::kill_process(strace, rustix::process::Signal::INT)?;
        self.strace.wait()?;
        let mut calls = Calls(BTreeMap::new());
        for file in fs::read_dir(self.folder.path())? {
            calls.add(&file?.path())?;
        }
        Ok(calls)
    }
}

/// Whether every thread of a process is traced.
fn is_traced(pid: u32) -> io::Result<bool> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        if status.lines().any(|line| line == "TracerPid:\t0") {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Calls {
    /// `calls.<thread>` is named after a thread, which may be gone by now.
    fn add(&mut self, file: &PathBuf) -> Result<(), Box<dyn Error + Send + Sync>> {
        let thread: u32 = file.extension().and_then(|id| id.to_str()).ok_or("a file")?.parse()?;
        let calls = self.0.entry(thread).or_default();
        for line in fs::read_to_string(file)?.lines() {
            // A call that was waiting when the tracing began is begun a second time.
            let name = line.split('(').next().unwrap_or_default();
            if name != "restart_syscall" {
                *calls.entry(name.to_owned()).or_default() += 1;
            }
        }
        Ok(())
    }

    /// Of some threads, per one of so many: the sum, and each that is not rare.
    pub(crate) fn per(&self, threads: impl Fn(u32) -> bool, many: usize) -> String {
        let mut sums: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, calls) in self.0.iter().filter(|(thread, _)| threads(**thread)) {
            for (name, count) in calls {
                *sums.entry(name).or_default() += count;
            }
        }
        let part = |count: usize| count as f64 / many as f64;
        let mut names: Vec<_> = sums.iter().filter(|(_, count)| part(**count) >= 0.05).collect();
        names.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let names: Vec<_> =
            names.iter().map(|(name, count)| format!("{name} {:.2}", part(**count))).collect();
        format!("{:.2}: {}", part(sums.values().sum()), names.join(", "))
    }
}
