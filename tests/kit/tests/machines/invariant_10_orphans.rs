//! Take-overs.
