//! The migration states and the state stream, in band.

use super::client::{Client, REGION_READ, access, message};
use crate::device::Pass;
use crate::fields;
use crate::vfio_user::rig::{COUNT, Deed, MEMORY, MEMORY_SIZE, REGISTERS, Rig};
use standstill_protocol::migration::{MigrationFlags, MigrationState as S, path};
use std::sync::atomic::Ordering;

const RESET: u16 = 13;
const FEATURE: u16 = 16;
const DATA_READ: u16 = 17;
const DATA_WRITE: u16 = 18;
const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;

const EINVAL: u32 = 22;
const EIO: u32 = 5;

const FLAGS: [MigrationFlags; 4] = [
    MigrationFlags::STOP_COPY,
    MigrationFlags::STOP_COPY_P2P,
    MigrationFlags::STOP_COPY_PRE_COPY,
    MigrationFlags::ALL,
];

fn set_body(state: u32) -> Vec<u8> {
    fields!(16_u32, 2 | SET, state, u32::MAX)
}

pub(super) fn set(client: &mut Client, state: S) -> Result<(), u32> {
    let body = set_body(state.value());
    client.call(FEATURE, &body).map(|reply| assert_eq!(reply, body, "the request is repeated"))
}

pub(super) fn get(client: &mut Client) -> S {
    let reply = client.call(FEATURE, &fields!(16_u32, 2 | GET)).unwrap();
    assert_eq!(reply[..8], fields!(16_u32, 2 | GET));
    assert_eq!(reply.len(), 16);
    S::from_value(u32::from_ne_bytes(reply[8..12].try_into().unwrap())).unwrap()
}

fn read(client: &mut Client, size: u32) -> Result<Vec<u8>, u32> {
    let reply = client.call(DATA_READ, &fields!(8 + size, size))?;
    assert_eq!(reply.len(), 8 + usize::try_from(size).unwrap(), "as long as was asked for");
    let length = u32::from_ne_bytes(reply[4..8].try_into().unwrap());
    assert_eq!(reply[..4], (8 + length).to_ne_bytes());
    let (data, padding) = reply[8..].split_at(usize::try_from(length).unwrap());
    assert!(padding.iter().all(|byte| *byte == 0));
    Ok(data.to_vec())
}

pub(super) fn write(client: &mut Client, data: &[u8]) -> Result<(), u32> {
    let size = u32::try_from(data.len()).unwrap();
    let mut body = fields!(8 + size, size);
    body.extend(data);
    client.call(DATA_WRITE, &body).map(|reply| assert!(reply.is_empty()))
}

/// What there is of the device's state now, read in pieces of that many bytes; in STOP_COPY that is the
/// rest.
pub(super) fn save(client: &mut Client, piece: u32) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let data = read(client, piece).unwrap();
        all.extend(&data);
        if data.len() < usize::try_from(piece).unwrap() {
            return all;
        }
    }
}

fn load(client: &mut Client, state: &[u8]) {
    state.chunks(10_000).for_each(|piece| write(client, piece).unwrap());
}

/// Brings the client to a state, with a whole state written where one is due.
fn reach(client: &mut Client, state: S, saved: &[u8]) {
    set(client, state).unwrap();
    if state == S::Resuming {
        load(client, saved);
    }
}

#[test]
fn every_pair_of_states_leads_where_the_table_says() {
    for flags in FLAGS {
        let rig = Rig::with_flags(flags);
        let mut client = Client::greeted(rig.connect());
        let reply = client.call(FEATURE, &fields!(16_u32, 1 | GET)).unwrap();
        assert_eq!(reply, fields!(16_u32, 1 | GET, flags.bits()));
        set(&mut client, S::StopCopy).unwrap();
        let saved = save(&mut client, 1 << 20);
        let is_there = |state: &S| *state != S::Error && flags.has(*state);
        for from in S::ALL.into_iter().filter(is_there) {
            for to in S::ALL {
                set(&mut client, S::Running).unwrap();
                reach(&mut client, from, &saved);
                let expected = if path(flags, from, to).is_ok() { to } else { from };
                let result = if expected == to { Ok(()) } else { Err(EINVAL) };
                assert_eq!(set(&mut client, to), result, "{flags:?}: {from} to {to}");
                assert_eq!(get(&mut client), expected, "{flags:?}: {from} to {to}");
                if from == S::Resuming && to == S::Resuming {
                    continue;
                }
                if expected == S::Resuming && from != S::Resuming {
                    load(&mut client, &saved);
                }
            }
        }
        set(&mut client, S::Running).unwrap();
        assert!(client.read(REGISTERS, COUNT).is_ok());
        drop(client);
    }
}

