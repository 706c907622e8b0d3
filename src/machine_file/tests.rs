use super::device::{COPY_ENGINE_KEYS, DEVICE_KEYS, DISK_KEYS, Program, RESTART_KEYS};
use super::hook::HOOK_KEYS;
use super::*;
use proptest::prelude::*;

fn places() -> Places {
    Places { file: "/etc/standstill".into(), runtime: "/run/standstill".into() }
}

/// What is wrong with a text, as a person sees it.
fn problems(text: &str) -> (usize, String) {
    let mut problems = Problems::new("vm.toml", text);
    let _ = MachineFile::read(text, &places(), &mut problems);
    (problems.len(), problems.render(false))
}

fn read(text: &str) -> MachineFile {
    let mut problems = Problems::new("vm.toml", text);
    let file = MachineFile::read(text, &places(), &mut problems);
    assert!(problems.is_empty(), "{}", problems.render(false));
    file
}

/// A machine with one more device of those lines.
fn with_device(lines: &str) -> String {
    format!("name = \"vm0\"\n[[device]]\nname = \"d\"\n{lines}\n")
}

const EVERYTHING: &str = r#"
name = "vm0"
heartbeat = "2s"
orphan = "exit"
qmp = "qmp.sock"
on-failure = "stay-stopped"
on-loss = "restart"
presence = "optional"
restart = { budget = 3, window = "30s", first-backoff = "1ms", longest-backoff = "2s" }

[deadlines]
hello = "1s"
first-phase = "2s"
second-phase = "3s"
undo = "4s"
fence = "5s"
memory = "6s"
stall = "0s"
silence = "8s"
qmp = "7s"

[[device]]
name = "engine0"
kind = "copy-engine"
socket = "engine0.sock"
memory = "64KiB"
slow-prepare = "1ms"
slow-stop = "2ms"
first-phase = "100ms"
second-phase = "200ms"

[[device]]
name = "nic0"
program = "bin/nic"
args = ["--socket={socket}", "--fast"]
env = { RUST_LOG = "info" }
socket = "/run/vm0/nic0.sock"
on-loss = "fail"
presence = "required"
one-phase = "allow"
client = "qemu"

[[ram]]
path = "/dev/shm/vm0"

[[hook]]
name = "vcpus"
stop = ["virsh", "suspend", "vm0"]
start = ["./resume"]
slot = "before"
start-slot = "after"
rank = -2
start-rank = 7
deadline = "9s"
"#;

