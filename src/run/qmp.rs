//! The VM itself: its processors stop before the devices and go on after them, by QMP, QEMU's control
//! socket.
//!
//! - [`wire`]: bytes and messages;
//! - [`link`]: the connection, made again whenever it is lost;
//! - [`news`]: what QEMU tells by itself;
//! - [`rules`]: what is done about a VM, by the state that it is in;
//! - [`memory`]: whether it ran before the pause;
//! - [`hook`]: the hook that the coordinator calls.
//!
//! The crate `qapi` has the words; why the connection is our own is in [`link`].

mod hook;
mod link;
mod memory;
mod news;
mod rules;
mod wire;

use crate::machine_file::QmpEntry;
use crate::operator::message::VmStatus;
use hook::Processors;
use memory::Memory;
use standstill::coordinator::{HookSpec, MachineBuilder, Slot};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// The target of log lines about the VM.
const TARGET: &str = "standstill::vm";

/// A call of the hook does not wait longer than this, whatever its deadline is: a clock cannot say every
/// time.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// What the connection and the hook have in common.
#[derive(Debug, Default)]
struct Shared {
    /// The devices stand, or are about to: the VM must not go on.
    stands: AtomicBool,
    /// How many holds the owner has accepted: what hangs then is given up.
    accepted: Mutex<u64>,
    /// Another hold was accepted.
    changed: Condvar,
    /// Whoever stops the VM or lets it go on does nothing else meanwhile.
    turn: Mutex<()>,
}

impl Shared {
    fn accepted(&self) -> MutexGuard<'_, u64> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits that long, or until a hold is accepted after so many.
    fn wait(&self, accepted: u64, within: Duration) {
        let waits = |now: &mut u64| *now == accepted;
        drop(self.changed.wait_timeout_while(self.accepted(), within, waits));
    }
}

/// How long a call with that deadline waits: an error must come before the deadline, at which the call counts
/// as one that hangs.
fn within(deadline: Duration) -> Duration {
    (deadline - deadline / 5).min(LONGEST)
}

/// The VM of a machine.
#[derive(Clone, Debug)]
pub(super) struct Qmp {
    processors: Processors,
    spec: HookSpec,
    status: watch::Receiver<VmStatus>,
}

impl Qmp {
    /// Begins to look for the VM. Whether it ran before a pause is remembered in that file.
    pub(super) fn begin(entry: &QmpEntry, memory: PathBuf) -> Self {
        let shared = Arc::new(Shared::default());
        let (link, handle, status) = link::link(&entry.path.value, Arc::clone(&shared));
        tokio::spawn(link.run());
        let memory = Arc::new(Memory::at(memory));
        let within = within(entry.deadline);
        let processors = Processors { link: handle, memory, shared, within };
        let spec = HookSpec::new(QmpEntry::HOOK, Slot::Before).deadline(entry.deadline);
        Self { processors, spec, status }
    }

    /// Makes the VM's processors a part of the machine.
    pub(super) fn add_to(&self, builder: MachineBuilder) -> MachineBuilder {
        builder.hook(self.spec.clone(), self.processors.clone())
    }

    /// Where the VM is, as far as it is known.
    pub(super) fn status(&self) -> watch::Receiver<VmStatus> {
        self.status.clone()
    }

    /// The owner has accepted a hold: a call that hangs is given up.
    pub(super) fn hold_accepted(&self) {
        *self.processors.shared.accepted() += 1;
        self.processors.shared.changed.notify_all();
    }

    /// A machine that runs was taken over. If an earlier coordinator had stopped the VM by then and
    /// nothing else, the VM goes on: that pause is rolled back.
    pub(super) fn taken_over_running(&self) {
        if !self.processors.memory.ran() {
            return;
        }
        let processors = self.processors.clone();
        let go_on = move || match processors.go_on_unless_paused() {
            Ok(true) => {
                tracing::warn!(target: TARGET, "a pause that was never finished is rolled back");
            }
            Ok(false) => {}
            Err(error) => {
                tracing::error!(
                    target: TARGET,
                    "an earlier `standstill run` has left the VM stopped, and it does not go on: {error}"
                );
            }
        };
        if let Err(error) = std::thread::Builder::new().name("qmp".into()).spawn(go_on) {
            tracing::error!(target: TARGET, %error, "the VM does not go on");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_waits_less_than_its_deadline_and_no_longer_than_a_clock_can_say() {
        assert_eq!(within(Duration::from_secs(5)), Duration::from_secs(4));
        let long = humantime::parse_duration("200000000000years").unwrap();
        assert_eq!(within(long), LONGEST);
        assert_eq!(within(Duration::MAX), LONGEST);
    }
}