#[test]
fn requests_that_cannot_be_are_refused_and_change_nothing() {
    let rig = Rig::with_flags(MigrationFlags::ALL);
    let mut client = Client::greeted(rig.connect());
    for body in [
        set_body(0),
        set_body(8),
        set_body(u32::MAX),
        fields!(15_u32, 2 | SET, 1_u32, 0_u32),
        fields!(16_u32, 2 | SET),
        fields!(16_u32, 2 | SET, 1_u32),
        fields!(15_u32, 2 | GET),
        fields!(16_u32, 2 | GET | SET, 1_u32, 0_u32),
        fields!(15_u32, 1 | GET),
        fields!(16_u32, 1 | SET, 7_u64),
        fields!(15_u32, 9 | GET),
        fields!(16_u32, 9 | SET, 7_u64),
    ] {
        assert_eq!(client.call(FEATURE, &body), Err(EINVAL), "{body:?}");
    }
    assert_eq!(get(&mut client), S::Running);
    drop(client);
}

#[test]
fn the_stream_is_read_and_written_in_its_states_alone_and_within_limits() {
    let rig = Rig::with_flags(MigrationFlags::ALL);
    let mut client = Client::greeted(rig.connect());
    set(&mut client, S::StopCopy).unwrap();
    let saved = save(&mut client, 4096);
    for state in S::ALL.into_iter().filter(|state| *state != S::Error) {
        set(&mut client, S::Running).unwrap();
        reach(&mut client, state, &saved);
        let reads = if state.is_saving() { Ok(()) } else { Err(EINVAL) };
        assert_eq!(read(&mut client, 16).map(drop), reads, "{state}");
        if state != S::Resuming {
            assert_eq!(write(&mut client, &[0; 16]), Err(EINVAL), "{state}");
        }
    }
    set(&mut client, S::StopCopy).unwrap();
    for wrong in [
        fields!(8_u32, 1_u32),
        fields!(7_u32, 0_u32),
        fields!((1_u32 << 20) + 9, (1_u32 << 20) + 1),
        fields!(u32::MAX, u32::MAX),
        fields!(8_u32),
    ] {
        assert_eq!(client.call(DATA_READ, &wrong), Err(EINVAL), "{wrong:?}");
    }
    assert_eq!(read(&mut client, 0), Ok(vec![]));
    set(&mut client, S::Resuming).unwrap();
    for wrong in [
        fields!(12_u32, 5_u32, 0_u32),
        fields!(13_u32, 5_u32, 0_u32),
        fields!(8_u32, 4_u32, 0_u32),
        fields!(u32::MAX, u32::MAX, 0_u32),
        fields!(8_u32),
    ] {
        assert_eq!(client.call(DATA_WRITE, &wrong), Err(EINVAL), "{wrong:?}");
    }
    load(&mut client, &saved);
    assert_eq!(set(&mut client, S::Stop), Ok(()), "nothing of what was refused was taken");
    drop(client);
}

#[test]
fn a_state_is_read_from_one_device_and_written_to_another() {
    let source = Rig::with_flags(MigrationFlags::ALL);
    let mut client = Client::greeted(source.connect());
    for offset in (0..MEMORY_SIZE).step_by(4096) {
        client.write(MEMORY, offset, u32::try_from(offset).unwrap() ^ 0x5a5a).unwrap();
    }
    client.write(7, 0x10, 0xfeb0_0000).unwrap();
    set(&mut client, S::PreCopy).unwrap();
    let mut saved = save(&mut client, 5000);
    client.write(MEMORY, 8192, 0xc0ffee).unwrap();
    set(&mut client, S::StopCopy).unwrap();
    saved.extend(save(&mut client, 5000));
    assert_eq!(read(&mut client, 100), Ok(vec![]), "the end stays the end");

    let target = Rig::with_flags(MigrationFlags::ALL);
    let mut client = Client::greeted(target.connect());
    set(&mut client, S::Resuming).unwrap();
    load(&mut client, &saved);
    set(&mut client, S::Running).unwrap();
    assert_eq!(client.read(MEMORY, 4096), Ok(4096 ^ 0x5a5a));
    assert_eq!(client.read(MEMORY, 8192), Ok(0xc0ffee));
    assert_eq!(client.read(7, 0x10), Ok(0xfeb0_0000));
    drop(client);
}

