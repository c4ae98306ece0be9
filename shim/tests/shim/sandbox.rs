//! The Sandbox API of the binary, as far as it goes without a guest: containerd's order of calls, and what is left of them.

use std::fs;

use crate::common::{Bundle, Containerd, await_gone, connect, ctx, options, refusal};
use containerd_shim_protos::api::{ConnectRequest, ShutdownRequest};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, SandboxStatusRequest, ShutdownSandboxRequest, StartSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::Client;
use protobuf::Message;
use ttrpc::Code;

/// A bundle as containerd makes it for a sandbox: without a specification.
fn bundle(containerd: &Containerd, id: &str) -> Bundle {
    let bundle = containerd.bundle(id, |_| {});
    fs::remove_file(bundle.path.join("config.json")).unwrap();
    bundle
}

/// Runs `start` with runtime options for a configuration file that holds `config`; gives the address.
fn start(containerd: &Containerd, bundle: &Bundle, config: &str) -> String {
    let file = bundle.path.join("bulkhead.toml");
    fs::write(&file, config).unwrap();
    let output = containerd.start_with(bundle, &options(&file).write_to_bytes().unwrap());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn create(bundle: &Bundle) -> CreateSandboxRequest {
    CreateSandboxRequest {
        sandbox_id: bundle.id.clone(),
        bundle_path: bundle.path.display().to_string(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_made_is_refused_and_the_shim_goes() {
    let containerd = Containerd::new().await;
    let bundle = bundle(&containerd, "s1");
    // The configuration that containerd passed to `start` counts: this API's requests have no place for it.
    let address = start(&containerd, &bundle, "kernel = \"/nonexistent/vmlinux\"\nkvm = \"/dev/null\"\n");
    let sandbox = SandboxClient::new(Client::connect(&address).await.unwrap());
    let task = connect(&address).await;
    let shim = task.connect(ctx(), &ConnectRequest { id: "s1".into(), ..Default::default() }).await.unwrap();

    let request = StartSandboxRequest { sandbox_id: "s1".into(), ..Default::default() };
    assert_eq!(refusal(sandbox.start_sandbox(ctx(), &request).await).0, Code::FAILED_PRECONDITION);
    let (code, message) = refusal(sandbox.create_sandbox(ctx(), &create(&bundle)).await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
    assert!(message.contains("guest kernel /nonexistent/vmlinux"), "{message}");
    assert!(!bundle.path.join("bulkhead").exists(), "the pod's directory is left");
    let request = SandboxStatusRequest { sandbox_id: "s1".into(), ..Default::default() };
    assert_eq!(refusal(sandbox.sandbox_status(ctx(), &request).await).0, Code::NOT_FOUND);

    let request = ShutdownSandboxRequest { sandbox_id: "s1".into(), ..Default::default() };
    let _ = sandbox.shutdown_sandbox(ctx(), &request).await;
    await_gone(shim.shim_pid).await;
    let socket = address.strip_prefix("unix://").unwrap();
    assert!(!fs::exists(socket).unwrap(), "the socket is left");
    containerd.delete(&bundle);
}

#[tokio::test]
async fn a_shim_serves_where_nobody_takes_its_events() {
    let containerd = Containerd::new().await;
    let bundle = containerd.bundle("c1", |_| {});
    let output = containerd.start_unheard(&bundle);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let client = connect(&String::from_utf8(output.stdout).unwrap()).await;
    let shim =
        client.connect(ctx(), &ConnectRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    let _ = client.shutdown(ctx(), &ShutdownRequest { id: "c1".into(), ..Default::default() }).await;
    await_gone(shim.shim_pid).await;
}
