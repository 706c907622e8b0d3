//! Stops one thread of another process and lets all others run, which no signal can.

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::process::Pid as Process;
use std::fs;
use std::sync::mpsc;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// A thread of another process that is traced, by a thread of this one: the kernel takes orders
/// from that alone.
pub(crate) struct Tracer {
    /// Without this it stands to its end.
    orders: mpsc::Sender<Order>,
    /// Each stop, then its end.
    told: UnboundedReceiver<Told>,
}

enum Order {
    Run,
    Stop,
}

/// What became of the thread, or why it is not known.
type Told = Result<WaitStatus, String>;

impl Tracer {
    /// Stops the one thread of a process that has this name.
    pub(crate) fn stop(process: Process, name: &str) -> Self {
        let thread = thread_named(process, name);
        let (orders, ordered) = mpsc::channel();
        let (tell, told) = unbounded_channel();
        std::thread::spawn(move || {
            if let Err(why) = trace(thread, &ordered, &tell) {
                // Fails if nobody wants to know.
                let _ = tell.send(Err(why));
            }
        });
        Self { orders, told }
    }

    /// Waits until it stands.
    pub(crate) async fn stopped(&mut self) {
        match next(&mut self.told).await {
            // That of PTRACE_INTERRUPT.
            WaitStatus::PtraceEvent(_, Signal::SIGTRAP, _) => {}
            other => panic!("the thread does not stand: {other:?}"),
        }
    }

    /// Lets it run, where it stands.
    pub(crate) fn run(&self) {
        // Fails if the tracer has failed, which `stopped` tells.
        let _ = self.orders.send(Order::Run);
    }

    /// Stops it, where it runs.
    pub(crate) fn stop_again(&self) {
        let _ = self.orders.send(Order::Stop);
    }

    /// Never lets it run again. Gives what ends it, to be waited for.
    pub(crate) fn for_good(self) -> impl Future<Output = WaitStatus> {
        let mut told = self.told;
        drop(self.orders);
        async move { next(&mut told).await }
    }
}

async fn next(told: &mut UnboundedReceiver<Told>) -> WaitStatus {
    told.recv().await.unwrap().unwrap_or_else(|why| panic!("{why}"))
}

/// The tracer's life. To its very end it waits for what it traces: a thread that has ended is
/// there, and so is its process, until its tracer has seen that.
fn trace(
    thread: Pid,
    orders: &mpsc::Receiver<Order>,
    tell: &UnboundedSender<Told>,
) -> Result<(), String> {
    ptrace::seize(thread, Options::empty()).map_err(|error| {
        format!(
            "this test has to stop one thread of its own child with ptrace, and PTRACE_SEIZE of \
             thread {thread} says: {error} (what may refuse it: kernel.yama.ptrace_scope above 1, \
             a container without CAP_SYS_PTRACE, seccomp)"
        )
    })?;
    loop {
        ptrace::interrupt(thread).map_err(|error| format!("PTRACE_INTERRUPT: {error}"))?;
        tell_next(thread, tell)?;
        let Ok(Order::Run) = orders.recv() else { break };
        ptrace::cont(thread, None).map_err(|error| format!("PTRACE_CONT: {error}"))?;
        let Ok(Order::Stop) = orders.recv() else { break };
    }
    tell_next(thread, tell)
}

fn tell_next(thread: Pid, tell: &UnboundedSender<Told>) -> Result<(), String> {
    // `__WALL`: it is no child, and no leader of a process.
    let status = waitpid(thread, Some(WaitPidFlag::__WALL));
    let status = status.map_err(|error| format!("waitpid of thread {thread}: {error}"))?;
    // Fails if nobody wants to know.
    let _ = tell.send(Ok(status));
    Ok(())
}

fn thread_named(process: Process, name: &str) -> Pid {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).unwrap();
    let threads: Vec<_> = tasks
        .map(|task| task.unwrap())
        .filter(|task| fs::read_to_string(task.path().join("comm")).unwrap().trim_end() == name)
        .map(|task| task.file_name().to_str().unwrap().parse().unwrap())
        .collect();
    assert_eq!(threads.len(), 1, "threads {name:?} of process {process:?}: {threads:?}");
    Pid::from_raw(threads[0])
}
