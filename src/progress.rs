//! A bar that shows how far a long command is.

use std::io::{self, IsTerminal};

/// What is going on, for a person at a terminal; silent elsewhere.
pub(crate) struct Progress {
    /// The bar itself; steps are counted by it.
    pub(crate) bar: indicatif::ProgressBar,
}

impl Progress {
    /// Nothing is said yet.
    pub(crate) fn new() -> Self {
        let bar = if io::stderr().is_terminal() {
            indicatif::ProgressBar::new(0)
        } else {
            indicatif::ProgressBar::hidden()
        };
        let style = indicatif::ProgressStyle::with_template(
            "{msg:30} {wide_bar:.green} {pos:>6}/{len} {elapsed:>5}",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Self { bar }
    }

    /// Begins something that has so many steps.
    pub(crate) fn say(&self, what: &'static str, steps: usize) {
        self.bar.set_length(steps as u64);
        self.bar.set_position(0);
        self.bar.set_message(what);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
