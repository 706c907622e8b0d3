//! The 16 bytes before each body.

use super::bytes::{Put, Reader, size_u32};
use super::command::Command;
use super::errno::Errno;

/// Size of a header, in bytes.
pub const HEADER_SIZE: usize = 16;

/// The bits of the flags that say what a message is.
const TYPE: u32 = 0xf;
const TYPE_REPLY: u32 = 1;
/// The sender wants no reply, not even if the command fails.
const NO_REPLY: u32 = 1 << 4;
/// The reply tells an error.
const ERROR: u32 = 1 << 5;

/// A header, as it travels: nothing in it has been judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Chosen by who sends a command, repeated in the reply. Each direction has ids of its own.
    pub id: u16,
    /// Number of the command, in replies too.
    pub command: u16,
    /// Size of the whole message in bytes, this header included.
    pub size: u32,
    /// What the message is; see [`Header::kind`].
    pub flags: u32,
    /// In an error reply the error number.
    pub error: u32,
}

/// What a message is, by its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A command that wants a reply.
    Command,
    /// A command that wants none, not even if it fails: a posted write.
    Posted,
    /// A reply: done.
    Done,
    /// A reply: refused, or failed. Some servers send a body with it.
    Refused(Errno),
}

impl Header {
    /// Of a command that wants a reply. The [size](Self::size) comes with the body.
    #[must_use]
    pub fn command(id: u16, command: Command) -> Self {
        Self { id, command: command.number(), ..Self::default() }
    }

    /// Of a command that wants no reply.
    #[must_use]
    pub fn posted(id: u16, command: Command) -> Self {
        Self { flags: NO_REPLY, ..Self::command(id, command) }
    }

    /// Of the reply to a command with this header.
    #[must_use]
    pub fn reply(&self) -> Self {
        Self { id: self.id, command: self.command, size: 0, flags: TYPE_REPLY, error: 0 }
    }

    /// Of the error reply to a command with this header. It has no body.
    #[must_use]
    pub fn refusal(&self, errno: Errno) -> Self {
        Self {
            size: size_u32(HEADER_SIZE),
            flags: TYPE_REPLY | ERROR,
            error: errno.number(),
            ..self.reply()
        }
    }

    /// What kind of message it is; `None` for a type that does not exist. Flags that do not exist
    /// are ignored.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        match self.flags & TYPE {
            0 if self.flags & NO_REPLY != 0 => Some(Kind::Posted),
            0 => Some(Kind::Command),
            TYPE_REPLY if self.flags & ERROR != 0 => {
                Some(Kind::Refused(Errno::from_reply(self.error)))
            }
            TYPE_REPLY => Some(Kind::Done),
            _ => None,
        }
    }

    /// Whether the sender waits for a reply: commands without the no-reply bit, and messages of a
    /// type that does not exist.
    #[must_use]
    pub fn wants_reply(&self) -> bool {
        matches!(self.kind(), Some(Kind::Command) | None)
    }

    /// Size of the body that follows, in bytes; `None` if the size is too small for this header.
    #[must_use]
    pub fn body_size(&self) -> Option<usize> {
        usize::try_from(self.size).ok()?.checked_sub(HEADER_SIZE)
    }

    /// Reads the header at the beginning of `bytes`; `None` if they are too few.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new("header", bytes);
        Some(Self {
            id: reader.u16().ok()?,
            command: reader.u16().ok()?,
            size: reader.u32().ok()?,
            flags: reader.u32().ok()?,
            error: reader.u32().ok()?,
        })
    }

    /// Appends the header alone, with its size as it is.
    #[inline]
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.reserve(HEADER_SIZE);
        out.put_u16(self.id);
        out.put_u16(self.command);
        out.put_u32(self.size);
        out.put_u32(self.flags);
        out.put_u32(self.error);
    }

    /// Appends a whole message: this header, with its size corrected, and the body that `body`
    /// appends. `following` bytes of the body are not in `out` but will be sent right after it.
    pub fn encode_message(
        &self,
        out: &mut Vec<u8>,
        following: usize,
        body: impl FnOnce(&mut Vec<u8>),
    ) {
        let start = out.len();
        self.encode(out);
        body(out);
        let size = size_u32((out.len() - start).saturating_add(following));
        if let Some(place) = out.get_mut(start + 4..start + 8) {
            place.copy_from_slice(&size.to_ne_bytes());
        }
    }
}
