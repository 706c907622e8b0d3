//! The capabilities of a configuration space, each as its bytes at power-on and the bits that a
//! client can write.
//!
//! | capability | specification |
//! |---|---|
//! | power management | PCI Bus Power Management Interface 1.2, 3.2 |
//! | MSI | PCI Local Bus 3.0, 6.8.1 |
//! | MSI-X | PCI Local Bus 3.0, 6.8.2 |
//! | PCI Express | PCI Express Base 3.0, 7.8 |

#![forbid(unsafe_code)]

use super::MsixLayout;

const POWER_MANAGEMENT: u8 = 0x01;
const MSI: u8 = 0x05;
const EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;

/// Offset of the control and status word in the power management capability.
pub(super) const POWER_CONTROL: usize = 4;
/// The power state in that word.
pub(super) const POWER_STATE: u8 = 0b11;

/// One capability; its pointer to the next one is filled in by who puts it into a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Capability {
    /// At power-on.
    pub(super) bytes: Vec<u8>,
    /// The bits that can be written; as long as `bytes`.
    pub(super) writable: Vec<u8>,
}

impl Capability {
    fn new(id: u8, length: usize) -> Self {
        let mut this = Self { bytes: vec![0; length], writable: vec![0; length] };
        this.bytes[0] = id;
        this
    }

    fn word(self, at: usize, value: u16, writable: u16) -> Self {
        self.put(at, value.to_le_bytes(), writable.to_le_bytes())
    }

    fn dword(self, at: usize, value: u32, writable: u32) -> Self {
        self.put(at, value.to_le_bytes(), writable.to_le_bytes())
    }

    fn put<const N: usize>(mut self, at: usize, value: [u8; N], writable: [u8; N]) -> Self {
        self.bytes[at..at + N].copy_from_slice(&value);
        self.writable[at..at + N].copy_from_slice(&writable);
        self
    }
}

/// D0 and D3hot, without power management events. What the device has in it survives D3hot
/// (`No_Soft_Reset`): the runtime does nothing at all when the state is written.
pub(super) fn power_management() -> Capability {
    const VERSION: u16 = 0b011;
    const NO_SOFT_RESET: u16 = 1 << 3;
    Capability::new(POWER_MANAGEMENT, 8).word(2, VERSION, 0).word(
        POWER_CONTROL,
        NO_SOFT_RESET,
        POWER_STATE.into(),
    )
}

/// `vectors` is 1, 2, 4, 8, 16 or 32. With 64-bit addresses and a mask bit for each vector.
pub(super) fn msi(vectors: u8) -> Capability {
    const ENABLE: u16 = 1;
    const MULTIPLE_CAPABLE: u32 = 1;
    const MULTIPLE_ENABLE: u16 = 0b111 << 4;
    const ADDRESS_64BIT: u16 = 1 << 7;
    const MASKABLE: u16 = 1 << 8;
    let [log2, ..] = vectors.trailing_zeros().to_le_bytes();
    let control = u16::from(log2) << MULTIPLE_CAPABLE | ADDRESS_64BIT | MASKABLE;
    let present = u32::MAX >> (32 - u32::from(vectors));
    Capability::new(MSI, 24)
        .word(2, control, ENABLE | MULTIPLE_ENABLE)
        // Message address: of whole double words.
        .dword(4, 0, !0b11)
        .dword(8, 0, u32::MAX)
        // Message data.
        .word(12, 0, u16::MAX)
        // Mask bits; the pending bits behind them only the device sets.
        .dword(16, 0, present)
}

/// Table and pending bits are in a BAR.
pub(super) fn msix(msix: MsixLayout) -> Capability {
    const FUNCTION_MASK: u16 = 1 << 14;
    const ENABLE: u16 = 1 << 15;
    let [bir, ..] = msix.bar.to_le_bytes();
    let bir = u32::from(bir);
    Capability::new(MSIX, 12)
        .word(2, msix.vectors - 1, ENABLE | FUNCTION_MASK)
        .dword(4, bir, 0)
        .dword(8, msix.pending_offset | bir, 0)
}

/// An endpoint behind a link of the first generation with one lane, which has no ASPM, no function
/// level reset, payloads of 128 bytes, and nothing that could report an error.
pub(super) fn express() -> Capability {
    // Version 2; device type 0 is an endpoint.
    const CAPABILITIES: u16 = 2;
    const ROLE_BASED_ERRORS: u32 = 1 << 15;
    // Device control: enables of four errors, relaxed ordering, no snoop, largest read request.
    const ERROR_ENABLES: u16 = 0xf;
    const RELAXED_ORDERING: u16 = 1 << 4;
    const NO_SNOOP: u16 = 1 << 11;
    const READ_REQUEST: u16 = 0b111 << 12;
    const READ_REQUEST_512: u16 = 0b010 << 12;
    // Link: 2.5 GT/s, one lane.
    const LINK: u16 = 1 | 1 << 4;
    const ASPM_OPTIONALITY: u32 = 1 << 22;
    // Link control: ASPM, common clock, extended synch.
    const LINK_WRITABLE: u16 = 0b11 | 1 << 6 | 1 << 7;
    const COMPLETION_TIMEOUT_DISABLE: u32 = 1 << 4;
    const TIMEOUT_DISABLED: u16 = 1 << 4;
    const SPEEDS: u32 = 1 << 1;
    const TARGET_SPEED: u16 = 1;
    Capability::new(EXPRESS, 60)
        .word(2, CAPABILITIES, 0)
        .dword(4, ROLE_BASED_ERRORS, 0)
        .word(
            8,
            RELAXED_ORDERING | NO_SNOOP | READ_REQUEST_512,
            ERROR_ENABLES | RELAXED_ORDERING | NO_SNOOP | READ_REQUEST,
        )
        .dword(12, u32::from(LINK) | ASPM_OPTIONALITY, 0)
        .word(16, 0, LINK_WRITABLE)
        .word(18, LINK, 0)
        // Slots and roots are other ports' affairs: 0 up to the second device capabilities.
        .dword(36, COMPLETION_TIMEOUT_DISABLE, 0)
        .word(40, 0, TIMEOUT_DISABLED)
        .dword(44, SPEEDS, 0)
        .word(48, TARGET_SPEED, 0)
}
