//! The coordinator of a virtual machine's device processes, to be embedded in a VMM.
//!
//! - [`process`]: starts device processes and proves that they are gone;
//! - [`logs`]: takes what they write to standard error into this program's log.

pub mod logs;
pub mod process;
