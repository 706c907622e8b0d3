//! From the start of a machine to its end.

use super::attach::{self, Plan};
use super::directory::{DirectoryError, MachineDirectory};
use super::observers::{Observers, Prepared, Readers};
use super::output::Output;
use super::qmp::Qmp;
use super::{Attach, Loaded, RunArgs, RunError, checked, exit_of, notify};
use crate::exit::Exit;
use crate::machine_file::checks::open_ram;
use crate::machine_file::{Beginning, DeviceEntry};
use crate::operator::history::History;
use crate::operator::message::Code;
use crate::operator::message::{DeviceEnd, ShutdownReply};
use crate::operator::server::{ADVICE_HELD, Ending, Operator, Server, problem};
use standstill::coordinator::{Events, Machine, MachineError, MachineEvent, TakenOver};
use standstill::protocol::transition::MachineState;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tracing_appender::non_blocking::ErrorCounter;

/// How long the last events may take to be written down.
const LAST_EVENTS: Duration = Duration::from_millis(500);
/// How often the service manager is told how the machine is.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);
/// How long the coordinator may take to say how the machine is.
const ALIVE: Duration = Duration::from_secs(5);

/// Signals that end the machine.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn recv(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

/// Why the machine is to end.
enum Reason {
    Signal(&'static str),
    Asked(Ending),
    Superseded,
    Lost,
}

/// A machine that is up, and what watches it.
struct Up {
    machine: Machine,
    history: History,
    observers: Observers,
    qmp: Option<Qmp>,
    /// From the beginning on: the machine can be taken over before anything else is done with it.
    events: Events,
}

/// Runs the machine until its end.
///
/// `log` counts the dropped lines of this command's log.
pub(super) async fn stay(
    mut loaded: Loaded,
    args: &RunArgs,
    log: ErrorCounter,
    output: &Output,
) -> Result<Exit, RunError> {
    let attach = args.attach;
    let system = |what| move |source| RunError::System { what, source };
    let mut signals = Signals::listen().map_err(system("listen to signals"))?;
    checked_text(&loaded)?;
    let name = loaded.file.name.clone();
    let (plan, mut directory, observers) = if attach == Some(Attach::Always) {
        // Nothing is taken from whoever has the machine before it is clear that it can be had.
        let plan = attach::plan(&loaded.file, &loaded.runtime, attach)?;
        checked(&mut loaded, Beginning::TakeOver)?;
        let observers = args.observers.prepare(&name, log)?;
        (plan, MachineDirectory::claim(&loaded.runtime, &name, true)?, observers)
    } else {
        let directory = MachineDirectory::claim(&loaded.runtime, &name, false)?;
        let plan = attach::plan(&loaded.file, &loaded.runtime, attach)?;
        let possible = checked(&mut loaded, plan.beginning())
            .and_then(|()| args.observers.prepare(&name, log));
        match possible {
            Ok(observers) => (plan, directory, observers),
            Err(error) => {
                if plan.beginning() == Beginning::Start {
                    directory.remove();
                }
                return Err(error);
            }
        }
    };
    let beginning = plan.beginning();
    let started = start(&loaded, plan, &directory, &mut signals, observers, output).await;
    let Up { machine, history, observers, qmp, events } = match started {
        Ok(up) => up,
        Err(error) => {
            if beginning == Beginning::Start {
                directory.remove();
            }
            return Err(error);
        }
    };
    let turn = match have(&mut directory).await {
        Ok(Some(turn)) => turn,
        // What there is of the machine in the folder is the other one's.
        Ok(None) => return Err(RunError::Superseded { machine: loaded.file.name }),
        Err(error) => {
            give_up(&machine, beginning, &directory).await;
            return Err(error.into());
        }
    };
    let directory = Arc::new(directory);

    let (endings, mut asked) = mpsc::channel(1);
    let operator = Arc::new(Operator {
        machine: machine.clone(),
        history: history.clone(),
        file: loaded.file,
        runtime: loaded.runtime,
        directory: Arc::clone(&directory),
        endings,
        vm: qmp.as_ref().map(Qmp::status),
    });
    let server = match Server::start(directory.operator_socket(), Arc::clone(&operator)) {
        Ok(server) => server,
        Err(error) => {
            give_up(&machine, beginning, &directory).await;
            return Err(RunError::System { what: "make the operator socket", source: error });
        }
    };
    drop(turn);
    announce(&operator, output).await;
    let ended = until_the_end(&operator, qmp.as_ref(), events, &mut signals, &mut asked).await;
    let ended = end(&operator, ended, &mut signals, &mut asked, output).await;
    // The last events of a machine that has ended are there by then.
    let _ = tokio::time::timeout(LAST_EVENTS, history.ended()).await;
    history.end();
    observers.finish().await;
    server.finish().await;
    if let Ok(Over { kept: false, .. }) = ended {
        directory.remove();
    }
    ended.map(|over| over.exit)
}

/// Waits for one's turn in the folder and keeps it; `None` if another coordinator has it.
async fn have(directory: &mut MachineDirectory) -> Result<Option<OwnedFd>, DirectoryError> {
    let turn = directory.turn().await?;
    Ok(directory.keep()?.then_some(turn))
}

/// Nobody could operate the machine. One that was started ends; what was taken over stays as it is.
async fn give_up(machine: &Machine, beginning: Beginning, directory: &MachineDirectory) {
    if beginning == Beginning::Start {
        let _ = machine.shutdown().await;
        directory.remove();
    }
}

/// Whether the text of the file is a machine.
fn checked_text(loaded: &Loaded) -> Result<(), RunError> {
    if loaded.problems.is_empty() {
        return Ok(());
    }
    // All at once: what the file speaks of is looked at, too.
    let mut problems = loaded.problems.clone();
    loaded.file.check(Beginning::Start, &mut problems);
    Err(RunError::File(Box::new(problems)))
}

/// Starts the machine or takes it over, and declares its RAM. Who observes it has a reader of the
/// events from before the start, and so misses nothing.
async fn start(
    loaded: &Loaded,
    plan: Plan,
    directory: &MachineDirectory,
    signals: &mut Signals,
    observers: Prepared,
    output: &Output,
) -> Result<Up, RunError> {
    let Loaded { file, .. } = loaded;
    let beginning = plan.beginning();
    let system = |source| RunError::System { what: "find this program", source };
    let history = History::new();
    if beginning == Beginning::Start {
        directory.forget_all();
    }
    let qmp = file.qmp.as_ref().map(|entry| Qmp::begin(entry, directory.vm_ran()));
    let builder = |devices: &[DeviceEntry]| {
        let builder = file.builder(devices, &directory.control())?;
        Ok(match &qmp {
            Some(qmp) => qmp.add_to(builder),
            None => builder,
        })
    };
    let (machine, readers, events) = match plan {
        Plan::Start => {
            let builder = builder(&file.devices).map_err(system)?;
            tokio::spawn(history.clone().follow(builder.events()));
            let (readers, events) = (Readers::of(&builder), builder.events());
            let starting = builder.start();
            tokio::pin!(starting);
            let mut signalled = false;
            loop {
                tokio::select! {
                    started = &mut starting => {
                        let machine = started.map_err(|error| RunError::Start(Box::new(error)))?;
                        if signalled {
                            let _ = machine.shutdown().await;
                            return Err(RunError::Interrupted);
                        }
                        break (machine, readers, events);
                    }
                    name = signals.recv() => {
                        tracing::warn!("{name} during the start: the machine ends when it has started");
                        if std::mem::replace(&mut signalled, true) {
                            return Err(RunError::Interrupted);
                        }
                    }
                }
            }
        }
        Plan::TakeOver(devices) => {
            let builder = builder(&devices).map_err(system)?;
            tokio::spawn(history.clone().follow(builder.events()));
            let (readers, events) = (Readers::of(&builder), builder.events());
            let taken = builder.take_over().await;
            let TakenOver { machine, report } =
                taken.map_err(|error| RunError::TakeOver(Box::new(error)))?;
            output.say(&history.report(&report).text);
            if let (Some(qmp), MachineState::Running) = (&qmp, report.machine) {
                qmp.taken_over_running();
            }
            (machine, readers, events)
        }
    };
    let observers = match observers.watch(&machine, readers, output, beginning).await {
        Ok(observers) => observers,
        Err(error) => {
            // The caller removes the folder.
            if beginning == Beginning::Start {
                let _ = machine.shutdown().await;
            }
            return Err(error);
        }
    };
    for ram in &file.ram {
        let path = &ram.value;
        let what = || format!("{} cannot be declared as guest RAM", path.display());
        let declared = match open_ram(path) {
            Ok(file) => machine.declare_ram(&file).await,
            Err(source) => Err(MachineError::Fd { source }),
        };
        match (declared, beginning) {
            (Ok(()), _) => {}
            // The devices still have what was declared to them.
            (Err(error), Beginning::TakeOver) => tracing::error!(%error, "{}", what()),
            (Err(source), Beginning::Start) => {
                let _ = machine.shutdown().await;
                return Err(RunError::Machine { what: what(), source });
            }
        }
    }
    Ok(Up { machine, history, observers, qmp, events })
}

/// Tells that the machine is up.
async fn announce(operator: &Operator, output: &Output) {
    let Operator { machine, file, directory, .. } = operator;
    let state = machine.status().await.map(|status| status.machine);
    let held = matches!(state, Ok(MachineState::Held));
    let state = state.map_or_else(|error| error.to_string(), |state| state.to_string());
    let socket = directory.operator_socket();
    output.say(&format!("machine {:?} is {state}; operators: {}", file.name, socket.display()));
    if held {
        output.say(ADVICE_HELD);
    }
    notify::ready(&state);
}

/// Waits for a reason to end, and tells the service manager how the machine is meanwhile.
async fn until_the_end(
    operator: &Operator,
    qmp: Option<&Qmp>,
    mut events: Events,
    signals: &mut Signals,
    asked: &mut mpsc::Receiver<Ending>,
) -> Reason {
    let interval = notify::watchdog().map_or(STATUS_INTERVAL, |wanted| wanted.min(STATUS_INTERVAL));
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            name = signals.recv() => return Reason::Signal(name),
            Some(ending) = asked.recv() => return Reason::Asked(ending),
            event = events.recv() => match event {
                Some(MachineEvent::Superseded { .. }) => return Reason::Superseded,
                Some(MachineEvent::HoldEnded { by_owner: true }) => {
                    if let Some(qmp) = qmp {
                        qmp.hold_accepted();
                    }
                }
                Some(_) => {}
                None => return Reason::Lost,
            },
            _ = ticks.tick() => {
                // One that does not answer in time is not alive, and the service manager acts.
                if let Ok(Ok(status)) = tokio::time::timeout(ALIVE, operator.machine.status()).await {
                    notify::alive();
                    let devices = status.devices.len();
                    notify::status(&format!("{}, {devices} devices", status.machine));
                }
            }
        }
    }
}

