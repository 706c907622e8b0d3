//! A stop with a lease: what only the control side can answer waits for the start, with all that is
//! behind it.

use super::client::{Client, access, message};
use super::edge::{LEASE, NO_LEASE, nothing_comes, until};
use crate::fields;
use crate::vfio_user::rig::{COUNT, Deed, REGISTERS, Rig, SLOW};
use standstill_protocol::message::{DeviceMessage, Phase};
use standstill_protocol::migration::MigrationState as S;
use std::time::Duration;

const REGION_READ: u16 = 9;
const RESET: u16 = 13;
const FEATURE: u16 = 16;

/// Stops the device while the transport is in an access, so that it finds in its socket what was sent
/// behind that.
fn stop_in_an_access(rig: &Rig, client: &mut Client, lease: Duration, send: impl Fn(&mut Client)) {
    rig.device().hold();
    client.send(&message(1, REGION_READ, 0, &access(REGISTERS, SLOW, 4)), &[]);
    rig.device().until_held();
    send(client);
    rig.command(2, Phase::PrepareStop, S::RunningP2p, NO_LEASE);
    assert!(matches!(rig.answer(), DeviceMessage::Reached(_)));
    rig.command(2, Phase::Stop, S::Stop, lease);
    until("the stop has come", || rig.parts.edge.is_held());
    rig.device().let_through();
    let answer = rig.answer();
    assert!(matches!(answer, DeviceMessage::Reached(_)), "{answer:?}");
    assert_eq!(client.receive().id, 1);
}

fn position(rig: &Rig, which: Deed) -> usize {
    rig.device().deeds().iter().position(|deed| *deed == which).unwrap()
}

#[test]
fn a_reset_that_the_stop_finds_takes_effect_after_the_start() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    stop_in_an_access(&rig, &mut client, LEASE, |client| {
        client.send(&message(2, RESET, 0, &[]), &[]);
        client.post_write(REGISTERS, 0, 5);
        client.send(&message(3, REGION_READ, 0, &access(REGISTERS, COUNT, 4)), &[]);
    });
    assert!(nothing_comes(&client));
    assert_eq!(rig.device().deeds(), [Deed::Stopped]);
    rig.start(3);
    let answers = [client.receive(), client.receive()];
    assert_eq!(answers.each_ref().map(|answer| (answer.id, answer.error)), [(2, 0), (3, 0)]);
    assert_eq!(answers[1].body[16..], 1_u32.to_ne_bytes());
    assert!(position(&rig, Deed::Stopped) < position(&rig, Deed::Reset));
    assert!(position(&rig, Deed::Reset) < position(&rig, Deed::Wrote(0, 5)));
    drop(client);
}

#[test]
fn so_does_a_migration_state_and_one_whose_client_has_gone_counts() {
    for stays in [true, false] {
        let rig = Rig::new();
        let mut client = Client::greeted(rig.connect());
        let body = fields!(16_u32, 2_u32 | 1 << 17, S::Stop.value(), u32::MAX);
        stop_in_an_access(&rig, &mut client, LEASE, |client| {
            client.send(&message(2, FEATURE, 0, &body), &[]);
        });
        assert!(nothing_comes(&client));
        let mut client = Some(client).filter(|_| stays);
        rig.start(3);
        if let Some(client) = &mut client {
            assert_eq!(client.receive().result().as_deref(), Ok(&*body));
        }
        drop(client);
        let mut client = Client::greeted(rig.connect());
        let state = client.call(FEATURE, &fields!(16_u32, 2_u32 | 1 << 16)).unwrap();
        assert_eq!(state[8..12], S::Stop.value().to_ne_bytes());
        drop(client);
    }
}

#[test]
fn a_lease_that_comes_again_and_again_puts_it_off_and_one_that_goes_lets_it_through() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    stop_in_an_access(&rig, &mut client, LEASE, |client| {
        client.send(&message(2, RESET, 0, &[]), &[]);
    });
    rig.stop_again(3);
    assert_eq!(client.receive().result(), Err(22), "the device is stopped, and without a lease");
    rig.start(4);
    for epoch in 3..20 {
        client.send(&message(3, RESET, 0, &[]), &[]);
        rig.stop(2 * epoch, LEASE);
        rig.start(2 * epoch + 1);
        assert_eq!(client.receive().result(), Ok(vec![]), "before the stop or after the start");
    }
    drop(client);
}
