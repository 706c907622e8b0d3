//! Whatever a device process sends to its coordinator, while the owner asks for what it likes, the
//! other device of the machine behaves, and deadlines pass.
//!
//! The whole input is steps: see `standstill_fuzz::track`. What must be so in any case is checked by
//! `standstill_coordinator::packets`; here is what depends on the packets.

#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_coordinator::packets::{Ask, Step as Played, run};
use standstill_fuzz::memory::Counting;
use standstill_fuzz::session;
use standstill_fuzz::track::{Fds, Step, Steps};
use standstill_protocol::codec::{MAGIC, Message, decode};
use standstill_protocol::message::DeviceMessage;
use std::rc::Rc;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const VERSION: u16 = 1;
/// What a machine of two devices may take of the heap in its life: the actor, the events and
/// reports of all that the owner asks for, and less than 64 KiB for what the device says.
const HEAP: usize = 1 << 20;
/// How many steps are played.
const MOST_STEPS: usize = 96;
/// How often a packet is sent at most, one after another: more than a device is allowed.
const FLOOD: usize = 1200;

const ASKS: [Ask; 16] = [
    Ask::Pause,
    Ask::Resume,
    Ask::PauseInSteps,
    Ask::ResumeInSteps,
    Ask::GoOn,
    Ask::GiveUp,
    Ask::Cancel,
    Ask::AcceptHold,
    Ask::Status,
    Ask::DeclareRam,
    Ask::Add,
    Ask::Restart(0),
    Ask::Restart(1),
    Ask::Remove(0),
    Ask::Remove(1),
    Ask::Shutdown,
];

fuzz_target!(|input: &[u8]| {
    let mut plan = Plan::default();
    Steps(input).take(MOST_STEPS).for_each(|step| plan.add(step));
    session::checked(HEAP, || {
        let ran = run(plan.steps.iter().map(|step| match step {
            Kept::Packet(bytes, fds) => Played::Packet { bytes, fds: *fds },
            Kept::Greet => Played::Greet,
            Kept::Obey => Played::Obey,
            Kept::Close => Played::Close,
            Kept::Exit => Played::Exit,
            Kept::Alarm => Played::Alarm,
            Kept::Ask(ask) => Played::Ask(*ask),
        }));
        assert!(ran.fenced > 0 || !plan.must_be_fenced, "it has broken the protocol: {ran:?}");
    });
});

/// What is played, with its packets whole.
#[derive(Clone, Debug)]
enum Kept {
    /// Shared by those that are the same: the plan is no part of what is measured.
    Packet(Rc<[u8]>, u8),
    Greet,
    Obey,
    Close,
    Exit,
    Alarm,
    Ask(Ask),
}

#[derive(Default)]
struct Plan {
    steps: Vec<Kept>,
    /// Its device was welcomed, and nothing else can have ended it.
    is_welcome: bool,
    /// It has sent what no device sends.
    must_be_fenced: bool,
}

impl Plan {
    fn add(&mut self, step: Step<'_>) {
        let kept = match step {
            Step::Message(payload, fds) => {
                let mut packet = MAGIC.to_vec();
                packet.extend(VERSION.to_le_bytes());
                packet.extend([0, 0]);
                packet.extend(payload);
                self.packet(packet, fds)
            }
            Step::Packet(packet, fds) => self.packet(packet.to_owned(), fds),
            Step::Turns(count) if count & 1 == 0 => Kept::Obey,
            Step::Turns(_) => Kept::Alarm,
            Step::Other(0 | 1, _) => Kept::Greet,
            Step::Other(2, _) => Kept::Close,
            Step::Other(3, _) => Kept::Exit,
            Step::Other(4, count) => return self.flood(count),
            Step::Other(_, which) => Kept::Ask(ASKS[usize::from(which) % ASKS.len()]),
        };
        match kept {
            Kept::Greet if self.steps.is_empty() => self.is_welcome = true,
            // A second one is a packet that no device sends; it is not looked at here.
            Kept::Greet | Kept::Close | Kept::Exit | Kept::Alarm => self.is_welcome = false,
            Kept::Ask(ask) => {
                self.is_welcome &=
                    matches!(ask, Ask::Pause | Ask::Resume | Ask::Status | Ask::DeclareRam);
            }
            Kept::Obey | Kept::Packet(..) => {}
        }
        self.steps.push(kept);
    }

    fn packet(&mut self, packet: Vec<u8>, fds: Fds) -> Kept {
        // The kernel may let no fds pass, and then there is no packet.
        if self.is_welcome && fds.count == 0 {
            self.must_be_fenced |= match decode::<DeviceMessage>(&packet, VERSION) {
                Ok(message) => message.is_handshake() || message.fd_count() != 0,
                Err(_) => true,
            };
        }
        Kept::Packet(packet.into(), fds.count)
    }

    /// The last packet again and again.
    fn flood(&mut self, count: u8) {
        let Some(Kept::Packet(..)) = self.steps.last() else { return };
        let count = (usize::from(count) * 8).min(FLOOD);
        if count == FLOOD && self.steps.len() <= MOST_STEPS {
            self.must_be_fenced |= self.is_welcome && self.last_has_no_fds();
        }
        let room = (2 * FLOOD).saturating_sub(self.steps.len());
        let again = self.steps.last().cloned();
        self.steps.extend(std::iter::repeat_n(again, count.min(room)).flatten());
    }

    fn last_has_no_fds(&self) -> bool {
        matches!(self.steps.last(), Some(Kept::Packet(_, 0)))
    }
}
