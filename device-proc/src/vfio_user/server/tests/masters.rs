//! What a client does while the coordinator has other plans, and what it cannot do to it.

use super::super::super::kept::Kept;
use super::super::super::session::{Next, Reply, Session};
use super::client::*;
use super::migration::{get, save, set, write};
use crate::fields;
use crate::pci::BarUse;
use crate::vfio_user::rig::*;
use rustix::event::{EventfdFlags, eventfd};
use standstill_protocol::message::{DeviceEvent, DeviceMessage, Phase};
use standstill_protocol::migration::{MigrationFlags, MigrationState as S};
use standstill_vfio_user::framing::Message;
use standstill_vfio_user::wire::{HEADER_SIZE, Header, Kind};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

const EINVAL: u32 = 22;
const EIO: u32 = 5;
const SET_IRQS: u16 = 8;
const RESET: u16 = 13;
const MIG_DATA_READ: u16 = 17;
const NO_LEASE: Duration = Duration::ZERO;

fn wrote(rig: &Rig) -> usize {
    rig.device().deeds().iter().filter(|deed| matches!(deed, Deed::Wrote(..))).count()
}

#[test]
fn a_client_that_changes_its_state_all_the_time_does_not_flood_the_coordinator() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    let begin = Instant::now();
    for round in 0..1500 {
        set(&mut client, if round % 2 == 0 { S::RunningP2p } else { S::Running }).unwrap();
    }
    set(&mut client, S::Stop).unwrap();
    let mut events = 0;
    loop {
        let message = rig.coordinator.recv(PATIENCE).unwrap().message;
        events += 1;
        if message == DeviceMessage::Event(DeviceEvent::ClientState(S::Stop)) {
            break;
        }
    }
    let most = 40 + 10 * (begin.elapsed().as_secs() + 1);
    assert!(events < most, "{events} events, at most {most}");
    drop(client);
}

#[test]
fn a_state_that_is_saved_ends_with_a_reset_by_the_coordinator() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, NO_LEASE);
    set(&mut client, S::StopCopy).unwrap();
    assert!(client.call(MIG_DATA_READ, &fields!(4104_u32, 4096_u32)).is_ok());
    rig.command(3, Phase::Reset, S::Stop, NO_LEASE);
    assert!(matches!(rig.answer(), DeviceMessage::Reached(_)));
    // What follows would be of a device that was reset meanwhile.
    assert_eq!(client.call(MIG_DATA_READ, &fields!(4104_u32, 4096_u32)), Err(EIO));
    assert_eq!(get(&mut client), S::StopCopy);
    set(&mut client, S::Stop).unwrap();
    set(&mut client, S::StopCopy).unwrap();
    let saved = save(&mut client, 1 << 20);
    set(&mut client, S::Resuming).unwrap();
    write(&mut client, &saved).unwrap();
    set(&mut client, S::Stop).unwrap();
    drop(client);
}

#[test]
fn what_was_kept_is_void_where_the_client_loads_another_state() {
    let rig = Rig::with_flags(MigrationFlags::ALL);
    let mut client = Client::greeted(rig.connect());
    set(&mut client, S::StopCopy).unwrap();
    let saved = save(&mut client, 1 << 20);
    client.post_write(REGISTERS, 0, 1);
    set(&mut client, S::Resuming).unwrap();
    write(&mut client, &saved).unwrap();
    set(&mut client, S::Stop).unwrap();
    // This one is meant for what was loaded.
    client.post_write(REGISTERS, 0, 2);
    set(&mut client, S::Running).unwrap();
    assert_eq!(client.read(REGISTERS, COUNT), Ok(1));
    assert_eq!(rig.device().deeds().iter().filter(|deed| **deed == Deed::Wrote(0, 2)).count(), 1);
    drop(client);
}

