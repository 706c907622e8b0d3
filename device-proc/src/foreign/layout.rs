//! A backend's own lists of regions and interrupts, checked once.

use crate::device::PciIdentity;
use crate::interrupt::{IrqCounts, MAX_MSI_VECTORS, MAX_MSIX_VECTORS};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use standstill_protocol::message::FileIdentity;
use standstill_vfio_user::wire::{
    self, PCI_CONFIG_REGION, PCI_IRQS, PCI_REGIONS, REGION_MAPPABLE, REGION_READABLE,
    REGION_WRITABLE, RegionInfo, SparseArea,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use thiserror::Error;
use vfio_user::{IrqInfo, ServerBackend, ServerRegion};

/// The least that a configuration space has, in bytes: the header.
const CONFIG_HEADER: usize = 64;

/// A backend cannot be served with what its author says of it.
#[derive(Debug, Error)]
pub enum ForeignError {
    /// A region is not one that a PCI device can have.
    #[error("region {index}: {what}")]
    Region {
        /// Its index.
        index: u32,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The file of a region cannot be used.
    #[error("the file of region {index} cannot be used")]
    Memory {
        /// Index of the region.
        index: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An interrupt index is there twice, or has more interrupts than a PCI device can have.
    #[error("interrupt index {index} with {count} interrupts: there twice, or too many")]
    Irq {
        /// The index.
        index: u32,
        /// How many it is to have.
        count: u32,
    },
    /// The backend does not let its own configuration space be read.
    #[error("the configuration space cannot be read")]
    Config(#[source] io::Error),
}

/// A region as it is described to clients, and its file.
#[derive(Debug)]
struct Region {
    info: RegionInfo,
    memory: Option<(OwnedFd, FileIdentity)>,
}

/// The regions and interrupts of a backend, by index.
#[derive(Debug)]
pub(super) struct Layout {
    regions: Vec<Region>,
    irqs: Vec<wire::IrqInfo>,
}

impl Layout {
    pub(super) fn new(regions: Vec<ServerRegion>, irqs: &[IrqInfo]) -> Result<Self, ForeignError> {
        let absent =
            |index| Region { info: RegionInfo { index, ..RegionInfo::default() }, memory: None };
        let mut layout = Self {
            regions: (0..PCI_REGIONS).map(absent).collect(),
            irqs: (0..PCI_IRQS).map(|index| wire::IrqInfo { flags: 0, index, count: 0 }).collect(),
        };
        let mut seen = Vec::new();
        for region in regions {
            let index = region.region_info.index;
            let refused = |what| ForeignError::Region { index, what };
            let place = usize::try_from(index).ok().and_then(|at| layout.regions.get_mut(at));
            let place = place.ok_or(refused("a PCI device has regions 0 to 8"))?;
            if seen.contains(&index) {
                return Err(refused("it is there twice"));
            }
            seen.push(index);
            *place = describe(region)?;
        }
        let config = layout.region(PCI_CONFIG_REGION);
        if config.size < CONFIG_HEADER as u64 || config.flags & REGION_READABLE == 0 {
            let what = "a configuration space of at least 64 bytes that can be read";
            return Err(ForeignError::Region { index: PCI_CONFIG_REGION, what });
        }
        let most = [1, u32::from(MAX_MSI_VECTORS), u32::from(MAX_MSIX_VECTORS), 1, 1];
        let mut seen = Vec::new();
        for irq in irqs {
            let IrqInfo { index, flags, count } = *irq;
            let refused = ForeignError::Irq { index, count };
            let at = usize::try_from(index).unwrap_or(usize::MAX);
            let (Some(place), Some(most)) = (layout.irqs.get_mut(at), most.get(at)) else {
                return Err(refused);
            };
            if count > *most || seen.contains(&index) {
                return Err(refused);
            }
            seen.push(index);
            *place = wire::IrqInfo { flags, index, count };
        }
        Ok(layout)
    }

    fn find(&self, index: u32) -> Option<&Region> {
        self.regions.get(usize::try_from(index).ok()?)
    }

    /// What a region is like.
    pub(super) fn region(&self, index: u32) -> RegionInfo {
        let absent = || RegionInfo { index, ..RegionInfo::default() };
        self.find(index).map_or_else(absent, |region| region.info.clone())
    }

    /// Its flags and its size in bytes.
    pub(super) fn flags_and_size(&self, index: u32) -> (u32, u64) {
        self.find(index).map_or((0, 0), |region| (region.info.flags, region.info.size))
    }

    /// Its file.
    pub(super) fn region_memory(&self, index: u32) -> Option<BorrowedFd<'_>> {
        self.find(index)?.memory.as_ref().map(|(file, _)| file.as_fd())
    }

    /// The files of all regions, each once.
    pub(super) fn memory_files(&self) -> Vec<FileIdentity> {
        let mut files: Vec<_> =
            self.regions.iter().filter_map(|region| Some(region.memory.as_ref()?.1)).collect();
        files.sort_unstable();
        files.dedup();
        files
    }

    /// How many interrupts an index has, and how they work.
    pub(super) fn irq(&self, index: u32) -> wire::IrqInfo {
        let found = usize::try_from(index).ok().and_then(|at| self.irqs.get(at));
        found.copied().unwrap_or(wire::IrqInfo { flags: 0, index, count: 0 })
    }

    /// How many interrupts there are; at most as many as PCI has, which was checked.
    pub(super) fn counts(&self) -> IrqCounts {
        let count = |index| u16::try_from(self.irq(index).count).unwrap_or(0);
        IrqCounts { intx: count(0), msi: count(1), msix: count(2) }
    }

    /// What the backend's configuration space says.
    pub(super) fn identity(
        &self,
        backend: &mut dyn ServerBackend,
    ) -> Result<PciIdentity, ForeignError> {
        let mut header = [0; CONFIG_HEADER];
        for (at, data) in (0..).step_by(4).zip(header.chunks_mut(4)) {
            backend.region_read(PCI_CONFIG_REGION, at, data).map_err(ForeignError::Config)?;
        }
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let class = [header[9], header[10], header[11], 0];
        Ok(PciIdentity {
            vendor: word(0x00),
            device: word(0x02),
            subsystem_vendor: word(0x2c),
            subsystem: word(0x2e),
            class: u32::from_le_bytes(class),
            revision: header[8],
        })
    }
}

/// A region as clients see it: what can be mapped always has areas.
fn describe(region: ServerRegion) -> Result<Region, ForeignError> {
    let ServerRegion { region_info, sparse_areas, mmap_fd } = region;
    let (index, size) = (region_info.index, region_info.size);
    let refused = |what| ForeignError::Region { index, what };
    let mut flags = region_info.flags & (REGION_READABLE | REGION_WRITABLE);
    let mut sparse = None;
    let mut memory = None;
    if let Some(fd) = mmap_fd
        && region_info.flags & REGION_MAPPABLE != 0
    {
        if index == PCI_CONFIG_REGION {
            return Err(refused("a configuration space cannot be mapped"));
        }
        let areas = sparse_areas.iter().map(|area| area.area);
        let mut areas: Vec<_> =
            areas.map(|area| SparseArea { offset: area.offset, size: area.size }).collect();
        if areas.is_empty() {
            areas.push(SparseArea { offset: 0, size });
        }
        let fits =
            |area: &SparseArea| area.offset.checked_add(area.size).is_some_and(|end| end <= size);
        if !areas.iter().all(fits) {
            return Err(refused("an area that can be mapped ends beyond it"));
        }
        flags |= REGION_MAPPABLE;
        sparse = Some(areas);
        memory = Some(own(fd).map_err(|source| ForeignError::Memory { index, source })?);
    }
    let info =
        RegionInfo { flags, index, size, offset: region_info.offset, sparse, msix_mappable: false };
    Ok(Region { info, memory })
}

/// An fd of one's own onto the file of a number that is somebody else's to close.
fn own(fd: RawFd) -> io::Result<(OwnedFd, FileIdentity)> {
    let myself = pidfd_open(getpid(), PidfdFlags::empty())?;
    let file = pidfd_getfd(&myself, fd, PidfdGetfdFlags::empty())?;
    let facts = rustix::fs::fstat(&file)?;
    Ok((file, FileIdentity { device: facts.st_dev, inode: facts.st_ino }))
}
