//! Making a root file system: unpacking an image for the first time, and a writable copy of an unpacked one.
//!
//! This is containerd's part alone, so the rows are by snapshotter and not by runtime; it decides what each of the
//! snapshotters is worth to a runtime that can use it.

use std::time::Instant;

use super::Bench;
use bulkhead_cri::grpc::GrpcError;

/// Snapshotters: the default one, and the one whose images go into a virtual machine as a disk.
const SNAPSHOTTERS: [&str; 2] = ["overlayfs", "erofs"];
/// Each is measured so often.
const ROUNDS: usize = 3;

/// Measures it.
pub(crate) async fn measure(bench: &mut Bench<'_>) {
    for snapshotter in SNAPSHOTTERS {
        for round in 0..ROUNDS {
            if let Err(error) = one(bench, snapshotter, round).await {
                bench.progress(&format!("SKIPPED setup with {snapshotter}: {error}"));
                bench.results.skip("rootfs-setup-first", snapshotter, error.to_string());
                break;
            }
        }
        bench.progress(&format!("setup: {snapshotter} done"));
    }
}

async fn one(bench: &mut Bench<'_>, snapshotter: &'static str, round: usize) -> Result<(), GrpcError> {
    let (committed, copy) = (format!("setup-{round}"), format!("setup-copy-{round}"));
    let started = Instant::now();
    bench.image.unpack(&bench.client, snapshotter, &committed).await?;
    bench.results.add_time("rootfs-setup-first", snapshotter, started.elapsed());

    let started = Instant::now();
    bench.client.prepare_snapshot(snapshotter, &copy, &committed).await?;
    bench.results.add_time("rootfs-setup-repeated", snapshotter, started.elapsed());

    bench.client.remove_snapshot(snapshotter, &copy).await?;
    bench.client.remove_snapshot(snapshotter, &committed).await
}