#[test]
fn a_bad_stream_is_found_at_the_end_of_resuming_and_a_reset_leads_out_of_error() {
    for flags in FLAGS {
        a_bad_stream_with(flags);
    }
}

fn a_bad_stream_with(flags: MigrationFlags) {
    let rig = Rig::with_flags(flags);
    let mut client = Client::greeted(rig.connect());
    set(&mut client, S::StopCopy).unwrap();
    let saved = save(&mut client, 1 << 20);
    set(&mut client, S::Running).unwrap();
    let mut damaged = saved.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    for bad in [&saved[..saved.len() - 1], &[], &damaged] {
        set(&mut client, S::Resuming).unwrap();
        // It may be found before the end, too.
        let _ = bad.chunks(10_000).try_for_each(|piece| write(&mut client, piece));
        let refused = set(&mut client, S::Stop);
        assert!(matches!(refused, Err(EINVAL | EIO)), "{refused:?}");
        assert_eq!(get(&mut client), S::Error);
        for state in S::ALL {
            assert_eq!(set(&mut client, state), Err(EINVAL), "{state}");
        }
        assert_eq!(client.read(REGISTERS, COUNT), Err(EINVAL));
        assert!(client.read(7, 0).is_ok());
        assert_eq!(client.call(RESET, &[]), Ok(vec![]));
        assert_eq!(get(&mut client), S::Running);
        assert_eq!(client.read(REGISTERS, COUNT), Ok(0));
    }
    drop(client);
}

#[test]
fn a_reset_keeps_the_state_of_a_device_that_runs_and_ends_resuming() {
    let rig = Rig::with_flags(MigrationFlags::ALL);
    let mut client = Client::greeted(rig.connect());
    for (state, then) in [
        (S::Running, Some(S::Running)),
        (S::RunningP2p, Some(S::RunningP2p)),
        (S::PreCopy, Some(S::PreCopy)),
        (S::PreCopyP2p, Some(S::PreCopyP2p)),
        (S::Resuming, Some(S::Running)),
        (S::Stop, None),
        (S::StopCopy, None),
    ] {
        set(&mut client, S::Running).unwrap();
        set(&mut client, state).unwrap();
        let resets =
            |rig: &Rig| rig.device().deeds().iter().filter(|deed| **deed == Deed::Reset).count();
        let before = resets(&rig);
        let reset = client.call(RESET, &[]);
        assert_eq!(reset, then.map(|_| vec![]).ok_or(EINVAL), "{state}");
        assert_eq!(get(&mut client), then.unwrap_or(state));
        assert_eq!(resets(&rig) - before, usize::from(then.is_some()), "{state}");
    }
    drop(client);
}

#[test]
fn a_reset_while_the_device_pre_copies_starts_the_stream_over() {
    let source = Rig::with_flags(MigrationFlags::ALL);
    source.device().saves_running.store(true, Ordering::SeqCst);
    let passes = || {
        let saved = |deed: &Deed| match deed {
            Deed::Saved(pass) => Some(*pass),
            _ => None,
        };
        source.device().deeds().iter().filter_map(saved).collect::<Vec<_>>()
    };
    let mut client = Client::greeted(source.connect());
    client.write(MEMORY, 4096, 0x5a5a).unwrap();
    set(&mut client, S::PreCopy).unwrap();
    let mut stream = save(&mut client, 5000);
    while passes().len() < 3 {
        stream.extend(save(&mut client, 5000));
    }
    let before = passes();
    assert_eq!(before[0], Pass::First);
    assert!(before[1..].iter().all(|pass| *pass == Pass::Later), "{before:?}");
    assert_eq!(client.call(RESET, &[]), Ok(vec![]));
    while passes().len() < before.len() + 2 {
        stream.extend(save(&mut client, 5000));
    }
    assert_eq!(passes()[before.len()..][..2], [Pass::First, Pass::Later], "{:?}", passes());
    set(&mut client, S::StopCopy).unwrap();
    stream.extend(save(&mut client, 5000));

    let target = Rig::with_flags(MigrationFlags::ALL);
    let mut client = Client::greeted(target.connect());
    set(&mut client, S::Resuming).unwrap();
    load(&mut client, &stream);
    set(&mut client, S::Running).unwrap();
    assert_eq!(client.read(MEMORY, 4096), Ok(0x5a5a));
    drop(client);
}

