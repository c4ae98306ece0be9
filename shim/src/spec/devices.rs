//! Devices: the guest has its own; those of the host stay there.

use std::path::Path;

use oci_spec::runtime::{Linux, LinuxDeviceType};

use super::SpecError;

/// What every container has (runtime specification, "Default Devices"), by path and number.
const DEFAULT: [(&str, i64, i64); 8] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
    ("/dev/console", 5, 1),
    ("/dev/ptmx", 5, 2),
];

/// Drops or refuses the host's devices.
///
/// A container that may use any device (`--privileged`) was given all there are on the host, without having asked for
/// one: they are dropped. Any other container asked for what it lists.
pub(super) fn translate(linux: &mut Linux) -> Result<(), SpecError> {
    let may_use_any =
        linux.resources().as_ref().and_then(|resources| resources.devices().as_ref()).is_some_and(|rules| {
            rules.iter().any(|rule| {
                rule.allow()
                    && rule.major().is_none()
                    && rule.minor().is_none()
                    && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
            })
        });
    let Some(devices) = linux.devices_mut() else { return Ok(()) };
    let is_default = |path: &Path, major, minor| {
        DEFAULT.iter().any(|&(name, a, b)| path == Path::new(name) && (a, b) == (major, minor))
    };
    if !may_use_any
        && let Some(device) = devices.iter().find(|device| {
            device.typ() != LinuxDeviceType::P && !is_default(device.path(), device.major(), device.minor())
        })
    {
        return Err(SpecError::Device(device.path().clone()));
    }
    let before = devices.len();
    devices.retain(|device| {
        device.typ() == LinuxDeviceType::P || is_default(device.path(), device.major(), device.minor())
    });
    if devices.len() < before {
        log::info!("{} devices of the host are left out of a privileged container", before - devices.len());
    }
    Ok(())
}
