//! Windows onto the memory of a process that is gone.

use super::*;

fn identity(file: &impl AsFd) -> FileIdentity {
    FileFacts::of(file).expect("fstat").id
}

#[test]
fn revoking_takes_all_windows_onto_a_file_and_leaves_the_others() {
    let (map, ram, peer) = machine();
    let other = SharedMemory::create("other", PAGE).expect("memory");
    map.map(window(0x40000, PAGE), Some(again(&peer))).expect("a second window");
    map.map(WindowSpec { writable: false, ..window(0x50000, PAGE) }, Some(again(&peer)))
        .expect("one for reading");
    map.map(window(0x60000, PAGE), Some(again(&other))).expect("another peer");
    let mapped = map.shared.changes().mapped;

    assert_eq!(map.revoke(&[identity(&peer)], SHORT), Ok(3));
    let dma = map.dma();
    for iova in [0x20000, 0x40000, 0x50000] {
        let error = dma.access(&[Span::read(iova, 8)]).expect_err("revoked");
        assert_eq!(error, DmaError::Unmapped { iova, len: 8 }, "as where no window is");
    }
    for (iova, class) in
        [(0x10000, WindowClass::Ram), (0x30000, WindowClass::Peer), (0x60000, WindowClass::Peer)]
    {
        assert_eq!(dma.classify(iova, 8), Some(class));
    }
    assert_eq!(map.shared.changes().mapped, mapped - 6 * PAGE);
    assert_eq!(map.revoke(&[identity(&peer)], SHORT), Ok(0), "nothing is left");
    drop(ram);
}

#[test]
fn what_was_declared_ram_stays() {
    let (map, ram, peer) = machine();
    assert_eq!(map.revoke(&[identity(&ram), identity(&peer)], SHORT), Ok(1));
    assert_eq!(map.dma().classify(0x10000, 8), Some(WindowClass::Ram));
}

#[test]
fn a_client_that_maps_the_file_again_has_its_window() {
    let (map, _ram, peer) = machine();
    map.revoke(&[identity(&peer)], SHORT).expect("unused");
    map.map(window(0x20000, PAGE), Some(again(&peer))).expect("mapped again");
    assert_eq!(map.dma().classify(0x20000, 8), Some(WindowClass::Peer));
}

#[test]
fn an_access_in_flight_holds_the_revocation_up() {
    let (map, _ram, peer) = machine();
    let dma = map.dma();
    let access = dma.access(&[Span::write(0x20000, 8)]).expect("access");
    thread::scope(|scope| {
        let revoke = scope.spawn(|| map.revoke(&[identity(&peer)], LONG));
        while dma.classify(0x20000, 8).is_some() {
            thread::yield_now();
        }
        assert!(dma.try_access(&[Span::read(0x20000, 8)]).is_err(), "nobody new gets in");
        access.write(0, 0, &[1; 8]).expect("still mapped");
        assert!(!revoke.is_finished());
        drop(access);
        assert_eq!(revoke.join().expect("no panic"), Ok(1));
    });
    assert_eq!(map.windows(), 2);
}

#[test]
fn what_is_in_use_for_too_long_stays_and_is_named() {
    let (map, _ram, peer) = machine();
    map.map(window(0x40000, PAGE), Some(again(&peer))).expect("a second window");
    let dma = map.dma();
    let access = dma.access(&[Span::write(0x40000, 8)]).expect("access");
    let error = map.revoke(&[identity(&peer)], SHORT).expect_err("in use");
    let expected = RevokeError { iova: 0x40000, windows: 1, accesses: 1, waited: SHORT };
    assert_eq!(error, expected);
    assert_eq!(dma.classify(0x20000, 8), None, "this one was free");
    drop(dma.access(&[Span::read(0x40000, 8)]).expect("usable as before"));
    drop(access);
    assert_eq!(map.revoke(&[identity(&peer)], SHORT), Ok(1));
}

#[test]
fn an_unmapping_that_gives_up_does_not_save_the_window() {
    let (map, _ram, peer) = machine();
    let dma = map.dma();
    let access = dma.access(&[Span::write(0x20000, 8)]).expect("access");
    thread::scope(|scope| {
        let unmap = scope.spawn(|| map.unmap(0x20000, 4 * PAGE, Duration::from_millis(50)));
        while dma.classify(0x20000, 8).is_some() {
            thread::yield_now();
        }
        let revoke = scope.spawn(|| map.revoke(&[identity(&peer)], LONG));
        assert!(unmap.join().expect("no panic").is_err(), "it gives up and opens it again");
        drop(access);
        assert_eq!(revoke.join().expect("no panic"), Ok(1));
    });
    assert_eq!(dma.classify(0x20000, 8), None);
}

proptest! {
    /// What is left after revocations is what a list of windows says.
    #[test]
    fn exactly_the_windows_onto_the_files_go(
        windows in prop::collection::vec((0usize..5, 1u64..4), 1..40),
        ram in 0usize..5,
        revoked in prop::collection::vec(0usize..5, 1..4),
    ) {
        let map = empty();
        let files: Vec<_> = (0..5).map(|_| memfd(4 * PAGE)).collect();
        map.declare_ram(again(&files[ram])).expect("declared");
        let mut at = 0;
        let mut all = Vec::new();
        for (file, pages) in windows {
            map.map(window(at, pages * PAGE), Some(again(&files[file]))).expect("mapped");
            all.push((at, pages * PAGE, file));
            at += pages * PAGE;
        }
        let identities: Vec<_> = revoked.iter().map(|file| identity(&files[*file])).collect();
        let stays = |file: &usize| *file == ram || !revoked.contains(file);
        let gone = all.iter().filter(|(_, _, file)| !stays(file)).count();
        prop_assert_eq!(map.revoke(&identities, SHORT), Ok(gone));
        let mut bytes = 0;
        for (iova, size, file) in &all {
            prop_assert_eq!(map.dma().classify(*iova, *size).is_some(), stays(file));
            bytes += if stays(file) { *size } else { 0 };
        }
        prop_assert_eq!(map.windows(), all.len() - gone);
        prop_assert_eq!(map.shared.changes().mapped, bytes);
    }
}
