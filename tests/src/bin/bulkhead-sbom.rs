//! What a release is made of, as CycloneDX 1.5: `cargo metadata` on standard input, the output of `sha256sum` for its files and
//! the packages whose programs it has as arguments.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a program of the command line")]

use std::collections::BTreeSet;
use std::io::Read;
use std::process::ExitCode;

use serde_json::{Value, json};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let files = arguments.next().unwrap_or_default();
    let packages: Vec<String> = arguments.collect();
    let result = std::fs::read_to_string(&files).map_err(|error| format!("can't read {files}: {error}"));
    let result = result.and_then(|files| {
        let mut metadata = String::new();
        std::io::stdin().read_to_string(&mut metadata).map_err(|error| error.to_string())?;
        let metadata = serde_json::from_str(&metadata).map_err(|error| format!("cargo metadata: {error}"))?;
        bill(&metadata, &files, &packages)
    });
    match result {
        Ok(bill) => {
            println!("{bill:#}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bulkhead-sbom: {error}");
            ExitCode::FAILURE
        }
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Packages that programs are linked from: those with normal dependencies between them, not what builds or tests them.
fn linked<'a>(metadata: &'a Value, roots: &[&'a Value]) -> BTreeSet<&'a str> {
    let nodes = list(&metadata["resolve"], "nodes");
    let mut found = BTreeSet::new();
    let mut open: Vec<&str> = roots.iter().map(|package| text(package, "id")).collect();
    while let Some(id) = open.pop() {
        if !found.insert(id) {
            continue;
        }
        let node = nodes.iter().find(|node| text(node, "id") == id);
        open.extend(node.into_iter().flat_map(dependencies));
    }
    found
}

fn dependencies(node: &Value) -> impl Iterator<Item = &str> {
    let is_normal =
        |dependency: &&Value| list(dependency, "dep_kinds").iter().any(|kind| kind["kind"].is_null());
    list(node, "deps").iter().filter(is_normal).map(|dependency| text(dependency, "pkg"))
}

fn reference(package: &Value) -> String {
    format!("pkg:cargo/{}@{}", text(package, "name"), text(package, "version"))
}

fn bill(metadata: &Value, files: &str, names: &[String]) -> Result<Value, String> {
    let packages = list(metadata, "packages");
    let members = list(metadata, "workspace_members");
    let roots = names
        .iter()
        .map(|name| {
            let is_it = |package: &&Value| text(package, "name") == name && members.contains(&package["id"]);
            packages.iter().find(is_it).ok_or_else(|| format!("there is no package {name}"))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let first = roots.first().ok_or("no package is named")?;
    let linked = linked(metadata, &roots);
    let by_id = |id: &str| packages.iter().find(|package| text(package, "id") == id);
    let mut components: Vec<Value> = linked.iter().copied().filter_map(by_id).map(component).collect();
    components.sort_by_key(|component| text(component, "bom-ref").to_owned());
    for line in files.lines() {
        let (digest, file) = line.split_once("  ").ok_or_else(|| format!("{line:?} is not of sha256sum"))?;
        components.push(
            json!({ "type": "file", "name": file, "hashes": [{ "alg": "SHA-256", "content": digest }] }),
        );
    }
    let mut depend: Vec<Value> = list(&metadata["resolve"], "nodes")
        .iter()
        .filter(|node| linked.contains(text(node, "id")))
        .map(|node| {
            let on: BTreeSet<String> = dependencies(node).filter_map(by_id).map(reference).collect();
            json!({ "ref": by_id(text(node, "id")).map(reference), "dependsOn": on })
        })
        .collect();
    depend.sort_by_key(|entry| text(entry, "ref").to_owned());
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": { "type": "application", "name": "bulkhead", "version": first["version"] } },
        "components": components,
        "dependencies": depend,
    }))
}

fn component(package: &Value) -> Value {
    let mut component = json!({
        "type": "library",
        "bom-ref": reference(package),
        "name": package["name"],
        "version": package["version"],
        "purl": reference(package),
    });
    if let Some(licence) = package["license"].as_str() {
        // Older packages have a slash for "or".
        component["licenses"] = json!([{ "expression": licence.replace('/', " OR ") }]);
    }
    component
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_linked_is_listed_and_nothing_else() {
        let package =
            |id: &str| json!({ "id": id, "name": id, "version": "1.0.0", "license": "MIT/Apache-2.0" });
        let depends = |on: &str, kind: Value| json!({ "pkg": on, "dep_kinds": [{ "kind": kind }] });
        let metadata = json!({
            "packages": [package("ours"), package("linked"), package("deep"), package("builds"), package("other")],
            "workspace_members": ["ours"],
            "resolve": { "nodes": [
                { "id": "ours", "deps": [depends("linked", Value::Null), depends("builds", json!("build"))] },
                { "id": "linked", "deps": [depends("deep", Value::Null), depends("other", json!("dev"))] },
                { "id": "deep", "deps": [] },
                { "id": "builds", "deps": [] },
            ] },
        });
        let bill = bill(&metadata, "abc  bin/program\n", &["ours".to_owned()]).unwrap();
        let names: Vec<&str> =
            list(&bill, "components").iter().map(|component| text(component, "name")).collect();
        assert_eq!(names, ["deep", "linked", "ours", "bin/program"]);
        assert_eq!(bill["components"][0]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(bill["components"][3]["hashes"][0]["content"], "abc");
        assert_eq!(bill["dependencies"][1]["dependsOn"], json!(["pkg:cargo/deep@1.0.0"]));
        assert!(super::bill(&metadata, "", &["other".to_owned()]).is_err(), "only members have programs");
    }
}
