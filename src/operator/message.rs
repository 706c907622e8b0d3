//! What travels on the operator socket: one JSON object on each line.
//!
//! The server speaks first ([`Greeting`]). Then each request ([`RequestLine`]) gets one answer with
//! its `id` ([`Line`]), in the order in which they are finished; `events` gets many.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use standstill::coordinator::events::JsonEvent;
use standstill::coordinator::report::JsonReport;
use standstill::coordinator::status::JsonStatus;
use std::fmt;
use std::path::PathBuf;
use thiserror::Error;

/// The version of the protocol; another one is another protocol.
pub(crate) const PROTOCOL: u32 = 1;
/// The longest request in bytes, without its line end.
pub(crate) const MAX_REQUEST: usize = 64 * 1024;

/// The first line of the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Greeting {
    /// [`PROTOCOL`].
    pub(crate) protocol: u32,
    /// Program and version, for a person.
    pub(crate) program: String,
    /// The machine's name.
    pub(crate) machine: String,
    /// The server's process id.
    pub(crate) pid: u32,
}

/// What an operator asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", content = "with", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Where the machine and its devices are: [`StatusReply`].
    Status {},
    /// Stop all devices: [`ReportReply`].
    Pause {
        /// They leave STOP by themselves when they were told nothing for so long, in nanoseconds.
        #[serde(default, rename = "lease-ns", skip_serializing_if = "Option::is_none")]
        lease_ns: Option<u64>,
    },
    /// Start all devices: [`ReportReply`].
    Resume {},
    /// Undo the transition that is under way.
    Cancel {},
    /// Take as it is what is not proven.
    AcceptHold {},
    /// End the machine: [`ShutdownReply`].
    Shutdown {
        /// Leave the device processes for a later coordinator.
        #[serde(default, rename = "keep-devices")]
        keep_devices: bool,
    },
    /// Add a device.
    Add {
        /// Its keys as in a `[[device]]` of a machine file, in TOML.
        toml: String,
        /// Where relative paths begin: an absolute path.
        #[serde(default)]
        directory: Option<PathBuf>,
    },
    /// Remove a device: [`RemoveReply`].
    Remove {
        /// Its name.
        device: String,
    },
    /// Start a lost device again.
    Restart {
        /// Its name.
        device: String,
    },
    /// What has happened and, if wanted, what happens from now on: [`EventLine`]s, then an end.
    Events {
        /// How many of the past ones, at most.
        #[serde(default)]
        last: u32,
        /// Go on with what happens from now on.
        #[serde(default)]
        follow: bool,
    },
    /// The last reports, oldest first: [`ReportsReply`].
    Report {
        /// How many, at most.
        #[serde(default = "one")]
        last: u32,
    },
    /// Declare a file to be guest RAM.
    DeclareRam {
        /// The file: an absolute path.
        path: PathBuf,
    },
}

fn one() -> u32 {
    1
}

impl Request {
    /// The names of all requests.
    pub(crate) const NAMES: [&str; 12] = [
        "status",
        "pause",
        "resume",
        "cancel",
        "accept-hold",
        "shutdown",
        "add",
        "remove",
        "restart",
        "events",
        "report",
        "declare-ram",
    ];
}

/// A request with the number that its answers carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequestLine {
    /// Chosen by the client.
    pub(crate) id: u64,
    /// What is asked.
    pub(crate) request: Request,
}

/// A line that is no request.
#[derive(Debug, Error)]
pub(crate) enum RequestError {
    /// It is no JSON object with the fields of a request.
    #[error("no request: {0}; a request is a line such as {{\"id\":1,\"request\":\"status\"}}")]
    Json(#[source] serde_json::Error),
    /// There is no such request.
    #[error("there is no request {name:?}{}", or_rather(.meant.as_deref()))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What may have been meant.
        meant: Option<String>,
    },
    /// What goes with it does not fit.
    #[error("request {name:?}: {source}")]
    With {
        /// Which request.
        name: String,
        /// What is wrong.
        source: serde_json::Error,
    },
}

fn or_rather(name: Option<&str>) -> String {
    name.map_or_else(String::new, |name| format!(", did you mean {name:?}?"))
}

