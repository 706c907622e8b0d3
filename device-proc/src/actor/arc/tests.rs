use super::*;
use crate::actor::budget::Overtaken;
use crate::actor::scripted::{Deed, Scripted, parts};

const LONG: Duration = Duration::from_secs(20);

fn budget(left: Duration) -> Budget {
    Budget::new(Instant::now(), left, Arc::default())
}

/// Takes a way, and says how it ended and which hooks were called meanwhile.
async fn go(
    parts: &Arc<Parts<Scripted>>,
    from: Activity,
    to: Activity,
    left: Duration,
) -> (Result<(), ArcFailure>, Vec<&'static str>) {
    parts.device.calls.lock().unwrap().clear();
    let outcome = change_activity(Arc::clone(parts), from, to, false, budget(left)).await;
    let calls = parts.device.calls.lock().unwrap().clone();
    (outcome.result, calls)
}

use Activity::{Full, NoPeer, Stopped};

#[tokio::test]
async fn each_step_calls_its_hook_and_sets_what_is_open() {
    let parts = parts(&[]);
    for (from, to, hook) in [
        (Full, NoPeer, "prepare_stop"),
        (NoPeer, Stopped, "stop"),
        (Stopped, NoPeer, "prepare_start"),
        (NoPeer, Full, "start"),
    ] {
        assert_eq!(go(&parts, from, to, LONG).await, (Ok(()), vec![hook]));
        assert!(parts.is_at(to), "{to}: {parts:?}");
        assert_eq!(parts.interrupts.is_frozen(), to == Stopped);
    }
}

#[tokio::test]
async fn a_longer_way_is_its_steps() {
    let parts = parts(&[]);
    let down = go(&parts, Full, Stopped, LONG).await;
    assert_eq!(down, (Ok(()), vec!["prepare_stop", "stop"]));
    assert!(parts.is_at(Stopped));
    let up = go(&parts, Stopped, Full, LONG).await;
    assert_eq!(up, (Ok(()), vec!["prepare_start", "start"]));
    assert!(parts.is_at(Full));
}

#[tokio::test]
async fn a_hook_that_fails_leaves_the_device_where_it_was() {
    for (from, to, hook) in [
        (Full, NoPeer, "prepare_stop"),
        (NoPeer, Stopped, "stop"),
        (Stopped, NoPeer, "prepare_start"),
        (NoPeer, Full, "start"),
    ] {
        let parts = parts(&[]);
        go(&parts, Full, from, LONG).await.0.unwrap();
        parts.device.deeds.lock().unwrap().push((hook, Deed::Fails));
        let (result, calls) = go(&parts, from, to, LONG).await;
        let failure = result.unwrap_err();
        assert!(failure.restored);
        assert_eq!(failure.refusal, device_refusal(format!("{hook}: no")));
        assert_eq!(calls, [hook]);
        assert!(parts.is_at(from), "{from}: {parts:?}");
        assert_eq!(parts.interrupts.is_frozen(), from == Stopped);
    }
}

#[tokio::test]
async fn a_hook_that_hangs_is_cut_off_and_undone_by_its_opposite() {
    for (from, to, hook, opposite) in [
        (Full, NoPeer, "prepare_stop", "start"),
        (NoPeer, Stopped, "stop", "prepare_start"),
        (Stopped, NoPeer, "prepare_start", "stop"),
        (NoPeer, Full, "start", "prepare_stop"),
    ] {
        let parts = parts(&[]);
        go(&parts, Full, from, LONG).await.0.unwrap();
        parts.device.deeds.lock().unwrap().push((hook, Deed::Hangs));
        let (result, calls) = go(&parts, from, to, Duration::from_millis(5)).await;
        let failure = result.unwrap_err();
        assert!(failure.restored);
        assert_eq!(failure.refusal.kind, RefusalKind::Device);
        let expected = format!("{hook} did not end within");
        assert!(failure.refusal.text.starts_with(&expected), "{}", failure.refusal.text);
        assert_eq!(calls, [hook, opposite]);
        assert!(parts.is_at(from), "{from}: {parts:?}");
    }
}

#[tokio::test]
async fn what_fails_on_a_longer_way_undoes_the_steps_before() {
    let parts = parts(&[("stop", Deed::Fails)]);
    let (result, calls) = go(&parts, Full, Stopped, LONG).await;
    assert!(result.unwrap_err().restored);
    assert_eq!(calls, ["prepare_stop", "stop", "start"]);
    assert!(parts.is_at(Full));
}

#[tokio::test]
async fn where_undoing_fails_everything_is_closed() {
    let parts = parts(&[("stop", Deed::Fails), ("start", Deed::Fails)]);
    let (result, _) = go(&parts, Full, Stopped, LONG).await;
    assert!(!result.unwrap_err().restored);
    assert!(parts.is_at(Stopped));
    assert!(parts.interrupts.is_frozen());
}

