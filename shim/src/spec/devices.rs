//! Devices: the guest has its own, and those of the host stay there, but for block devices: these become disks of the guest.

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::SpecError;

/// Character devices whose numbers mean the same in the guest: null, zero, full, random, urandom, tty, console, ptmx,
/// the kernel's log (the guest's own); the TUN device and FUSE.
const SAME_IN_GUEST: [(i64, i64); 11] =
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 1), (5, 2), (10, 200), (10, 229)];

/// The kinds of access that a rule can name.
const ACCESS: [char; 3] = ['r', 'w', 'm'];

/// The number of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNumber {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// A block device of the host that a container asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostDisk {
    /// Which one.
    pub number: DeviceNumber,
    /// Whether the container may only read it.
    pub read_only: bool,
}

/// What number a disk of the host has in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskPlace {
    /// On the host.
    pub host: DeviceNumber,
    /// In the guest.
    pub guest: DeviceNumber,
}

/// Drops or refuses the host's devices; gives the block devices among them, each once.
///
/// A container that may use any device (`--privileged`) was given all there are on the host, without having asked for
/// one: they are dropped. Any other container asked for what it lists.
pub(super) fn translate(linux: &mut Linux) -> Result<Vec<HostDisk>, SpecError> {
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().clone());
    let rules = rules.unwrap_or_default();
    let may_use_any = rules.iter().any(|rule| {
        rule.allow()
            && rule.major().is_none()
            && rule.minor().is_none()
            && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
    });
    let Some(devices) = linux.devices_mut() else { return Ok(Vec::new()) };
    let before = devices.len();
    if may_use_any {
        devices.retain(is_the_guests);
        if devices.len() < before {
            log::info!(
                "{} devices of the host are left out of a privileged container",
                before - devices.len()
            );
        }
        return Ok(Vec::new());
    }
    let mut disks: Vec<HostDisk> = Vec::new();
    for device in devices.iter().filter(|device| !is_the_guests(device)) {
        let number = number_of(device).ok_or_else(|| SpecError::Device(device.path().clone()))?;
        if !disks.iter().any(|disk| disk.number == number) {
            disks.push(HostDisk { number, read_only: !access(&rules, number).contains('w') });
        }
    }
    Ok(disks)
}

/// Whether a device means the same in the guest.
fn is_the_guests(device: &LinuxDevice) -> bool {
    let is_character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
    device.typ() == LinuxDeviceType::P
        || is_character && SAME_IN_GUEST.contains(&(device.major(), device.minor()))
}

/// The number of a block device.
fn number_of(device: &LinuxDevice) -> Option<DeviceNumber> {
    if device.typ() != LinuxDeviceType::B {
        return None;
    }
    Some(DeviceNumber { major: device.major().try_into().ok()?, minor: device.minor().try_into().ok()? })
}

/// What the rules allow with a block device: the last one that fits decides.
fn access(rules: &[LinuxDeviceCgroup], number: DeviceNumber) -> String {
    let fits = |rule: &&LinuxDeviceCgroup, kind| {
        let is = |wanted: Option<i64>, number: u32| {
            wanted.is_none_or(|wanted| wanted == -1 || wanted == i64::from(number))
        };
        let named = rule.access().as_deref().unwrap_or_default();
        matches!(rule.typ(), None | Some(LinuxDeviceType::A | LinuxDeviceType::B))
            && is(rule.major(), number.major)
            && is(rule.minor(), number.minor)
            && (named.is_empty() || named.contains(kind))
    };
    let allowed =
        |kind: &char| rules.iter().rev().find(|rule| fits(rule, *kind)).is_some_and(|rule| rule.allow());
    ACCESS.into_iter().filter(allowed).collect()
}

/// Gives device nodes the numbers that they have in the guest.
pub(super) fn place(devices: &mut [LinuxDevice], places: &[DiskPlace]) {
    for device in devices {
        let place = number_of(device).and_then(|number| places.iter().find(|place| place.host == number));
        if let Some(DiskPlace { guest, .. }) = place {
            device.set_major(guest.major.into());
            device.set_minor(guest.minor.into());
        }
    }
}

/// Turns rules on block devices of the host into rules on the guest's: no number means the same there.
pub(super) fn place_rules(rules: &mut Vec<LinuxDeviceCgroup>, places: &[DiskPlace]) {
    let placed = places.iter().filter_map(|place| {
        let access = access(rules, place.host);
        // An empty one would mean all.
        (!access.is_empty()).then(|| {
            let mut rule = LinuxDeviceCgroup::default();
            rule.set_allow(true);
            rule.set_typ(Some(LinuxDeviceType::B));
            rule.set_major(Some(place.guest.major.into()));
            rule.set_minor(Some(place.guest.minor.into()));
            rule.set_access(Some(access));
            rule
        })
    });
    let placed: Vec<_> = placed.collect();
    let is_wild = |number: Option<i64>| number.is_none_or(|number| number == -1);
    rules.retain(|rule| {
        rule.typ() != Some(LinuxDeviceType::B) || (is_wild(rule.major()) && is_wild(rule.minor()))
    });
    rules.extend(placed);
}
