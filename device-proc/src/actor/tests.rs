use super::control::clipped;
use super::scripted::{Scripted, parts};
use super::*;
use crate::vfio_user::endpoint::Endpoint;
use rustix::io::Errno;
use standstill_protocol::message::{MAX_TEXT, Phase, Refused, Term};
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

#[tokio::test]
async fn a_reset_out_of_resuming_starts_the_device() {
    let (parts, endpoint) = standalone().await;
    let load = as_client(&endpoint, |client| client.set_state(MigrationState::Resuming)).await;
    assert_eq!(load, Ok(Ok(MigrationState::Resuming)));
    assert!(parts.is_at(Activity::Stopped));
    assert_eq!(as_client(&endpoint, Endpoint::reset).await, Ok(()));
    assert!(parts.is_at(Activity::Full));
}
