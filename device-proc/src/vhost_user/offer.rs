//! What a frontend is offered of what a backend can do. Pure.

#![forbid(unsafe_code)]

use vhost::vhost_user::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_RING_PACKED;

/// The protocol features that a backend may have; all others are left out. `STATUS` and
/// `INFLIGHT_SHMFD` have no handler in the crate: offering one of them ends the start of a QEMU.
const OF_BACKENDS: Protocol = Protocol::CONFIG.union(Protocol::MQ).union(Protocol::LOG_SHMFD);

/// What is done here for every backend.
const OF_OURS: Protocol = Protocol::CONFIGURE_MEM_SLOTS.union(Protocol::RESET_DEVICE);

/// Features that are about the connection, and not about the device.
pub(super) const OF_THE_CONNECTION: u64 =
    VhostUserVirtioFeatures::LOG_ALL.bits() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    /// Virtio features, and those of the connection.
    pub(super) features: u64,
    pub(super) protocol: Protocol,
}

impl Offer {
    /// What is offered of a backend's features. `logs` says that its memory has a bitmap for dirty
    /// pages, `has_state` that its state can be transferred.
    pub(super) fn of(features: u64, protocol: Protocol, logs: bool, has_state: bool) -> Self {
        let mut protocol = (protocol & OF_BACKENDS) | OF_OURS;
        protocol.set(Protocol::LOG_SHMFD, logs && protocol.contains(Protocol::LOG_SHMFD));
        protocol.set(Protocol::DEVICE_STATE, has_state);
        let mut features = features & !(1 << VIRTIO_F_RING_PACKED) & !OF_THE_CONNECTION;
        features |= VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if protocol.contains(Protocol::LOG_SHMFD) {
            features |= VhostUserVirtioFeatures::LOG_ALL.bits();
        }
        Self { features, protocol }
    }

    /// The features of the device itself.
    pub(super) fn of_the_device(self) -> u64 {
        self.features & !OF_THE_CONNECTION
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION_1: u64 = 1 << 32;

    #[test]
    fn what_has_no_handler_is_never_offered() {
        let all = Offer::of(u64::MAX, Protocol::all(), true, true);
        for never in [
            Protocol::STATUS,
            Protocol::INFLIGHT_SHMFD,
            Protocol::GET_VRING_BASE_INFLIGHT,
            Protocol::PAGEFAULT,
            Protocol::INBAND_NOTIFICATIONS,
            Protocol::BACKEND_REQ,
            Protocol::SHARED_OBJECT,
            Protocol::SHMEM,
        ] {
            assert!(!all.protocol.intersects(never), "{never:?}");
        }
        assert_eq!(all.features & 1 << VIRTIO_F_RING_PACKED, 0);
        assert_ne!(all.features & VERSION_1, 0, "the others are the backend's business");
    }

    #[test]
    fn a_backend_that_offers_little_gets_what_every_one_has() {
        let little = Offer::of(VERSION_1, Protocol::empty(), true, false);
        assert_eq!(little.protocol, Protocol::CONFIGURE_MEM_SLOTS | Protocol::RESET_DEVICE);
        assert_eq!(little.features, VERSION_1 | 1 << 30);
        assert_eq!(little.of_the_device(), VERSION_1);
    }

    #[test]
    fn dirty_pages_are_logged_only_by_who_has_a_bitmap_and_marks_in_it() {
        let log = VhostUserVirtioFeatures::LOG_ALL.bits();
        let of = |protocol, logs| Offer::of(log, protocol, logs, false);
        assert_ne!(of(Protocol::LOG_SHMFD, true).features & log, 0);
        assert!(of(Protocol::LOG_SHMFD, true).protocol.contains(Protocol::LOG_SHMFD));
        for offer in [of(Protocol::LOG_SHMFD, false), of(Protocol::CONFIG, true)] {
            assert_eq!(offer.features & log, 0);
            assert!(!offer.protocol.contains(Protocol::LOG_SHMFD));
        }
    }

    #[test]
    fn a_state_is_offered_by_who_has_one() {
        let offer = Offer::of(0, Protocol::CONFIG | Protocol::MQ, false, true);
        let ours = OF_OURS | Protocol::DEVICE_STATE;
        assert_eq!(offer.protocol, Protocol::CONFIG | Protocol::MQ | ours);
    }
}
