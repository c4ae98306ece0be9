//! What containers change of their root file systems, as the kubelet sees it.

use bulkhead_cri::proto;

use crate::cases::Environment;
use crate::cri::{Container, Pod};
use crate::failure::{Explain, Outcome};
use crate::process::eventually;
use crate::{ensure, ensure_eq};

const MIB: u64 = 1 << 20;

/// containerd looks at snapshots every ten seconds.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

fn used(container: &Container<'_>) -> Outcome<u64> {
    let request = proto::ContainerStatsRequest { container_id: container.id.clone(), ..Default::default() };
    let answer = container.node.client().container_stats(&request).explain(|| "statistics".into())?;
    let stats = answer.stats.into_option().explain(|| "statistics without statistics".into())?;
    let layer =
        stats.writable_layer.into_option().explain(|| "no writable layer in the statistics".into())?;
    Ok(layer.used_bytes.value)
}

/// The writable layer's size follows what the container has in it; a removed container's goes.
pub(crate) fn counted(environment: &mut Environment) -> Outcome<String> {
    let pod = Pod::run(environment.node()?, environment.handler(), "changes", |_| {})?;
    let container = pod.start("writes", "sleep 100000", |_| {})?;
    let settles = |what: &str, range: std::ops::Range<u64>| {
        eventually(what, LIMIT, || {
            let used = used(&container)?;
            ensure!(range.contains(&used), "{used} bytes");
            Ok(used)
        })
    };
    let before = settles("the size of a new layer", 0..2 * MIB)?;
    container.exec("dd if=/dev/urandom of=/big bs=1M count=20 2>/dev/null; sync")?.success()?;
    let with = settles("the size of a layer with 20 MiB", 20 * MIB..26 * MIB)?;
    container.exec("rm /big; sync")?.success()?;
    let without = settles("the size of a layer without them", 0..3 * MIB)?;
    let beside = pod.start("beside", "test ! -e /mark && echo x >/mark && cat /mark", |_| {})?;
    ensure_eq!(beside.wait()?.success()?, "x\n", "files of another container");
    pod.finish()?;
    Ok(format!("{} KiB, {} KiB, {} KiB", before >> 10, with >> 10, without >> 10))
}
