//! What the fuzz targets share: how an input is taken apart, and how memory is counted.

#![warn(missing_docs)]

pub mod memory;
pub mod session;
pub mod socket;
pub mod track;
pub mod vfio_user;
