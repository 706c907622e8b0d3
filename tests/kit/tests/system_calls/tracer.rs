//! Which system calls a process makes, by which of its threads and in which phase of what it does.
//!
//! The threads of the process are traced; the processes that it starts are not.

use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::read_to_string;
use std::path::Path;
use std::process::{Command, Stdio};

/// What the process says by `getpgid` of what it does; see the program `embedder`.
const MARK: u64 = 0x0100_0000;
const MARKS: u64 = 0x1000;
/// `prctl(PR_SET_NAME)`: from here on it is known which thread this is.
const PR_SET_NAME: u64 = 15;
/// `op` of `ptrace_syscall_info` at the entry to a system call.
const ENTRY: u8 = 1;

/// A system call, seen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seen {
    /// Its number.
    pub(crate) number: i64,
    /// The name of the thread; that of the program for its first one.
    pub(crate) thread: String,
    /// What the process said that it does.
    pub(crate) phase: u64,
    /// What it has done before that: a thread may be behind.
    pub(crate) before: u64,
}

#[derive(Default)]
struct Thread {
    /// `None` until it has given itself a name.
    name: Option<String>,
    unnamed: Vec<(i64, Phases)>,
}

/// What the process does, and what it has done before that.
type Phases = (u64, u64);

/// Runs a program with its standard input at its end, and looks at it until it has ended.
///
/// # Panics
///
/// If it cannot be traced, or does not end well.
pub(crate) fn trace(program: &Path, arguments: &[&str]) -> BTreeSet<Seen> {
    let mut child = Command::new(program).args(arguments).stdin(Stdio::piped()).spawn().unwrap();
    let first = Pid::from_raw(i32::try_from(child.id()).unwrap());
    // Until its input ends it has one thread and waits.
    let options =
        Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL;
    ptrace::seize(first, options).unwrap_or_else(|error| {
        panic!(
            "this test traces its own child with ptrace, and PTRACE_SEIZE says: {error} (what may \
             refuse it: kernel.yama.ptrace_scope above 1, a container without CAP_SYS_PTRACE, \
             seccomp)"
        )
    });
    ptrace::interrupt(first).unwrap();
    drop(child.stdin.take());
    let name = program.file_name().unwrap().to_str().unwrap().to_owned();
    let named = Thread { name: Some(name), ..Thread::default() };
    let mut threads = BTreeMap::from([(first, named)]);
    let mut seen = BTreeSet::new();
    let (mut phase, mut before, mut inside) = (0, 0, false);
    loop {
        // Threads that are traced are children of this thread, and no others of this process are.
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        let (thread, signal) = match waitpid(None, Some(flags)).unwrap() {
            WaitStatus::Exited(pid, code) if pid == first => {
                assert_eq!(code, 0, "{} {arguments:?}", program.display());
                break;
            }
            WaitStatus::Signaled(pid, signal, _) if pid == first => {
                panic!("{} {arguments:?}: {signal}", program.display())
            }
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) => {
                threads.remove(&pid);
                continue;
            }
            WaitStatus::PtraceSyscall(pid) => {
                let entry = ptrace::syscall_info(pid).is_ok_and(|info| info.op == ENTRY);
                if let (true, Ok(registers)) = (entry, ptrace::getregs(pid)) {
                    let number = i64::try_from(registers.orig_rax).unwrap();
                    let argument = registers.rdi;
                    let marks = number == libc::SYS_getpgid;
                    if marks && (MARK..MARK + MARKS).contains(&argument) {
                        let marked = (argument - MARK) / 2;
                        if marked != phase {
                            (phase, before) = (marked, phase);
                        }
                        inside = argument % 2 == 1;
                    } else if pid != first || inside {
                        let thread = threads.entry(pid).or_default();
                        if number == libc::SYS_prctl && argument == PR_SET_NAME {
                            thread.unnamed.push((number, (phase, before)));
                            // It has the name at the exit from this call, which comes next.
                        } else if let Some(name) = &thread.name {
                            let thread = name.clone();
                            seen.insert(Seen { number, thread, phase, before });
                        } else {
                            thread.unnamed.push((number, (phase, before)));
                        }
                    }
                } else if let Some(thread) = threads.get_mut(&pid)
                    && thread.unnamed.last().is_some_and(|&(number, _)| number == libc::SYS_prctl)
                {
                    let comm = format!("/proc/{first}/task/{pid}/comm");
                    let name = read_to_string(comm).unwrap_or_default().trim_end().to_owned();
                    for (number, (phase, before)) in thread.unnamed.drain(..) {
                        seen.insert(Seen { number, thread: name.clone(), phase, before });
                    }
                    thread.name = Some(name);
                }
                (pid, None)
            }
            WaitStatus::Stopped(pid, signal) => (pid, Some(signal)),
            // A thread was made, is new, or stops for a moment.
            WaitStatus::PtraceEvent(pid, ..) => (pid, None),
            other => panic!("{other:?}"),
        };
        // One that was killed meanwhile tells by its exit.
        let _ = ptrace::syscall(thread, signal);
    }
    let _ = child.wait();
    seen
}