/// The outside of a request.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    id: u64,
    request: String,
    #[serde(default)]
    with: Option<Value>,
}

impl RequestLine {
    /// Reads a line. The number is given back also with an error, where it could be read.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, (Option<u64>, RequestError)> {
        let envelope: Envelope = serde_json::from_slice(line).map_err(|error| {
            let id = serde_json::from_slice::<Value>(line).ok().and_then(|v| v["id"].as_u64());
            (id, RequestError::Json(error))
        })?;
        let Envelope { id, request: name, with } = envelope;
        if !Request::NAMES.contains(&name.as_str()) {
            let meant = crate::nearest::nearest(&name, Request::NAMES).map(str::to_owned);
            return Err((Some(id), RequestError::Unknown { name, meant }));
        }
        let with = with.unwrap_or_else(|| json!({}));
        let request = serde_json::from_value(json!({ "request": &name, "with": with }))
            .map_err(|source| (Some(id), RequestError::With { name, source }))?;
        Ok(Self { id, request })
    }

    /// The line, with its end.
    pub(crate) fn to_line(&self) -> Vec<u8> {
        let mut object = serde_json::to_value(&self.request).unwrap_or_default();
        object["id"] = self.id.into();
        line(&object)
    }
}

/// A line of the server after the greeting.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// The number of the request; absent if it could not be read.
    pub(crate) id: Option<u64>,
    /// What it says.
    #[serde(flatten)]
    pub(crate) body: Body,
}

/// What a line of the server says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Body {
    /// It was done; the object depends on the request.
    Ok(Value),
    /// It was not.
    Error(Problem),
    /// One event.
    Event(Box<EventLine>),
    /// That many events were lost: the client reads too slowly.
    Lost(u64),
    /// No more events come, for this reason.
    End(String),
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Problem {
    /// Which kind.
    pub(crate) code: Code,
    /// For a person.
    pub(crate) message: String,
    /// What a person can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) advice: Option<String>,
    /// Of a transition that did not end where it was to end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) report: Option<Box<ReportReply>>,
}

/// The kinds of problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Code {
    /// The line is no request.
    BadRequest,
    /// The device that is to be added is not described as it should be.
    BadDevice,
    /// It is not possible as things are; nothing was begun.
    Refused,
    /// It was tried, and did not work.
    Failed,
    /// The transition did not end where it was to end; the report says everything.
    Transition,
    /// Another coordinator has the machine.
    Superseded,
    /// The machine is ending, or has ended.
    Gone,
    /// Too many clients, or too many requests.
    Busy,
}

/// The answer to `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StatusReply {
    /// The machine.
    #[serde(flatten)]
    pub(crate) status: JsonStatus,
    /// When this `standstill run` took the machine up, RFC 3339.
    pub(crate) since: String,
    /// Its process id.
    pub(crate) pid: u32,
    /// Whether devices outlive it: `keep` or `exit`.
    pub(crate) orphan: String,
    /// The last transition, if there was one.
    pub(crate) last: Option<LastTransition>,
    /// The VM; absent if the machine file does not say where its QMP is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) vm: Option<VmStatus>,
}

/// The VM, as QEMU tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmStatus {
    /// Where QEMU serves QMP.
    pub(crate) qmp: PathBuf,
    /// QEMU and its version; absent without a connection.
    pub(crate) qemu: Option<String>,
    /// Where the VM is, in QEMU's words: `running`, `paused`, …; absent without a connection.
    pub(crate) state: Option<String>,
    /// Why there is no connection; absent with one.
    pub(crate) missing: Option<String>,
}

/// The last transition, in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastTransition {
    /// The number of its report.
    pub(crate) number: u64,
    /// When it ended, RFC 3339.
    pub(crate) time: String,
    /// What it was for.
    pub(crate) operation: String,
    /// How it ended.
    pub(crate) outcome: String,
    /// How long it took.
    pub(crate) total_ns: u64,
    /// Of a resume: how long the machine had stood still.
    pub(crate) downtime_ns: Option<u64>,
}

/// A report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReportReply {
    /// Its number, from 1.
    pub(crate) number: u64,
    /// When the transition ended, RFC 3339.
    pub(crate) time: String,
    /// The same for a person.
    pub(crate) text: String,
    /// Everything.
    pub(crate) report: JsonReport,
}

