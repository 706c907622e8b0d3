//! What is done about a VM, by the state that QEMU says it is in. Pure.

use qapi::qmp::RunState;

/// What a run state means for whoever stops and starts a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vm {
    /// Its processors run, or can without anybody's command (a guest that sleeps wakes by itself).
    Runs,
    /// It stands, and `cont` lets it go on.
    Ready,
    /// It stands, and must not be let go on: it has ended, has failed, or runs elsewhere.
    Stuck,
    /// It stands, and QEMU lets it go on by itself when it has done what it is doing.
    Busy,
}

impl From<RunState> for Vm {
    fn from(state: RunState) -> Self {
        match state {
            RunState::running | RunState::suspended => Self::Runs,
            // A VM that is reset while it stands is as one that was never started.
            RunState::paused | RunState::prelaunch => Self::Ready,
            RunState::debug
            | RunState::internal_error
            | RunState::io_error
            | RunState::postmigrate
            | RunState::shutdown
            | RunState::watchdog
            | RunState::guest_panicked => Self::Stuck,
            RunState::inmigrate
            | RunState::finish_migrate
            | RunState::restore_vm
            | RunState::save_vm
            | RunState::colo => Self::Busy,
        }
    }
}

/// Where a call is to bring the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// No processor runs.
    Stands,
    /// They run.
    Runs,
}

/// What is done before anything was said to QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum First {
    /// It is brought to where it is to be.
    Bring,
    /// It stays as it is.
    Leave,
    /// Nobody can say what becomes of it.
    Refuse,
}

/// What is done with the VM when the machine stops; or starts again, if the pause has stopped the VM.
pub(super) fn first(target: Target, vm: Vm) -> First {
    match (target, vm) {
        (Target::Stands, Vm::Runs) => First::Bring,
        (Target::Stands, Vm::Ready | Vm::Stuck) => First::Leave,
        (Target::Runs, Vm::Ready) => First::Bring,
        (Target::Runs, Vm::Stuck | Vm::Runs) => First::Leave,
        (_, Vm::Busy) => First::Refuse,
    }
}

/// What is done when QEMU has said where the VM is, after a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It is where it is to be.
    Done,
    /// The command is given again.
    Again,
    /// It is asked again.
    Wait,
    /// It was let go on too late, when the devices stand again: it is stopped.
    TurnBack,
    /// It is where it was, and stays there.
    Fail,
}

/// How a call stands with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    /// The machine waits no longer, or not much: it is held, and all that can be is brought to STOP.
    pub(super) late: bool,
    /// A command had no answer, so it may have been carried out or not.
    pub(super) unanswered: bool,
}

/// What follows when QEMU says where the VM is.
pub(super) fn next(target: Target, vm: Vm, progress: Progress) -> Next {
    let Progress { late, unanswered } = progress;
    match (target, vm) {
        (Target::Stands, Vm::Ready | Vm::Stuck) => Next::Done,
        // What was lost on the way is said again, also late: in a machine that is held nothing runs.
        (Target::Stands, Vm::Runs) if !late || unanswered => Next::Again,
        (Target::Stands, Vm::Runs) => Next::Fail,
        (Target::Stands, Vm::Busy) if !late || unanswered => Next::Wait,
        (Target::Stands, Vm::Busy) => Next::Fail,
        (Target::Runs, Vm::Runs) if late => Next::TurnBack,
        (Target::Runs, Vm::Runs | Vm::Stuck) => Next::Done,
        (Target::Runs, Vm::Ready | Vm::Busy) if late => Next::Fail,
        (Target::Runs, Vm::Ready) => Next::Again,
        (Target::Runs, Vm::Busy) => Next::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IN_TIME: Progress = Progress { late: false, unanswered: false };
    const LATE: Progress = Progress { late: true, unanswered: false };
    const LATE_UNANSWERED: Progress = Progress { late: true, unanswered: true };
    const ALL: [Vm; 4] = [Vm::Runs, Vm::Ready, Vm::Stuck, Vm::Busy];

    #[test]
    fn a_vm_that_stands_is_left_and_so_is_one_that_cannot_go_on() {
        for vm in [Vm::Ready, Vm::Stuck] {
            assert_eq!(first(Target::Stands, vm), First::Leave);
        }
        assert_eq!(first(Target::Stands, Vm::Runs), First::Bring);
        assert_eq!(first(Target::Runs, Vm::Ready), First::Bring);
        // It has ended or runs elsewhere by now, or somebody else was sooner.
        assert_eq!(first(Target::Runs, Vm::Stuck), First::Leave);
        assert_eq!(first(Target::Runs, Vm::Runs), First::Leave);
    }

    #[test]
    fn a_guest_that_sleeps_can_wake_and_counts_as_one_that_runs() {
        assert_eq!(Vm::from(RunState::suspended), Vm::Runs);
        assert_eq!(first(Target::Stands, RunState::suspended.into()), First::Bring);
    }

    #[test]
    fn what_qemu_will_start_by_itself_is_not_taken_for_stopped() {
        for state in [
            RunState::inmigrate,
            RunState::finish_migrate,
            RunState::save_vm,
            RunState::restore_vm,
            RunState::colo,
        ] {
            for target in [Target::Stands, Target::Runs] {
                assert_eq!(first(target, state.into()), First::Refuse);
                for progress in [IN_TIME, LATE, LATE_UNANSWERED] {
                    assert_ne!(next(target, state.into(), progress), Next::Done);
                }
            }
        }
    }

    #[test]
    fn a_stop_ends_only_with_a_vm_that_stands() {
        for progress in [IN_TIME, LATE, LATE_UNANSWERED] {
            for vm in ALL {
                let done = next(Target::Stands, vm, progress) == Next::Done;
                assert_eq!(done, matches!(vm, Vm::Ready | Vm::Stuck), "{vm:?} {progress:?}");
            }
        }
        assert_eq!(next(Target::Stands, Vm::Runs, IN_TIME), Next::Again);
        assert_eq!(next(Target::Stands, Vm::Runs, LATE_UNANSWERED), Next::Again);
        // QEMU has done what it was told, and somebody lets the VM go on.
        assert_eq!(next(Target::Stands, Vm::Runs, LATE), Next::Fail);
    }

    #[test]
    fn nothing_is_let_go_on_late() {
        for progress in [LATE, LATE_UNANSWERED] {
            assert_eq!(next(Target::Runs, Vm::Runs, progress), Next::TurnBack);
            assert_eq!(next(Target::Runs, Vm::Ready, progress), Next::Fail);
        }
        assert_eq!(next(Target::Runs, Vm::Ready, IN_TIME), Next::Again);
        assert_eq!(next(Target::Runs, Vm::Runs, IN_TIME), Next::Done);
    }
}
