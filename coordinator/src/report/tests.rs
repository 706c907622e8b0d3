use super::*;
use MigrationState::{Running, RunningP2p};
use serde_json::{Value, json};
use standstill_protocol::transition::FailureKind;

const FIRST: Epoch = Epoch(4);
const UNDO: Epoch = Epoch(5);

fn command(
    epoch: Epoch,
    phase: Phase,
    target: MigrationState,
    sent_ns: u64,
    answer: CommandAnswer,
) -> CommandReport {
    let answered_ns = (answer != CommandAnswer::None).then_some(sent_ns + 1000);
    CommandReport { epoch, phase, target, undo: epoch == UNDO, sent_ns, answered_ns, answer }
}

fn reached(state: MigrationState) -> CommandAnswer {
    CommandAnswer::Reached { state, timings: Timings::default(), evidence: Evidence::default() }
}

fn failure(number: u32, kind: FailureKind) -> Failure {
    let (phase, subject) = (Some(Phase::PrepareStop), Subject::Participant(ParticipantId(number)));
    Failure { epoch: FIRST, phase, subject, kind }
}

/// A pause that one refused, for which one was silent and one could not be proven gone, and that a
/// hook did not return from.
pub(crate) fn report() -> TransitionReport {
    let refused = CommandAnswer::Refused { state: Running, why: "not now".into() };
    let undone = || command(UNDO, Phase::Start, Running, 9000, reached(Running));
    let fence = |proven: bool| FenceReport {
        why: Loss::Timeout,
        detail: "no answer within the deadline".into(),
        began_ns: 5000,
        proven_ns: proven.then_some(6000),
        proof: proven.then(|| "killed by signal 9, 1 backing files unlocked".into()),
    };
    let silent = || command(FIRST, Phase::PrepareStop, RunningP2p, 0, CommandAnswer::None);
    let participant = |number, name: &str, after, commands, fence| ParticipantReport {
        id: ParticipantId(number),
        name: name.into(),
        incarnation: 1,
        pid: Some(1000 + number),
        before: Running,
        after,
        commands,
        fence,
    };
    let honest = command(FIRST, Phase::PrepareStop, RunningP2p, 0, reached(RunningP2p));
    let refuses = command(FIRST, Phase::PrepareStop, RunningP2p, 0, refused);
    let participants = vec![
        participant(0, "honest", Some(Running), vec![honest, undone()], None),
        participant(1, "refuses", Some(Running), vec![refuses], None),
        participant(2, "silent", None, vec![silent()], Some(fence(true))),
        participant(3, "stuck", None, vec![silent()], Some(fence(false))),
    ];
    let names = participants.iter().map(|p| (p.id, p.name.clone())).collect();
    let reasons =
        vec![HeldReason::FenceUnproven(ParticipantId(3)), HeldReason::HookHung(HookId(0))];
    let hook = |moment, returned_ns, error| HookReport {
        id: HookId(0),
        name: "vcpus".into(),
        moment,
        called_ns: 100,
        returned_ns,
        error,
    };
    TransitionReport {
        operation: Operation::Pause,
        outcome: Outcome::Held { reasons, fenced: vec![(ParticipantId(2), Loss::Timeout)] },
        machine: MachineState::Held,
        term: Term(2),
        first_epoch: FIRST,
        last_epoch: UNDO,
        began: SystemTime::UNIX_EPOCH + Duration::from_secs(1),
        total_ns: 10_000,
        downtime_ns: None,
        participants,
        hooks: vec![
            hook(HookMoment::Stop, Some(300), None),
            hook(HookMoment::Start, Some(300), Some("no".into())),
            hook(HookMoment::Stop, None, None),
        ],
        failures: vec![
            failure(1, FailureKind::Refused),
            failure(2, FailureKind::Lost(Loss::Timeout)),
            failure(3, FailureKind::FenceUnproven),
        ],
        strays: 0,
        names: Names { participants: names, hooks: BTreeMap::from([(HookId(0), "vcpus".into())]) },
    }
}

#[test]
fn a_person_reads_who_was_where_what_was_done_and_what_is_proven() {
    let text = report().to_string();
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let expected = [
        "pause: Held in 10.0 µs (term 2, epoch 5)",
        "honest           RUNNING → RUNNING_P2P in 1.0 µs; undo: → RUNNING in 1.0 µs",
        "refuses          RUNNING ✗ PrepareStop refused in RUNNING: not now; now RUNNING",
        "silent           RUNNING ✗ no answer to PrepareStop; fenced: no answer within the \
         deadline (killed by signal 9, 1 backing files unlocked)",
        "stuck            RUNNING ✗ no answer to PrepareStop; to be fenced: no answer within the \
         deadline, not proven",
        "vcpus            stop in 200 ns",
        "vcpus            start ✗ no",
        "vcpus            stop ✗ has not returned",
        "device \"refuses\" refused (not now), in PrepareStop of epoch 4",
        "device \"silent\" is lost: no answer within the deadline, in PrepareStop of epoch 4",
        "device \"stuck\" could not be proven gone, in PrepareStop of epoch 4",
        "held: nothing proves that device \"stuck\" is gone",
        "held: hook \"vcpus\" has not returned",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn a_program_reads_the_same_as_json() {
    let value = serde_json::to_value(JsonReport::from(&report())).unwrap();
    assert_eq!(
        [&value["operation"], &value["outcome"], &value["machine"]],
        ["pause", "Held", "held"].map(Value::from).each_ref()
    );
    assert_eq!((&value["term"], &value["epoch"]), (&json!(2), &json!(5)));
    let [honest, refuses, silent, stuck] =
        std::array::from_fn(|number| &value["participants"][number]);
    assert_eq!(
        honest["commands"][1],
        json!({
            "epoch": 5, "phase": "Start", "target": "RUNNING", "undo": true, "sent_ns": 9000,
            "answered_ns": 10_000, "reached": "RUNNING", "refused": null, "refused_in": null,
            "hook_ns": 0, "drain_ns": 0, "evidence_ns": 0,
        })
    );
    assert_eq!((&honest["before"], &honest["after"]), (&json!("RUNNING"), &json!("RUNNING")));
    assert_eq!((&honest["incarnation"], &honest["pid"]), (&json!(1), &json!(1000)));
    assert_eq!(value["began_unix_ns"], 1_000_000_000);
    assert_eq!(honest["fenced"], Value::Null);
    let refusal = &refuses["commands"][0];
    assert_eq!(
        (&refusal["refused"], &refusal["refused_in"]),
        (&json!("not now"), &json!("RUNNING"))
    );
    assert_eq!(refusal["reached"], Value::Null);
    let unanswered = &silent["commands"][0];
    assert_eq!((&unanswered["answered_ns"], &unanswered["reached"]), (&Value::Null, &Value::Null));
    assert_eq!(silent["after"], Value::Null);
    assert_eq!(silent["fenced"], "no answer within the deadline");
    assert_eq!((&silent["fence_ns"], &silent["proven_ns"]), (&json!(5000), &json!(6000)));
    assert_eq!(silent["proof"], "killed by signal 9, 1 backing files unlocked");
    assert_eq!((&stuck["proven_ns"], &stuck["proof"]), (&Value::Null, &Value::Null));
    assert_eq!(
        value["hooks"][1],
        json!({
            "name": "vcpus", "moment": "start", "called_ns": 100, "returned_ns": 300, "error": "no",
        })
    );
    assert_eq!(value["hooks"][2]["returned_ns"], Value::Null);
    assert_eq!(value["failures"].as_array().unwrap().len(), 5);
}
