//! A fault of a plan as it is written, and errors that say what was meant.

use super::{Cause, Injection, Outside, PlanError};
use serde::{Deserialize, Serialize};
use standstill_protocol::fault::Fault;

/// One fault as it stands in a file. (With `#[serde(flatten)]` an error would not know its line.)
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Written {
    device: u16,
    #[serde(default = "super::once")]
    round: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    inside: Option<Fault>,
    #[serde(skip_serializing_if = "Option::is_none")]
    outside: Option<Outside>,
}

impl TryFrom<Written> for Injection {
    type Error = &'static str;

    fn try_from(written: Written) -> Result<Self, Self::Error> {
        let Written { device, round, inside, outside } = written;
        let cause = match (inside, outside) {
            (Some(fault), None) => Cause::Inside(fault),
            (None, Some(outside)) => Cause::Outside(outside),
            (None, None) => return Err("a fault needs `inside` or `outside`"),
            (Some(_), Some(_)) => return Err("a fault is either `inside` or `outside`"),
        };
        Ok(Self { device, round, cause })
    }
}

impl From<Injection> for Written {
    fn from(injection: Injection) -> Self {
        let Injection { device, round, cause } = injection;
        let (inside, outside) = match cause {
            Cause::Inside(fault) => (Some(fault), None),
            Cause::Outside(outside) => (None, Some(outside)),
        };
        Self { device, round, inside, outside }
    }
}

/// Finds the word that was meant.
pub(super) fn explained(source: toml::de::Error) -> PlanError {
    let meant = meant(source.message());
    PlanError::Text { source, meant }
}

/// The word that is most like the one that serde does not know. Its error has that one in the first
/// pair of backticks and those that it knows in the others.
fn meant(message: &str) -> Option<String> {
    let unknown = message.starts_with("unknown variant") || message.starts_with("unknown field");
    let mut words = message.split('`').skip(1).step_by(2);
    let word = words.next().filter(|_| unknown)?;
    let length = word.chars().count();
    words
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= length.min(candidate.chars().count()) / 2)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate.to_owned())
}