#[tokio::test]
async fn dma_in_flight_that_does_not_end_is_counted_and_undone() {
    let parts = parts(&[]);
    let peer = parts.gate.peer().try_enter().unwrap();
    let (result, calls) = go(&parts, Full, NoPeer, Duration::from_millis(5)).await;
    let failure = result.unwrap_err();
    assert_eq!((failure.restored, failure.refusal.kind), (true, RefusalKind::Drain));
    let text = failure.refusal.text;
    assert!(text.starts_with("peer DMA: 1 accesses still in flight"), "{text}");
    assert_eq!(calls, ["prepare_stop", "start"]);
    assert!(parts.is_at(Full));
    drop(peer);

    go(&parts, Full, NoPeer, LONG).await.0.unwrap();
    let ram = parts.gate.ram().try_enter().unwrap();
    let (result, calls) = go(&parts, NoPeer, Stopped, Duration::from_millis(5)).await;
    assert_eq!(result.unwrap_err().refusal.kind, RefusalKind::Drain);
    assert_eq!(calls, ["stop", "prepare_start"]);
    assert!(parts.is_at(NoPeer));
    drop(ram);
}

#[tokio::test]
async fn a_stop_waits_for_register_accesses() {
    let parts = parts(&[]);
    go(&parts, Full, NoPeer, LONG).await.0.unwrap();
    let access = parts.accesses.try_enter().unwrap();
    let (result, calls) = go(&parts, NoPeer, Stopped, Duration::from_millis(5)).await;
    let text = result.unwrap_err().refusal.text;
    assert!(text.starts_with("1 register accesses still in flight"), "{text}");
    assert!(calls.is_empty(), "the hook comes after the accesses: {calls:?}");
    assert!(parts.is_at(NoPeer));
    let (stopped, ()) = tokio::join!(go(&parts, NoPeer, Stopped, LONG), async { drop(access) });
    stopped.0.unwrap();
    assert!(parts.is_at(Stopped));
}

#[tokio::test]
async fn an_arc_that_is_overtaken_is_given_up() {
    let parts = parts(&[("prepare_stop", Deed::Hangs)]);
    let overtaken: Arc<Overtaken> = Arc::default();
    let budget = Budget::new(Instant::now(), LONG, Arc::clone(&overtaken));
    let (outcome, ()) =
        tokio::join!(change_activity(Arc::clone(&parts), Full, NoPeer, false, budget), async {
            overtaken.fire();
        });
    assert!(outcome.result.unwrap_err().restored);
    assert!(parts.is_at(Full));
}

#[tokio::test]
async fn a_reset_keeps_what_is_open_and_calls_no_hook() {
    for at in [Full, NoPeer, Stopped] {
        let parts = parts(&[]);
        go(&parts, Full, at, LONG).await.0.unwrap();
        parts.device.calls.lock().unwrap().clear();
        let (result, _) = reset(Arc::clone(&parts), at, at, false, budget(LONG)).await;
        assert_eq!(result, Ok(()));
        assert_eq!(*parts.device.calls.lock().unwrap(), ["reset"]);
        assert!(parts.is_at(at), "{at}: {parts:?}");
    }
}

#[tokio::test]
async fn a_reset_can_start_a_device() {
    let parts = parts(&[]);
    go(&parts, Full, Stopped, LONG).await.0.unwrap();
    parts.device.calls.lock().unwrap().clear();
    let (result, _) = reset(Arc::clone(&parts), Stopped, Full, false, budget(LONG)).await;
    assert_eq!(result, Ok(()));
    assert_eq!(*parts.device.calls.lock().unwrap(), ["reset", "prepare_start", "start"]);
    assert!(parts.is_at(Full) && !parts.interrupts.is_frozen());
}

#[tokio::test]
async fn a_reset_that_fails_leaves_everything_closed() {
    let parts = parts(&[("reset", Deed::Fails)]);
    let (result, _) = reset(Arc::clone(&parts), Full, Full, false, budget(LONG)).await;
    assert_eq!(result.unwrap_err().text, "reset: no");
    assert!(parts.is_at(Stopped) && parts.interrupts.is_frozen());
}

#[tokio::test]
async fn an_interrupt_that_is_raised_for_ever_has_the_stop_refused_and_nothing_else() {
    let parts = parts(&[]);
    go(&parts, Full, NoPeer, LONG).await.0.unwrap();
    let interrupts = parts.interrupts.clone();
    let raised = interrupts.raising().try_enter().unwrap();
    let (result, calls) = go(&parts, NoPeer, Stopped, Duration::from_millis(5)).await;
    let failure = result.unwrap_err();
    assert!(failure.restored);
    assert_eq!(failure.refusal.kind, RefusalKind::Drain);
    let expected = "an interrupt is still being raised after";
    assert!(failure.refusal.text.starts_with(expected), "{}", failure.refusal.text);
    assert_eq!(calls, ["stop", "prepare_start"]);
    assert!(parts.is_at(NoPeer) && !parts.interrupts.is_frozen());
    // Where undoing fails too, nothing is waited for.
    parts.device.deeds.lock().unwrap().push(("prepare_start", Deed::Fails));
    let (result, _) = go(&parts, NoPeer, Stopped, Duration::from_millis(5)).await;
    assert!(!result.unwrap_err().restored);
    assert!(parts.is_at(Stopped) && parts.interrupts.is_frozen());
    drop(raised);
}
