//! Reads the events of a machine, one after another.

use super::MachineEvent;
use tokio::sync::broadcast::{self, error};

/// The events of a machine, from the call that gave this on.
///
/// A reader that falls more than 1024 events behind loses the oldest and is told how many, by
/// [`MachineEvent::Missed`]. A clone begins where the events are now.
///
/// ```no_run
/// # async fn example(machine: standstill_coordinator::Machine) {
/// let mut events = machine.events();
/// while let Some(event) = events.recv().await {
///     println!("{event}");
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<MachineEvent>,
}

impl Events {
    pub(crate) fn of(receiver: broadcast::Receiver<MachineEvent>) -> Self {
        Self { receiver }
    }

    /// Of a machine that is gone there is nothing to hear.
    pub(crate) fn none() -> Self {
        Self { receiver: broadcast::channel(1).1 }
    }

    /// Waits for the next event; `None` once the machine is gone and everything was read. Cancel
    /// safe: an event that was not returned is returned by the next call.
    pub async fn recv(&mut self) -> Option<MachineEvent> {
        match self.receiver.recv().await {
            Ok(event) => Some(event),
            Err(error::RecvError::Lagged(events)) => Some(MachineEvent::Missed { events }),
            Err(error::RecvError::Closed) => None,
        }
    }

    /// The next event, if it is there already. Never waits.
    pub fn try_recv(&mut self) -> Option<MachineEvent> {
        match self.receiver.try_recv() {
            Ok(event) => Some(event),
            Err(error::TryRecvError::Lagged(events)) => Some(MachineEvent::Missed { events }),
            Err(error::TryRecvError::Empty | error::TryRecvError::Closed) => None,
        }
    }
}

impl Clone for Events {
    fn clone(&self) -> Self {
        Self { receiver: self.receiver.resubscribe() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_falls_behind_is_told_how_many_events_are_lost_and_goes_on() {
        let (sender, receiver) = broadcast::channel(2);
        let mut events = Events::of(receiver);
        assert!(events.try_recv().is_none());
        for device in ["a", "b", "c", "d", "e"] {
            sender.send(MachineEvent::HoldBegan { device: device.into() }).unwrap();
        }
        let mut late = events.clone();
        drop(sender);
        let first = events.recv().await.unwrap();
        assert_eq!(first.to_string(), "3 events were missed");
        let second = events.recv().await.unwrap();
        assert!(matches!(second, MachineEvent::HoldBegan { device } if device == "d"));
        let third = events.try_recv().unwrap();
        assert!(matches!(third, MachineEvent::HoldBegan { device } if device == "e"));
        assert!(events.recv().await.is_none());
        assert!(late.recv().await.is_none(), "a clone begins where the events are");
    }
}