#[test]
fn the_msix_table_and_memory_are_within_reach_of_a_stopped_device() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    let bars = &rig.parts.layout.bars;
    let table = bars.iter().position(|bar| bar.usage == BarUse::Msix).unwrap();
    let table = u32::try_from(table).unwrap();
    client.write(MEMORY, 8, 0x1234).unwrap();
    set(&mut client, S::Stop).unwrap();
    rig.stop(2, NO_LEASE);
    for value in [1, 0] {
        assert_eq!(client.write(table, 12, value), Ok(()));
        assert_eq!(client.read(table, 12), Ok(value));
    }
    client.post_write(table, 0, 0xfee0_0000);
    assert_eq!(client.read(table, 0), Ok(0xfee0_0000));
    assert_eq!(client.read(MEMORY, 8), Ok(0x1234));
    assert_eq!(client.write(MEMORY, 8, 0), Err(EINVAL));
    assert_eq!(client.read(REGISTERS, COUNT), Err(EINVAL));
    assert_eq!(client.write(REGISTERS, 0, 0), Err(EINVAL));
    drop(client);
}

#[test]
fn a_reset_leaves_configuration_space_the_msix_table_and_eventfds_alone() {
    const BAR_0: u64 = 0x10;
    const COMMAND: u64 = 4;
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    let bars = &rig.parts.layout.bars;
    let table = bars.iter().position(|bar| bar.usage == BarUse::Msix).unwrap();
    let table = u32::try_from(table).unwrap();
    client.write(7, COMMAND, 6).unwrap();
    client.write(7, BAR_0, 0xfe00_0000).unwrap();
    client.write(table, 0, 0xfee0_0000).unwrap();
    let vector = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let install = fields!(20_u32, 4_u32 | 32, 2_u32, 0_u32, 1_u32);
    client.call_with(SET_IRQS, &install, &[vector.as_fd()]).unwrap();
    let before = rig.parts.config().bytes().to_vec();
    let assert_untouched = |client: &mut Client| {
        assert_eq!(rig.parts.config().bytes(), before);
        assert_eq!(client.read(7, BAR_0), Ok(0xfe00_0000));
        assert_eq!(client.read(table, 0), Ok(0xfee0_0000));
    };
    client.call(RESET, &[]).unwrap();
    assert_untouched(&mut client);
    rig.stop(2, NO_LEASE);
    rig.command(3, Phase::Reset, S::Stop, NO_LEASE);
    assert!(matches!(rig.answer(), DeviceMessage::Reached(_)));
    assert_untouched(&mut client);
    assert_eq!(rig.device().deeds().iter().filter(|deed| **deed == Deed::Reset).count(), 2);
    rig.start(4);
    rig.device().handles.interrupts.raise(0);
    assert_eq!(rustix::io::read(&vector, &mut [0_u8; 8]), Ok(8), "it is still installed");
    drop(client);
}

#[test]
fn what_is_kept_comes_before_a_command_that_the_start_lets_in_first() {
    let rig = Rig::new();
    let endpoint = rig.endpoint();
    let mut session = Session::new(&endpoint, None);
    let mut kept = Kept::default();
    let take = |session: &mut Session<'_, _>, kept: &mut Kept, bytes: &[u8]| {
        let (header, body) = bytes.split_first_chunk::<HEADER_SIZE>().unwrap();
        let header = Header::decode(header).unwrap();
        let message = Message { header, kind: Kind::Command, body, fds: Vec::new() };
        session.take(message, kept, &mut Reply::default())
    };
    let greeting = message(1, VERSION, 0, &version("{}"));
    assert!(matches!(take(&mut session, &mut kept, &greeting), Next::Agreed(_)));
    let contents = rig.parts.edge.contents();
    for (command, body) in [
        (REGION_READ, access(REGISTERS, COUNT, 4)),
        (REGION_WRITE, write_body(REGISTERS, 8, &[0; 4])),
    ] {
        kept.keep(REGISTERS, 4, &[7; 4], contents);
        let before = wrote(&rig);
        let next = take(&mut session, &mut kept, &message(2, command, 0, &body));
        assert!(matches!(next, Next::Reply), "{next:?}");
        assert!(kept.is_empty());
        let writes = usize::from(command == REGION_WRITE);
        assert_eq!(wrote(&rig), before + 1 + writes);
        let deeds = rig.device().deeds();
        assert_eq!(deeds[deeds.len() - 1 - writes], Deed::Wrote(4, 0x0707_0707));
    }
}
