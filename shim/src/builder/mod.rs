//! Making templates: a guest is booted in a jailed VMM of its own, without a pod, up to the agent's first answer, saved,
//! and published in the store. Then a first pod starts from it.

pub(crate) mod background;
pub(crate) mod confine;
pub(crate) mod rehearsal;
mod working_set;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_vmm_protocol::{Channel, Request};
use log::Level;
use nix::sys::socket::SockType;

use self::confine::Confined;
use crate::host::cgroup::CgroupError;
use crate::pod::agent::{Agent, AgentError, Greeting};
use crate::pod::guest::{self, Backends, CONSOLE_KEPT, FileError, Files, Start};
use crate::pod::machine::{Control, JailNetwork, Jailed, MachineError, identity_args, socket_pair};
use crate::pod::tail::Tail;
use crate::pod::{PodError, from_owned};
use crate::template::store::Draft;
use crate::template::{Key, Order, Recipe, StoreError, Template};

/// From the start of the VMM until its machine is saved.
const MACHINE_LIMIT: Duration = Duration::from_secs(60);

/// What a kernel and an agent that have just begun still put off to do it soon: what they do before the machine is saved no pod does
/// again, in memory of its own.
const SETTLE: Duration = Duration::from_millis(500);

/// A killed VMM is gone within this time.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Why there is no new template.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file that every guest needs.
    #[error(transparent)]
    File(#[from] FileError),
    /// The VMM.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Limits for making it.
    #[error("can't limit what making the template takes")]
    Confine(#[from] CgroupError),
    /// A pipe, a runtime or the like.
    #[error("can't prepare the guest of the template: {step}")]
    Prepare {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The guest did not come to the point at which it is saved.
    #[error("the guest of the template did not boot{said}")]
    Guest {
        /// What the console and the VMM said.
        said: String,
        /// What was noticed.
        #[source]
        source: Box<PodError>,
    },
    /// The agent does not answer.
    #[error("the agent in the guest of the template does not answer{said}")]
    Agent {
        /// What the console and the VMM said.
        said: String,
        /// What was noticed.
        #[source]
        source: AgentError,
    },
    /// It takes too long.
    #[error("the guest of the template was not saved within {} s{said}", MACHINE_LIMIT.as_secs())]
    TimedOut {
        /// What the console and the VMM said.
        said: String,
    },
    /// It was made, and is of no use.
    #[error("no pod can be started from the new template {}", .key.short())]
    Rehearsal {
        /// Its name.
        key: Key,
        /// Why.
        #[source]
        source: rehearsal::RehearsalError,
    },
    /// It was made, and no guest came out of it.
    #[error("no pod can be started from the new template {}: its guest can't be restored", .key.short())]
    NotRestored {
        /// Its name.
        key: Key,
    },
    /// The VMM does not end.
    #[error("the VMM of the template was killed but does not end")]
    Stuck,
}

/// How to go about it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Make it again even if there is one.
    pub again: bool,
    /// How long to wait for another maker to end.
    pub patience: Duration,
    /// How long to leave the machine to others first, with the right to make templates in hand.
    pub delay: Duration,
    /// Whether to do it within limits, below everybody else.
    pub confined: bool,
}

/// A template that is in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// Its name.
    pub key: Key,
    /// How long making it took; `None` if it was there already.
    pub took: Option<Duration>,
}

