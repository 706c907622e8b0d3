//! Who may operate a machine.

use crate::fixture::{Place, two_engines};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

/// Another user than root.
const NOBODY: &str = "65534";

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

/// Runs a copy of the command as another user, where this one is root; else nobody else can be.
fn as_nobody(place: &Place, args: &[&str]) -> Option<Output> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let copy = place.path("standstill");
    std::fs::copy(env!("CARGO_BIN_EXE_standstill"), &copy).unwrap();
    std::fs::set_permissions(place.folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"])
        .arg(copy)
        .args(args)
        .env("STANDSTILL_RUNTIME_DIR", place.runtime())
        .output();
    Some(output.unwrap())
}

#[test]
fn only_the_owner_and_root_may_operate_a_machine() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    let folder = place.runtime().join("vm0");
    let socket = folder.join("operator.sock");
    assert_eq!((mode(&folder), mode(&socket)), (0o700, 0o600));
    let args = ["status", "--socket", socket.to_str().unwrap()];
    let Some(output) = as_nobody(&place, &args) else {
        // This user without the right to enter the folder is as anybody else.
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o000)).unwrap();
        let said = place.expect(1, &args);
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o700)).unwrap();
        assert!(said.contains("Permission denied") && said.contains("and root"), "{said}");
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Permission denied") && said.contains("and root"), "{said}");
    // Where somebody has opened the way by mistake, the credentials count.
    for path in [&place.runtime(), &folder, &socket] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
    }
    let output = as_nobody(&place, &args).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("user 65534 may not operate this machine"), "{said}");
}

#[test]
fn a_place_that_others_may_write_is_refused() {
    let place = Place::new();
    let file = place.write("vm0.toml", &two_engines(""));
    let folder = place.runtime().join("vm0");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o777)).unwrap();
    let said = place.expect(1, &["run", file.to_str().unwrap()]);
    assert!(said.contains("mode 777"), "{said}");
}

#[test]
fn without_a_runtime_directory_it_is_said_what_to_do() {
    let place = Place::new();
    let file = place.write("vm0.toml", &two_engines(""));
    let mut command = place.command(&["run", file.to_str().unwrap()]);
    command.env_remove("STANDSTILL_RUNTIME_DIR").env("XDG_RUNTIME_DIR", place.path("nowhere/xdg"));
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("cannot make directory") && said.contains("nowhere/xdg/standstill"),
        "{said}"
    );
}
