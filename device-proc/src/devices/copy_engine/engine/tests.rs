use super::*;
use crate::gate::{Gate, Scope};
use crate::interrupt::Interrupts;
use crate::memory::MemoryMap;
use std::sync::mpsc;
use std::time::Duration;

#[tokio::test]
async fn with_the_gate_closed_an_error_waits_before_it_changes_the_state() {
    const LONG: Duration = Duration::from_secs(20);
    let gate = Arc::new(Gate::new());
    let dma = MemoryMap::new(Arc::clone(&gate)).dma();
    let shared = Shared::new(Handles { dma, interrupts: Interrupts::new() }, 1);
    shared.lock().state.run = true;
    gate.close(Scope::All, LONG).await.expect("nothing in flight");
    let (halted, has_halted) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let job = Job { generation: 0, iova: 0, first: true };
            halt(&shared, job, BadDescriptor::Length(0).into());
            halted.send(()).expect("the test waits");
        });
        assert!(has_halted.recv_timeout(Duration::from_millis(20)).is_err());
        assert!(shared.lock().state.run);
        gate.open(Scope::All);
        assert_eq!(has_halted.recv_timeout(LONG), Ok(()));
    });
    let current = shared.lock();
    assert!(!current.state.run);
    assert_eq!(current.state.error, ErrorCode::Descriptor as u8);
}