#[test]
fn both_masters_have_their_say_and_the_client_sees_its_own_position() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, std::time::Duration::ZERO);
    assert_eq!(get(&mut client), S::Running);
    set(&mut client, S::Stop).unwrap();
    rig.start(3);
    assert_eq!(get(&mut client), S::Stop);
    assert_eq!(client.write(REGISTERS, 0, 1), Err(EINVAL), "the client holds it");
    client.post_write(REGISTERS, 0, 2);
    set(&mut client, S::Running).unwrap();
    assert_eq!(client.read(REGISTERS, COUNT), Ok(1));
    drop(client);
    let mut client = Client::greeted(rig.connect());
    set(&mut client, S::RunningP2p).unwrap();
    drop(client);
    let mut client = Client::greeted(rig.connect());
    assert_eq!(get(&mut client), S::RunningP2p, "the next client finds it so");
    drop(client);
}

#[test]
fn how_much_there_is_to_save_can_be_asked_in_every_state() {
    let rig = Rig::with_flags(MigrationFlags::ALL);
    let mut client = Client::greeted(rig.connect());
    set(&mut client, S::StopCopy).unwrap();
    let saved = save(&mut client, 1 << 20);
    for state in S::ALL.into_iter().filter(|state| *state != S::Error) {
        set(&mut client, S::Running).unwrap();
        reach(&mut client, state, &saved);
        let reply = client.call(FEATURE, &fields!(16_u32, 9 | GET)).unwrap();
        assert_eq!((&reply[..8], reply.len()), (&fields!(16_u32, 9 | GET)[..], 16));
        let size = u64::from_ne_bytes(reply[8..].try_into().unwrap());
        if matches!(state, S::Running | S::Stop) {
            assert!(size >= MEMORY_SIZE, "{state}: {size}");
        }
    }
    // A stream that is none.
    set(&mut client, S::Running).unwrap();
    set(&mut client, S::Resuming).unwrap();
    assert!(set(&mut client, S::Stop).is_err());
    assert_eq!(get(&mut client), S::Error);
    assert!(client.call(FEATURE, &fields!(16_u32, 9 | GET)).is_ok());
    assert_eq!(read(&mut client, 100), Err(EINVAL));
    assert_eq!(write(&mut client, &saved[..100]), Err(EINVAL));
    drop(client);
}

#[test]
fn what_was_rung_before_a_stop_in_band_is_told_before_it() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    client.send(&message(1, 6, 0, &fields!(4096_u32, 0_u32, REGISTERS, 0_u32)), &[]);
    let (_, bells) = client.receive_with_fds();
    for round in 1..30 {
        rustix::io::write(&bells[0], &1_u64.to_ne_bytes()).unwrap();
        set(&mut client, S::Stop).unwrap();
        let deeds = rig.device().deeds();
        let rang = deeds.iter().filter(|deed| **deed == Deed::Rang(0)).count();
        assert_eq!(rang, round);
        set(&mut client, S::Running).unwrap();
    }
    drop(client);
}

#[test]
fn a_stop_in_band_that_fails_or_hangs_leaves_the_client_where_it_was() {
    for hangs in [false, true] {
        let rig = Rig::new();
        let mut client = Client::greeted(rig.connect());
        let device = rig.device();
        let how = if hangs { &device.hangs_at_stop } else { &device.fails_to_stop };
        how.store(true, Ordering::SeqCst);
        client.send(&message(1, FEATURE, 0, &set_body(S::Stop.value())), &[]);
        client.send(&message(2, REGION_READ, 0, &access(7, 0, 4)), &[]);
        let answers = [client.receive(), client.receive()];
        let answers = answers.map(|answer| (answer.id, answer.error));
        assert_eq!(answers, [(1, EIO), (2, 0)], "what is behind it is served");
        assert_eq!(get(&mut client), S::RunningP2p);
        assert_eq!(set(&mut client, S::Running), Ok(()));
        client.write(REGISTERS, 0, 7).unwrap();
        let deeds = rig.device().deeds();
        assert_eq!(deeds, [Deed::Stopped, Deed::Started, Deed::Wrote(0, 7)]);
        drop(client);
    }
}
