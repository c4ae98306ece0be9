//! `deploy/`: every manifest is sound, the chart says the same as the plain files, and what it has the installer do is what the
//! installer can do.
//!
//! Only the few actions of Helm's template language that the chart uses are known here; anything else fails the test.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use serde_yaml_ng::{Deserializer, Value};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn read(place: &str) -> String {
    fs::read_to_string(deploy().join(place)).unwrap_or_else(|error| panic!("{place}: {error}"))
}

/// The documents of a file, each an object with a kind.
fn documents(place: &str, text: &str) -> Vec<Value> {
    let documents: Vec<Value> = Deserializer::from_str(text)
        .map(|document| Value::deserialize(document).unwrap_or_else(|error| panic!("{place}: {error}")))
        .filter(|document| !document.is_null())
        .collect();
    for document in &documents {
        for path in ["apiVersion", "kind"] {
            assert!(document[path].is_string(), "{place}: no {path}");
        }
        assert!(document["metadata"]["name"].is_string(), "{place}: no name");
    }
    documents
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> &'a Value {
    documents.iter().find(|document| document["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"))
}

/// Fills a template in as Helm does.
fn render(template: &str, values: &Value) -> String {
    let mut out = String::new();
    let mut conditions = Vec::new();
    for line in template.lines() {
        if let Some(action) = line.trim().strip_prefix("{{-").and_then(|line| line.strip_suffix("}}")) {
            match action.trim().split_once(' ') {
                Some(("if", value)) => conditions.push(lookup(value, values).as_bool().unwrap()),
                None if action.trim() == "end" => assert!(conditions.pop().is_some(), "an end too many"),
                _ => panic!("an action that this test does not know: {line}"),
            }
            continue;
        }
        if conditions.iter().all(|condition| *condition) {
            out.push_str(&fill_in(line, values));
            out.push('\n');
        }
    }
    assert!(conditions.is_empty(), "an if without an end");
    out
}

fn fill_in(line: &str, values: &Value) -> String {
    let Some((before, rest)) = line.split_once("{{") else { return line.to_owned() };
    let (action, after) = rest.split_once("}}").unwrap();
    let (name, is_quoted) = match action.trim().split_once(" | ") {
        Some((name, "quote")) => (name, true),
        Some(_) => panic!("a function that this test does not know: {line}"),
        None => (action.trim(), false),
    };
    let value = match lookup(name, values) {
        Value::String(text) => text,
        other => panic!("{name} is {other:?} and not a text"),
    };
    let value = if is_quoted { format!("{value:?}") } else { value };
    format!("{before}{value}{}", fill_in(after, values))
}

fn lookup(name: &str, values: &Value) -> Value {
    match name {
        ".Release.Namespace" => "bulkhead".into(),
        ".Release.Service" => "Helm".into(),
        _ => {
            let path = name.strip_prefix(".Values.").unwrap_or_else(|| panic!("{name} is unknown"));
            let value = path.split('.').fold(values, |value, key| &value[key]);
            assert!(!value.is_null(), "values.yaml has no {path}");
            value.clone()
        }
    }
}

fn values() -> Value {
    serde_yaml_ng::from_str(&read("chart/values.yaml")).unwrap()
}

fn chart(values: &Value) -> Vec<Value> {
    let templates = ["chart/templates/runtimeclass.yaml", "chart/templates/daemonset.yaml"];
    templates.iter().flat_map(|place| documents(place, &render(&read(place), values))).collect()
}

/// What the installer is called with.
fn arguments(daemon_set: &Value) -> Vec<String> {
    let installer = &daemon_set["spec"]["template"]["spec"]["initContainers"][0];
    installer["args"].as_sequence().unwrap().iter().map(|arg| arg.as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_chart_says_what_the_plain_files_say() {
    let mut plain = documents("daemonset.yaml", &read("daemonset.yaml"));
    plain.extend(documents("runtimeclass.yaml", &read("runtimeclass.yaml")));
    let chart = chart(&values());
    assert_eq!(chart.len(), 2);
    let (ours, theirs) = (of_kind(&plain, "RuntimeClass"), of_kind(&chart, "RuntimeClass"));
    for key in ["apiVersion", "handler", "overhead", "scheduling"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    let (ours, theirs) = (of_kind(&plain, "DaemonSet"), of_kind(&chart, "DaemonSet"));
    let spec = |set: &Value| set["spec"]["template"]["spec"].clone();
    for key in ["nodeSelector", "containers", "volumes", "tolerations"] {
        assert_eq!(spec(ours)[key], spec(theirs)[key], "{key}");
    }
    assert_eq!(spec(ours)["initContainers"][0]["image"], spec(theirs)["initContainers"][0]["image"]);
    // The pods of the RuntimeClass go where it has been installed.
    let selector = &of_kind(&plain, "RuntimeClass")["scheduling"]["nodeSelector"]["bulkhead.dev/runtime"];
    assert_eq!(selector, &spec(ours)["nodeSelector"]["bulkhead.dev/runtime"]);
    // The chart's own file has what Helm insists on, and the version of what it installs.
    let about: Value = serde_yaml_ng::from_str(&read("chart/Chart.yaml")).unwrap();
    assert_eq!((&about["apiVersion"], &about["name"]), (&"v2".into(), &"bulkhead".into()));
    assert_eq!(about["appVersion"], env!("CARGO_PKG_VERSION"));
    assert_eq!(values()["image"]["tag"], env!("CARGO_PKG_VERSION"));
    render(&read("chart/templates/NOTES.txt"), &values());
}

#[test]
fn the_charts_switches_switch() {
    let mut values = values();
    values["runtimeClass"]["create"] = false.into();
    values["containerd"]["restart"] = false.into();
    let chart = chart(&values);
    assert!(chart.iter().all(|document| document["kind"] != "RuntimeClass"));
    assert!(!arguments(of_kind(&chart, "DaemonSet")).contains(&"--restart".to_owned()));
}

#[test]
fn the_installer_understands_what_it_is_called_with() {
    let plain = documents("daemonset.yaml", &read("daemonset.yaml"));
    for arguments in
        [arguments(of_kind(&plain, "DaemonSet")), arguments(of_kind(&chart(&values()), "DaemonSet"))]
    {
        // Nothing is there to be installed, which it says only once it has understood the rest.
        let output = Command::new(env!("CARGO_BIN_EXE_bulkhead")).args(&arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains("/opt/bulkhead/bin/containerd-shim-bulkhead-v1 is missing"), "{said}");
    }
}

#[test]
fn the_image_holds_every_part() {
    let recipe = read("Containerfile");
    for part in [
        "containerd-shim-bulkhead-v1",
        "/bulkhead ",
        "bulkhead-vmm",
        "bulkhead-fs",
        "vmlinux",
        "guest.erofs",
        "/opt/bulkhead/bin/",
        "/opt/bulkhead/libexec/bulkhead/",
        "/opt/bulkhead/share/bulkhead/",
    ] {
        assert!(recipe.contains(part), "{part}");
    }
}

#[test]
fn the_examples_belong_together() {
    let pod = documents("examples/pod.yaml", &read("examples/pod.yaml"));
    let class = documents("runtimeclass.yaml", &read("runtimeclass.yaml"));
    assert_eq!(of_kind(&pod, "Pod")["spec"]["runtimeClassName"], class[0]["metadata"]["name"]);
    let policy = documents("examples/networkpolicy.yaml", &read("examples/networkpolicy.yaml"));
    assert_eq!(
        of_kind(&policy, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        of_kind(&pod, "Pod")["metadata"]["labels"]
    );
}
