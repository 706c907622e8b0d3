//! A VMM whose system calls are looked at: does everything that a coordinator is for, and says in
//! between what it does.
//!
//! It says so by a system call that is made for nothing else, so that whoever traces it needs no
//! other channel: `getpgid` of a process number that cannot be, [`MARK`] and twice the number of the
//! phase, one more while the calling thread is inside a call of the coordinator.
//!
//! `embedder blocking | sealed | async FOLDER`; it begins at the end of its standard input. `sealed` is
//! as `blocking`, with a seccomp filter that ends the program at the first system call of the
//! machine's threads that is not listed. The folder is for its files; a machine that is kept is in its
//! `vm`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a program for tests fails by panicking")]

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use standstill_coordinator::blocking::{Events, Machine, TakenOver};
use standstill_coordinator::dirty::{DirtyOptions, Untracked};
use standstill_coordinator::{
    DeviceSpec, Hook, HookSpec, LocalDevice, LocalError, LossPolicy, MachineBuilder, MachineEvent,
    RestartPolicy, Slot,
};
use standstill_protocol::message::{Command, Phase};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use standstill_testkit::Script;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

/// Above the highest process number that Linux gives (2²²).
const MARK: i32 = 0x0100_0000;
/// Long: nobody waits so long.
const LONG: Duration = Duration::from_secs(60);

// The phases of `standstill_coordinator::system_calls`, numbered as in the test that looks at them.
const APART: i32 = 0;
const START: i32 = 1;
const RUNNING: i32 = 2;
const TRANSITION: i32 = 3;
const LOSS: i32 = 4;
const MEMBERSHIP: i32 = 5;
const SHUTDOWN: i32 = 6;
const TAKE_OVER: i32 = 7;

fn mark(phase: i32, inside: bool) {
    let number = MARK + 2 * phase + i32::from(inside);
    // Fails, as it is to.
    let _ = rustix::process::getpgid(Pid::from_raw(number));
}

/// Does something with the coordinator, in that phase of a machine's life.
fn during<T>(phase: i32, call: impl FnOnce() -> T) -> T {
    mark(phase, true);
    let result = call();
    mark(phase, false);
    result
}

struct Vcpus;

impl Hook for Vcpus {
    fn stop(&mut self) -> Result<(), LocalError> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), LocalError> {
        Ok(())
    }
}

struct Local;

impl LocalDevice for Local {
    fn migration(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY_P2P
    }

    fn set_state(
        &mut self,
        _target: MigrationState,
        _command: &Command,
    ) -> Result<(), (LocalError, MigrationState)> {
        Ok(())
    }
}

fn device(script: Script, name: &str) -> DeviceSpec {
    let restart = LossPolicy::Restart(RestartPolicy::default());
    Script { name: name.into(), ..script }.spec().unwrap().on_loss(restart)
}

fn description(backing_file: &Path) -> MachineBuilder {
    MachineBuilder::new("vm")
        .heartbeat(Duration::from_millis(5))
        .device(device(Script::honest().backing_file(backing_file), "d0"))
        .device(device(Script::honest().on_nth(Phase::Stop, 3, []), "d1"))
}

fn kill(machine: &Machine, device: usize) {
    let pid = machine.status().unwrap().devices[device].pid.unwrap();
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
}

fn until_joined(events: &mut Events) {
    while !matches!(events.recv_timeout(LONG).unwrap(), MachineEvent::DeviceJoined { .. }) {}
}

