//! A container's disks: block devices that it asks for, and its root file system if that is on a disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_agent_protocol::ROOTS_DIR;
use bulkhead_vmm_protocol::roots;
use containerd_shim_protos::types::mount::Mount;

use super::changes::{CoveredRoot, forget_in};
use super::layers::{Changes, LayeredRoot};
use super::rootfs::RootFiles;
use crate::error::{ApiError, chain};
use crate::host::changes::{self, ChangesDisk};
use crate::host::disk::{DiskError, OpenDisk};
use crate::host::opaque;
use crate::pod::Pod;
use crate::pod::disks::{AttachError, AttachedDisk, FileSystem, Overlay};
use crate::spec::{DeviceNumber, DiskPlace, HostDisk};

/// File systems on a disk that the guest mounts itself; all others are mounted on the host and shared.
const GUEST_FILE_SYSTEMS: [&str; 1] = ["ext4"];

/// Why a container's changes are not where they should be.
const NO_ROOM: &str =
    "a container's changes are shared as files: the pod has no slot left for a disk with them";

/// A root file system that the guest mounts by itself.
#[derive(Debug)]
pub(crate) enum GuestRoot {
    /// One on a disk of its own.
    Disk(RootDisk),
    /// Layers of an image, and where the container's changes go.
    Layers(LayeredRoot),
    /// The container's changes, on top of what is shared as files.
    Covered(CoveredRoot),
}

/// What may be on disks of the guest that could be shared as files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allowance {
    /// How many disks there may be.
    pub disks: usize,
    /// Whether what the container changes is to be on one.
    pub changes: bool,
}

impl GuestRoot {
    /// What containerd's mounts are, if they are such a one.
    pub(crate) fn open(mounts: &[Mount], allowed: Allowance) -> Result<Option<GuestRoot>, ApiError> {
        if let Some(disk) = RootDisk::open(mounts)? {
            return Ok(Some(GuestRoot::Disk(disk)));
        }
        // What is shared as files must not show a container what it was.
        if !allowed.changes {
            forget_in(mounts);
        }
        if allowed.disks == 0 {
            if allowed.changes {
                log::warn!("{NO_ROOM}");
                forget_in(mounts);
            }
            return Ok(None);
        }
        let both = allowed.disks > 1;
        if let Some(root) = LayeredRoot::of(mounts, allowed.changes && both)? {
            if allowed.changes && !both && matches!(root.changes, Changes::Files(_)) {
                log::warn!("{NO_ROOM}");
                forget_in(mounts);
            }
            return Ok(Some(GuestRoot::Layers(root)));
        }
        let covered = if allowed.changes { CoveredRoot::of(mounts) } else { None };
        Ok(covered.map(GuestRoot::Covered))
    }
}

/// A root file system on a disk, open on the host.
#[derive(Debug)]
pub(crate) struct RootDisk {
    disk: OpenDisk,
    file_system: FileSystem,
}

impl RootDisk {
    /// Opens the disk that containerd's mounts consist of, if they do: one file system that the guest knows, on a block
    /// device (as the snapshotter `devmapper` has it) or in an image (as `blockfile` has it).
    pub(crate) fn open(mounts: &[Mount]) -> Result<Option<RootDisk>, DiskError> {
        let [mount] = mounts else { return Ok(None) };
        let known = GUEST_FILE_SYSTEMS.contains(&mount.type_.as_str());
        if !known || !mount.target.is_empty() || !mount.source.starts_with('/') {
            return Ok(None);
        }
        let read_only = mount.options.iter().any(|option| option == "ro");
        let disk = OpenDisk::open_path(PathBuf::from(&mount.source), read_only)?;
        let file_system = FileSystem { kind: mount.type_.clone(), options: mount.options.clone() };
        Ok(Some(RootDisk { disk, file_system }))
    }
}

/// Open disks for a container.
#[derive(Debug)]
pub(crate) struct OpenDisks {
    root: Option<GuestRoot>,
    devices: Vec<(DeviceNumber, OpenDisk)>,
}

/// The disks of a container in its pod.
#[derive(Debug, Default)]
pub(crate) struct ContainerDisks {
    /// Those that somebody waits for.
    pub attached: Vec<AttachedDisk>,
    /// Those of which nothing is left to be written: layers, and a container's changes.
    pub passing: Vec<AttachedDisk>,
    /// What numbers the block devices of the host have in the guest.
    pub places: Vec<DiskPlace>,
    /// Where the root file system is mounted in the guest, if it is on a disk.
    pub root: Option<PathBuf>,
    /// Where on the host is what the container changes, if the guest makes an overlay of it.
    pub changes: Option<PathBuf>,
    /// The file that it is in, if it is a disk.
    pub disk_of_changes: Option<PathBuf>,
}

impl ContainerDisks {
    /// Takes them away from the pod, if it still lives. What was on the disk with the container's changes is of no use then, and
    /// nobody has to wait until the guest has let go of it.
    pub(crate) async fn detach(&self, pod: &Arc<Pod>) {
        if pod.death().is_none() {
            if !self.passing.is_empty() {
                let (pod, passing) = (pod.clone(), self.passing.clone());
                tokio::spawn(async move { pod.detach_disks(&passing).await });
            }
            pod.detach_disks(&self.attached).await;
        }
        if let Some(file) = &self.disk_of_changes {
            changes::remove(file);
        }
    }

