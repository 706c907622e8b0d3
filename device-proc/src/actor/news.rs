//! How much a client can make its device process tell of itself: a coordinator takes whoever floods
//! it for broken, and that is no power for a client to have over its device.

use standstill_protocol::message::DeviceEvent;
use std::mem::{Discriminant, discriminant};
use std::time::{Duration, Instant};

/// Events at once.
const AT_ONCE: u32 = 32;
/// How long it takes until one more may be told.
const EACH: Duration = Duration::from_millis(100);

/// What may still be told, and what waits. Of each kind of event the last one is kept.
#[derive(Debug)]
pub(super) struct News {
    left: u32,
    since: Instant,
    waiting: Vec<DeviceEvent>,
}

impl News {
    pub(super) fn new(now: Instant) -> Self {
        Self { left: AT_ONCE, since: now, waiting: Vec::new() }
    }

    /// The event, if it may be told now. If not, it waits, and the first one that does gives the
    /// time after which [`due`](Self::due) is to be called.
    pub(super) fn offer(
        &mut self,
        event: DeviceEvent,
        now: Instant,
    ) -> Result<DeviceEvent, Option<Duration>> {
        self.refill(now);
        if self.waiting.is_empty() && self.left > 0 {
            self.left -= 1;
            return Ok(event);
        }
        let first = self.waiting.is_empty();
        // In the order in which they came, so that the last one is told last.
        self.waiting.retain(|other| kind(other) != kind(&event));
        self.waiting.push(event);
        Err(first.then_some(EACH))
    }

    /// What waits, as far as it may be told now, and when to ask again if that is not all.
    pub(super) fn due(&mut self, now: Instant) -> (Vec<DeviceEvent>, Option<Duration>) {
        self.refill(now);
        let count = self.waiting.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let told: Vec<_> = self.waiting.drain(..count).collect();
        self.left -= u32::try_from(count).unwrap_or(self.left);
        (told, (!self.waiting.is_empty()).then_some(EACH))
    }

    fn refill(&mut self, now: Instant) {
        let more = now.saturating_duration_since(self.since).as_millis() / EACH.as_millis();
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        if more > 0 {
            self.left = self.left.saturating_add(more).min(AT_ONCE);
            self.since = now;
        }
    }
}

/// A client that has come and one that has gone are one kind: whether one is there.
fn kind(event: &DeviceEvent) -> Discriminant<DeviceEvent> {
    match event {
        DeviceEvent::ClientDisconnected => discriminant(&DeviceEvent::ClientConnected),
        event => discriminant(event),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use standstill_protocol::migration::MigrationState as S;

    #[test]
    fn few_events_are_told_at_once() {
        let now = Instant::now();
        let mut news = News::new(now);
        for _ in 0..AT_ONCE {
            assert_eq!(
                news.offer(DeviceEvent::ClientConnected, now),
                Ok(DeviceEvent::ClientConnected)
            );
        }
        assert_eq!(news.due(now), (Vec::new(), None));
    }

    #[test]
    fn of_many_the_last_of_each_kind_is_told_in_order() {
        let begin = Instant::now();
        let mut news = News::new(begin);
        let mut told = 0;
        let mut asked = None;
        for state in [S::Running, S::RunningP2p, S::Stop].iter().cycle().take(3000) {
            for event in [
                DeviceEvent::ClientConnected,
                DeviceEvent::ClientState(*state),
                DeviceEvent::ClientDisconnected,
            ] {
                match news.offer(event, begin) {
                    Ok(_) => told += 1,
                    Err(Some(after)) => assert_eq!(asked.replace(after), None),
                    Err(None) => assert!(asked.is_some()),
                }
            }
        }
        assert_eq!(told, AT_ONCE);
        assert_eq!(news.due(begin), (Vec::new(), Some(EACH)));
        let later = begin + asked.unwrap();
        assert_eq!(news.due(later), (vec![DeviceEvent::ClientState(S::Stop)], Some(EACH)));
        // What comes now waits behind what waits already.
        assert_eq!(news.offer(DeviceEvent::Failed("x".into()), later + EACH), Err(None));
        assert_eq!(
            news.due(later + EACH * 2).0,
            [DeviceEvent::ClientDisconnected, DeviceEvent::Failed("x".into())]
        );
        assert!(news.offer(DeviceEvent::ClientConnected, later + EACH * 3).is_ok());
    }

    #[test]
    fn a_second_of_any_client_stays_far_below_what_a_coordinator_takes_for_a_flood() {
        let begin = Instant::now();
        let mut news = News::new(begin);
        let mut told = 0;
        for ms in 0..1000 {
            let now = begin + Duration::from_millis(ms);
            for _ in 0..100 {
                told += usize::from(news.offer(DeviceEvent::ClientState(S::Stop), now).is_ok());
            }
            if ms % 100 == 0 {
                told += news.due(now).0.len();
            }
        }
        assert!((33..100).contains(&told), "{told}");
    }
}