/// The answer to `report`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReportsReply {
    /// Oldest first.
    pub(crate) reports: Vec<ReportReply>,
}

/// The answer to `remove`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RemoveReply {
    /// How its process ended; absent if there was none.
    pub(crate) exit: Option<String>,
}

/// The answer to `shutdown`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ShutdownReply {
    /// True if the device processes were left for a later coordinator.
    pub(crate) kept: bool,
    /// How each device process ended; empty if they were left.
    pub(crate) devices: Vec<DeviceEnd>,
}

/// The end of a device process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceEnd {
    /// Its name.
    pub(crate) device: String,
    /// How it ended; absent if that was not seen.
    pub(crate) exit: Option<String>,
    /// True if it had a process when the end began. Without an exit it is not proven to have ended then.
    #[serde(default)]
    pub(crate) had_process: bool,
}

impl DeviceEnd {
    /// False if its process may still be there.
    pub(crate) fn is_gone(&self) -> bool {
        self.exit.is_some() || !self.had_process
    }
}

impl fmt::Display for DeviceEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, exit, had_process } = self;
        match exit {
            Some(exit) => write!(f, "{device} {exit}"),
            None if *had_process => write!(f, "{device} is not proven to have ended"),
            None => write!(f, "{device} had no process"),
        }
    }
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EventLine {
    /// Its number, from 1, without gaps.
    pub(crate) number: u64,
    /// When it was seen, RFC 3339.
    pub(crate) time: String,
    /// For a person.
    pub(crate) text: String,
    /// Everything.
    #[serde(flatten)]
    pub(crate) event: JsonEvent,
}

