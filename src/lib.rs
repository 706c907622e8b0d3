//! Stops and starts all device processes of a virtual machine as one.
