//! The system calls that a coordinator makes, for the seccomp filter of the VMM that embeds it.
//!
//! The list is for x86-64 and glibc (the module is not there on others), and is compared with what a
//! machine really does by a test that traces it; `docs/system-calls.md` says how to use it.
//!
//! ```
//! use standstill_coordinator::system_calls::{Phase, SYSTEM_CALLS, Thread};
//!
//! // What the threads of a machine need that runs by now, and will neither be taken over nor start
//! // devices again.
//! let life = [Phase::Running, Phase::Transition, Phase::Shutdown];
//! let allowed: Vec<i64> = SYSTEM_CALLS
//!     .iter()
//!     .filter(|call| call.thread == Thread::Machine)
//!     .filter(|call| call.phases.iter().any(|phase| life.contains(phase)))
//!     .map(|call| call.number)
//!     .collect();
//! assert!(!allowed.is_empty());
//! ```

/// A system call and who makes it when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SystemCall {
    /// Its name.
    pub name: &'static str,
    /// Its number on this architecture.
    pub number: i64,
    /// Who makes it. A call that several make is there once for each.
    pub thread: Thread,
    /// When it may be made.
    pub phases: &'static [Phase],
    /// True if a machine makes it only on some systems or now and then: when memory runs short, when
    /// threads meet, with another C library.
    pub sometimes: bool,
    /// What for, for a person.
    pub purpose: &'static str,
}

/// A kind of threads, which share a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Thread {
    /// Those that call the blocking API.
    Caller,
    /// Those on which the machine lives: `standstill` and what it makes (workers, hooks, local
    /// devices, whose own calls are not listed). With the async API, those of the runtime.
    Machine,
    /// `standstill-spawn`, of which there is one in a program. Device processes inherit its filter.
    Spawn,
}

/// A phase in the life of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Until `start` returns.
    Start,
    /// Signs of life, status, events, memory declarations.
    Running,
    /// A pause or a resume.
    Transition,
    /// A device is lost, fenced and restarted.
    Loss,
    /// A device is added or removed.
    Membership,
    /// The end, by `shutdown` or by the drop of the last handle.
    Shutdown,
    /// Until `take_over` returns.
    TakeOver,
}

use Phase::{Loss, Membership, Running, Shutdown, Start, TakeOver, Transition};
use Thread::{Caller, Machine, Spawn};

const ALWAYS: &[Phase] = &[Start, Running, Transition, Loss, Membership, Shutdown, TakeOver];
/// While device processes are started.
const BIRTH: &[Phase] = &[Start, Loss, Membership];
/// While threads are made.
const SETUP: &[Phase] = &[Start, Loss, Membership, TakeOver];
/// While device processes end.
const DEATH: &[Phase] = &[Start, Loss, Membership, Shutdown, TakeOver];

/// While the machine's own thread begins.
const CREATION: &[Phase] = &[Start, TakeOver];
/// Once it is there.
const LIFE: &[Phase] = &[Running, Transition, Loss, Membership, Shutdown];
/// While files of a kept machine are written.
const KEPT: &[Phase] = &[Start, Loss, Membership, Shutdown, TakeOver];
/// While devices are told of RAM.
const TRACKED: &[Phase] = &[Running, Loss, Membership];
const TAKEN: &[Phase] = &[TakeOver];

macro_rules! calls {
    ($($thread:ident $phases:ident $often:ident { $($number:ident $purpose:literal,)* })*) => {
        &[$($(SystemCall {
            // Without the `SYS_` in front.
            name: stringify!($number).split_at(4).1,
            number: libc::$number,
            thread: $thread,
            phases: $phases,
            sometimes: calls!(@ $often),
            purpose: $purpose,
        },)*)*]
    };
    (@ surely) => { false };
    (@ sometimes) => { true };
}

