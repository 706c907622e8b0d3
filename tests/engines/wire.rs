//! A bad wire between an engine and its client: at worst the client loses its connection.

use crate::machine::{Guest, LONG};
use standstill::coordinator::Outcome;
use standstill::device_proc::devices::copy_engine::registers::*;
use standstill::vfio_user::client::Client;
use standstill_testkit::outside::data::{DataAction, DataFault, DataRelay, Framing, Way};
use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long an answer may take that was cut off in the middle.
const CUT_OFF: Duration = Duration::from_secs(2);

/// Connects, looks at the registers and reads the ID; why that was not possible. No answer may take
/// longer than that.
fn id(socket: &Path, timeout: Duration) -> Result<u32, String> {
    let read = || -> Result<u32, Box<dyn Error>> {
        let client = Client::builder().timeout(timeout).connect(socket)?;
        client.device_info()?;
        client.region_info(REGISTER_BAR)?;
        let mut bytes = [0; 4];
        client.region_read(REGISTER_BAR, ID, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    };
    read().map_err(|error| format!("{error:?}"))
}

/// A client that comes a moment later, as soon as the engine has seen that the one before is gone.
fn until_served(socket: &Path) {
    let end = Instant::now() + LONG;
    while id(socket, CUT_OFF) != Ok(ID_VALUE) {
        assert!(Instant::now() < end, "the engine serves nobody any more");
    }
}

#[tokio::test]
async fn whatever_comes_over_the_wire_an_engine_lives_takes_part_and_serves_the_next_client() {
    use DataAction::{CorruptAt, CutAt, DelayMs, Merge, Split};
    let guest = Guest::new("wire");
    let machine = guest.description.builder().start().await.unwrap();
    machine.declare_ram(&guest.ram).await.unwrap();
    let pid = crate::machine::pid(&machine, 1).await;
    let socket = guest.description.socket(1);
    // The first message of the client is the version, the third one asks for a region.
    let both = [Way::ToDevice, Way::ToClient];
    let faults = both.into_iter().flat_map(|way| {
        let cut = [CutAt(0), CutAt(7), CutAt(20)];
        // The number, the command, the size, the flags, and what follows the header.
        let corrupt = [0, 2, 4, 7, 8, 16, 20].map(CorruptAt);
        let late = [DelayMs(50), Split, Merge];
        let actions = cut.into_iter().chain(corrupt).chain(late);
        [1, 3].into_iter().flat_map(move |message| {
            let fault = move |action| DataFault { way, message, action };
            actions.clone().map(fault)
        })
    });
    for fault in faults {
        let relay =
            DataRelay::start(&guest.description.folder.join("relay"), &socket, Framing::VfioUser);
        let relay = relay.unwrap();
        let armed = relay.arm(fault);
        let read = id(relay.path(), CUT_OFF);
        if matches!(fault.action, DelayMs(_)) {
            assert_eq!(read, Ok(ID_VALUE), "{fault:?}");
        }
        let fired: Vec<_> = relay.fired().iter().map(|fired| fired.index).collect();
        assert_eq!(fired, [armed], "{fault:?}: {read:?}");
        drop(relay);
        until_served(&socket);
        let stopped = machine.pause().await.unwrap();
        assert_eq!(stopped.report().outcome, Outcome::Done, "{fault:?}: {}", stopped.report());
        stopped.resume().await.unwrap();
        assert_eq!(crate::machine::pid(&machine, 1).await, pid, "{fault:?}: it was restarted");
    }
    machine.shutdown().await.unwrap();
}

#[tokio::test]
async fn engines_work_and_stop_behind_relays_as_without_them() {
    let mut guest = Guest::new("relayed");
    let machine = guest.description.builder().start().await.unwrap();
    machine.declare_ram(&guest.ram).await.unwrap();
    let relays = [0, 1, 2].map(|number| {
        let listen = guest.description.folder.join(format!("relay{number}"));
        DataRelay::start(&listen, &guest.description.socket(number), Framing::VfioUser).unwrap()
    });
    let slow = DataFault { way: Way::ToDevice, message: 0, action: DataAction::DelayMs(1) };
    let slow = relays[1].arm(slow);
    guest.connect_at(|number| relays[number].path().to_owned());
    for number in 0..3 {
        guest.start(number);
    }
    guest.assert_writing(&[0, 1, 2]).await;
    let stopped = machine.pause().await.unwrap();
    let sight = guest.sight();
    assert_eq!(guest.sight(), sight);
    stopped.resume().await.unwrap();
    guest.assert_writing(&[0, 1, 2]).await;
    assert!(relays[1].fired().iter().all(|fired| fired.index == slow));
    assert!(!relays[1].fired().is_empty());
    machine.shutdown().await.unwrap();
}
