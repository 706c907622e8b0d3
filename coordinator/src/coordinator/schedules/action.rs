//! What can happen next, and how likely each is.

use super::super::script::packets::Ask;
use super::world::HOOK_BUDGET;
use crate::description::Deadlines;
use standstill_protocol::transition::Slot;

/// One step of a schedule. Devices are named by the number of their process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// The coordinator handles the next message in its mailbox.
    Handle,
    /// The coordinator is told that there is something to read.
    Watch,
    /// A device says Hello.
    Greet(usize),
    /// A device reads the next message.
    Read(usize),
    /// A device finishes the arc that it is taking.
    Arc(usize),
    /// It fails at it: back where the arc began, or in ERROR.
    Fail(usize, bool),
    /// A device process dies; the kernel has what it had sent.
    Crash(usize),
    /// It closes its control channel and lives on.
    Close(usize),
    /// It does nothing any more.
    Hang(usize),
    /// Its lease runs out.
    Expire(usize),
    /// The end of a process is seen.
    SeeExit(usize),
    /// The fence of a process is proven.
    Prove(usize),
    /// The last words of a process were read.
    Gone(usize),
    /// The next deadline passes.
    Tick,
    /// A hook returns, well or with an error.
    Hook(usize, bool),
    /// A hook hangs.
    HangHook(usize),
    /// A local device answers: it was done, or it is where it was.
    Local(usize, bool),
    /// A local device hangs.
    HangLocal(usize),
    /// The start of a process that was asked for is done, or fails.
    Spawn(bool),
    /// The owner asks for something.
    Ask(Ask),
    /// A message that a device has read comes once more.
    Again(usize, usize),
    /// A device sends what nobody waits for; the number says what.
    Stray(usize, usize),
    /// A device sends what no device sends.
    Garbage(usize),
    /// A device sends a quarter of what it may send in a second.
    Flood(usize),
    /// Another coordinator writes itself down.
    Supersede,
    /// A device is welcomed by that one.
    Welcomed(usize),
}

/// How likely each fault is, against a weight of 5 to 20 for what goes well.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    pub(super) crash: u32,
    pub(super) close: u32,
    pub(super) hang: u32,
    pub(super) fail: u32,
    pub(super) time: u32,
    pub(super) stray: u32,
    pub(super) garbage: u32,
    pub(super) flood: u32,
    pub(super) supersede: u32,
}

/// What a device is to its machine.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Kind {
    /// 0: fail, 1: continue without, 2: restart.
    pub(super) on_loss: u8,
    pub(super) optional: bool,
    /// Its fence is proven late, or never.
    pub(super) unprovable: bool,
    /// How far it is when the machine is taken over: steps of a pause, and whether it is dead.
    pub(super) found: (u8, bool),
}

/// Everything that is chosen before a schedule begins.
#[derive(Clone, Debug, Default)]
pub(super) struct Case {
    pub(super) devices: Vec<Kind>,
    pub(super) hooks: Vec<(Slot, Slot)>,
    pub(super) locals: usize,
    pub(super) stay_stopped: bool,
    /// An undo, and a hold, has less time than a hook.
    pub(super) hurried: bool,
    pub(super) heartbeats: bool,
    /// The processes outlive their coordinator.
    pub(super) kept: bool,
    /// They have outlived one.
    pub(super) taken_over: bool,
    pub(super) faults: Faults,
    /// The owner asks for nothing but pauses and resumes.
    pub(super) plain: bool,
    pub(super) steps: usize,
}

impl Case {
    pub(super) fn deadlines(&self) -> Deadlines {
        let Deadlines { undo, .. } = Deadlines::default();
        let undo = if self.hurried { HOOK_BUDGET / 5 } else { undo };
        Deadlines { undo, ..Deadlines::default() }
    }

    /// One of all cases.
    pub(super) fn any(rng: &mut fastrand::Rng) -> Self {
        let one_in = |rng: &mut fastrand::Rng, n: u32| rng.u32(0..n) == 0;
        let taken_over = one_in(rng, 24);
        let kept = taken_over || one_in(rng, 16);
        let devices = (0..rng.usize(1..5)).map(|_| Kind {
            on_loss: [0, 0, 0, 1, 2][rng.usize(0..5)],
            optional: one_in(rng, 4),
            unprovable: one_in(rng, 6),
            found: (if one_in(rng, 2) { 0 } else { rng.u8(0..6) }, one_in(rng, 6)),
        });
        let devices = devices.collect();
        let slots = [Slot::Before, Slot::Between, Slot::After];
        let hooks = (0..[0, 0, 1, 2][rng.usize(0..4)])
            .map(|_| (slots[rng.usize(0..3)], slots[rng.usize(0..3)]))
            .collect();
        let faults = if one_in(rng, 4) {
            Faults { time: 1, ..Faults::default() }
        } else {
            Faults {
                crash: rng.u32(0..2),
                close: u32::from(one_in(rng, 4)),
                hang: rng.u32(0..2),
                fail: rng.u32(0..3),
                time: rng.u32(0..3),
                stray: rng.u32(0..3),
                garbage: u32::from(one_in(rng, 8)),
                flood: u32::from(one_in(rng, 32)),
                supersede: u32::from(kept && one_in(rng, 2)),
            }
        };
        Self {
            devices,
            hooks,
            locals: usize::from(one_in(rng, 4)),
            stay_stopped: one_in(rng, 3),
            hurried: false,
            heartbeats: one_in(rng, 4),
            kept,
            taken_over,
            faults,
            plain: one_in(rng, 2),
            steps: rng.usize(20..160),
        }
    }
}