/// All of them.
pub const SYSTEM_CALLS: &[SystemCall] = calls! {
    Caller ALWAYS surely {
        SYS_futex "waits for the answer",
        SYS_getpid "is this the process that has the machine, or a fork of it",
        SYS_read "the fd of events and of launched phases",
        SYS_write "wakes the machine's thread; the fd of events",
    }
    Caller ALWAYS sometimes {
        SYS_brk "memory",
        SYS_close "the fds of events and of launched phases",
        SYS_madvise "memory",
        SYS_mmap "memory",
        SYS_mprotect "memory",
        SYS_mremap "memory",
        SYS_munmap "memory",
        SYS_restart_syscall "after a stop signal",
        SYS_sched_yield "threads meet",
    }
    Caller LIFE surely {
        SYS_eventfd2 "the fd of events and of launched phases",
        SYS_fcntl "a copy of the RAM's fd",
        SYS_fstat "dirty tracking: the size of RAM",
    }
    Caller CREATION surely {
        SYS_clone3 "the machine's thread",
        SYS_rt_sigprocmask "the machine's thread",
    }
    Caller CREATION sometimes {
        SYS_clone "the machine's thread, with older C libraries",
        SYS_rt_sigaction "the machine's thread, the first of the program",
    }

    Machine ALWAYS surely {
        SYS_close "fds",
        SYS_epoll_ctl "watches fds",
        SYS_epoll_pwait "what there is to read, without waiting",
        SYS_epoll_wait "waits for everything",
        SYS_exit "threads end",
        SYS_fcntl "copies of fds that close on exec",
        SYS_fstat "RAM and backing files: which file is it",
        SYS_futex "threads meet",
        SYS_getpid "is the spawning thread of this process, and not of one that has forked",
        SYS_madvise "threads end; memory",
        SYS_mmap "threads begin; memory",
        SYS_mprotect "threads begin; memory",
        SYS_munmap "threads end; memory",
        SYS_read "logs of devices; files",
        SYS_recvmsg "answers of devices",
        SYS_rt_sigprocmask "threads begin and end",
        SYS_sendmsg "commands to devices",
        SYS_sigaltstack "threads begin and end",
        SYS_write "wakes threads; files",
    }
    Machine ALWAYS sometimes {
        SYS_brk "memory",
        SYS_mremap "memory",
        SYS_restart_syscall "after a stop signal",
        SYS_sched_yield "threads meet",
    }
    Machine SETUP surely {
        SYS_clone3 "threads: workers, hooks, local devices, the spawning thread",
        SYS_getrandom "keys of hash tables; the identity of the machine",
        SYS_gettid "threads begin",
        SYS_newfstatat "files by their path",
        SYS_open "backing files, opened again for their locks",
        SYS_prctl "`PR_SET_NAME`: threads begin",
        SYS_readlink "the paths of backing files",
        SYS_rseq "threads begin",
        SYS_sched_getaffinity "threads begin; how many CPUs there are",
        SYS_set_robust_list "threads begin",
        SYS_setsockopt "control channels: no fds after the greeting, credentials",
        SYS_statx "files by their path",
    }
    Machine SETUP sometimes {
        SYS_clone "threads, with older C libraries",
        SYS_lseek "`/proc/self/cgroup`: how many CPUs there are",
    }
    Machine CREATION surely {
        SYS_epoll_create1 "the machine's thread begins",
        SYS_eventfd2 "the machine's thread begins",
        SYS_getpriority "short time slices",
        SYS_sched_getscheduler "short time slices",
        SYS_sched_setattr "short time slices",
    }
    Machine CREATION sometimes {
        SYS_setpriority "short time slices",
    }
    Machine BIRTH surely {
        SYS_socketpair "control channels",
    }
    Machine TRACKED surely {
        SYS_ftruncate "dirty tracking: bitmaps",
        SYS_memfd_create "dirty tracking: bitmaps",
    }
    Machine DEATH surely {
        SYS_flock "locks of backing files; of the directory of a kept machine",
        SYS_geteuid "kept machines: whose directory is it",
        SYS_ioctl "`FIONBIO`: the rest of a log",
        SYS_openat "kept machines: the directory and the record",
        SYS_pidfd_send_signal "kills",
        SYS_ppoll "has it ended",
        SYS_unlink "kept machines: sockets",
        SYS_unlinkat "kept machines: the record",
        SYS_waitid "how has it ended",
    }
    Machine KEPT surely {
        SYS_bind "kept machines: the sockets of devices",
        SYS_connect "kept machines: is a socket alive; a take-over",
        SYS_fsync "kept machines: the record",
        SYS_mkdirat "kept machines: the directory",
        SYS_renameat "kept machines: the record",
        SYS_socket "kept machines: the sockets of devices; a take-over",
    }
    Machine KEPT sometimes {
        SYS_chmod "kept machines: the rights of sockets",
    }
    Machine TAKEN surely {
        SYS_getsockopt "a take-over: who is at the other end",
        SYS_pidfd_open "a take-over: processes by the record",
        SYS_pipe2 "a take-over: a device of which nothing is left",
    }

    Spawn ALWAYS surely {
        SYS_close "fds",
        SYS_fcntl "fds above the standard ones",
        SYS_futex "waits for work",
    }
    Spawn ALWAYS sometimes {
        SYS_brk "memory",
        SYS_madvise "memory",
        SYS_mremap "memory",
        SYS_restart_syscall "after a stop signal",
        SYS_sched_yield "threads meet",
    }
    Spawn BIRTH surely {
        SYS_clone3 "device processes (`CLONE_VM`, `CLONE_VFORK`)",
        SYS_gettid "it begins",
        SYS_mmap "the stack of a process that begins",
        SYS_mprotect "memory",
        SYS_munmap "the stack of a process that has begun",
        SYS_open "`/dev/null`",
        SYS_pidfd_open "device processes",
        SYS_pipe2 "logs of devices",
        SYS_prctl "`PR_SET_NAME`: it begins",
        SYS_prlimit64 "the stack of a process that begins",
        SYS_rseq "it begins",
        SYS_rt_sigprocmask "a process begins with no signal blocked",
        SYS_sched_getaffinity "it begins: the size of its stack",
        SYS_set_robust_list "it begins",
        SYS_sigaltstack "it begins",
    }
    Spawn BIRTH sometimes {
        SYS_clone "device processes, with older C libraries",
        SYS_kill "a process that cannot be owned",
    }
    Spawn DEATH surely {
        SYS_waitid "processes that did not end in time, or that lived on",
    }
};
