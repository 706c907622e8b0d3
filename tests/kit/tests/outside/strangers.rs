//! A test program that has none of the kit's programs beside it: that of another package.

use std::process::Command;

/// This test program, copied to where no programs are, runs these tests of its own: scripted devices,
/// relays and pilots are the copy itself.
#[test]
fn a_test_of_another_package_is_the_programs_that_it_needs() {
    let folder = tempfile::tempdir().unwrap();
    let deps = folder.path().join("deps");
    std::fs::create_dir(&deps).unwrap();
    let copy = deps.join("stranger");
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    let tests = [
        "relays::what_a_device_has_said_before_it_is_killed_counts",
        "relays::what_has_fired_does_not_fire_again_in_the_next_incarnation",
        "coordinators::a_coordinator_that_hangs_for_a_while_goes_on_as_if_nothing_had_been",
    ];
    let output = Command::new(copy).arg("--exact").args(tests).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("3 passed"), "{text}");
}