/// Makes the template that is ordered. Blocks; needs no runtime around it.
pub fn build(order: &Order, options: Options) -> Result<Built, BuildError> {
    let store = order.store();
    let lock = store.lock(options.patience)?;
    std::thread::sleep(options.delay);
    let _confined = if options.confined { Confined::enter(order.recipe.size)? } else { None };
    let started = Instant::now();
    let inputs = store.inputs(&order.recipe, &lock)?;
    let there = if options.again { None } else { store.sound(&inputs.key()) };
    if let Some(Template { key, working_set: Some(_), .. }) = there {
        return Ok(Built { key, took: None });
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| BuildError::Prepare { step: "start a runtime", source })?;
    let key = match there {
        // Its maker was killed before the end.
        Some(Template { key, .. }) => key,
        None => {
            // Before anything is spent on it: the kernel's own list of pages is in it at least, 64 bytes for 4 KiB.
            let (size, limit) = (u64::from(order.recipe.size.memory_mib) << (20 - 6), order.limit);
            if size > limit {
                return Err(StoreError::Limit { size, limit }.into());
            }
            let files = Files::open(&order.recipe)?;
            let draft = store.draft(order.recipe.size.memory_mib, &lock)?;
            let greeting = runtime.block_on(save_guest(&order.recipe, &files, &draft))?;
            let guest = (greeting.kernel, greeting.version);
            store.publish(draft, inputs, guest, order.limit, &lock)?
        }
    };
    let (memory, place) = (store.memory_inode(&key)?, store.scratch(&lock));
    let rehearsed = runtime.block_on(rehearsal::rehearse(order.config(), memory, &place));
    // The pod that tried it has logged why.
    if store.sound(&key).is_none() {
        return Err(BuildError::NotRestored { key });
    }
    // Without a list there is an empty one, so that pods don't ask for it again and again.
    let list = rehearsed.as_deref().unwrap_or_default();
    store.add_working_set(&key, list, &lock)?;
    match rehearsed {
        Ok(_) => Ok(Built { key, took: Some(started.elapsed()) }),
        Err(source) => Err(BuildError::Rehearsal { key, source }),
    }
}

/// Boots a guest in the draft's memory and saves it; its VMM is gone when this returns.
async fn save_guest(recipe: &Recipe, files: &Files, draft: &Draft) -> Result<Greeting, BuildError> {
    let prepare = |step| move |source| BuildError::Prepare { step, source };
    let (channel, vmm_channel) = Channel::pair().map_err(MachineError::Channel)?;
    let vmm = Jailed::start(
        &recipe.vmm,
        &identity_args(),
        "VMM",
        &[vmm_channel.as_fd()],
        None,
        None,
        JailNetwork::Empty,
    )?;
    drop(vmm_channel);
    let vmm = Arc::new(vmm);

    let saving = async {
        let (console_reader, console_writer) = io::pipe().map_err(prepare("create a pipe"))?;
        let console = Tail::start(console_reader.into(), CONSOLE_KEPT, "guest console", Level::Debug)
            .map_err(prepare("read a pipe"))?;
        let said = || {
            let lines = [console.last_lines(3, 600), vmm.stderr.last_lines(3, 600)];
            lines.iter().filter(|text| !text.is_empty()).map(|text| format!("; {text}")).collect::<String>()
        };
        // Nothing is mounted before a pod configures its guest, so nobody has to serve files.
        let (_no_files, fuse) = socket_pair(SockType::SeqPacket)?;
        let (agent_ours, agent_vmm) = socket_pair(SockType::Stream)?;
        let agent = Agent::new(from_owned(agent_ours).map_err(prepare("watch a socket"))?);

        let machine = async {
            let (control, mut listener) = Control::new(channel)?;
            let start = Start::Draft(&draft.memory);
            guest::prepare(&control, recipe, files, start)?;
            let backends = Backends {
                console: console_writer.as_fd(),
                fuse: [fuse.as_fd(); 2],
                agent: agent_vmm.as_fd(),
            };
            let failed = |source: PodError| BuildError::Guest { said: said(), source: Box::new(source) };
            guest::prepared(&control, &mut listener).await.map_err(failed)?;
            let mut listener =
                guest::start(&control, listener, recipe, files, backends, start).await.map_err(failed)?;
            let greeting = guest::greet(&control, &agent, &mut listener, MACHINE_LIMIT)
                .await
                .map_err(failed)?
                .map_err(|source| BuildError::Agent { said: said(), source })?;
            tokio::select! {
                () = tokio::time::sleep(SETTLE) => {}
                _ = listener.until_ended() => return Err(BuildError::Machine(MachineError::Gone)),
            }
            let state = [draft.state.as_fd()];
            tokio::select! {
                biased;
                saved = control.request("Save", &Request::Save, &state) => saved?,
                _ = listener.until_ended() => return Err(BuildError::Machine(MachineError::Gone)),
            }
            Ok(greeting)
        };
        match tokio::time::timeout(MACHINE_LIMIT, machine).await {
            Ok(result) => result,
            Err(_) => Err(BuildError::TimedOut { said: said() }),
        }
    };
    let result = saving.await;
    vmm.child.kill();
    // It writes to the draft's memory as long as it lives.
    match tokio::time::timeout(KILL_LIMIT, vmm.child.wait()).await {
        Ok(_) => result,
        Err(_) => result.and(Err(BuildError::Stuck)),
    }
}
