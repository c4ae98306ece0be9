//! Room that the kernel makes once, when it is first needed: made before the guest becomes a template, pods share it.

use std::io;
use std::path::Path;

/// Control groups that together take more memory per CPU than the kernel begins with (28 KiB).
const GROUPS: u32 = 16;

/// A group that stays, with nothing in it. While there is one, the kernel's code for control groups is switched on: in some twenty
/// pages of it and of the network's code instructions are replaced when the first one comes and when the last one goes.
const KEPT: &str = "kept";

/// Has the kernel make its second chunk of memory per CPU, of which it keeps an empty one. With it comes a table for who pays for
/// what (`pcpu_alloc_chunk`), four mebibytes of zeroes; without this the first container's control groups and namespaces would
/// make each pod write them. Then leaves [`KEPT`].
///
/// # Errors
/// When a control group can't be made or removed.
pub(crate) fn for_each_cpu(control_groups: &Path) -> io::Result<()> {
    let kept = std::fs::create_dir(control_groups.join(KEPT));
    let groups = (0..GROUPS).map(|number| control_groups.join(format!("room-{number}")));
    let made: Vec<_> = groups.clone().map(std::fs::create_dir).collect();
    let removed: Vec<_> = groups
        .zip(&made)
        .filter(|(_, made)| made.is_ok())
        .map(|(group, _)| std::fs::remove_dir(group))
        .collect();
    made.into_iter().chain(removed).chain([kept]).collect()
}
