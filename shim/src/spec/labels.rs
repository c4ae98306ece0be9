//! Labels of the host's security modules. They name policies that are loaded into the host's kernel; the guest's kernel
//! has neither module.

use oci_spec::runtime::Process;

use super::SpecError;

/// AppArmor profiles that container engines give to whoever asks for none.
const DEFAULT_PROFILES: [&str; 5] =
    ["", "unconfined", "cri-containerd.apparmor.d", "docker-default", "nerdctl-default"];

/// Takes the labels out. An engine's default profile stands for what the pod's virtual machine gives anyway; a profile that
/// somebody chose would be missed.
pub(super) fn clear(process: &mut Process) -> Result<(), SpecError> {
    if let Some(profile) = process.apparmor_profile() {
        if !is_default(profile) {
            return Err(SpecError::AppArmor(profile.chars().take(128).collect()));
        }
        log::debug!("the AppArmor profile {profile:?} is left out: the guest has no AppArmor");
    }
    if let Some(label) = process.selinux_label() {
        log::debug!("the SELinux label {label:?} is left out: the guest has no SELinux");
    }
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    Ok(())
}

fn is_default(profile: &str) -> bool {
    // Podman's is named after its version.
    DEFAULT_PROFILES.contains(&profile) || profile.starts_with("containers-default-")
}
