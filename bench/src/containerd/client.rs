//! containerd's calls, as far as the benchmark makes them.

use std::path::Path;
use std::time::Duration;

use protobuf::{EnumOrUnknown, MessageField};

use crate::proto;
use bulkhead_cri::grpc::{Channel, GrpcError};

/// A single call may take this long; in the nested host that is virtual time.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// The namespace that everything of the benchmark lives in.
pub(crate) const NAMESPACE: &str = "bulkhead-bench";
/// Keeps an object from containerd's garbage collection.
const GC_ROOT: (&str, &str) = ("containerd.io/gc.root", "2025-01-01T00:00:00Z");

/// A connection to containerd. Clones share it.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// Connects to the containerd behind `socket`, to what it has in `namespace`.
    ///
    /// # Errors
    /// When nobody answers there.
    pub(crate) async fn connect(socket: &Path, namespace: &str) -> Result<Self, GrpcError> {
        let metadata = vec![("containerd-namespace", namespace.to_owned())];
        Ok(Self { channel: Channel::connect(socket, metadata, CALL_LIMIT).await? })
    }

    /// containerd's version.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub async fn version(&self) -> Result<String, GrpcError> {
        let answer: proto::VersionResponse = self
            .channel
            .call("containerd.services.version.v1.Version/Version", &proto::Empty::default())
            .await?;
        Ok(answer.version)
    }

    /// Puts a blob into the content store.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn write_content(&self, digest: &str, data: Vec<u8>) -> Result<(), GrpcError> {
        let request = proto::WriteContentRequest {
            action: EnumOrUnknown::new(proto::WriteAction::COMMIT),
            ref_: format!("bench-{digest}"),
            total: data.len() as i64,
            expected: digest.to_owned(),
            data,
            labels: [kept()].into(),
            ..Default::default()
        };
        let _: proto::WriteContentResponse =
            self.channel.call("containerd.services.content.v1.Content/Write", &request).await?;
        Ok(())
    }

    /// Names an image.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn create_image(&self, name: &str, target: proto::Descriptor) -> Result<(), GrpcError> {
        let image =
            proto::Image { name: name.to_owned(), target: MessageField::some(target), ..Default::default() };
        let request = proto::CreateImageRequest { image: MessageField::some(image), ..Default::default() };
        let _: proto::CreateImageResponse =
            self.channel.call("containerd.services.images.v1.Images/Create", &request).await?;
        Ok(())
    }

    /// Makes a writable snapshot on top of `parent` (empty for none) and says how to mount it.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn prepare_snapshot(
        &self,
        snapshotter: &str,
        key: &str,
        parent: &str,
    ) -> Result<Vec<proto::Mount>, GrpcError> {
        let request = proto::PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: [kept()].into(),
            ..Default::default()
        };
        let answer: proto::PrepareSnapshotResponse =
            self.channel.call("containerd.services.snapshots.v1.Snapshots/Prepare", &request).await?;
        Ok(answer.mounts)
    }

    /// Unpacks a layer of the content store into a prepared snapshot.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn apply_layer(
        &self,
        layer: proto::Descriptor,
        mounts: Vec<proto::Mount>,
    ) -> Result<(), GrpcError> {
        let request = proto::ApplyRequest { diff: MessageField::some(layer), mounts, ..Default::default() };
        let _: proto::ApplyResponse =
            self.channel.call("containerd.services.diff.v1.Diff/Apply", &request).await?;
        Ok(())
    }

    /// Makes a prepared snapshot the read-only snapshot `name`.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn commit_snapshot(
        &self,
        snapshotter: &str,
        key: &str,
        name: &str,
    ) -> Result<(), GrpcError> {
        let request = proto::CommitSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: [kept()].into(),
            ..Default::default()
        };
        let _: proto::Empty =
            self.channel.call("containerd.services.snapshots.v1.Snapshots/Commit", &request).await?;
        Ok(())
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn remove_snapshot(&self, snapshotter: &str, key: &str) -> Result<(), GrpcError> {
        let request = proto::RemoveSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
            ..Default::default()
        };
        let _: proto::Empty =
            self.channel.call("containerd.services.snapshots.v1.Snapshots/Remove", &request).await?;
        Ok(())
    }

    /// Records a container.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn create_container(&self, container: proto::Container) -> Result<(), GrpcError> {
        let request =
            proto::CreateContainerRequest { container: MessageField::some(container), ..Default::default() };
        let _: proto::CreateContainerResponse =
            self.channel.call("containerd.services.containers.v1.Containers/Create", &request).await?;
        Ok(())
    }

    /// Forgets a container.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn delete_container(&self, id: &str) -> Result<(), GrpcError> {
        let request = proto::DeleteContainerRequest { id: id.to_owned(), ..Default::default() };
        let _: proto::Empty =
            self.channel.call("containerd.services.containers.v1.Containers/Delete", &request).await?;
        Ok(())
    }

    /// Creates a container's task: starts its shim and sets its process up. `output` is the FIFO of both output streams.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn create_task(
        &self,
        id: &str,
        rootfs: Vec<proto::Mount>,
        output: &Path,
    ) -> Result<(), GrpcError> {
        let output = output.display().to_string();
        let request = proto::CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs,
            stdout: output.clone(),
            stderr: output,
            ..Default::default()
        };
        let _: proto::CreateTaskResponse =
            self.channel.call("containerd.services.tasks.v1.Tasks/Create", &request).await?;
        Ok(())
    }

    /// Starts a task's process.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn start_task(&self, id: &str) -> Result<(), GrpcError> {
        let request = proto::StartRequest { container_id: id.to_owned(), ..Default::default() };
        let _: proto::StartResponse =
            self.channel.call("containerd.services.tasks.v1.Tasks/Start", &request).await?;
        Ok(())
    }

    /// Sends a task's process SIGKILL.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn kill_task(&self, id: &str) -> Result<(), GrpcError> {
        let request = proto::KillRequest {
            container_id: id.to_owned(),
            signal: libc::SIGKILL as u32,
            ..Default::default()
        };
        let _: proto::Empty = self.channel.call("containerd.services.tasks.v1.Tasks/Kill", &request).await?;
        Ok(())
    }

    /// Waits for a task to end, and gives its exit status.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn wait_task(&self, id: &str) -> Result<u32, GrpcError> {
        let request = proto::WaitRequest { container_id: id.to_owned(), ..Default::default() };
        let answer: proto::WaitResponse =
            self.channel.call("containerd.services.tasks.v1.Tasks/Wait", &request).await?;
        Ok(answer.exit_status)
    }

    /// Deletes a task that has ended: cleans up after it and ends its shim.
    ///
    /// # Errors
    /// As for every call: see [`Channel::call`].
    pub(crate) async fn delete_task(&self, id: &str) -> Result<(), GrpcError> {
        let request = proto::DeleteTaskRequest { container_id: id.to_owned(), ..Default::default() };
        let _: proto::DeleteResponse =
            self.channel.call("containerd.services.tasks.v1.Tasks/Delete", &request).await?;
        Ok(())
    }
}

fn kept() -> (String, String) {
    (GC_ROOT.0.to_owned(), GC_ROOT.1.to_owned())
}
