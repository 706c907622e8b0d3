//! Hooks and local devices that tell the trace what they are asked.

use crate::trace::{Call, Trace, TraceWriter, What};
use standstill_coordinator::{Hook, LocalDevice, LocalError};
use standstill_protocol::message::{Command, Phase};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use std::fmt;
use std::io;

type OnCall = Box<dyn FnMut(Call) -> Result<(), LocalError> + Send>;
type OnCommand = Box<dyn FnMut(Phase) -> Result<(), LocalError> + Send>;

/// A hook that tells the trace when it is called and when it returns, and in between does what
/// the test wants.
pub struct TracedHook {
    trace: TraceWriter,
    on_call: OnCall,
}

impl TracedHook {
    /// A hook of that name in the trace, which does nothing.
    ///
    /// # Errors
    ///
    /// If the trace cannot be opened.
    pub fn new(name: &str, trace: &Trace) -> io::Result<Self> {
        Ok(Self { trace: trace.writer(name)?, on_call: Box::new(|_| Ok(())) })
    }

    /// Does this at each call; may fail, may block.
    #[must_use]
    pub fn doing(
        mut self,
        on_call: impl FnMut(Call) -> Result<(), LocalError> + Send + 'static,
    ) -> Self {
        self.on_call = Box::new(on_call);
        self
    }

    /// Fails each time that it is called for this.
    #[must_use]
    pub fn failing(self, when: Call) -> Self {
        self.doing(move |call| {
            if call == when { Err(format!("{when:?} fails as it was told").into()) } else { Ok(()) }
        })
    }

    fn call(&mut self, call: Call) -> Result<(), LocalError> {
        self.trace.write(What::Called(call));
        let result = (self.on_call)(call);
        self.trace.write(What::Returned(call));
        result
    }
}

impl fmt::Debug for TracedHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TracedHook").field("trace", &self.trace).finish_non_exhaustive()
    }
}

impl Hook for TracedHook {
    fn stop(&mut self) -> Result<(), LocalError> {
        self.call(Call::Stop)
    }

    fn start(&mut self) -> Result<(), LocalError> {
        self.call(Call::Start)
    }
}

/// A local device with P2P states that tells the trace what it is told and answers, and in between
/// does what the test wants.
pub struct TracedLocal {
    trace: TraceWriter,
    state: MigrationState,
    on_command: OnCommand,
}

impl TracedLocal {
    /// A local device of that name in the trace, which is where it is told to be at once.
    ///
    /// # Errors
    ///
    /// If the trace cannot be opened.
    pub fn new(name: &str, trace: &Trace) -> io::Result<Self> {
        let on_command = Box::new(|_| Ok(()));
        Ok(Self { trace: trace.writer(name)?, state: MigrationState::Running, on_command })
    }

    /// Does this at each command; may block. Where it fails, the command is refused.
    #[must_use]
    pub fn doing(
        mut self,
        on_command: impl FnMut(Phase) -> Result<(), LocalError> + Send + 'static,
    ) -> Self {
        self.on_command = Box::new(on_command);
        self
    }
}

impl fmt::Debug for TracedLocal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TracedLocal").field("state", &self.state).finish_non_exhaustive()
    }
}

impl LocalDevice for TracedLocal {
    fn migration(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY_P2P
    }

    fn set_state(
        &mut self,
        target: MigrationState,
        command: &Command,
    ) -> Result<(), (LocalError, MigrationState)> {
        let Command { phase, epoch, .. } = *command;
        self.trace.write(What::Received { phase, epoch, target });
        let result = (self.on_command)(phase);
        match result {
            Ok(()) => {
                self.state = target;
                self.trace.write(What::Reached { phase, epoch, state: target });
                Ok(())
            }
            Err(error) => {
                self.trace.write(What::Refused { phase, epoch, state: self.state });
                Err((error, self.state))
            }
        }
    }
}
