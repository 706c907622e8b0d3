//! Errors for people.

use std::error::Error;

/// The error and all that caused it, each on a line of its own.
pub(crate) fn explain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut last = text.clone();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors repeat their source in their own text.
        if !last.contains(&cause_text) {
            text.push_str("\n  because: ");
            text.push_str(&cause_text);
        }
        last = cause_text;
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use thiserror::Error;

    #[derive(Debug, Error)]
    #[error("{text}")]
    struct Told {
        text: &'static str,
        source: Option<Box<Told>>,
    }

    fn told(text: &'static str, source: Option<Told>) -> Told {
        Told { text, source: source.map(Box::new) }
    }

    #[test]
    fn a_cause_is_told_once() {
        let cause = told("exited with status 3", Some(told("no memory", None)));
        let error = told("nic0 exited with status 3; it last wrote: oops", Some(cause));
        let expected = "nic0 exited with status 3; it last wrote: oops\n  because: no memory";
        assert_eq!(explain(&error), expected);
    }
}