/// Makes a machine on a thread of its own, whose filter the threads of the machine inherit.
#[cfg(target_arch = "x86_64")]
fn on_thread<T: Send>(sealed: bool, make: impl FnOnce() -> T + Send) -> T {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
    use standstill_coordinator::process::Spawner;
    use standstill_coordinator::system_calls::{SYSTEM_CALLS, Thread};

    if !sealed {
        return make();
    }
    // Before there is any filter: device processes inherit that of the thread that starts them.
    Spawner::new().unwrap();
    std::thread::scope(|scope| {
        let maker = scope.spawn(|| {
            let listed = SYSTEM_CALLS.iter().filter(|call| call.thread != Thread::Spawn);
            let rules = listed.map(|call| (call.number, Vec::new())).collect();
            let (others, these) = (SeccompAction::KillProcess, SeccompAction::Allow);
            let filter = SeccompFilter::new(rules, others, these, TargetArch::x86_64).unwrap();
            let program: BpfProgram = filter.try_into().unwrap();
            seccompiler::apply_filter(&program).unwrap();
            make()
        });
        maker.join().unwrap()
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn on_thread<T: Send>(sealed: bool, make: impl FnOnce() -> T + Send) -> T {
    assert!(!sealed, "the list is for x86-64");
    make()
}

fn blocking(folder: &Path, sealed: bool) {
    let file = folder.join("disk");
    let lock = File::create(&file).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();

    let whole = description(&file)
        .hook(HookSpec::new("vcpus", Slot::Before), Vcpus)
        .local_device("local", Local);
    let machine = during(START, || on_thread(sealed, || whole.start_blocking()).unwrap());
    let ram = tempfile::tempfile().unwrap();
    ram.set_len(1 << 20).unwrap();
    let mut events = during(RUNNING, || {
        machine.declare_ram(&ram).unwrap();
        let untracked = DirtyOptions::new(4096).untracked(Untracked::AllDirty);
        let mut tracking = machine.start_dirty_tracking(untracked).unwrap();
        tracking.collect().unwrap();
        drop(tracking);
        let mut events = machine.events();
        // Signs of life come meanwhile.
        let silence = events.recv_timeout(Duration::from_millis(100));
        assert!(silence.is_err(), "{silence:?}");
        machine.status().unwrap();
        events
    });
    during(TRANSITION, || {
        machine.pause().unwrap().resume().unwrap();
        let preparing = machine.launch_prepare_stop(LONG).unwrap();
        preparing.fd().unwrap();
        let stopped = preparing.join().unwrap().launch_stop().join().unwrap();
        stopped.resume().unwrap();
        // Here d1 is silent: it gives up, and is undone.
        let error = machine.pause_timeout(Duration::from_millis(50)).unwrap_err();
        drop(error);
        while events.try_recv().is_some() {}
        events.fd().unwrap();
    });
    mark(LOSS, false);
    kill(&machine, 0);
    during(LOSS, || {
        let lost = |event: &MachineEvent| matches!(event, MachineEvent::DeviceExited { .. });
        while !lost(&events.recv_timeout(LONG).unwrap()) {}
    });
    // The proof waits for this.
    flock(&lock, FlockOperation::Unlock).unwrap();
    during(LOSS, || {
        let fenced = |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { .. });
        while !fenced(&events.recv_timeout(LONG).unwrap()) {}
    });
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    during(LOSS, || until_joined(&mut events));
    let newcomer = device(Script::honest(), "d2");
    during(MEMBERSHIP, || {
        machine.add_device(newcomer).unwrap();
        machine.remove_device("d2").unwrap();
    });
    during(SHUTDOWN, || {
        machine.shutdown().unwrap();
        drop(machine);
        while events.recv().is_some() {}
    });
    // One that is dropped instead.
    let another = description(&file);
    let machine = during(START, || on_thread(sealed, || another.start_blocking()).unwrap());
    during(SHUTDOWN, || {
        let mut events = machine.events();
        drop(machine);
        while events.recv().is_some() {}
    });
    mark(APART, false);
    flock(&lock, FlockOperation::Unlock).unwrap();

    let kept = || {
        let keep = MachineBuilder::new("vm").keep(folder.join("vm"));
        keep.device(device(Script::honest(), "d0")).device(device(Script::honest(), "d1"))
    };
    let description = kept();
    let machine = during(START, || on_thread(sealed, || description.start_blocking()).unwrap());
    mark(LOSS, false);
    let mut events = machine.events();
    kill(&machine, 1);
    during(LOSS, || until_joined(&mut events));
    kill(&machine, 1);
    during(SHUTDOWN, || drop(machine));
    let description = kept();
    let TakenOver { machine, .. } =
        during(TAKE_OVER, || on_thread(sealed, || description.take_over_blocking()).unwrap());
    during(SHUTDOWN, || machine.shutdown().unwrap());
    mark(APART, false);
}

fn asynchronous(folder: &Path) {
    let file = folder.join("disk");
    let lock = File::create(&file).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let runtime = during(START, || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    });
    let description = description(&file);
    let machine = during(START, || runtime.block_on(description.start()).unwrap());
    during(TRANSITION, || {
        runtime.block_on(async {
            machine.pause().await.unwrap().resume().await.unwrap();
        });
    });
    mark(LOSS, false);
    let pid = runtime.block_on(machine.status()).unwrap().devices[1].pid.unwrap();
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
    during(LOSS, || {
        runtime.block_on(async {
            let mut events = machine.events();
            let joined = |event: &MachineEvent| matches!(event, MachineEvent::DeviceJoined { .. });
            while !joined(&events.recv().await.unwrap()) {}
        });
    });
    during(SHUTDOWN, || {
        runtime.block_on(machine.shutdown()).unwrap();
        drop(machine);
        drop(runtime);
    });
    mark(APART, false);
}

fn main() {
    // Not before it is traced.
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["blocking", folder] => blocking(Path::new(folder), false),
        ["sealed", folder] => blocking(Path::new(folder), true),
        ["async", folder] => asynchronous(Path::new(folder)),
        _ => panic!("usage: embedder blocking | sealed | async FOLDER, not {arguments:?}"),
    }
}
