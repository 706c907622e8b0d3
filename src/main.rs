//! The `standstill` command.

fn main() {}
