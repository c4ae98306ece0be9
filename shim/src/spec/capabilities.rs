//! Capabilities that nobody knows are left out, with a warning, as runc leaves them out.

use oci_spec::runtime::Capability;
use serde::Deserialize;
use serde_json::Value;

/// A specification, or a process's part of one, without the capabilities that nobody knows; `None` if it has none of these.
pub(crate) fn only_known(json: &[u8]) -> Option<Value> {
    let mut object: Value = serde_json::from_slice(json).ok()?;
    let process = match object.get_mut("process") {
        Some(process) => process,
        None => &mut object,
    };
    let mut unknown = Vec::new();
    for set in process.get_mut("capabilities")?.as_object_mut()?.values_mut().filter_map(Value::as_array_mut)
    {
        set.retain(|capability| {
            let is_known = !capability.is_string() || Capability::deserialize(capability).is_ok();
            if !is_known && !unknown.contains(capability) {
                unknown.push(capability.clone());
            }
            is_known
        });
    }
    if unknown.is_empty() {
        return None;
    }
    for capability in unknown.iter().take(8) {
        let name: String = capability.as_str().unwrap_or_default().chars().take(64).collect();
        log::warn!("the capability {name:?} is unknown and left out");
    }
    Some(object)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_nobody_knows_is_left_out() {
        let sets = |names: &[&str]| json!({"bounding": names, "effective": names});
        let some = json!({"capabilities": sets(&["CAP_CHOWN", "CAP_NOSUCH", "CAP_BPF"]), "cwd": "/"});
        let rest = json!({"capabilities": sets(&["CAP_CHOWN", "CAP_BPF"]), "cwd": "/"});
        let read = |value: &Value| only_known(value.to_string().as_bytes());
        assert_eq!(read(&some), Some(rest.clone()));
        assert_eq!(read(&json!({"process": some, "root": {}})), Some(json!({"process": rest, "root": {}})));
        // It is no repair of anything else.
        for other in [rest, json!({}), json!([]), json!({"capabilities": {"bounding": [1, {}]}})] {
            assert_eq!(read(&other), None, "{other}");
        }
        assert_eq!(only_known(b"nonsense"), None);
    }
}