/// The machine is over.
struct Over {
    exit: Exit,
    /// Its devices were left as they are.
    kept: bool,
}

/// Ends the machine, as the reason wants it.
async fn end(
    operator: &Operator,
    reason: Reason,
    signals: &mut Signals,
    asked: &mut mpsc::Receiver<Ending>,
    output: &Output,
) -> Result<Over, RunError> {
    let machine = operator.file.name.clone();
    let client = match reason {
        Reason::Signal(name) => {
            tracing::info!("{name}: the machine ends");
            notify::stopping(name);
            None
        }
        Reason::Asked(Ending { keep: true, reply }) => {
            notify::stopping("devices are left for a later coordinator");
            // The client may be gone.
            let _ = reply.send(Ok(ShutdownReply { kept: true, devices: Vec::new() }));
            output
                .say("the devices are left as they are; `standstill run --attach` takes them over");
            return Ok(Over { exit: Exit::Done, kept: true });
        }
        Reason::Asked(Ending { keep: false, reply }) => {
            tracing::info!("an operator ends the machine");
            notify::stopping("shutdown");
            Some(reply)
        }
        Reason::Superseded => return Err(RunError::Superseded { machine }),
        Reason::Lost => return Err(RunError::Lost),
    };
    let before = operator.machine.status().await.map(|status| status.devices).unwrap_or_default();
    let shutdown = operator.machine.shutdown();
    tokio::pin!(shutdown);
    let ended = loop {
        tokio::select! {
            ended = &mut shutdown => break ended,
            name = signals.recv() => {
                tracing::warn!("{name} again: what has not ended is killed");
                let machine = operator.machine.clone();
                // The answer goes to the first one.
                tokio::spawn(async move { machine.shutdown_within(Duration::ZERO).await });
            }
            Some(Ending { reply, .. }) = asked.recv() => {
                let _ = reply.send(Err(problem(Code::Gone, "the machine is ending already")));
            }
        }
    };
    let exits = match ended {
        Ok(exits) => exits,
        Err(MachineError::Superseded { .. }) => return Err(RunError::Superseded { machine }),
        Err(source) => return Err(RunError::Machine { what: "shutdown".to_owned(), source }),
    };
    let had_process =
        |name: &str| before.iter().any(|device| device.name == name && device.pid.is_some());
    let devices: Vec<_> = exits
        .into_iter()
        .map(|(device, exit)| {
            let had_process = had_process(&device);
            DeviceEnd { device, exit: exit.map(|exit| exit.to_string()), had_process }
        })
        .collect();
    let told = devices.iter().filter(|end| end.exit.is_some() || end.had_process);
    told.for_each(|end| output.say(&end.to_string()));
    let all_gone = devices.iter().all(DeviceEnd::is_gone);
    if let Some(reply) = client {
        let _ = reply.send(Ok(ShutdownReply { kept: false, devices }));
    }
    Ok(Over { exit: exit_of(all_gone), kept: false })
}
