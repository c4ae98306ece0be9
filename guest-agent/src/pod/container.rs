//! One container: its group, its first process and the further ones.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_agent_protocol::{StatsResponse, Stdio, cgroup};

use super::process::{NewProcess, Process, signal_number};
use super::{Pod, PodError, check_id};
use crate::container::cgroup::Cgroup;
use crate::container::cgroup::device_filter::{AttachedFilter, DeviceFilter};
use crate::container::cgroup::resources::Limits;
use crate::container::launch::{Job, LaunchError};
use crate::container::namespaces::Kind;
use crate::container::plan::ContainerPlan;
use crate::container::process::{Inherited, ProcessPlan};
use crate::container::spec;
use crate::sys;

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    id: String,
    cgroup: Arc<Cgroup>,
    /// `CLONE_NEW*` flags of the namespaces that a further process joins.
    namespaces: libc::c_int,
    /// What a further process gets from it.
    inherited: Inherited,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Exec>>,
    filter: Mutex<Option<AttachedFilter>>,
    paused: AtomicBool,
    oom_kills_seen: AtomicU64,
}

/// A further process, or its id while it is being set up.
#[derive(Debug, Clone)]
enum Exec {
    Busy,
    Ready(Arc<Process>),
}

impl Container {
    /// Makes a container up to its first process, which waits to be started. What was made is undone on failure.
    pub(super) async fn create(
        pod: &Pod,
        id: &str,
        plan: ContainerPlan,
        stdio: Stdio,
    ) -> Result<Arc<Self>, PodError> {
        let cgroup = Arc::new(pod.hierarchy.create(id)?);
        let created = Self::create_in(pod, id, plan, stdio, cgroup.clone()).await;
        if created.is_err()
            && let Err(error) = cgroup.remove().await
        {
            log::warn!("container {id}: {}", bulkhead_base::chain(&error));
        }
        created
    }

    async fn create_in(
        pod: &Pod,
        id: &str,
        plan: ContainerPlan,
        stdio: Stdio,
        cgroup: Arc<Cgroup>,
    ) -> Result<Arc<Self>, PodError> {
        plan.limits.apply(&pod.hierarchy, &cgroup)?;
        let filter = plan.devices.attach(&cgroup)?;
        pod.oom
            .watch(id, &cgroup)
            .map_err(|source| PodError::System { what: "watch for memory events", source })?;
        let new = NewProcess {
            container_id: id,
            job: Job::Container(&plan),
            plan: &plan.process,
            stdio,
            cgroup: cgroup.directory(),
        };
        // Without a process id namespace of its own the rest of a container does not end with its first process.
        let outlived = !plan.namespaces.is_new(Kind::Pid);
        let group = cgroup.clone();
        let on_exit = move || {
            if outlived && let Err(error) = group.kill() {
                log::warn!("{}", bulkhead_base::chain(&error));
            }
            group.oom_kills() > 0
        };
        let init = Process::create(pod, new, on_exit).await.map_err(|error| match error {
            PodError::Launch(LaunchError::Died) if cgroup.oom_kills() > 0 => LaunchError::OutOfMemory.into(),
            other => other,
        })?;
        Ok(Arc::new(Self {
            id: id.to_owned(),
            cgroup,
            namespaces: plan.namespaces.all_flags(),
            inherited: plan.inherited,
            init,
            execs: Mutex::default(),
            filter: Mutex::new(filter),
            paused: AtomicBool::new(false),
            oom_kills_seen: AtomicU64::new(0),
        }))
    }

    /// Its id.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Its first process.
    pub(crate) fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Its control group.
    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// A further process.
    pub(crate) fn exec(&self, exec_id: &str) -> Result<Arc<Process>, PodError> {
        match self.execs().get(exec_id) {
            Some(Exec::Ready(process)) => Ok(process.clone()),
            Some(Exec::Busy) => Err(PodError::Busy(self.id.clone())),
            None => Err(PodError::NoProcess { id: self.id.clone(), exec_id: exec_id.to_owned() }),
        }
    }

