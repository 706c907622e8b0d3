//! A sequence of packets and of what happens between them, as one input.
//!
//! Each step begins with one byte: its kind in the lowest 2 bits, then how many fds come with it (3
//! bits), then which of them is the first (3 bits). A message or a packet goes on with its length
//! (16 bits, little endian) and its bytes, anything else with one byte. What is too short is the
//! last step.

/// One step of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// What follows the header of a packet.
    Message(&'a [u8], Fds),
    /// A whole packet.
    Packet(&'a [u8], Fds),
    /// Time for the other side: that many turns.
    Turns(u8),
    /// Something else happens: the number of fds says what, the byte says more.
    Other(u8, u8),
}

/// Which fds come with a packet: `count` of the kinds `first`, `first + 1`, …
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fds {
    /// How many; up to 7.
    pub count: u8,
    /// The kind of the first one, of 8.
    pub first: u8,
}

/// The steps of an input, one after another.
#[derive(Clone, Copy, Debug)]
pub struct Steps<'a>(pub &'a [u8]);

impl<'a> Iterator for Steps<'a> {
    type Item = Step<'a>;

    fn next(&mut self) -> Option<Step<'a>> {
        let (&head, rest) = self.0.split_first()?;
        let fds = Fds { count: head >> 2 & 7, first: head >> 5 };
        if head & 2 != 0 {
            let (&byte, rest) = rest.split_first()?;
            self.0 = rest;
            return Some(if head & 1 == 0 {
                Step::Turns(byte)
            } else {
                Step::Other(fds.count, byte)
            });
        }
        let (&length, rest) = rest.split_first_chunk()?;
        let length = usize::from(u16::from_le_bytes(length)).min(rest.len());
        let (bytes, rest) = rest.split_at(length);
        self.0 = rest;
        Some(if head & 1 == 0 { Step::Message(bytes, fds) } else { Step::Packet(bytes, fds) })
    }
}

/// Writes an input, for a corpus to begin with.
#[derive(Clone, Debug, Default)]
pub struct Script(pub Vec<u8>);

impl Script {
    /// Adds what follows the header of a packet.
    ///
    /// # Panics
    ///
    /// If it is too long for its length to be written.
    #[must_use]
    pub fn message(self, payload: &[u8], fds: Fds) -> Self {
        self.bytes(0, payload, fds)
    }

    /// Adds a packet.
    ///
    /// # Panics
    ///
    /// If it is too long for its length to be written.
    #[must_use]
    pub fn packet(self, packet: &[u8], fds: Fds) -> Self {
        self.bytes(1, packet, fds)
    }

    fn bytes(mut self, kind: u8, bytes: &[u8], fds: Fds) -> Self {
        let length = u16::try_from(bytes.len()).expect("a packet of at most 64 KiB");
        self.0.push(kind | (fds.count & 7) << 2 | fds.first << 5);
        self.0.extend(length.to_le_bytes());
        self.0.extend(bytes);
        self
    }

    /// Adds turns for the other side.
    #[must_use]
    pub fn turns(mut self, count: u8) -> Self {
        self.0.extend([2, count]);
        self
    }

    /// Adds something else.
    #[must_use]
    pub fn other(mut self, what: u8, more: u8) -> Self {
        self.0.extend([3 | (what & 7) << 2, more]);
        self
    }

    /// Adds steps that were read.
    ///
    /// # Panics
    ///
    /// If there is a packet that is too long for its length to be written.
    #[must_use]
    pub fn steps(self, steps: Steps<'_>) -> Self {
        steps.fold(self, |script, step| match step {
            Step::Message(payload, fds) => script.message(payload, fds),
            Step::Packet(packet, fds) => script.packet(packet, fds),
            Step::Turns(count) => script.turns(count),
            Step::Other(what, more) => script.other(what, more),
        })
    }
}
