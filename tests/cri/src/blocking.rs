//! The client for programs without a tokio runtime.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::grpc::GrpcError;

/// A connection to a runtime, whose calls wait for the answer. It is served only during calls, which is enough for those that
/// carry one message each way.
pub struct Client {
    runtime: Runtime,
    client: crate::Client,
}

impl Client {
    /// Connects to the runtime behind `socket`; each call may take `limit`.
    ///
    /// # Errors
    /// When nobody answers there.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self, GrpcError> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| GrpcError::Connect { path: socket.to_owned(), source })?;
        let client = runtime.block_on(crate::Client::connect(socket, limit))?;
        Ok(Self { runtime, client })
    }

    pub(crate) fn client(&self) -> &crate::Client {
        &self.client
    }

    pub(crate) fn wait<T>(&self, call: impl Future<Output = T>) -> T {
        self.runtime.block_on(call)
    }
}
