//! The `qmp` of a machine file: QEMU's control socket.

use super::diagnostic::Problem;
use super::fields::{Fields, Placed};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a VM has to stop, or to go on, if the file says nothing: as any hook.
const DEADLINE: Duration = Duration::from_secs(5);

/// The VM whose processors stop and start with the machine.
#[derive(Clone, Debug)]
pub(crate) struct QmpEntry {
    /// Where QEMU serves QMP.
    pub(crate) path: Placed<PathBuf>,
    /// How long one stop or start of the VM may take.
    pub(crate) deadline: Duration,
}

impl QmpEntry {
    /// The name of the hook that it is.
    pub(crate) const HOOK: &str = "qmp";

    /// `runtime` is the machine's folder, in which a relative path begins.
    pub(super) fn from_fields(root: &Fields<'_>, runtime: &Path) -> Option<Self> {
        // Its type is noted where the other deadlines are read.
        let deadlines = root.quiet_table("deadlines", "the table of deadlines");
        let deadline = deadlines.as_ref().and_then(|fields| {
            let deadline = fields.deadline("qmp")?;
            let span = fields.key("qmp").unwrap_or_default();
            if !deadline.is_zero() && root.key("qmp").is_none() {
                let message = "the deadline `qmp` needs a machine with `qmp`, the path of a socket";
                fields.note(Problem::new(message, span));
            }
            Some(deadline)
        });
        let Placed { value, span } = root.text("qmp")?;
        if value.is_empty() {
            root.note(Problem::new("`qmp` must be the path of a socket", span.clone()));
        }
        let path = Placed { value: runtime.join(value), span };
        Some(Self { path, deadline: deadline.unwrap_or(DEADLINE) })
    }
}
