use super::*;
use proptest::prelude::*;
use standstill_protocol::fault::{Action, Forgery, Packet, Point};

fn phase() -> impl Strategy<Value = Phase> {
    use Phase::{Load, PrepareStart, PrepareStop, Reset, Save, Start, Stop};
    prop::sample::select(vec![PrepareStop, Stop, PrepareStart, Start, Save, Load, Reset])
}

fn point() -> impl Strategy<Value = Point> {
    prop_oneof![
        phase().prop_map(Point::Receipt),
        phase().prop_map(Point::BeforeAck),
        phase().prop_map(Point::AfterAck),
        prop::sample::select(vec![Point::Hello, Point::Query, Point::Memory, Point::Shutdown]),
        prop::sample::select(vec![Point::Saving, Point::Loading, Point::Mmio]),
        prop::sample::select(vec![Point::Dma, Point::DmaInFlight]),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    use Forgery::{Declaration, EarlierEpoch, HigherTerm, LaterEpoch, LowerTerm, State};
    let forgeries =
        vec![LowerTerm, HigherTerm, EarlierEpoch, LaterEpoch, Forgery::Phase, State, Declaration];
    let packets = vec![Packet::Garbage, Packet::Empty, Packet::Truncated, Packet::Oversized];
    let plain = vec![
        Action::Abort,
        Action::Segv,
        Action::Stop,
        Action::Spin,
        Action::NoAck,
        Action::TwoAcks,
        Action::Disconnect,
        Action::KeepDma,
    ];
    prop_oneof![
        any::<u8>().prop_map(Action::Exit),
        any::<u32>().prop_map(Action::DelayMs),
        any::<i32>().prop_map(Action::Refuse),
        any::<u32>().prop_map(Action::FdFlood),
        any::<u32>().prop_map(Action::MessageFlood),
        prop::sample::select(forgeries).prop_map(Action::Forge),
        prop::sample::select(packets).prop_map(Action::Send),
        prop::sample::select(plain),
    ]
}

fn inside() -> impl Strategy<Value = Cause> {
    (point(), any::<u32>(), action())
        .prop_map(|(point, nth, action)| Fault { point, nth, action })
        .prop_filter("possible", Fault::is_possible)
        .prop_map(Cause::Inside)
}

fn outside() -> impl Strategy<Value = Cause> {
    use OutsideAction::{
        Corrupt, CorruptAt, Cut, DelayMs, Drop, Duplicate, Kill, KillCoordinator, Limit, Merge,
        Split, StopCoordinatorMs, StopMs, Swap,
    };
    let limit = super::Limit { resource: Resource::Data, value: 1 << 20 };
    let moment = prop_oneof![
        Just(Moment::Running),
        Just(Moment::Stopped),
        phase().prop_map(Moment::Command),
        phase().prop_map(Moment::Answer),
        Just(Moment::Packet(PacketKind::MemoryAccepted)),
    ];
    let actions = vec![
        Kill,
        StopMs(0),
        StopMs(7),
        DelayMs(9),
        Drop,
        Duplicate,
        Corrupt,
        CorruptAt(3),
        Split,
        Merge,
        Swap,
        Cut,
        Limit(limit),
        KillCoordinator,
        StopCoordinatorMs(5),
    ];
    (moment, prop::sample::select(actions))
        .prop_map(|(moment, action)| Cause::Outside(Outside { moment, action }))
        .prop_filter("possible", |cause| cause.impossible().is_none())
}

fn hook(rounds: u32) -> impl Strategy<Value = HookFault> {
    let places = prop::sample::select(vec![Place::Before, Place::Between, Place::After]);
    let calls = prop::sample::select(vec![Call::Stop, Call::Start]);
    let actions = prop::sample::select(vec![HookAction::Fail, HookAction::StickMs(3)]);
    (1..=rounds, places, calls, actions).prop_map(|(round, place, call, action)| HookFault {
        round,
        place,
        call,
        action,
    })
}

fn plan() -> impl Strategy<Value = Plan> {
    use Policy::{ContinueWithout, Restart, Rollback, StayStopped};
    let policy = prop::sample::select(vec![Rollback, StayStopped, ContinueWithout, Restart]);
    (1..=Plan::MOST_DEVICES, 1..=u32::MAX, policy).prop_flat_map(|(devices, rounds, policy)| {
        let cause = prop_oneof![inside(), outside()];
        let fault = (0..devices, 1..=rounds, cause);
        let fault = fault.prop_map(|(device, round, cause)| Injection { device, round, cause });
        let faults = prop::collection::vec(fault, 0..6);
        (faults, prop::collection::vec(hook(rounds), 0..3)).prop_map(move |(faults, hooks)| Plan {
            devices,
            rounds,
            policy,
            faults,
            hooks,
        })
    })
}

proptest! {
    #[test]
    fn any_plan_is_read_as_it_was_written(plan in plan()) {
        let text = plan.to_toml().unwrap();
        prop_assert_eq!(Plan::from_toml(&text).unwrap(), plan, "{}", text);
    }

    #[test]
    fn any_text_is_a_plan_or_an_error(text in "(devices|rounds|=| |[0-9]|\"|\n|\\[|\\]|fault){0,40}") {
        let _ = Plan::from_toml(&text);
    }
}

#[test]
fn what_is_left_out_is_once_and_rollback() {
    let text = "devices = 3\n[[fault]]\ndevice = 1\n\
                inside = { point = { before-ack = \"Stop\" }, action = { exit = 1 } }\n";
    let fault = Fault::new(Point::BeforeAck(Phase::Stop), Action::Exit(1));
    assert_eq!(Plan::from_toml(text).unwrap(), Plan::new(3).fault(1, fault));
}

fn error(text: &str) -> String {
    Plan::from_toml(text).unwrap_err().to_string()
}

#[test]
fn a_word_that_no_plan_has_is_named_with_its_line_and_the_one_that_was_meant() {
    let text =
        "devices = 3\n\n[[fault]]\ndevice = 1\ninside = { point = \"dma\", action = \"abrot\" }\n";
    let error = error(text);
    for words in ["line 5", "abrot", "did you mean `abort`?"] {
        assert!(error.contains(words), "{words} is not in\n{error}");
    }
    let error = self::error("devices = 3\npolcy = \"rollback\"\n");
    assert!(error.contains("line 2") && error.contains("did you mean `policy`?"), "{error}");
    let error = self::error("devices = 3\npolicy = \"xyz\"\n");
    assert!(error.contains("stay-stopped") && !error.contains("did you mean"), "{error}");
}

#[test]
fn a_fault_comes_from_inside_or_from_outside() {
    let both = "inside = { point = \"dma\", action = \"spin\" }\n\
                outside = { moment = \"running\", action = \"kill\" }";
    for (cause, says) in [("", "needs `inside` or `outside`"), (both, "either")] {
        let error = error(&format!("devices = 3\n[[fault]]\ndevice = 1\n{cause}\n"));
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let spin = Fault::new(Point::Dma, Action::Spin);
    let most = Plan::MOST_DEVICES;
    Plan::new(most).check().unwrap();
    let cases = [
        (Plan::new(most + 1), "has 64 devices at most, not 65"),
        (Plan::new(0), "at least one device"),
        (Plan::new(1).rounds(0), "at least one round"),
        (Plan::new(3).fault(3, spin), "fault 1 (endless loop before a DMA) is for device 3"),
        (
            Plan::new(3).inject(Injection { device: 0, round: 2, cause: Cause::Inside(spin) }),
            "is for round 2, and there are 1",
        ),
        (
            Plan::new(3).fault(0, spin).fault(1, Fault::new(Point::Dma, Action::NoAck)),
            "fault 2 (no answer before a DMA) cannot be",
        ),
        (
            Plan::new(3).outside(0, Moment::Running, OutsideAction::Drop),
            "(packet lost while the machine runs) cannot be: no packet is under way",
        ),
    ];
    for (plan, says) in cases {
        let error = plan.check().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
        if let Ok(text) = plan.to_toml() {
            assert_eq!(self::error(&text), error);
        }
    }
}

#[test]
fn the_plan_in_the_documentation_is_one_that_can_be_run() {
    use crate::sweep::{Expected, Judge, Times};

    let page = include_str!("../../../../docs/testkit.md");
    let (_, rest) = page.split_once("\n## Plans\n").unwrap();
    let (_, rest) = rest.split_once("```toml\n").unwrap();
    let plan = Plan::from_toml(rest.split_once("```").unwrap().0).unwrap();
    assert_eq!((plan.devices, plan.faults.len(), plan.hooks.len()), (3, 2, 1));
    let (expected, times) = (Expected::ours().unwrap(), Times::default());
    Judge { expected, times, knows_liars: false }.accepts(&plan).unwrap();
}
