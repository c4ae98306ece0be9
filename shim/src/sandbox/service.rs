//! The Sandbox API itself.
//!
//! A sandbox is created with its pod: the machine runs, and waits. Started, it is the pod's: it has its name and its
//! network, and takes containers. Stopped, by request or by an accident, it is still known, so that its end can be asked
//! for; only the request to shut down ends the shim.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox as SandboxApi, create_sandbox};
use protobuf::MessageField;
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::config::PodConfig;
use super::members::{FIRST_PROCESS, Members};
use super::{files, spec};
use crate::config::Config;
use crate::error::{ApiError, Code};
use crate::events::timestamp;
use crate::host::cgroup;
use crate::id;
use crate::options::RuntimeOptions;
use crate::pod::limits::Claim;
use crate::pod::timeline::now_us;
use crate::pod::{Pod, now_ns, state};
use crate::sizing::Demand;
use crate::spec::sandbox::Role;
use crate::task::create::{NewPod, hostname};
use crate::task::service::complete;
use crate::task::shim::{Shim, Slot};
use crate::task::stats;

/// What containerd's CRI plugin knows as the states of a sandbox.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// What a sandbox is reported to have ended with when its virtual machine died: killed.
const KILLED: u32 = 128 + libc::SIGKILL as u32;

/// The Sandbox API of one shim.
pub(crate) struct SandboxService {
    shim: Arc<Shim>,
    /// What containerd passed when it started the shim: requests of this API carry none.
    options: RuntimeOptions,
    sandbox: Mutex<Option<Arc<Sandbox>>>,
}

/// The sandbox of a shim.
#[derive(Debug)]
struct Sandbox {
    id: String,
    hostname: String,
    pod: Arc<Pod>,
    /// Nanoseconds since the Unix epoch.
    created_at_ns: AtomicI64,
    started: AtomicBool,
    /// Whether its end was asked for.
    ordered: AtomicBool,
}

impl Sandbox {
    fn created_at(&self) -> i64 {
        self.created_at_ns.load(Ordering::Relaxed)
    }

    fn is_ready(&self) -> bool {
        self.started.load(Ordering::Relaxed) && self.pod.death().is_none()
    }

    async fn stop(&self) {
        if self.pod.death().is_none() {
            self.ordered.store(true, Ordering::Relaxed);
        }
        self.pod.stop().await;
    }
}

/// The API under its name.
pub(crate) fn services(shim: &Arc<Shim>, options: RuntimeOptions) -> HashMap<String, Service> {
    SandboxService::new(shim, options).services()
}

impl SandboxService {
    pub(super) fn new(shim: &Arc<Shim>, options: RuntimeOptions) -> Arc<SandboxService> {
        Arc::new(SandboxService { shim: shim.clone(), options, sandbox: Mutex::default() })
    }

    pub(super) fn services(self: Arc<Self>) -> HashMap<String, Service> {
        create_sandbox(Arc::new(SandboxServer(self)))
    }

    fn current(&self) -> Option<Arc<Sandbox>> {
        self.sandbox.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, sandbox: Option<Arc<Sandbox>>) {
        *self.sandbox.lock().unwrap_or_else(PoisonError::into_inner) = sandbox;
    }

    fn find(&self, id: &str) -> Result<Arc<Sandbox>, ApiError> {
        self.current().filter(|sandbox| sandbox.id == id).ok_or_else(|| unknown(id))
    }

    async fn create(&self, request: CreateSandboxRequest) -> Result<(), ApiError> {
        let received_us = now_us();
        let id = request.sandbox_id.clone();
        id::check(&id).map_err(|error| ApiError::invalid(error.to_string()))?;
        let mut slot = self.shim.slot.lock().await;
        if self.current().is_some() {
            let message = format!("the sandbox {id:?} can't be created: this shim has one already");
            return Err(ApiError::new(Code::ALREADY_EXISTS, message));
        }
        if slot.pod.is_some() {
            return Err(ApiError::precondition("this shim serves the pod of a container"));
        }
        let bundle = PathBuf::from(&request.bundle_path);
        if !bundle.is_absolute() {
            return Err(ApiError::invalid(format!("the bundle {bundle:?} is not an absolute path")));
        }
        let config = PodConfig::from_any(request.options.as_ref().unwrap_or(&Default::default()))?;
        let namespace = self.shim.publisher.namespace();
        let spec = spec::build(&bundle, &id, &config, &request.netns_path, &request.annotations, namespace)?;
        let new = NewPod {
            id: id.clone(),
            bundle: &bundle,
            spec: &spec,
            role: &Role::Sandbox,
            demand: Demand::of(&spec, &Role::Sandbox)?,
            claim: Claim::new([], None, &Role::Sandbox),
            config: Config::load(&self.options.config)?,
            received_us,
        };
        let pod = self.shim.launch(new).await?;
        let hostname = hostname(&spec);
        self.adopt(&mut slot, &id, hostname, pod, &config, &bundle.join(state::DIRECTORY)).await
    }

    /// Makes a pod that runs a sandbox that is created.
    pub(super) async fn adopt(
        &self,
        slot: &mut Slot,
        id: &str,
        hostname: String,
        pod: Arc<Pod>,
        config: &PodConfig,
        directory: &Path,
    ) -> Result<(), ApiError> {
        let files = match files::write(directory, config) {
            Ok(files) => files,
            Err(error) => {
                pod.stop().await;
                return Err(error.into());
            }
        };
        slot.pod = Some(pod.clone());
        slot.first_process = Some(FIRST_PROCESS);
        let sysctls = config.sysctls.clone().into_iter().collect();
        slot.sandbox = Some(Members { ready: false, files, sysctls });
        self.replace(Some(Arc::new(Sandbox {
            id: id.to_owned(),
            hostname,
            pod,
            created_at_ns: AtomicI64::new(now_ns()),
            started: AtomicBool::new(false),
            ordered: AtomicBool::new(false),
        })));
        Ok(())
    }

