//! Kernel parameters that the host chooses for the guest.

use std::fs;

use bulkhead_agent_protocol::Parameter;

/// Where they are.
const ROOT: &str = "/proc/sys";

/// Whether a path leads to something below the directory that it is relative to.
pub(crate) fn is_below(path: &str) -> bool {
    path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Sets what can be set: the host's kernel may have parameters, or values of them, that this one has not.
pub(crate) fn set(parameters: &[Parameter]) {
    for Parameter { path, value, .. } in parameters {
        if !is_below(path) {
            log::warn!("{path:?} is no path of a parameter");
        } else if let Err(error) = fs::write(format!("{ROOT}/{path}"), value) {
            log::debug!("the parameter {path} does not become {value:?}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_below_is_a_parameter() {
        assert!(is_below("vm/max_map_count"));
        for path in ["", "/etc/passwd", "../self/mem", "vm/../../x", "vm//x", "."] {
            assert!(!is_below(path), "{path:?}");
        }
    }
}