/// A JSON object as a line, with its end.
pub(crate) fn line(value: &impl Serialize) -> Vec<u8> {
    // Only maps with keys that are no text cannot be written, and there are none.
    let mut bytes = serde_json::to_vec(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all() -> Vec<Request> {
        vec![
            Request::Status {},
            Request::Pause { lease_ns: Some(3_000_000_000) },
            Request::Resume {},
            Request::Cancel {},
            Request::AcceptHold {},
            Request::Shutdown { keep_devices: true },
            Request::Add { toml: "name = \"a\"".into(), directory: Some("/".into()) },
            Request::Remove { device: "a".into() },
            Request::Restart { device: "a".into() },
            Request::Events { last: 3, follow: true },
            Request::Report { last: 2 },
            Request::DeclareRam { path: "/ram".into() },
        ]
    }

    #[test]
    fn every_request_is_read_as_it_was_written_and_has_its_name_in_the_list() {
        let requests = all();
        assert_eq!(requests.len(), Request::NAMES.len());
        for (request, name) in requests.into_iter().zip(Request::NAMES) {
            let written = RequestLine { id: 7, request };
            let line = written.to_line();
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            assert_eq!(RequestLine::parse(&line).unwrap(), written);
            let value: Value = serde_json::from_slice(&line).unwrap();
            assert_eq!(value["request"], name);
        }
    }

    #[test]
    fn what_need_not_be_said_need_not_be_said() {
        for (line, request) in [
            (r#"{"id":1,"request":"status"}"#, Request::Status {}),
            (r#"{"id":1,"request":"shutdown"}"#, Request::Shutdown { keep_devices: false }),
            (r#"{"id":1,"request":"events"}"#, Request::Events { last: 0, follow: false }),
            (r#"{"request":"report","id":1,"with":{}}"#, Request::Report { last: 1 }),
        ] {
            assert_eq!(RequestLine::parse(line.as_bytes()).unwrap().request, request);
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_the_number_of_the_request() {
        for (line, id, text) in [
            ("", None, "EOF"),
            ("pause", None, "expected value"),
            ("[]", None, "no request"),
            (r#"{"request":"pause"}"#, None, "missing field `id`"),
            (r#"{"id":-1,"request":"pause"}"#, None, "invalid value"),
            (r#"{"id":4,"request":"pause","extra":1}"#, Some(4), "unknown field `extra`"),
            (r#"{"id":4,"request":"puase"}"#, Some(4), "did you mean \"pause\"?"),
            (r#"{"id":4,"request":"remove"}"#, Some(4), "missing field `device`"),
            (r#"{"id":4,"request":"remove","with":{"device":1}}"#, Some(4), "invalid type"),
            (r#"{"id":4,"request":"pause","with":{"now":1}}"#, Some(4), "unknown field `now`"),
            (r#"{"id":4,"request":"pause","with":{"lease-ns":-1}}"#, Some(4), "invalid value"),
        ] {
            let (found, error) = RequestLine::parse(line.as_bytes()).unwrap_err();
            assert_eq!(found, id, "{line}");
            assert!(error.to_string().contains(text), "{line}: {error}");
        }
    }

    /// The answers to a request, as they are read and written again.
    fn again(request: &Request, ok: Value) -> Value {
        fn typed<T: Serialize + serde::de::DeserializeOwned>(ok: Value) -> Value {
            serde_json::to_value(serde_json::from_value::<T>(ok).unwrap()).unwrap()
        }
        match request {
            Request::Status {} => typed::<StatusReply>(ok),
            Request::Pause { .. } | Request::Resume {} => typed::<ReportReply>(ok),
            Request::Shutdown { .. } => typed::<ShutdownReply>(ok),
            Request::Remove { .. } => typed::<RemoveReply>(ok),
            Request::Report { .. } => typed::<ReportsReply>(ok),
            Request::Cancel {}
            | Request::AcceptHold {}
            | Request::Add { .. }
            | Request::Restart { .. }
            | Request::Events { .. }
            | Request::DeclareRam { .. } => json!({}),
        }
    }

    #[test]
    fn the_examples_of_the_page_are_what_this_program_reads_and_writes() {
        let page = include_str!("../../docs/operator-socket.md");
        let mut requests = std::collections::BTreeMap::new();
        let mut seen = std::collections::BTreeSet::new();
        for line in page.lines() {
            if let Some(line) = line.strip_prefix("→ ") {
                match RequestLine::parse(line.as_bytes()) {
                    Ok(line) => {
                        let name = serde_json::to_value(&line.request).unwrap()["request"].clone();
                        seen.insert(name.as_str().unwrap().to_owned());
                        requests.insert(line.id, line.request);
                    }
                    Err((_, RequestError::Unknown { name, .. })) => assert_eq!(name, "puase"),
                    Err((_, error)) => panic!("{line}: {error}"),
                }
            }
            let Some(text) = line.strip_prefix("← ") else { continue };
            let value: Value = serde_json::from_str(text).unwrap();
            if value.get("protocol").is_some() {
                let greeting: Greeting = serde_json::from_value(value.clone()).unwrap();
                assert_eq!(serde_json::to_value(&greeting).unwrap(), value);
                assert_eq!(greeting.protocol, PROTOCOL);
                continue;
            }
            let line: Line = serde_json::from_value(value.clone()).unwrap();
            assert_eq!(serde_json::to_value(&line).unwrap(), value, "{text}");
            if let (Line { id: Some(id), body: Body::Ok(ok) }, Some(request)) =
                (&line, line.id.and_then(|id| requests.get(&id)))
            {
                assert_eq!(again(request, ok.clone()), *ok, "{id}: {text}");
            }
        }
        for name in Request::NAMES {
            assert!(seen.contains(name) || page.contains(&format!("`{name}`")), "{name}");
        }
        assert!(page.contains(&format!("{MAX_REQUEST}").replace("65536", "65,536")));
        for code in ["bad-request", "bad-device", "refused", "failed", "transition"] {
            assert!(serde_json::from_value::<Code>(code.into()).is_ok());
            assert!(page.contains(&format!("| `{code}` |")), "{code}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = RequestLine::parse(&bytes);
        }

        #[test]
        fn no_json_is_too_strange(id in any::<i64>(), name in "[a-z-]{0,12}", with in "\\PC{0,40}") {
            let line = json!({ "id": id, "request": name, "with": { "device": with } });
            if let Ok(line) = RequestLine::parse(line.to_string().as_bytes()) {
                prop_assert!(["remove", "restart"].contains(&name.as_str()), "{:?}", line);
            }
        }
    }
}
