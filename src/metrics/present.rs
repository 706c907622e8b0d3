//! Where a machine and its devices are at the moment of a scrape.

use super::totals::{self, Device, Text};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use standstill::coordinator::{DeviceStanding, DeviceStatus, Status};
use standstill::protocol::transition::MachineState;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InState {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stands {
    device: Text<String>,
    standing: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DroppedBy {
    source: &'static str,
    device: Text<String>,
}

/// All of it; `dropped` lines of the command's own log were dropped.
pub(super) fn registry(status: &Status, dropped: u64) -> Registry {
    let mut registry = totals::registry(&status.name);
    machine(status, &mut registry);
    devices(&status.devices, &mut registry);
    lines(&status.devices, dropped, &mut registry);
    registry
}

fn machine(status: &Status, registry: &mut Registry) {
    let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "The program that serves these metrics", build);
    let states = Family::<InState, Gauge>::default();
    for (state, name) in [
        (MachineState::Running, "running"),
        (MachineState::Stopped, "stopped"),
        (MachineState::Held, "held"),
        (MachineState::LeaseExpired, "lease-expired"),
    ] {
        let present = i64::from(status.machine == state);
        states.get_or_create(&InState { state: name }).set(present);
    }
    registry.register("machine_state", "1 for the state in which the machine is", states);
    let busy: Gauge = Gauge::default();
    busy.set(i64::from(status.operation.is_some()));
    let help = "1 while a transition of the machine is under way";
    registry.register("transition_under_way", help, busy);
}

fn devices(devices: &[DeviceStatus], registry: &mut Registry) {
    let up = Family::<Device, Gauge>::default();
    let standings = Family::<Stands, Gauge>::default();
    let states = Family::<Device, Gauge>::default();
    let incarnations = Family::<Device, Gauge>::default();
    let progress = Family::<Device, Counter>::default();
    for one in devices {
        let labels = Device::new(&one.name);
        up.get_or_create(&labels).set(i64::from(one.standing == DeviceStanding::Ready));
        for standing in STANDINGS {
            let labels = Stands { device: Text(one.name.clone()), standing: standing.name() };
            standings.get_or_create(&labels).set(i64::from(one.standing == standing));
        }
        if let Some(state) = one.state {
            states.get_or_create(&labels).set(i64::from(state.value()));
        }
        let incarnation = i64::try_from(one.incarnation).unwrap_or(i64::MAX);
        incarnations.get_or_create(&labels).set(incarnation);
        progress.get_or_create(&labels).inc_by(one.progress);
    }
    registry.register("device_up", "1 if the device counts, 0 if it is missing", up);
    let help = "1 for what the device is to the machine";
    registry.register("device_standing", help, standings);
    let help = "Where the device last proved to be: the number of the VFIO migration state";
    registry.register("device_migration_state", help, states);
    let help = "How often the device was started; 0 for one inside the VMM";
    registry.register("device_incarnation", help, incarnations);
    let help = "Progress of the data threads of the device's present process, in its own unit";
    registry.register("device_progress", help, progress);
}

fn lines(devices: &[DeviceStatus], dropped: u64, registry: &mut Registry) {
    let lines = Family::<DroppedBy, Counter>::default();
    for one in devices.iter().filter(|device| device.pid.is_some()) {
        for (source, count) in [
            ("device", one.dropped_logs.by_device),
            ("coordinator", one.dropped_logs.by_coordinator),
        ] {
            let device = Text(one.name.clone());
            lines.get_or_create(&DroppedBy { source, device }).inc_by(count);
        }
    }
    lines
        .get_or_create(&DroppedBy { source: "writer", device: Text(String::new()) })
        .inc_by(dropped);
    let help = "Log lines that nobody waited for, by who dropped them";
    registry.register("log_lines_dropped", help, lines);
}

const STANDINGS: [DeviceStanding; 7] = [
    DeviceStanding::Starting,
    DeviceStanding::Joining,
    DeviceStanding::Ready,
    DeviceStanding::Lost,
    DeviceStanding::Fenced,
    DeviceStanding::Restarting,
    DeviceStanding::Leaving,
];
