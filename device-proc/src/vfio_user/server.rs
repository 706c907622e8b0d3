//! The thread that serves one client after another.

use super::adapter::Adapter;
use super::endpoint::{CONFIG_REGION, Endpoint, REGIONS};
use crate::device::Device;
use crate::interrupt::IrqIndex;
use crate::pci::BarUse;
use crate::serve::panics::contained;
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::thread::Builder;
use std::time::Duration;
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    vfio_region_info, vfio_region_sparse_mmap_area,
};
use vfio_user::{IrqInfo, Server, ServerRegion, SparseArea};

/// Flags of `GET_IRQ_INFO`.
const IRQ_EVENTFD: u32 = 1;
const IRQ_MASKABLE: u32 = 1 << 1;
const IRQ_AUTOMASKED: u32 = 1 << 2;

/// After an error in a row of them the thread rests, first this long, then twice as long.
const FIRST_REST: Duration = Duration::from_millis(10);
const LONGEST_REST: Duration = Duration::from_secs(1);

/// Serves clients of this listener on a thread of its own, until the process ends.
pub(crate) fn start<D: Device>(listener: OwnedFd, endpoint: Endpoint<D>) -> io::Result<()> {
    let waiting = UnixListener::from(listener.try_clone()?);
    // It may be shared with whoever gave it: the crate waits in accept.
    waiting.set_nonblocking(false)?;
    let server = Server::from_owned_fd(listener, true, irqs(&endpoint), regions(&endpoint));
    Builder::new().name("vfio-user".into()).spawn(move || run(&waiting, &server, &endpoint))?;
    Ok(())
}

fn run<D: Device>(waiting: &UnixListener, server: &Server, endpoint: &Endpoint<D>) {
    let mut rest = FIRST_REST;
    loop {
        // Seen here first: the crate does not say when a client comes.
        match poll(&mut [PollFd::new(waiting, PollFlags::IN)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => tracing::warn!(%error, "waiting for a client"),
        }
        endpoint.connected();
        // It keeps nothing from one client to the next.
        let served = contained(|| server.run(&mut Adapter(endpoint)));
        endpoint.disconnected();
        match served {
            Ok(Ok(())) => rest = FIRST_REST,
            Err(error) => tracing::warn!(%error, "serving a client ended"),
            Ok(Err(error)) => {
                tracing::warn!(%error, "serving a client ended");
                // Where accepting fails, it fails again at once.
                std::thread::park_timeout(rest);
                rest = (rest * 2).min(LONGEST_REST);
            }
        }
    }
}

fn irqs<D: Device>(endpoint: &Endpoint<D>) -> Vec<IrqInfo> {
    let counts = endpoint.parts().layout.irqs;
    let info = |(index, irq): (u32, IrqIndex)| {
        let flags = match irq {
            IrqIndex::Intx => IRQ_EVENTFD | IRQ_MASKABLE | IRQ_AUTOMASKED,
            _ => IRQ_EVENTFD,
        };
        IrqInfo { index, flags, count: irq.count(counts) }
    };
    (0..).zip(IrqIndex::ALL).map(info).collect()
}

fn regions<D: Device>(endpoint: &Endpoint<D>) -> Vec<ServerRegion> {
    let bars = &endpoint.parts().layout.bars;
    let region = |index: u32| {
        let size = endpoint.region_size(index);
        let mut flags = 0;
        if size > 0 {
            flags |= VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        }
        let bar = usize::try_from(index).ok().filter(|_| index < CONFIG_REGION);
        let mmap_fd = bar
            .filter(|&bar| bars.get(bar).is_some_and(|bar| bar.usage == BarUse::Memory))
            // It stays open as long as the endpoint, which the server's thread owns.
            .and_then(|bar| endpoint.parts().bar_memory[bar].as_ref().map(AsRawFd::as_raw_fd));
        let mut sparse_areas = Vec::new();
        if mmap_fd.is_some() {
            flags |= VFIO_REGION_INFO_FLAG_MMAP;
            // The fd is sent only with an area.
            let area = vfio_region_sparse_mmap_area { offset: 0, size };
            sparse_areas.push(SparseArea { area });
        }
        let region_info = vfio_region_info {
            argsz: u32::try_from(size_of::<vfio_region_info>()).unwrap_or(u32::MAX),
            flags,
            index,
            cap_offset: 0,
            size,
            offset: 0,
        };
        ServerRegion { region_info, sparse_areas, mmap_fd }
    };
    (0..REGIONS).map(region).collect()
}
