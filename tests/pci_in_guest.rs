//! Linux finds in QEMU what a device says that it has: a conventional device as it always was, and an
//! endpoint with all capabilities.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use standstill::device_proc::device::{
    AccessError, Bar, Device, DeviceError, DeviceInfo, PciIdentity,
};
use standstill::device_proc::memory::SharedMemory;
use standstill::device_proc::registers::RegisterFile;
use standstill::device_proc::{ServeOptions, serve};
use standstill_testkit::qemu::Qemu;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than a guest takes for anything on a busy machine.
const LONG: Duration = Duration::from_secs(120);

/// Which device this program is, and where it is served, if it is one.
const VARIABLE: &str = "STANDSTILL_TEST_DEVICE";

struct Scratch(RegisterFile<8>);

impl Device for Scratch {
    fn region_read(&self, _bar: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        self.0.read(offset, data)
    }

    fn region_write(&self, _bar: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        self.0.write(offset, data)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.0.reset();
        Ok(())
    }

    fn save(&self, to: &mut dyn Write) -> Result<(), DeviceError> {
        self.0.save(to)
    }

    fn load(&self, from: &mut dyn Read) -> Result<(), DeviceError> {
        self.0.load(from)
    }
}

fn info(kind: &str) -> DeviceInfo {
    let memory = SharedMemory::create("bar", 1 << 20).unwrap().try_clone_fd().unwrap();
    let info = DeviceInfo::new(kind, PciIdentity::new(0x1234, 0x0001))
        .bar(0, Bar::registers(4096))
        .bar(2, Bar::memory(1 << 20, memory))
        .msix_vectors(3);
    if kind == "endpoint" { info.express().msi_vectors(4).without_intx() } else { info }
}

/// A device process; it ends with this.
struct Served {
    process: Child,
    socket: PathBuf,
}

impl Served {
    fn start(kind: &str, folder: &Path) -> Self {
        let socket = folder.join(kind);
        let mut program = Command::new(std::env::current_exe().unwrap());
        program.args(["--exact", "linux_finds_what_a_device_says_that_it_has", "--nocapture"]);
        program.env(VARIABLE, format!("{kind} {}", socket.display())).stdin(Stdio::null());
        let served = Self { process: program.spawn().unwrap(), socket };
        let began = Instant::now();
        while !served.socket.exists() {
            assert!(began.elapsed() < LONG, "the device process serves nothing");
            std::thread::park_timeout(Duration::from_millis(5));
        }
        served
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Identifiers and offsets of the capabilities in a configuration space.
fn capabilities(config: &[u8]) -> Vec<(u8, usize)> {
    let mut next = usize::from(config[0x34]);
    let mut found = Vec::new();
    while next != 0 {
        found.push((config[next], next));
        assert!(found.len() < 48, "the list has no end");
        next = usize::from(config[next + 1]);
    }
    found
}

#[test]
fn linux_finds_what_a_device_says_that_it_has() {
    if let Ok(what) = std::env::var(VARIABLE) {
        let (kind, socket) = what.split_once(' ').unwrap();
        let scratch = Scratch(RegisterFile::new([0; 8]));
        serve(ServeOptions::new(socket), |_handles| Ok((scratch, info(kind)))).unwrap();
        return;
    }
    let Some(qemu) = Qemu::for_tests() else { return };
    let folder = tempfile::tempdir().unwrap();
    let conventional = Served::start("conventional", folder.path());
    let endpoint = Served::start("endpoint", folder.path());
    let guest = qemu
        .guest()
        .vfio_user("conventional", &conventional.socket)
        .vfio_user("endpoint", &endpoint.socket)
        .init(
            r#"for bus in 01 02; do
                 cd /sys/bus/pci/devices/0000:$bus:00.0
                 echo "size of $bus: $(stat -c %s config)"
                 echo "pin of $bus: $(cat irq)"
                 echo "bar 2 of $bus: $(sed -n 3p resource)"
                 echo "config of $bus: $(hexdump -v -n 256 -e '1/1 "%02x"' config)"
               done"#,
        )
        .start()
        .unwrap();
    let find = |what: &str, bus: &str| {
        let (begin, line) = (format!("{what} of {bus}: "), guest.console());
        let line = line.wait_for(&begin, LONG).unwrap();
        line.split_once(&begin).unwrap().1.trim().to_owned()
    };
    // As Linux sees it: memory, prefetchable, 64-bit (`IORESOURCE_*`).
    const MEMORY: u64 = 0x200;
    const PREFETCHABLE: u64 = 0x2000;
    const WIDE: u64 = 0x10_0000;
    let rows = [
        ("01", "256", true, MEMORY | PREFETCHABLE, vec![(0x11, 0x40)]),
        (
            "02",
            "4096",
            false,
            MEMORY | PREFETCHABLE | WIDE,
            vec![(0x01, 0x40), (0x05, 0x48), (0x11, 0x60), (0x10, 0x6c)],
        ),
    ];
    for (bus, size, has_pin, flags, list) in rows {
        assert_eq!(find("size", bus), size);
        assert_eq!(find("pin", bus) != "0", has_pin);
        let resource = find("bar 2", bus);
        let found = resource.rsplit_once("0x").unwrap().1;
        let found = u64::from_str_radix(found, 16).unwrap();
        assert_eq!(found & (MEMORY | PREFETCHABLE | WIDE), flags, "{resource}");
        let hex = find("config", bus);
        let config: Vec<u8> = (0..hex.len() / 2)
            .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap())
            .collect();
        assert_eq!(capabilities(&config), list);
    }
    guest.wait(LONG).unwrap();
}
