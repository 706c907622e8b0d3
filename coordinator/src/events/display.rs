//! Events as one line of text, for logs and terminals.

use super::MachineEvent;
use standstill_protocol::message::DeviceEvent;
use std::fmt;

impl fmt::Display for MachineEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TransitionBegan { operation, epoch } => {
                write!(f, "{operation} begins (epoch {epoch})")
            }
            Self::Transition(report) => {
                write!(f, "{} ended in {}", report.operation, report.outcome.name())?;
                report.failure_lines().iter().try_for_each(|line| write!(f, "; {line}"))
            }
            Self::DeviceLost { device, incarnation, loss, detail, during } => {
                write!(f, "{device} ({incarnation}) is lost: {loss}")?;
                if !detail.is_empty() && *detail != loss.to_string() {
                    write!(f, " ({detail})")?;
                }
                during.map_or(Ok(()), |operation| write!(f, ", during a {operation}"))
            }
            Self::DeviceHung { device, incarnation, hang } => {
                write!(f, "{device} ({incarnation}) hangs: {hang}")
            }
            Self::DeviceExited { device, incarnation, exit } => {
                write!(f, "{device} ({incarnation}) {exit}")
            }
            Self::DeviceFenced { device, incarnation, locks, .. } => {
                write!(f, "{device} ({incarnation}) is fenced")?;
                if *locks > 0 { write!(f, ", {locks} backing files unlocked") } else { Ok(()) }
            }
            Self::FenceUnproven { device, incarnation } => {
                write!(f, "{device} ({incarnation}) is killed, but not proven gone yet")
            }
            Self::DeviceRestarting { device, attempt, after } => {
                write!(f, "{device} is started again after {after:?} (attempt {attempt})")
            }
            Self::DeviceJoined { device, incarnation, state, took, .. } => {
                write!(
                    f,
                    "{device} ({incarnation}) has joined in {state}, {took:.1?} after its start"
                )
            }
            Self::DeviceRestartsExhausted { device, restarts } => {
                write!(f, "{device} is not started again: {restarts} restarts are its budget")
            }
            Self::DeviceNotRestarted { device, why } | Self::DeviceNotStarted { device, why } => {
                write!(f, "{device} was not started: {why}")
            }
            Self::DeviceRemoved { device, exit: Some(exit) } => {
                write!(f, "{device} is removed, its process {exit}")
            }
            Self::DeviceRemoved { device, exit: None } => write!(f, "{device} is removed"),
            Self::HoldBegan { device } => {
                write!(f, "the machine is held: {device} is not proven to stand still")
            }
            Self::HoldEnded { by_owner: true } => {
                f.write_str("the hold is accepted by the owner; the machine is stopped")
            }
            Self::HoldEnded { by_owner: false } => {
                f.write_str("everything is proven now; the machine is stopped")
            }
            Self::Superseded { term } => {
                write!(f, "another coordinator (term {term}) has the machine")
            }
            Self::Missed { events } => write!(f, "{events} events were missed"),
            Self::Device { device, event } => match event {
                DeviceEvent::ClientConnected => write!(f, "a client has connected to {device}"),
                DeviceEvent::ClientDisconnected => {
                    write!(f, "the client of {device} has disconnected")
                }
                DeviceEvent::ClientState(state) => {
                    write!(f, "the client of {device} has brought it to {state}")
                }
                DeviceEvent::LeaseExpired(state) => {
                    write!(f, "the lease of {device} has run out; it is in {state}")
                }
                DeviceEvent::Failed(why) => write!(f, "{device} cannot go on: {why}"),
                DeviceEvent::Superseded(term) => {
                    write!(f, "{device} belongs to another coordinator (term {term})")
                }
            },
        }
    }
}