#[test]
fn everything_that_can_be_said_arrives() {
    let file = read(EVERYTHING);
    assert_eq!((file.name.as_str(), file.orphan), ("vm0", Orphan::Exit));
    assert_eq!(file.deadlines.stall, Duration::ZERO);
    assert_eq!(file.deadlines.silence, Duration::from_secs(8));
    assert_eq!(file.ram[0].value, Path::new("/dev/shm/vm0"));
    let text = format!("{:?}", file.builder(&file.devices, Path::new("/c")).unwrap());
    for part in [
        "name: \"vm0\"",
        "--socket=/run/standstill/vm0/engine0.sock",
        "--memory=65536",
        "--slow-prepare=1ms",
        "--slow-stop=2ms",
        "first_phase: Some(100ms)",
        "second_phase: Some(200ms)",
        "/etc/standstill/bin/nic",
        "--socket=/run/vm0/nic0.sock",
        "\"--fast\"",
        "(\"RUST_LOG\", Some(\"info\"))",
        "(\"NOTIFY_SOCKET\", None)",
        "on_loss: Some(Fail)",
        "presence: Some(Required)",
        "one_phase_allowed: true",
        "QEMU's vfio-user client",
        "name: \"vcpus\", stop: Before, start: After, stop_rank: -2, start_rank: 7, deadline: 9s",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let qmp = file.qmp.as_ref().unwrap();
    assert_eq!(qmp.path.value, Path::new("/run/standstill/vm0/qmp.sock"));
    assert_eq!(qmp.deadline, Duration::from_secs(7));
    let hook = &file.hooks[0];
    assert_eq!(hook.stop.as_ref().unwrap().program.value, Path::new("virsh"));
    assert_eq!(hook.start.as_ref().unwrap().program.value, Path::new("/etc/standstill/./resume"));
}

#[test]
fn every_problem_is_told_at_once() {
    let (found, shown) = problems(
        r#"
name = "vm0"
onn-loss = "fail"
orphan = "kep"
heartbeat = 5

[[device]]
name = "a"
kind = "copy-engin"
socket = "x.sock"

[[device]]
name = "a"
program = "/bin/true"
socket = "x.sock"
memory = "1MiB"
"#,
    );
    assert_eq!(found, 7, "{shown}");
    for part in [
        "did you mean `on-loss`?",
        "did you mean \"keep\"?",
        "`heartbeat` must be a time in quotes",
        "this is a number",
        "did you mean \"copy-engine\"?",
        "two devices are named \"a\"",
        "two devices have the socket /run/standstill/vm0/x.sock",
        "`memory` is for devices of kind \"copy-engine\"",
        "vm.toml:3:1",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
}

#[test]
fn what_is_no_toml_is_shown_where_it_is() {
    let (found, shown) = problems("name = \"vm0\"\norphan keep\n[[device]\nname = \"d\"\n");
    assert!(found >= 2, "{shown}");
    assert!(shown.contains("vm.toml:2:"), "{shown}");
    assert!(shown.contains("orphan keep"), "{shown}");
}

#[test]
fn a_device_that_cannot_be_is_refused_with_the_reason() {
    let long = "x".repeat(100);
    let disk = "kind = \"vhost-user-blk\"\nsocket = \"s\"\nfile = \"d\"\n";
    for (lines, part) in [
        ("", "needs a `kind` or a `program`"),
        ("kind = \"copy-engine\"\nprogram = \"/d\"\nsocket = \"s\"", "not both"),
        ("kind = \"copy-engine\"", "needs a `socket`"),
        ("kind = \"copy-engine\"\nsocket = \"s\"\nargs = [\"a\"]", "for devices with a `program`"),
        ("kind = \"copy-engine\"\nsocket = \"s\"\nmemory = \"5KiB\"", "a power of two"),
        ("kind = \"copy-engine\"\nsocket = \"s\"\nmemory = \"1X\"", "unknown unit"),
        ("kind = \"copy-engine\"\nsocket = \"operator.sock\"", "is the operator socket"),
        ("kind = \"vhost-user-blk\"\nfile = \"d\"", "a vhost-user frontend there"),
        ("kind = \"vhost-user-blk\"\nsocket = \"s\"", "needs a `file`"),
        (&format!("{disk}queues = 65"), "expected 1 to 64"),
        (&format!("{disk}queues = 0"), "expected 1 to 64"),
        (&format!("{disk}serial = \"123456789012345678901\""), "at most 20 bytes"),
        (&format!("{disk}read-only = \"perhaps\""), "`read-only`"),
        (&format!("{disk}lock = \"ring\""), "did you mean \"rings\""),
        (&format!("{disk}memory = \"1MiB\""), "`memory` is for devices of kind \"copy-engine\""),
        ("program = \"/d\"\nfile = \"d\"", "`file` is for devices of kind \"vhost-user-blk\""),
        (&format!("program = \"/d\"\nsocket = \"{long}\""), "at most 107 are possible"),
        ("program = \"/d\"\nfirst-phase = \"1s\"", "needs a `second-phase`"),
        ("program = \"/d\"\nrestart = { budget = 1 }", "no effect without"),
        ("program = \"/d\"\non-loss = \"restart\"\nrestart = { budget = -1 }", "from 0 to"),
        ("program = \"/d\"\non-loss = \"restart\"\nrestart = { bugdet = 1 }", "`budget`?"),
        ("program = \"/d\"\non-loss = \"restart\"\nclient = \"qemu\"", "cannot be restarted"),
        ("program = \"/d\"\nargs = \"a\"", "must be a list of texts"),
        ("program = \"/d\"\nargs = [1]", "must be a list of texts"),
        ("program = \"/d\"\nenv = { \"A=B\" = \"\" }", "cannot name an environment variable"),
    ] {
        let (found, shown) = problems(&with_device(lines));
        assert_eq!(found, 1, "{lines}: {shown}");
        assert!(shown.contains(part), "{part}: {shown}");
    }
    for name in ["", ".hidden", "a/b", "..", &"n".repeat(65)] {
        let text = format!("name = \"vm0\"\n[[device]]\nname = \"{name}\"\nprogram = \"/d\"\n");
        let (found, shown) = problems(&text);
        assert_eq!(found, 1, "{name:?}: {shown}");
        assert!(shown.contains("cannot be the name of a device"), "{shown}");
    }
}

#[test]
fn machines_hooks_and_tables_that_cannot_be_are_refused_with_the_reason() {
    for (text, part) in [
        ("", "needs a `name`"),
        ("name = \"a/b\"", "cannot be the name of a machine"),
        ("name = 1", "must be a text in quotes"),
        ("name = \"m\"\ndevice = 1", "write [[device]]"),
        ("name = \"m\"\ndeadlines = 1", "must be a table"),
        ("name = \"m\"\n[deadlines]\nundo = \"0s\"", "cannot be zero"),
        ("name = \"m\"\n[deadlines]\nundo = \"soon\"", "a time in quotes"),
        ("name = \"m\"\n[[ram]]\npath = 1", "must be a text"),
        ("name = \"m\"\n[[hook]]\nname = \"h\"\nslot = \"before\"", "needs a command"),
        ("name = \"m\"\n[[hook]]\nname = \"h\"\nstop = [\"a\"]", "needs a `slot`"),
        ("name = \"m\"\n[[hook]]\nname = \"h\"\nslot = \"before\"\nstop = []", "a program in it"),
        (
            "name = \"m\"\n[[hook]]\nname = \"h\"\nslot = \"before\"\nstop = [\"a\"]\nrank = 1.5",
            "a number with a fraction",
        ),
        (
            "name = \"m\"\n[[hook]]\nname = \"h\"\nslot = \"before\"\nstop = [\"a\"]\ndeadline = \"0s\"",
            "`deadline` cannot be zero",
        ),
        (
            "name = \"m\"\n[[device]]\nname = \"d\"\nprogram = \"/bin/true\"\nfirst-phase = \"0s\"\n\
             second-phase = \"1s\"",
            "`first-phase` cannot be zero",
        ),
    ] {
        let (found, shown) = problems(text);
        assert_eq!(found, 1, "{text}: {shown}");
        assert!(shown.contains(part), "{part}: {shown}");
    }
}

#[test]
fn a_vm_that_cannot_be_is_refused_with_the_reason() {
    let long = "x".repeat(100);
    let device = "[[device]]\nname = \"d\"\nprogram = \"/d\"\nsocket = \"s\"";
    let hook = "[[hook]]\nname = \"qmp\"\nslot = \"before\"\nstop = [\"a\"]";
    for (lines, part) in [
        ("qmp = 1", "must be a text in quotes"),
        ("qmp = \"\"", "must be the path of a socket"),
        ("qmp = [\"a\"]", "this is a list"),
        (&format!("qmp = \"{long}\""), "the QMP socket is too long for a Unix socket"),
        (&format!("qmp = \"s\"\n{device}"), "/vm0/s is the data socket of a device"),
        ("qmp = \"operator.sock\"", "is the operator socket of the machine"),
        (&format!("qmp = \"q\"\n{hook}"), "two hooks are named \"qmp\""),
        ("qmp = \"q\"\n[deadlines]\nqmp = \"0s\"", "`qmp` cannot be zero"),
        ("qmp = \"q\"\n[deadlines]\nqmp = 5", "a time in quotes"),
        ("[deadlines]\nqmp = \"5s\"", "needs a machine with `qmp`"),
        ("qpm = \"q\"", "did you mean `qmp`?"),
    ] {
        let (found, shown) = problems(&format!("name = \"vm0\"\n{lines}\n"));
        assert_eq!(found, 1, "{lines}: {shown}");
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let file = read("name = \"vm0\"\nqmp = \"/run/q\"");
    let qmp = file.qmp.unwrap();
    assert_eq!((qmp.path.value.to_str(), qmp.deadline.as_secs()), (Some("/run/q"), 5));
}

#[test]
fn a_disk_is_started_as_it_is_described() {
    let text = "name = \"vm0\"\n[[device]]\nname = \"disk\"\nkind = \"vhost-user-blk\"\n\
                socket = \"disk.sock\"\nfile = \"images/disk.img\"\nqueues = 4\nserial = \"s 1\"\n\
                read-only = \"yes\"\ndirect = \"no\"\nlock = \"rings\"\n";
    let expected = [
        "device",
        "vhost-user-blk",
        "--socket=/run/standstill/vm0/disk.sock",
        &format!("--file={}", places().file.join("images/disk.img").display()),
        "--queues=4",
        "--read-only",
        "--serial=s 1",
        "--lock=rings",
    ];
    let expected = Program::BuiltIn(expected.map(str::to_owned).to_vec());
    assert_eq!(read(text).devices[0].program, Some(expected));
}

#[test]
fn a_device_of_its_own_is_read_with_and_without_its_header() {
    let machine = read("name = \"vm0\"");
    let device = "name = \"d\"\nkind = \"copy-engine\"\nsocket = \"d.sock\"\n";
    for text in [device.to_owned(), format!("[[device]]\n{device}")] {
        let mut problems = Problems::new("device", &text);
        let device = machine.read_device(&text, &places(), &mut problems).unwrap();
        assert!(problems.is_empty(), "{}", problems.render(false));
        assert_eq!(device.socket.unwrap().value, Path::new("/run/standstill/vm0/d.sock"));
    }
    for text in ["", "name = \"d\"", &format!("[[device]]\n{device}[[device]]\n{device}")] {
        let mut problems = Problems::new("device", text);
        let _ = machine.read_device(text, &places(), &mut problems);
        assert!(!problems.is_empty(), "{text}");
    }
}

#[test]
fn the_budget_of_one_device_is_over_that_of_all() {
    let text = "name = \"vm0\"\non-loss = \"restart\"\nrestart = { window = \"7s\" }\n\
                [[device]]\nname = \"d\"\nprogram = \"/d\"\nrestart = { budget = 9 }\n";
    let spec = format!("{:?}", read(text).devices[0].spec().unwrap());
    assert!(spec.contains("budget: 9, window: 7s"), "{spec}");
}

#[test]
fn every_key_is_documented() {
    let page = include_str!("../../docs/machine-file.md");
    let keys = [
        &MACHINE_KEYS[..],
        &DEADLINE_KEYS,
        &RAM_KEYS,
        &DEVICE_KEYS,
        &COPY_ENGINE_KEYS,
        &DISK_KEYS,
        &RESTART_KEYS,
        &HOOK_KEYS,
    ];
    for key in keys.concat() {
        assert!(page.contains(&format!("| `{key}` |")), "{key} is not in docs/machine-file.md");
    }
}

#[test]
fn the_machines_of_the_pages_are_machines() {
    for page in [
        include_str!("../../docs/machine-file.md"),
        include_str!("../../docs/operating.md"),
        include_str!("../../docs/qemu.md"),
    ] {
        let blocks = page.split("```toml\n").skip(1);
        let blocks: Vec<_> = blocks.filter_map(|rest| rest.split("```").next()).collect();
        assert!(!blocks.is_empty());
        for block in blocks {
            assert!(!read(block).devices.is_empty(), "{block}");
        }
    }
}

#[test]
fn the_example_is_a_machine() {
    let file = read(include_str!("../../examples/machine.toml"));
    assert_eq!(file.devices.len(), 2);
}

proptest! {
    #[test]
    fn no_text_is_too_strange(text in "\\PC{0,200}") {
        let _ = problems(&text);
    }

    #[test]
    fn no_value_of_a_known_key_is_too_strange(
        lines in proptest::collection::vec(
            (proptest::sample::select(all_keys()), proptest::sample::select(VALUES.to_vec())),
            0..8,
        ),
        header in proptest::sample::select(vec!["", "[[device]]", "[[hook]]", "[deadlines]", "[[ram]]"]),
    ) {
        let lines: Vec<_> = lines.iter().map(|(key, value)| format!("{key} = {value}")).collect();
        let _ = problems(&format!("name = \"vm0\"\n{header}\n{}\n", lines.join("\n")));
    }
}

const VALUES: [&str; 9] =
    ["1", "-1", "1.5", "true", "\"\"", "\"5s\"", "[]", "[\"a\"]", "{ a = \"b\" }"];

fn all_keys() -> Vec<&'static str> {
    [&MACHINE_KEYS[..], &DEADLINE_KEYS, &DEVICE_KEYS, &COPY_ENGINE_KEYS, &DISK_KEYS, &HOOK_KEYS]
        .concat()
}