    /// Has the host know what the guest's overlay knows of the container's changes, for whoever makes an image of them.
    pub(crate) async fn tell_host_of_changes(&self) {
        let Some(changes) = self.changes.clone() else { return };
        match tokio::task::spawn_blocking(move || opaque::tell_host(&changes)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                log::warn!("an image of the container's changes may lack removals: {}", chain(&error))
            }
            Err(error) => log::warn!("an image of the container's changes may lack removals: {error}"),
        }
    }
}

impl OpenDisks {
    /// Opens the block devices that a container asks for, beside its root.
    pub(crate) fn open(root: Option<GuestRoot>, devices: &[HostDisk]) -> Result<OpenDisks, DiskError> {
        let open = |disk: &HostDisk| Ok((disk.number, OpenDisk::open(disk)?));
        Ok(OpenDisks { root, devices: devices.iter().map(open).collect::<Result<_, DiskError>>()? })
    }

    /// What of the root file system is shared as files, which `mounts` would be without a disk.
    pub(crate) fn root_files<'a>(&'a self, mounts: &'a [Mount]) -> RootFiles<'a> {
        match &self.root {
            None => RootFiles::Mounts(mounts),
            Some(GuestRoot::Layers(LayeredRoot { changes: Changes::Files(changes), .. })) => {
                RootFiles::Changes(&changes.directory)
            }
            Some(GuestRoot::Covered(CoveredRoot { lower, .. })) => RootFiles::Lower(lower),
            Some(_) => RootFiles::None,
        }
    }

    /// Puts them into the pod, all or none. What is shared of the container's files is in the pod already.
    pub(crate) async fn attach(self, pod: &Arc<Pod>, container: &str) -> Result<ContainerDisks, ApiError> {
        let mut disks = ContainerDisks::default();
        match self.attach_to(pod, container, &mut disks).await {
            Ok(()) => Ok(disks),
            Err(error) => {
                disks.detach(pod).await;
                Err(error.into())
            }
        }
    }

    async fn attach_to(
        self,
        pod: &Pod,
        container: &str,
        disks: &mut ContainerDisks,
    ) -> Result<(), AttachError> {
        if let Some(root) = &self.root {
            let attached = match root {
                GuestRoot::Disk(RootDisk { disk, file_system }) => {
                    pod.attach_disk(disk, Some(file_system)).await?
                }
                GuestRoot::Layers(LayeredRoot { layers, changes, options }) => {
                    let changes = match changes {
                        Changes::None => None,
                        Changes::Files(changes) => {
                            let place = |name: &str| shared(container, &format!("{}/{name}", roots::CHANGES));
                            disks.changes = Some(changes.directory.join(&changes.upper));
                            Some((place(&changes.upper), place(&changes.work)))
                        }
                        Changes::Disk(ChangesDisk { disk }) => {
                            disks.disk_of_changes = Some(disk.path.clone());
                            let attached = pod.attach_changes(disk, None, &[]).await?;
                            let places = attached.changes();
                            disks.passing.push(attached);
                            Some(places)
                        }
                    };
                    pod.attach_layers(layers, &Overlay { changes, options: options.clone() }).await?
                }
                GuestRoot::Covered(CoveredRoot { disk: ChangesDisk { disk }, options, .. }) => {
                    disks.disk_of_changes = Some(disk.path.clone());
                    let lower = shared(container, roots::LOWER);
                    pod.attach_changes(disk, Some(&lower), options).await?
                }
            };
            disks.root = Some(attached.mount_point());
            let is_kept = matches!(root, GuestRoot::Disk(_));
            if is_kept { &mut disks.attached } else { &mut disks.passing }.push(attached);
        }
        for (host, disk) in &self.devices {
            let attached = pod.attach_disk(disk, None).await?;
            disks.places.push(DiskPlace { host: *host, guest: attached.number });
            disks.attached.push(attached);
        }
        Ok(())
    }
}

/// Where in the guest something of a container's root is that is shared as files.
fn shared(container: &str, name: &str) -> String {
    Path::new(ROOTS_DIR).join(container).join(name).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn only_what_the_guest_can_mount_by_itself_is_a_disk() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        std::fs::write(&image, [0; 4096]).unwrap();
        let path = image.to_str().unwrap();
        let ext4 = mount("ext4", path, &["rw", "loop"]);
        let root = RootDisk::open(std::slice::from_ref(&ext4)).unwrap().unwrap();
        assert!(!root.disk.read_only);
        let root = RootDisk::open(&[mount("ext4", path, &["ro"])]).unwrap().unwrap();
        assert!(root.disk.read_only);
        for other in [
            vec![],
            vec![mount("overlay", "overlay", &["lowerdir=/a"])],
            vec![mount("bind", path, &["rbind"])],
            vec![mount("xfs", path, &[])],
            vec![ext4.clone(), ext4],
        ] {
            assert!(RootDisk::open(&other).unwrap().is_none(), "{other:?}");
        }
        std::fs::remove_file(&image).unwrap();
        assert!(RootDisk::open(&[mount("ext4", path, &[])]).is_err());
    }
}
