//! A container's disks: block devices that it asks for, and its root file system if that is on a disk.

use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::SHARED_DIR;
use containerd_shim_protos::types::mount::Mount;

use super::layers::LayeredRoot;
use super::rootfs::RootFiles;
use crate::error::{ApiError, chain};
use crate::host::disk::{DiskError, OpenDisk};
use crate::host::opaque;
use crate::pod::Pod;
use crate::pod::disks::{AttachError, AttachedDisk, FileSystem, Overlay};
use crate::pod::tree;
use crate::spec::{DeviceNumber, DiskPlace, HostDisk};

/// File systems on a disk that the guest mounts itself; all others are mounted on the host and shared.
const GUEST_FILE_SYSTEMS: [&str; 1] = ["ext4"];

/// A root file system that the guest mounts by itself.
#[derive(Debug)]
pub enum GuestRoot {
    /// One on a disk of its own.
    Disk(RootDisk),
    /// Layers of an image, and where the container's changes go.
    Layers(LayeredRoot),
}

impl GuestRoot {
    /// What containerd's mounts are, if they are such a one. `layers` says whether there may be layers on a disk.
    pub fn open(mounts: &[Mount], layers: bool) -> Result<Option<GuestRoot>, ApiError> {
        if let Some(disk) = RootDisk::open(mounts)? {
            return Ok(Some(GuestRoot::Disk(disk)));
        }
        Ok(if layers { LayeredRoot::of(mounts)?.map(GuestRoot::Layers) } else { None })
    }
}

/// A root file system on a disk, open on the host.
#[derive(Debug)]
pub struct RootDisk {
    disk: OpenDisk,
    file_system: FileSystem,
}

impl RootDisk {
    /// Opens the disk that containerd's mounts consist of, if they do: one file system that the guest knows, on a block
    /// device (as the snapshotter `devmapper` has it) or in an image (as `blockfile` has it).
    pub fn open(mounts: &[Mount]) -> Result<Option<RootDisk>, DiskError> {
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
pub struct OpenDisks {
    root: Option<GuestRoot>,
    devices: Vec<(DeviceNumber, OpenDisk)>,
}

/// The disks of a container in its pod.
#[derive(Debug, Default)]
pub struct ContainerDisks {
    /// All of them.
    pub attached: Vec<AttachedDisk>,
    /// What numbers the block devices of the host have in the guest.
    pub places: Vec<DiskPlace>,
    /// Where the root file system is mounted in the guest, if it is on a disk.
    pub root: Option<PathBuf>,
    /// Where on the host is what the container changes, if the guest makes an overlay of it.
    pub changes: Option<PathBuf>,
}

impl ContainerDisks {
    /// Has the host know what the guest's overlay knows of the container's changes, for whoever makes an image of them.
    pub async fn tell_host_of_changes(&self) {
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
    pub fn open(root: Option<GuestRoot>, devices: &[HostDisk]) -> Result<OpenDisks, DiskError> {
        let open = |disk: &HostDisk| Ok((disk.number, OpenDisk::open(disk)?));
        Ok(OpenDisks { root, devices: devices.iter().map(open).collect::<Result<_, DiskError>>()? })
    }

    /// What of the root file system is shared as files, which `mounts` would be without a disk.
    pub fn root_files<'a>(&'a self, mounts: &'a [Mount]) -> RootFiles<'a> {
        match &self.root {
            None => RootFiles::Mounts(mounts),
            Some(GuestRoot::Layers(LayeredRoot { changes: Some(changes), .. })) => {
                RootFiles::Changes(&changes.directory)
            }
            Some(_) => RootFiles::None,
        }
    }

    /// Puts them into the pod, all or none. What is shared of the container's files is in the pod already.
    pub async fn attach(self, pod: &Pod, container: &str) -> Result<ContainerDisks, ApiError> {
        let mut disks = ContainerDisks::default();
        match self.attach_to(pod, container, &mut disks).await {
            Ok(()) => Ok(disks),
            Err(error) => {
                pod.detach_disks(&disks.attached).await;
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
                    let place = |name: &str| {
                        let place = Path::new(SHARED_DIR).join(container).join(tree::CHANGES).join(name);
                        place.display().to_string()
                    };
                    disks.changes = changes.as_ref().map(|changes| changes.directory.join(&changes.upper));
                    let changes =
                        changes.as_ref().map(|changes| (place(&changes.upper), place(&changes.work)));
                    pod.attach_layers(layers, &Overlay { changes, options: options.clone() }).await?
                }
            };
            disks.root = Some(attached.mount_point());
            disks.attached.push(attached);
        }
        for (host, disk) in &self.devices {
            let attached = pod.attach_disk(disk, None).await?;
            disks.places.push(DiskPlace { host: *host, guest: attached.number });
            disks.attached.push(attached);
        }
        Ok(())
    }
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
        let image = std::env::temp_dir().join(format!("bulkhead-root-{}", std::process::id()));
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
