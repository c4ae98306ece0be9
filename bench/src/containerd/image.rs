//! The image that every runtime runs: one uncompressed layer with the static workload and the files it works on.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::client::Client;
use super::tar::{Archive, NameTooLong};
use crate::proto;
use crate::workload::files;
use bulkhead_cri::grpc::GrpcError;

/// The image's name in containerd.
pub(crate) const NAME: &str = "bulkhead.bench/workload:1";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// What keeps the image from being made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The workload's binary is not there.
    #[error("cannot read the workload {path}: {source}")]
    Workload {
        /// Where it was looked for.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A file name of the image is too long.
    #[error(transparent)]
    Name(#[from] NameTooLong),
    /// containerd refused it.
    #[error("cannot import the image: {0}")]
    Import(#[from] GrpcError),
}

/// An image in memory: blobs by digest.
#[derive(Debug, Clone)]
pub struct Image {
    layer: Blob,
    config: Blob,
    manifest: Blob,
}

#[derive(Debug, Clone)]
struct Blob {
    media_type: &'static str,
    digest: String,
    data: Vec<u8>,
}

impl Image {
    /// Builds the image around the workload's binary.
    ///
    /// # Errors
    /// When the binary can't be read.
    pub fn build(workload: &Path) -> Result<Self, ImageError> {
        let binary = std::fs::read(workload)
            .map_err(|source| ImageError::Workload { path: workload.to_owned(), source })?;
        let layer = Blob::new(LAYER_TYPE, layer(&binary)?);
        let config = serde_json::json!({
            "architecture": "amd64",
            "os": "linux",
            "config": { "Entrypoint": [files::PROGRAM] },
            "rootfs": { "type": "layers", "diff_ids": [layer.digest] },
        });
        let config = Blob::new(CONFIG_TYPE, config.to_string().into_bytes());
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": config.json(),
            "layers": [layer.json()],
        });
        let manifest = Blob::new(MANIFEST_TYPE, manifest.to_string().into_bytes());
        Ok(Self { layer, config, manifest })
    }

    /// The committed snapshot's name: the chain id, which is the diff id for a single layer.
    pub fn snapshot(&self) -> &str {
        &self.layer.digest
    }

    /// Puts the image into containerd, not unpacked.
    ///
    /// # Errors
    /// When containerd refuses.
    pub async fn import(&self, client: &Client) -> Result<(), ImageError> {
        for blob in [&self.layer, &self.config, &self.manifest] {
            client.write_content(&blob.digest, blob.data.clone()).await?;
        }
        client.create_image(NAME, self.manifest.descriptor()).await?;
        Ok(())
    }

    /// Unpacks the layer into the committed snapshot `name`.
    ///
    /// # Errors
    /// When containerd refuses.
    pub async fn unpack(&self, client: &Client, snapshotter: &str, name: &str) -> Result<(), GrpcError> {
        let key = format!("unpack-{name}");
        let mounts = client.prepare_snapshot(snapshotter, &key, "").await?;
        client.apply_layer(self.layer.descriptor(), mounts).await?;
        client.commit_snapshot(snapshotter, &key, name).await
    }
}

impl Blob {
    fn new(media_type: &'static str, data: Vec<u8>) -> Self {
        let mut digest = "sha256:".to_owned();
        for byte in Sha256::digest(&data) {
            // Writing to a string can't fail.
            let _ = write!(digest, "{byte:02x}");
        }
        Self { media_type, digest, data }
    }

    fn descriptor(&self) -> proto::Descriptor {
        proto::Descriptor {
            media_type: self.media_type.to_owned(),
            digest: self.digest.clone(),
            size: self.data.len() as i64,
            ..Default::default()
        }
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.data.len() })
    }
}

fn layer(binary: &[u8]) -> Result<Vec<u8>, NameTooLong> {
    let mut archive = Archive::default();
    for (directory, mode) in
        [("dev/", 0o755), ("proc/", 0o755), ("sys/", 0o755), ("tmp/", 0o1777), ("run/", 0o755)]
    {
        archive.directory(directory, mode)?;
    }
    archive.file(files::PROGRAM.trim_start_matches('/'), 0o755, binary)?;
    files::add_tree(&mut archive)?;
    archive.file(files::ARCHIVE.trim_start_matches('/'), 0o644, &files::archive()?)?;
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::tar::{Entry, entries};

    #[test]
    fn the_image_holds_together() {
        let workload = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(workload.path(), b"binary").unwrap();
        let image = Image::build(workload.path()).unwrap();

        let manifest: serde_json::Value = serde_json::from_slice(&image.manifest.data).unwrap();
        assert_eq!(manifest["layers"][0]["digest"], image.snapshot());
        assert_eq!(manifest["layers"][0]["size"], image.layer.data.len());
        assert_eq!(manifest["config"]["digest"], image.config.digest);
        assert!(
            entries(&image.layer.data)
                .any(|entry| entry == Entry::File { name: &files::PROGRAM[1..], content: b"binary" })
        );
    }

    #[test]
    fn digests_are_sha256() {
        let blob = Blob::new(LAYER_TYPE, b"abc".to_vec());
        assert_eq!(blob.digest, "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn a_missing_workload_is_named() {
        let error = Image::build(Path::new("/nonexistent/workload")).unwrap_err();
        assert!(error.to_string().starts_with("cannot read the workload /nonexistent/workload"), "{error}");
    }
}
