//! Invariant 2: what was in flight has ended before the answer goes.

use crate::child::Device;
use crate::client::Client;
use crate::probe::{COPY, COPY_SIZE};
use standstill_device_proc::memory::SharedMemory;
use standstill_protocol::message::{CoordinatorMessage, MemoryDeclaration, Phase, Term};
use standstill_protocol::migration::MigrationState as S;
use std::os::fd::AsFd;

pub(crate) const IOVA: u64 = 0x1_0000;

/// A window of the device, and a copy into it that has come half-way.
pub(crate) struct HalfWay {
    pub(crate) memory: SharedMemory,
    client: Client,
}

impl HalfWay {
    pub(crate) fn begin(device: &Device, ram: bool) -> Self {
        let memory = SharedMemory::create("window", 4096).unwrap();
        if ram {
            let declaration =
                MemoryDeclaration { term: Term(1), sequence: 1, ram_fds: 1, dirty_page_size: 0 };
            device.send_with(&CoordinatorMessage::Memory(declaration), &[memory.as_fd()]);
            device.answer();
        }
        let mut client = Client::connect(&device.socket());
        client.dma_map(IOVA, 4096, memory.as_fd()).unwrap();
        let mut half_way = Self { memory, client };
        half_way.again();
        half_way
    }

    /// Another copy, when the last one is whole.
    pub(crate) fn again(&mut self) {
        self.memory.zero();
        self.ask_for_another();
        let last_of_first_half = COPY_SIZE / 2 - 1;
        crate::child::until("the first half is there", || self.byte(last_of_first_half) != 0);
    }

    /// Another copy, whether it may begin or not.
    pub(crate) fn ask_for_another(&mut self) {
        self.client.write_u32(0, COPY, u32::try_from(IOVA).unwrap()).unwrap();
    }

    fn byte(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.memory.read(offset, &mut byte).unwrap();
        byte[0]
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.byte(COPY_SIZE - 1) != 0
    }

    pub(crate) fn let_go(&self) {
        self.memory.store_u64(COPY_SIZE, 1).unwrap();
    }
}

/// The device is on the way and does not say that it has arrived.
fn assert_waits(device: &Device, target: S) {
    for epoch in 0..20 {
        // The answer to a query would come behind an answer to the command.
        assert_eq!(device.query(100 + epoch).moving_to, Some(target));
    }
}

#[test]
fn invariant_2_quiet_the_answer_waits_for_a_peer_copy_that_is_half_way() {
    let device = Device::welcomed("");
    let copy = HalfWay::begin(&device, false);
    device.command(1, Phase::PrepareStop, S::RunningP2p);
    assert_waits(&device, S::RunningP2p);
    assert!(!copy.is_whole());
    copy.let_go();
    let prepared = device.reached();
    assert_eq!((prepared.phase, prepared.state), (Phase::PrepareStop, S::RunningP2p));
    assert!(copy.is_whole(), "the answer came before the copy had ended");
    assert!(prepared.timings.drain_ns > 0);
}

#[test]
fn invariant_2_quiet_a_copy_to_ram_holds_up_the_second_phase_only() {
    let device = Device::welcomed("");
    let copy = HalfWay::begin(&device, true);
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    device.command(1, Phase::Stop, S::Stop);
    assert_waits(&device, S::Stop);
    assert!(!copy.is_whole());
    copy.let_go();
    assert_eq!(device.reached().state, S::Stop);
    assert!(copy.is_whole(), "the answer came before the copy had ended");
}
