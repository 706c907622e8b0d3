use super::control::clipped;
use super::scripted::{Scripted, parts};
use super::*;
use crate::vfio_user::endpoint::Endpoint;
use rustix::io::Errno;
use standstill_protocol::message::{DeviceMessage, MAX_TEXT, Phase, Refused, Term};
use std::marker::PhantomData;

#[test]
fn long_texts_are_cut_between_characters() {
    let refused = Refused {
        term: Term(1),
        epoch: Epoch(1),
        phase: Phase::Stop,
        state: MigrationState::Running,
        refusal: Refusal { kind: RefusalKind::Device, text: format!("x{}", "ä".repeat(MAX_TEXT)) },
    };
    let DeviceMessage::Refused(cut) = clipped(DeviceMessage::Refused(refused)) else {
        panic!("another message");
    };
    assert_eq!(cut.refusal.text.len(), MAX_TEXT - 1);
    assert!(cut.refusal.text.ends_with('ä'));
}

/// An actor without a coordinator, and what its client uses.
async fn standalone() -> (Arc<Parts<Scripted>>, Arc<Endpoint<Scripted>>) {
    let parts = parts(&[]);
    let (ended, _outcome) = oneshot::channel();
    let arguments = Arguments {
        parts: Arc::clone(&parts),
        migration: MigrationFlags::STOP_COPY_P2P,
        control: None,
        ended,
    };
    let (actor, _gone) = Actor::spawn(None, DeviceActor(PhantomData), arguments).await.unwrap();
    let endpoint = Arc::new(Endpoint::new(Arc::clone(&parts), actor));
    (parts, endpoint)
}

/// The client's calls block, as they do on the transport's thread.
async fn as_client<T: Send + 'static>(
    endpoint: &Arc<Endpoint<Scripted>>,
    call: impl FnOnce(&Endpoint<Scripted>) -> T + Send + 'static,
) -> T {
    let endpoint = Arc::clone(endpoint);
    tokio::task::spawn_blocking(move || call(&endpoint)).await.unwrap()
}

#[tokio::test]
async fn a_client_can_stop_and_start_its_device_in_band() {
    let (parts, endpoint) = standalone().await;
    let stop = as_client(&endpoint, |client| client.set_state(MigrationState::Stop)).await;
    assert_eq!(stop, Ok(Ok(MigrationState::Stop)));
    assert!(parts.is_at(Activity::Stopped));
    assert_eq!(as_client(&endpoint, Endpoint::reset).await, Err(Errno::INVAL), "stopped");

    let run = as_client(&endpoint, |client| client.set_state(MigrationState::Running)).await;
    assert_eq!(run, Ok(Ok(MigrationState::Running)));
    assert!(parts.is_at(Activity::Full));
    let hooks = ["prepare_stop", "stop", "prepare_start", "start"];
    assert_eq!(*parts.device.calls.lock().unwrap(), hooks);
    assert_eq!(as_client(&endpoint, Endpoint::reset).await, Ok(()));
}

/// Stops the device in band, reads its state, and starts it again.
async fn read_all(endpoint: &Arc<Endpoint<Scripted>>) -> Vec<u8> {
    as_client(endpoint, |client| {
        assert_eq!(client.set_state(MigrationState::StopCopy), Ok(Ok(MigrationState::StopCopy)));
        assert_eq!(client.state(), Ok(MigrationState::StopCopy));
        assert_eq!(client.migration_size().stop_copy, 5);
        let mut state = Vec::new();
        let length = loop {
            let begin = state.len();
            state.resize(begin + 4096, 0);
            match client.migration_read(&mut state[begin..]).unwrap() {
                4096 => {}
                length => break begin + length,
            }
        };
        state.truncate(length);
        assert_eq!(client.set_state(MigrationState::Running), Ok(Ok(MigrationState::Running)));
        assert_eq!(client.migration_read(&mut [0]), Err(Errno::INVAL), "it has ended");
        state
    })
    .await
}

#[tokio::test]
async fn a_client_saves_and_loads_its_device_in_band() {
    let (parts, endpoint) = standalone().await;
    assert_eq!(endpoint.migration_flags(), MigrationFlags::STOP_COPY_P2P);
    *parts.device.contents.lock().unwrap() = b"state".to_vec();
    let state = read_all(&endpoint).await;
    *parts.device.contents.lock().unwrap() = b"other".to_vec();
    let loaded = as_client(&endpoint, move |client| {
        client.set_state(MigrationState::Resuming).unwrap().unwrap();
        for piece in state.chunks(100) {
            client.migration_write(piece).unwrap();
        }
        client.set_state(MigrationState::Running)
    });
    assert_eq!(loaded.await, Ok(Ok(MigrationState::Running)));
    assert_eq!(*parts.device.contents.lock().unwrap(), b"state");
    assert!(parts.is_at(Activity::Full));
}

#[tokio::test]
async fn a_bad_state_leads_to_error_at_the_commit_and_a_reset_out_of_it() {
    let (parts, endpoint) = standalone().await;
    *parts.device.contents.lock().unwrap() = b"state".to_vec();
    let mut state = read_all(&endpoint).await;
    let end = state.len() - 1;
    for (bad, text) in [
        (state[..end].to_vec(), "the state stream ends too early"),
        (Vec::new(), "the state stream ends too early"),
        (
            {
                state[end] ^= 1;
                state
            },
            "damaged: end at 0x0",
        ),
    ] {
        let refused = as_client(&endpoint, move |client| {
            client.set_state(MigrationState::Resuming).unwrap().unwrap();
            client.migration_write(&bad).unwrap();
            let refused = client.set_state(MigrationState::Stop).unwrap().unwrap_err();
            assert_eq!(client.state(), Ok(MigrationState::Error));
            let unusable = client.set_state(MigrationState::Running).unwrap().unwrap_err();
            assert_eq!(unusable.kind, RefusalKind::NoWay);
            assert_eq!(client.reset(), Ok(()));
            assert_eq!(client.state(), Ok(MigrationState::Running));
            refused
        });
        let refused = refused.await;
        assert_eq!(refused.kind, RefusalKind::Stream);
        assert!(refused.text.starts_with(text), "{}", refused.text);
        assert!(parts.is_at(Activity::Full));
    }
}

#[tokio::test]
async fn a_reset_out_of_resuming_starts_the_device() {
    let (parts, endpoint) = standalone().await;
    let load = as_client(&endpoint, |client| client.set_state(MigrationState::Resuming)).await;
    assert_eq!(load, Ok(Ok(MigrationState::Resuming)));
    assert!(parts.is_at(Activity::Stopped));
    assert_eq!(as_client(&endpoint, Endpoint::reset).await, Ok(()));
    assert!(parts.is_at(Activity::Full));
}
