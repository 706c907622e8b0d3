//! Registers, reset, configuration and saved state.

use super::*;
use proptest::prelude::*;

#[test]
fn registers_are_accessed_as_documented_and_not_otherwise() {
    let machine = Machine::new();
    assert_eq!(machine.read_u32(ID).to_le_bytes(), *b"COPE");
    assert_eq!(machine.read_u32(VERSION), 1);
    assert_eq!(machine.read_u64(MEMORY_SIZE), SIZE);
    machine.write_u64(PROBE_IOVA, 0x1111_2222_3333_4440);
    assert_eq!(machine.read_u32(PROBE_IOVA), 0x3333_4440);
    machine.write_u32(PROBE_IOVA + 4, 0x5555_6666);
    assert_eq!(machine.read_u64(PROBE_IOVA), 0x5555_6666_3333_4440);

    let refused = |bar: u32, offset: u64, width: usize| {
        let mut data = vec![0; width];
        let error = AccessError::NoRegister { offset, width };
        assert_eq!(machine.device.region_read(bar, offset, &mut data), Err(error));
        assert_eq!(machine.device.region_write(bar, offset, &data), Err(error));
    };
    refused(REGISTER_BAR, CONTROL, 8);
    refused(REGISTER_BAR, CONTROL, 2);
    refused(REGISTER_BAR, CONTROL, 1);
    refused(REGISTER_BAR, CONTROL + 4, 4);
    refused(REGISTER_BAR, RING_BASE + 2, 4);
    refused(REGISTER_BAR, RING_BASE + 4, 8);
    refused(REGISTER_BAR, 0x98, 4);
    refused(REGISTER_BAR, REGISTER_BAR_SIZE - 8, 8);
    refused(REGISTER_BAR, u64::MAX - 7, 8);
    refused(1, CONTROL, 4);

    let bad_value = |register: u64, value: u64, width: usize| {
        let bytes = value.to_le_bytes();
        let result = machine.try_write(register, bytes.get(..width).expect("4 or 8"));
        assert_eq!(result, Err(AccessError::BadValue { offset: register, value }));
    };
    bad_value(CONTROL, 4, 4);
    bad_value(CONTROL, u64::from(CONTROL_RUN), 4);
    bad_value(RING_BASE, 32, 8);
    bad_value(RING_ENTRIES, u64::from(MAX_ENTRIES) + 1, 4);
    bad_value(DOORBELL, 0, 4);
    bad_value(STATUS, 0, 4);
    bad_value(BYTES, 0, 8);
    machine.write_u64(RING_BASE, u64::MAX - 63);
    machine.write_u32(RING_ENTRIES, 2);
    bad_value(CONTROL, u64::from(CONTROL_RUN), 4);
    machine.start(CONTROL_RUN, &[copy(RAM, TARGET, 8)]);
    bad_value(RING_BASE, RAM, 8);
    bad_value(RING_ENTRIES, 4, 4);
    bad_value(DOORBELL, 2, 4);
}

#[test]
fn a_probe_tells_ram_from_peer_from_nothing() {
    let machine = Machine::new();
    let rows = [
        (RAM, SIZE, PROBE_RAM),
        (PEER, SIZE, PROBE_PEER),
        (PEER, SIZE + 1, PROBE_UNMAPPED),
        (0, 8, PROBE_UNMAPPED),
        (PEER, 0, PROBE_UNMAPPED),
    ];
    for (iova, len, found) in rows {
        machine.write_u64(PROBE_IOVA, iova);
        machine.write_u64(PROBE_LEN, len);
        assert_eq!(machine.read_u32(PROBE_RESULT), found, "{len:#x} bytes at {iova:#x}");
    }
}

#[tokio::test]
async fn a_reset_brings_registers_and_memory_to_zero() {
    let machine = Machine::new();
    machine.device.memory.store_u64(0x100, 5).expect("inside");
    machine.start(CONTROL_RUN | CONTROL_LOOP, &[to_peer()]);
    machine.wait_progress(10);
    machine.close(Scope::All).await;
    machine.device.reset().expect("reset");
    machine.gate().open(Scope::All);
    let_others_run();
    for register in [RING_BASE, BYTES, DESCRIPTORS, INTERRUPTS, PROBE_IOVA, PROBE_LEN] {
        assert_eq!(machine.read_u64(register), 0, "register {register:#x}");
    }
    for register in [CONTROL, STATUS, RING_ENTRIES, DOORBELL, HEAD, PROBE_RESULT] {
        assert_eq!(machine.read_u32(register), 0, "register {register:#x}");
    }
    assert_eq!(machine.device.memory.load_u64(0x100), Ok(0));
    assert!(machine.device.evidence(Moment::PrepareStopped).counters.is_empty());
}

