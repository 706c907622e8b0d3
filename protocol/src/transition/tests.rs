//! Tests of the coordinator's side of the barrier.

mod properties;
mod world;
