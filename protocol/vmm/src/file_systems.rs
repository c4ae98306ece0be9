//! Which of the host's file systems a pod may share: an allow list, the same for the shim, which arranges the mounts of a
//! pod's tree, and for the file server, which finds what the host mounts there later.
//!
//! On the list are file systems that hold files. What is a window into the host's kernel (procfs, sysfs, cgroup, debugfs,
//! tracefs, securityfs, configfs, efivarfs, pstore, binfmt_misc, bpf, devpts, mqueue, nsfs, resctrl, selinuxfs, …) is not, nor
//! is whatever nobody has thought of yet.

/// `f_type` of statfs(2) for each, and the names that `/proc/self/mountinfo` has for it.
const SHAREABLE: &[(u32, &[&str])] = &[
    (0xef53, &["ext2", "ext3", "ext4"]),
    (0x5846_5342, &["xfs"]),
    (0x9123_683e, &["btrfs"]),
    (0xca45_1a4e, &["bcachefs"]),
    (0xf2f5_2010, &["f2fs"]),
    (0x2fc1_2fc1, &["zfs"]),
    (0x3153_464a, &["jfs"]),
    (0x5265_4973, &["reiserfs"]),
    (0x3434, &["nilfs2"]),
    (0x794c_7630, &["overlay"]),
    (0x6175_6673, &["aufs"]),
    (TMPFS, &["tmpfs"]),
    (RAMFS, &["ramfs"]),
    (0x6969, &["nfs", "nfs4"]),
    (0x00c3_6400, &["ceph"]),
    (0xff53_4d42, &["cifs"]),
    (0xfe53_4d42, &["smb3"]),
    (0x6b41_4653, &["afs"]),
    (0x5346_414f, &["afs"]),
    (0x0bd0_0bd0, &["lustre"]),
    (0x4750_4653, &["gpfs"]),
    (0x1983_0326, &["beegfs"]),
    (0x2003_0528, &["pvfs2"]),
    (0x0116_1970, &["gfs2"]),
    (0x7461_636f, &["ocfs2"]),
    (0x6573_5546, &["fuse", "fuseblk", "virtiofs"]),
    (0x0102_1997, &["9p"]),
    (0x786f_4256, &["vboxsf"]),
    (0xe0f5_e1e2, &["erofs"]),
    (0x7371_7368, &["squashfs"]),
    (0x28cd_3d45, &["cramfs"]),
    (0x9660, &["iso9660"]),
    (0x1501_3346, &["udf"]),
    (0x4d44, &["vfat", "msdos"]),
    (0x2011_bab0, &["exfat"]),
    (0x7366_746e, &["ntfs3"]),
    (0x482b, &["hfsplus"]),
    (0xf15f, &["ecryptfs"]),
];

const TMPFS: u32 = 0x0102_1994;
const RAMFS: u32 = 0x8584_58f6;

/// Whether a mount may be shared, by its file system's `f_type` and whether device nodes on the mount are dead (`nodev`).
///
/// devtmpfs, the host's `/dev`, can't be told from tmpfs by its number. But it is of no use mounted `nodev`.
#[must_use]
pub fn is_shareable(f_type: u32, nodev: bool) -> bool {
    SHAREABLE.iter().any(|(number, _)| *number == f_type) && (nodev || !matches!(f_type, TMPFS | RAMFS))
}

/// Whether a mount may be shared, by its file system's name in mountinfo, which a subtype may follow (`fuse.sshfs`).
#[must_use]
pub fn is_shareable_name(name: &str) -> bool {
    let known = |name: &str| SHAREABLE.iter().any(|(_, names)| names.contains(&name));
    known(name) || name.split_once('.').is_some_and(|(kind, _)| matches!(kind, "fuse" | "fuseblk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_into_the_kernel_are_not_on_the_list() {
        let names = [
            "proc",
            "sysfs",
            "cgroup",
            "cgroup2",
            "debugfs",
            "tracefs",
            "securityfs",
            "configfs",
            "efivarfs",
            "pstore",
            "binfmt_misc",
            "bpf",
            "devpts",
            "devtmpfs",
            "mqueue",
            "nsfs",
            "resctrl",
            "selinuxfs",
            "smackfs",
            "fusectl",
            "rpc_pipefs",
            "nfsd",
            "hugetlbfs",
            "pipefs",
            "sockfs",
            "xenfs",
            "functionfs",
            "ext4.proc",
            "proc.fuse",
            "",
        ];
        for name in names {
            assert!(!is_shareable_name(name), "{name}");
        }
        let numbers: [u32; 18] = [
            0x9fa0,
            0x6265_6572,
            0x0027_e0eb,
            0x6367_7270,
            0x6462_6720,
            0x7472_6163,
            0x7363_6673,
            0x6265_6570,
            0xde5e_81e4,
            0x6165_676c,
            0x4249_4e4d,
            0xcafe_4a11,
            0x1cd1,
            0x1980_0202,
            0x6e73_6673,
            0x0765_5821,
            0xf97c_ff8c,
            0x6573_5543,
        ];
        for number in numbers {
            assert!(!is_shareable(number, true), "{number:#x}");
        }
        assert!(!is_shareable(0, true) && !is_shareable(u32::MAX, true));
    }

    #[test]
    fn what_holds_files_is() {
        for name in
            ["ext4", "xfs", "btrfs", "overlay", "tmpfs", "nfs4", "fuse.sshfs", "fuseblk", "fuseblk.ntfs-3g"]
        {
            assert!(is_shareable_name(name), "{name}");
        }
        assert!(is_shareable(0xef53, false) && is_shareable(0x794c_7630, false));
        assert!(is_shareable(TMPFS, true) && !is_shareable(TMPFS, false), "it may be the host's /dev");
    }
}
