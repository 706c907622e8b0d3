//! Machines, rogue devices and oracles for tests of device processes.
