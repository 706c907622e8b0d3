//! A device's state from process to process in band: by a VMM that speaks vfio-user with both.

use crate::child::Device;
use crate::probe::{MEMORY_SIZE, NUMBER};
use crate::state::Memory;
use standstill_protocol::migration::MigrationState as S;
use standstill_vfio_user::client::{Client, ClientError};
use standstill_vfio_user::wire::Errno;
use std::io::Write;
use std::time::Duration;

/// Longer than any stream here.
const LIMIT: u64 = 4 << 30;
/// For what takes as long as a gibibyte does.
const LONG: Duration = Duration::from_secs(120);

fn connect(device: &Device) -> Client {
    Client::builder().timeout(LONG).connect(device.socket()).unwrap()
}

fn number(client: &Client) -> Result<u32, ClientError> {
    let mut bytes = [0; 4];
    client.region_read(0, NUMBER, &mut bytes).map(|()| u32::from_le_bytes(bytes))
}

fn set_number(client: &Client, number: u32) {
    client.region_write(0, NUMBER, &number.to_le_bytes()).unwrap();
}

/// What there is of the state of a device that runs, and at least that many bytes: a read may be short
/// while the device is still looked through.
fn read(client: &Client, least: u64, to: &mut impl Write) -> u64 {
    let mut done = 0;
    while done < least {
        done += client.read_state(to, LIMIT).unwrap();
    }
    done
}

/// What is left of the state, and the device stands.
fn save(client: &Client) -> Vec<u8> {
    client.set_migration_state(S::StopCopy).unwrap();
    let mut state = Vec::new();
    client.read_state(&mut state, LIMIT).unwrap();
    state
}

/// Makes a device that runs load a state; where it is then if that was refused.
fn load(client: &Client, state: &[u8]) -> Result<(), S> {
    client.set_migration_state(S::Resuming).unwrap();
    // That it is bad may be found before its end.
    let _ = client.write_state(&mut &*state);
    let loaded = client.set_migration_state(S::Stop);
    loaded.map_err(|error| {
        let errno = error.source.errno();
        assert!(matches!(errno, Some(Errno::EINVAL | Errno::EIO)), "{error:?}");
        error.now.unwrap()
    })
}

#[test]
fn a_device_that_runs_goes_to_another_process_in_passes() {
    const SIZE: u64 = 8 << 20;
    let (from, to) = (Memory::new(SIZE), Memory::new(SIZE));
    let source = Device::welcomed(&format!("pre-copy {}", from.word()));
    let client = connect(&source);
    set_number(&client, 5);
    from.write(0, &[1; 100]);
    client.set_migration_state(S::PreCopy).unwrap();
    let mut state = Vec::new();
    read(&client, SIZE, &mut state);
    // The device runs on, and its memory is written through a mapping.
    set_number(&client, 6);
    from.write(3 << 16, &[2; 100]);
    let second = read(&client, 1 << 16, &mut state);
    assert!(second < 70_000, "{second} bytes");
    from.write(SIZE - 100, &[3; 100]);
    state.extend(save(&client));

    let target = Device::welcomed(&format!("pre-copy {}", to.word()));
    let client = connect(&target);
    assert_eq!(load(&client, &state), Ok(()));
    client.set_migration_state(S::Running).unwrap();
    assert_eq!(number(&client).unwrap(), 6);
    for (at, byte) in [(0, 1), (3 << 16, 2), (SIZE - 100, 3)] {
        assert_eq!(to.read(at, 100), vec![byte; 100], "at {at:#x}");
    }
}

#[test]
fn a_bad_state_is_refused_by_the_other_process_and_the_first_one_goes_on() {
    let source = Device::welcomed("");
    let from = connect(&source);
    set_number(&from, 7);
    from.region_write(2, MEMORY_SIZE - 4, &[1, 2, 3, 4]).unwrap();
    let state = save(&from);
    let changed = |at: usize, by: u8| {
        let mut state = state.clone();
        state[at] = state[at].wrapping_add(by);
        state
    };
    let target = Device::welcomed("");
    let to = connect(&target);
    for (what, bad) in [
        ("nothing", vec![]),
        ("its half", state[..state.len() / 2].to_vec()),
        ("all but its last byte", state[..state.len() - 1].to_vec()),
        ("something behind its end", [&state[..], &[0]].concat()),
        ("a damaged one", changed(state.len() / 2, 1)),
        ("one of a later major version", changed(8, 1)),
    ] {
        assert_eq!(load(&to, &bad), Err(S::Error), "{what}");
        // Out of it leads a reset, and the device is as it was at first.
        to.reset().unwrap();
        assert_eq!(to.migration_state().unwrap(), S::Running);
        assert_eq!(number(&to).unwrap(), 0, "{what}");
    }
    for script in ["kind:camera", "pci:2", "version:2"] {
        let other = Device::welcomed(script);
        assert_eq!(load(&connect(&other), &state), Err(S::Error), "{script}");
    }
    assert_eq!(load(&to, &state), Ok(()));
    to.set_migration_state(S::Running).unwrap();
    assert_eq!(number(&to).unwrap(), 7);
    // Nobody has lost it meanwhile.
    from.set_migration_state(S::Running).unwrap();
    assert_eq!(number(&from).unwrap(), 7);
    set_number(&from, 8);
    assert_eq!(number(&from).unwrap(), 8);
}

#[test]
fn a_gibibyte_of_memory_goes_from_a_device_that_runs_to_another() {
    let (from, to) = (Memory::new(1 << 30), Memory::new(1 << 30));
    let source = Device::welcomed(&format!("pre-copy {}", from.word()));
    let target = Device::welcomed(&format!("pre-copy {}", to.word()));
    let pattern = |at: u64| [at.to_le_bytes(), (!at).to_le_bytes()].concat();
    let places: Vec<u64> = (0..256).map(|n| n * (4 << 20) + n * 8).collect();
    for at in &places {
        from.write(*at, &pattern(*at));
    }
    let (read_from, write_to) = std::io::pipe().unwrap();
    let (out, into) = (connect(&source), connect(&target));
    into.set_migration_state(S::Resuming).unwrap();
    std::thread::scope(|scope| {
        let into = &into;
        // It ends with the pipe.
        let loading = scope.spawn(move || into.write_state(&mut { read_from }).unwrap());
        let mut write_to = write_to;
        out.set_migration_state(S::PreCopy).unwrap();
        let first = read(&out, 1 << 30, &mut write_to);
        from.write(5 << 20, b"written while it runs");
        out.set_migration_state(S::StopCopy).unwrap();
        let rest = out.read_state(&mut write_to, LIMIT).unwrap();
        assert!(rest < 1 << 20, "{rest} bytes");
        drop(write_to);
        assert_eq!(loading.join().unwrap(), first + rest);
    });
    into.set_migration_state(S::Running).unwrap();
    for at in places {
        assert_eq!(to.read(at, 16), pattern(at), "at {at:#x}");
    }
    assert_eq!(to.read(5 << 20, 21), b"written while it runs");
}