#[tokio::test]
async fn a_saved_engine_goes_on_in_another_process() {
    let source = Machine::new();
    source.start(CONTROL_RUN | CONTROL_LOOP, &[to_peer()]);
    source.wait_progress(10);
    source.close(Scope::All).await;
    let mut saved = Vec::new();
    source.device.save(&mut saved).expect("saved");
    let done = source.read_u64(DESCRIPTORS);

    let target = Machine::new();
    target.put(0, to_peer());
    target.close(Scope::All).await;
    let mut stream = saved.as_slice();
    target.device.load(&mut stream).expect("loaded");
    assert!(stream.is_empty(), "exactly what was saved is read");
    let mut again = Vec::new();
    target.device.save(&mut again).expect("saved");
    assert_eq!(again, saved);
    assert_eq!(target.peer.load_u64(8), Ok(0), "the gate is closed");
    target.gate().open(Scope::All);
    wait_until("it goes on", || target.peer.load_u64(8).is_ok_and(|sequence| sequence > done));

    let smaller =
        Machine::with(CopyEngineConfig { memory_size: 4096, ..CopyEngineConfig::default() });
    assert!(smaller.device.load(&mut saved.as_slice()).is_err(), "another memory size");
    let fewer = Machine::with(CopyEngineConfig { vectors: 1, ..CopyEngineConfig::default() });
    assert!(fewer.device.load(&mut saved.as_slice()).is_err(), "other vectors");
}

#[test]
fn a_saved_state_that_contradicts_itself_is_refused() {
    let shape = Shape { memory_size: SIZE, vectors: 4 };
    let good = State { ring_entries: 4, head: 3, run: true, ..State::default() };
    let check = |state: &State| {
        let mut saved = Vec::new();
        state::save(shape, state, &mut saved).expect("saved");
        state::load(shape, &mut saved.as_slice())
    };
    assert_eq!(check(&good).expect("good"), good);
    let bad = [
        State { head: 4, ..good.clone() },
        State { doorbell: 4, ..good.clone() },
        State { ring_entries: MAX_ENTRIES + 1, ..good.clone() },
        State { ring_base: 1, ..good.clone() },
        State { ring_base: u64::MAX - 63, ..good.clone() },
        State { error: 1, ..good.clone() },
        State { error: 99, run: false, ..good.clone() },
        State { probe_result: 3, ..good.clone() },
        State { sequences: vec![state::Sequence::default(); 1025], ..good.clone() },
        State { sequences: vec![state::Sequence { executed: 1, stored: 2 }], ..good.clone() },
    ];
    for state in bad {
        assert!(check(&state).is_err(), "{state:?}");
    }
}

#[test]
fn impossible_configurations_are_refused() {
    let default = CopyEngineConfig::default;
    assert_eq!(default().check(), Ok(()));
    for memory_size in [0, 2048, 4097, 3 << 20, MAX_MEMORY_SIZE * 2] {
        let config = CopyEngineConfig { memory_size, ..default() };
        assert_eq!(config.check(), Err(ConfigError::MemorySize(memory_size)));
    }
    assert_eq!(CopyEngineConfig { vectors: 0, ..default() }.check(), Ok(()));
    let config = CopyEngineConfig { vectors: 17, ..default() };
    assert_eq!(config.check(), Err(ConfigError::Vectors(17)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a stream says, loading it neither panics nor changes anything unless it is whole.
    #[test]
    fn a_damaged_stream_is_refused_and_changes_nothing(
        cut in any::<prop::sample::Index>(),
        flip in prop::option::of((any::<prop::sample::Index>(), 1u8..)),
        noise in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let shape = Shape { memory_size: SIZE, vectors: 4 };
        let sequences = vec![state::Sequence { executed: 3, stored: 2 }; 5];
        let state = State { ring_entries: 8, head: 2, bytes: 77, sequences, ..State::default() };
        let mut saved = Vec::new();
        state::save(shape, &state, &mut saved).expect("saved");
        let damaged = match flip {
            Some((at, bits)) => {
                let mut damaged = saved.clone();
                let at = at.index(damaged.len());
                damaged[at] ^= bits;
                damaged
            }
            None => saved[..cut.index(saved.len())].to_vec(),
        };
        prop_assert!(state::load(shape, &mut damaged.as_slice()).is_err());
        prop_assert!(state::load(shape, &mut noise.as_slice()).is_err());
        prop_assert_eq!(state::load(shape, &mut saved.as_slice()).expect("whole"), state);
    }

    /// A driver can write what it likes.
    #[test]
    fn registers_survive_any_access(
        accesses in prop::collection::vec((any::<bool>(), 0u64..0xa0, 0usize..10, any::<u64>()), 50),
    ) {
        let machine = Machine::new();
        for (write, offset, width, value) in accesses {
            let mut data = vec![0; width];
            data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
            let result = if write {
                machine.device.region_write(REGISTER_BAR, offset, &data)
            } else {
                machine.device.region_read(REGISTER_BAR, offset, &mut data)
            };
            prop_assert!(result.is_ok() || width != 4 || offset % 8 != 0 || offset > 0x90 || write
                || (0x68..0x80).contains(&offset));
        }
    }
}
