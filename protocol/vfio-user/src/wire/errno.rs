//! Error numbers, as they travel in error replies.

use std::fmt;
use std::io;

/// A Linux error number, 1 to [`Errno::MAX`]: what an error reply carries.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(u16);

impl Errno {
    /// The largest error number of the kernel.
    pub const MAX: u16 = 4095;

    /// Operation not permitted.
    pub const EPERM: Self = Self::of(rustix::io::Errno::PERM);
    /// No such thing.
    pub const ENOENT: Self = Self::of(rustix::io::Errno::NOENT);
    /// Input or output error; also what stands for numbers that are none.
    pub const EIO: Self = Self::of(rustix::io::Errno::IO);
    /// Argument list too long: more bytes than a transfer may have.
    pub const E2BIG: Self = Self::of(rustix::io::Errno::TOOBIG);
    /// Out of memory.
    pub const ENOMEM: Self = Self::of(rustix::io::Errno::NOMEM);
    /// Bad address.
    pub const EFAULT: Self = Self::of(rustix::io::Errno::FAULT);
    /// Busy.
    pub const EBUSY: Self = Self::of(rustix::io::Errno::BUSY);
    /// It exists already.
    pub const EEXIST: Self = Self::of(rustix::io::Errno::EXIST);
    /// No such device: nothing can be reached at that address.
    pub const ENODEV: Self = Self::of(rustix::io::Errno::NODEV);
    /// Invalid argument.
    pub const EINVAL: Self = Self::of(rustix::io::Errno::INVAL);
    /// No space left.
    pub const ENOSPC: Self = Self::of(rustix::io::Errno::NOSPC);
    /// No such function: an unknown command.
    pub const ENOSYS: Self = Self::of(rustix::io::Errno::NOSYS);
    /// Valid, but not offered.
    pub const EOPNOTSUPP: Self = Self::of(rustix::io::Errno::OPNOTSUPP);
    /// Too late.
    pub const ETIMEDOUT: Self = Self::of(rustix::io::Errno::TIMEDOUT);

    #[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "1 to 4095")]
    const fn of(errno: rustix::io::Errno) -> Self {
        Self(errno.raw_os_error() as u16)
    }

    /// The error that a reply with the error bit and this number means: EIO for 0, which some
    /// servers send, and for what is no error number.
    #[must_use]
    pub fn from_reply(number: u32) -> Self {
        u16::try_from(number)
            .ok()
            .filter(|errno| (1..=Self::MAX).contains(errno))
            .map_or(Self::EIO, Self)
    }

    /// The error number, 1 to 4095.
    #[must_use]
    pub fn number(self) -> u32 {
        u32::from(self.0)
    }

    /// The error number as the system's interfaces have it, 1 to 4095.
    #[must_use]
    pub fn raw_os_error(self) -> i32 {
        i32::from(self.0)
    }
}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.raw_os_error())
    }
}

/// The number of an error of the system; EIO for one without.
impl From<&io::Error> for Errno {
    fn from(error: &io::Error) -> Self {
        let number = error.raw_os_error().and_then(|number| u32::try_from(number).ok());
        Self::from_reply(number.unwrap_or(0))
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from(*self).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({self})")
    }
}