    /// Sets a further process up, which waits to be started.
    pub(crate) async fn create_exec(
        &self,
        pod: &Pod,
        exec_id: &str,
        process: &[u8],
        stdio: Stdio,
    ) -> Result<Arc<Process>, PodError> {
        check_id("exec", exec_id)?;
        let process: spec::Process =
            serde_json::from_slice(process).map_err(|error| PodError::Json("the process", error))?;
        let plan = ProcessPlan::new(&process, &self.inherited)?;
        self.require_running()?;
        match self.execs().entry(exec_id.to_owned()) {
            std::collections::hash_map::Entry::Occupied(_) => {
                return Err(PodError::ProcessExists { id: self.id.clone(), exec_id: exec_id.to_owned() });
            }
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Exec::Busy),
        };
        let created = self.launch_exec(pod, &plan, stdio).await;
        let mut execs = self.execs();
        match &created {
            Ok(process) => execs.insert(exec_id.to_owned(), Exec::Ready(process.clone())),
            Err(_) => execs.remove(exec_id),
        };
        created
    }

    async fn launch_exec(
        &self,
        pod: &Pod,
        plan: &ProcessPlan,
        stdio: Stdio,
    ) -> Result<Arc<Process>, PodError> {
        let pidfd = sys::process::open_pidfd(self.init.pid().cast_signed())
            .map_err(|source| PodError::System { what: "open the container's first process", source })?;
        let new = NewProcess {
            container_id: &self.id,
            job: Job::Exec { pidfd: pidfd.as_fd(), namespaces: self.namespaces },
            plan,
            stdio,
            cgroup: self.cgroup.directory(),
        };
        let group = self.cgroup.clone();
        Process::create(pod, new, move || group.oom_kills() > 0).await
    }

    /// A process can only be added to a container that runs.
    fn require_running(&self) -> Result<(), PodError> {
        let state = |state| Err(PodError::State { id: self.id.clone(), state });
        if self.init.ended().is_some() {
            state("stopped")
        } else if self.paused.load(Relaxed) {
            state("paused")
        } else {
            Ok(())
        }
    }

    /// Forgets a further process that has ended, or kills it if it was never started.
    pub(crate) async fn delete_exec(&self, exec_id: &str) -> Result<(), PodError> {
        let process = self.exec(exec_id)?;
        process.require_deletable(&self.id)?;
        process.kill().await?;
        self.execs().remove(exec_id);
        Ok(())
    }

    /// Sends a signal to every process.
    pub(crate) fn signal_all(&self, signal: u32) -> Result<(), PodError> {
        let number = signal_number(signal)?;
        if number == libc::SIGKILL {
            return Ok(self.cgroup.kill()?);
        }
        for pid in self.cgroup.pids()? {
            // Those that have ended meanwhile need no signal.
            let _ = sys::process::kill(pid.cast_signed(), number);
        }
        Ok(())
    }

    /// Stops or continues every process.
    pub(crate) async fn set_paused(&self, paused: bool) -> Result<(), PodError> {
        if self.init.ended().is_some() {
            return Err(PodError::State { id: self.id.clone(), state: "stopped" });
        }
        self.cgroup.set_frozen(paused).await?;
        self.paused.store(paused, Relaxed);
        Ok(())
    }

    /// Changes the limits.
    pub(crate) fn update(&self, pod: &Pod, resources: &[u8]) -> Result<(), PodError> {
        let resources: spec::Resources =
            serde_json::from_slice(resources).map_err(|error| PodError::Json("the resources", error))?;
        let limits = Limits::new(&resources)?;
        let rules = spec::items(&resources.devices);
        let devices = DeviceFilter::new(rules)?;
        limits.apply(&pod.hierarchy, &self.cgroup)?;
        if !rules.is_empty() {
            // The new filter is there before the old one goes.
            let new = devices.attach(&self.cgroup)?;
            let old =
                std::mem::replace(&mut *self.filter.lock().unwrap_or_else(PoisonError::into_inner), new);
            if let Some(old) = old {
                old.detach(&self.cgroup)?;
            }
        }
        Ok(())
    }

    /// What it uses.
    pub(crate) fn stats(&self) -> StatsResponse {
        cgroup::read(&|name| self.cgroup.read(name).unwrap_or_default())
    }

    /// Whether processes were killed for want of memory since the last call.
    pub(super) fn has_new_oom_kills(&self) -> bool {
        let kills = self.cgroup.oom_kills();
        self.oom_kills_seen.swap(kills, Relaxed) < kills
    }

    /// Ends what is left and removes what was made of it.
    pub(super) async fn remove(&self, pod: &Pod) -> Result<(), PodError> {
        if self.has_new_oom_kills() {
            pod.events.push_oom(&self.id);
        }
        self.cgroup.kill()?;
        self.init.kill().await?;
        Ok(self.cgroup.remove().await?)
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
