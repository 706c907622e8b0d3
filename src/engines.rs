//! A machine of copy engines that write into each other's memory, its VMM, and the oracle that says
//! whether it stood still: what `standstill demo` shows and `standstill chaos` tries faults on.
//!
//! - [`machine`]: guest RAM, device processes, everything mapped into everything;
//! - [`engine`]: drives one copy engine as a guest's driver would;
//! - [`layout`] and [`pairs`]: who writes what where;
//! - [`oracle`]: did the machine really stand still?

pub(crate) mod engine;
pub(crate) mod layout;
pub(crate) mod machine;
pub(crate) mod oracle;
pub(crate) mod pairs;
