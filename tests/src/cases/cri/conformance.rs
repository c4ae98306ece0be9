//! What the conformance tests of the interface (critest) ask for and the other themes don't: each as with runc.

use std::fs;
use std::time::Duration;

use bulkhead_cri::proto::{self, MountPropagation};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use protobuf::MessageField;

use super::like_runc::{id, security};
use super::volumes::volume;
use crate::cases::Environment;
use crate::cri::{Handler, Pod};
use crate::failure::{Explain, Outcome};
use crate::{ensure, ensure_eq, fail};

/// Name servers of the pod, users that don't exist, volumes whose directory does not exist yet, ends that were there before.
pub(crate) fn rest(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let ask = |handler: Handler| -> Outcome<String> {
        let pod = Pod::run(node, handler, "conforms", |config| {
            config.dns_config = MessageField::some(proto::DNSConfig {
                servers: vec!["10.10.10.10".to_owned()],
                searches: vec!["example.test".to_owned()],
                options: vec!["ndots:3".to_owned()],
                ..Default::default()
            });
        })?;
        let mut answers = vec![pod.run_script("names", "cat /etc/resolv.conf", |_| {})?.success()?];
        let new = node.containerd().path().join(format!("new-{}", handler.name()));
        let made = pod.run_script("volume", "echo x >/v/f && ls /v", |config| {
            config.mounts = vec![proto::Mount {
                container_path: "/v".to_owned(),
                host_path: new.display().to_string(),
                ..Default::default()
            }];
        })?;
        answers.push(made.success()?);
        fs::remove_dir_all(&new).explain(|| "remove the volume".into())?;
        let group = pod.start("group", "id", |config| security(config).run_as_group = id(5));
        answers.push(format!("a group without a user: {}", group.is_ok()));
        let nobody = pod.start("user", "id", |config| security(config).run_as_username = "nosuch".to_owned());
        answers.push(format!("no such user: {}", nobody.is_ok()));

        let container = pod.start("twice", "exec sleep 100000", |_| {})?;
        answers.push(format!("started twice: {}", container.start().is_ok()));
        container.stop(Duration::ZERO)?;
        container.stop(Duration::ZERO).explain(|| "stop a container once more".into())?;
        answers.push(format!("exec after the end: {}", container.exec("true").is_ok()));
        let request =
            proto::RemoveContainerRequest { container_id: container.id.clone(), ..Default::default() };
        container.remove()?;
        let again = node.client().remove_container(&request);
        again.explain(|| "remove a container once more".into())?;
        // A running one is ended.
        pod.start("removed", "exec sleep 100000", |_| {})?.remove()?;
        pod.finish()?;
        Ok(answers.join("\n"))
    };
    let right = ask(Handler::Runc)?;
    ensure_eq!(ask(environment.handler())?, right, "answer, and runc's");
    Ok(right.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// What a container in a virtual machine can't have is refused in words, and the pod goes on.
pub(crate) fn refused(environment: &mut Environment) -> Outcome<String> {
    type Change<'a> = &'a dyn Fn(&mut proto::ContainerConfig);
    let node = environment.node()?;
    let (shared, huge) = (node.directory("shared")?, node.directory("huge")?);
    let result = (|| {
        mount(Some(&shared), &shared, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .explain(|| "bind".into())?;
        mount(None::<&str>, &shared, None::<&str>, MsFlags::MS_SHARED, None::<&str>)
            .explain(|| "share".into())?;
        let pod = Pod::run(node, environment.handler(), "refuses", |_| {})?;
        let bidirectional = |config: &mut proto::ContainerConfig| {
            config.mounts = vec![proto::Mount {
                container_path: "/shared".to_owned(),
                host_path: shared.display().to_string(),
                propagation: MountPropagation::PROPAGATION_BIDIRECTIONAL.into(),
                ..Default::default()
            }];
        };
        let device = |config: &mut proto::ContainerConfig| {
            config.devices = vec![proto::Device {
                container_path: "/dev/kvm".to_owned(),
                host_path: "/dev/kvm".to_owned(),
                permissions: "rw".to_owned(),
                ..Default::default()
            }];
        };
        // What the kubelet makes of an `emptyDir` with the medium `HugePages`.
        mount(Some("tests"), &huge, Some("hugetlbfs"), MsFlags::empty(), Some("pagesize=2M"))
            .explain(|| "mount huge pages".into())?;
        let volume_of_huge_pages = |config: &mut proto::ContainerConfig| {
            config.mounts = vec![volume(&huge, "/huge")];
        };
        let cases: [(&str, Change<'_>); 3] = [
            ("Bidirectional", &bidirectional),
            ("only block devices", &device),
            ("a file system of huge pages", &volume_of_huge_pages),
        ];
        for (words, change) in cases {
            let container = pod.create("refused", "true", |config| change(config))?;
            let Err(failure) = container.start() else {
                fail!("a container was started where {words:?} was to be said")
            };
            ensure!(failure.0.contains(words), "{words:?} is not in {failure}");
            container.remove()?;
        }
        ensure_eq!(pod.run_script("after", "echo on", |_| {})?.stdout, "on\n", "a container after that");
        pod.finish()?;
        Ok("mounts that travel to the node, character devices, huge pages".to_owned())
    })();
    for path in [&shared, &huge] {
        let _ = umount2(path, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(path);
    }
    result
}