    async fn start(&self, id: &str) -> Result<Arc<Sandbox>, ApiError> {
        let mut slot = self.shim.slot.lock().await;
        let Some(sandbox) = self.current() else {
            return Err(ApiError::precondition(format!("the sandbox {id:?} has not been created")));
        };
        if sandbox.id != id {
            return Err(unknown(id));
        }
        if sandbox.started.load(Ordering::Relaxed) {
            return Err(ApiError::precondition(format!("the sandbox {id:?} has been started already")));
        }
        sandbox.pod.check_alive()?;
        if let Err(error) = sandbox.pod.configure(&sandbox.hostname).await {
            sandbox.pod.stop().await;
            return Err(error.into());
        }
        sandbox.pod.timeline().finish(id);
        if let Some(members) = slot.sandbox.as_mut() {
            members.ready = true;
        }
        sandbox.created_at_ns.store(now_ns(), Ordering::Relaxed);
        sandbox.started.store(true, Ordering::Relaxed);
        self.shim.watch_pod(&sandbox.pod);
        Ok(sandbox)
    }

    /// Ends the sandbox with every container in it.
    async fn stop(&self, id: &str) -> Result<(), ApiError> {
        // What is being made in it meanwhile fails with it: this waits for nobody.
        self.find(id)?.stop().await;
        self.shim.await_containers().await;
        Ok(())
    }

    async fn shut_down(&self, id: &str) -> Result<(), ApiError> {
        if self.current().is_some() {
            self.stop(id).await?;
        }
        let mut slot = self.shim.slot.lock().await;
        match (self.current(), &slot.pod) {
            // One that has come to be meanwhile, or nothing to do any more.
            (Some(sandbox), _) if sandbox.id == id => sandbox.stop().await,
            // Creating it failed, or nobody ever tried.
            (None, None) => {}
            _ => return Err(unknown(id)),
        }
        slot.pod = None;
        slot.first_process = None;
        slot.sandbox = None;
        self.replace(None);
        self.shim.exit();
        Ok(())
    }

    fn status(&self, request: &SandboxStatusRequest) -> Result<SandboxStatusResponse, ApiError> {
        let sandbox = self.find(&request.sandbox_id)?;
        let mut response = SandboxStatusResponse {
            sandbox_id: sandbox.id.clone(),
            pid: sandbox.pod.host_pid(),
            state: if sandbox.is_ready() { READY } else { NOT_READY }.to_owned(),
            created_at: timestamp(sandbox.created_at()),
            ..Default::default()
        };
        if let Some(death) = sandbox.pod.death() {
            response.exited_at = timestamp(death.at_ns);
            response.info.insert("reason".to_owned(), death.reason);
        }
        if request.verbose {
            response.info.insert("shimPid".to_owned(), std::process::id().to_string());
            response.info.insert("vmmPid".to_owned(), sandbox.pod.host_pid().to_string());
        }
        Ok(response)
    }

    fn metrics(&self, id: &str) -> Result<SandboxMetricsResponse, ApiError> {
        let sandbox = self.find(id)?;
        sandbox.pod.check_alive()?;
        let group = sandbox.pod.cgroup().ok_or_else(|| {
            let message = "the pod has no cgroup on this host, so there are no figures of it";
            ApiError::new(Code::UNAVAILABLE, message)
        })?;
        sandbox.pod.keep_limits();
        let any = stats::convert(&cgroup::stats(group)).map_err(|error| {
            ApiError::new(Code::INTERNAL, format!("can't encode the statistics: {error}"))
        })?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = timestamp(now_ns());
        metric.id = sandbox.id.clone();
        metric.data = MessageField::some(any);
        Ok(response)
    }
}

fn unknown(id: &str) -> ApiError {
    ApiError::not_found(format!("there is no sandbox {id:?} in this shim"))
}

/// The service, shared with the tasks that carry its calls out.
struct SandboxServer(Arc<SandboxService>);

#[async_trait]
impl SandboxApi for SandboxServer {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let service = self.0.clone();
        complete(async move {
            let id = request.sandbox_id.clone();
            service.create(request).await.inspect_err(|error| log::error!("sandbox {id}: {error}"))
        })
        .await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let service = self.0.clone();
        let sandbox = complete(async move {
            let id = &request.sandbox_id;
            service.start(id).await.inspect_err(|error| log::error!("sandbox {id}: {error}"))
        })
        .await?;
        Ok(StartSandboxResponse {
            pid: sandbox.pod.host_pid(),
            created_at: timestamp(sandbox.created_at()),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        self.0.find(&request.sandbox_id)?;
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = "amd64".to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let service = self.0.clone();
        complete(async move { service.stop(&request.sandbox_id).await }).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let sandbox = self.0.find(&request.sandbox_id)?;
        let death = sandbox.pod.died().await;
        let ordered = sandbox.ordered.load(Ordering::Relaxed);
        Ok(WaitSandboxResponse {
            exit_status: if ordered { 0 } else { KILLED },
            exited_at: timestamp(death.at_ns),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        Ok(self.0.status(&request)?)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.0.find(&request.sandbox_id)?.pod.check_alive()?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let service = self.0.clone();
        complete(async move { service.shut_down(&request.sandbox_id).await }).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        Ok(self.0.metrics(&request.sandbox_id)?)
    }
}
