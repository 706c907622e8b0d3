//! CPU time and context switches, of this thread and of other processes.

use rustix::io::Errno;
use serde_json::{Value, json};
use std::fs;
use std::io;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};

/// Counters that only grow.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    cpu_ns: u64,
    voluntary: u64,
    involuntary: u64,
}

impl Tally {
    /// For a table: per one of so many.
    pub(crate) fn per(&self, many: usize) -> String {
        let [cpu, voluntary, involuntary] =
            [self.cpu_ns, self.voluntary, self.involuntary].map(|count| count as f64 / many as f64);
        format!("{:.1} µs, {voluntary:.2} + {involuntary:.2}", cpu / 1e3)
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "cpu_ns": self.cpu_ns,
            "voluntary_switches": self.voluntary,
            "involuntary_switches": self.involuntary,
        })
    }
}

impl Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns + other.cpu_ns,
            voluntary: self.voluntary + other.voluntary,
            involuntary: self.involuntary + other.involuntary,
        }
    }
}

impl Sub for Tally {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns - other.cpu_ns,
            voluntary: self.voluntary - other.voluntary,
            involuntary: self.involuntary - other.involuntary,
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Tally {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

/// Of the calling thread.
pub(crate) fn own() -> io::Result<Tally> {
    task("/proc/thread-self")
}

/// Of all threads of these processes together.
pub(crate) fn processes(pids: &[u32]) -> io::Result<Tally> {
    pids.iter().map(|pid| process(*pid)).sum()
}

fn process(pid: u32) -> io::Result<Tally> {
    fs::read_dir(format!("/proc/{pid}/task"))?
        .map(|entry| task(entry?.path().to_str().ok_or(Errno::INVAL)?))
        .sum()
}

fn task(folder: &str) -> io::Result<Tally> {
    let number = |text: Option<&str>| text.and_then(|text| text.trim().parse().ok());
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "a counter is missing in /proc");
    let cpu = fs::read_to_string(format!("{folder}/schedstat"))?;
    let status = fs::read_to_string(format!("{folder}/status"))?;
    let count = |name: &str| {
        number(status.lines().find_map(|line| line.strip_prefix(name))).ok_or_else(missing)
    };
    Ok(Tally {
        cpu_ns: number(cpu.split(' ').next()).ok_or_else(missing)?,
        voluntary: count("voluntary_ctxt_switches:")?,
        involuntary: count("nonvoluntary_ctxt_switches:")?,
    })
}
