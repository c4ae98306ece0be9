//! The control thread: serves the shim's requests until the machine or the shim ends.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use bulkhead_base::chain;
use bulkhead_vmm_protocol::{
    Channel, ChannelError, Event, ExitReason, FromVmm, Packet, Refusal, RefusalKind, Request,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::machine::{Machine, MachineError, Prepared, RunningMachine, SlotError};
use crate::resources::{Handles, ResourceError};

/// How long the shim may take to make room for a message.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// The longest text of a refusal, in bytes.
const REFUSAL_MAX: usize = 4096;

/// What ends the control thread before its time.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The control socket is of no use.
    #[error("the control socket can't be used")]
    Channel(#[from] ChannelError),
    /// Waiting failed.
    #[error("can't wait for the control socket")]
    Wait(#[source] io::Error),
}

/// How serving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The machine ended and the shim was told why.
    Exited,
    /// The shim's end was closed.
    ShimGone,
    /// The machine couldn't be built and the shim was told why.
    Refused,
}

/// Serves one machine over `channel`, from its boot to its end.
pub fn serve(channel: &Channel) -> Result<Outcome, ControlError> {
    channel.set_timeout(Some(SEND_LIMIT))?;
    let Some((mut machine, handles)) = boot(channel)? else { return Ok(Outcome::Refused) };
    match run(channel, &mut machine, &handles)? {
        End::Exited => {
            let fallback = ExitReason::Internal { detail: "the machine ended without a reason".into() };
            let reason = machine.finish(fallback);
            channel.send(&FromVmm::Event(Event::Exited(reason)), &[])?;
            Ok(Outcome::Exited)
        }
        End::ShimGone => Ok(Outcome::ShimGone),
        End::Save(file) => {
            let mut file = File::from(file);
            let result = machine.save(&mut file);
            reply(channel, result.map_err(|error| refusal_of(RefusalKind::Template, &error)))?;
            wait_for_shim(channel)
        }
    }
}

/// Refuses everything until the shim closes its end: the machine was saved and doesn't run any more.
fn wait_for_shim(channel: &Channel) -> Result<Outcome, ControlError> {
    let watch = Watch::new(channel, None)?;
    loop {
        watch.wait()?;
        match channel.receive::<Request>() {
            Ok(_) | Err(ChannelError::Malformed(_)) => {
                reply(channel, Err(invalid("the machine has stopped to be saved")))?;
            }
            Err(ChannelError::Closed) => return Ok(Outcome::ShimGone),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Prepares, waits for the boot request and carries it out; `None` when it was refused.
fn boot(channel: &Channel) -> Result<Option<(RunningMachine, Handles)>, ControlError> {
    let watch = Watch::new(channel, None)?;
    watch.wait()?;
    let Packet { message, fds } = channel.receive::<Request>()?;
    let Request::Prepare(config) = message else {
        reply(channel, Err(invalid("the first request has to be to prepare")))?;
        return Ok(None);
    };
    let prepared = match Prepared::new(&config, fds) {
        Ok(prepared) => prepared,
        Err(error) => {
            reply(channel, Err(refusal(&error)))?;
            return Ok(None);
        }
    };
    reply(channel, Ok(()))?;
    watch.wait()?;
    let Packet { message, fds } = channel.receive::<Request>()?;
    let result = match message {
        Request::Boot(config) => start(Machine::build(prepared, &config, fds)),
        Request::Restore(config) => start(Machine::restore(prepared, &config, fds)),
        Request::Prepare(_)
        | Request::Save
        | Request::ConnectVsock { .. }
        | Request::AttachDisk(_)
        | Request::AttachNet(_)
        | Request::DetachDevice { .. } => Err(invalid("nothing is booted yet")),
    };
    match result {
        Ok(running) => {
            reply(channel, Ok(()))?;
            Ok(Some(running))
        }
        Err(refusal) => {
            reply(channel, Err(refusal))?;
            Ok(None)
        }
    }
}

fn start(built: Result<(Machine, Handles), MachineError>) -> Result<(RunningMachine, Handles), Refusal> {
    let (machine, handles) = built.map_err(|error| refusal(&error))?;
    let running = machine.start().map_err(|error| refusal(&error))?;
    Ok((running, handles))
}

/// What ends the serving of requests.
enum End {
    Exited,
    ShimGone,
    /// The machine is to be saved to this file.
    Save(OwnedFd),
}

/// Serves requests until the machine or the shim ends, or the machine is to be saved.
fn run(channel: &Channel, machine: &mut RunningMachine, handles: &Handles) -> Result<End, ControlError> {
    // What it took to make the machine goes back to the host: there is one of it for each pod.
    // SAFETY: takes a number; the allocator's own locks are all that it needs.
    unsafe { libc::malloc_trim(0) };
    let watch = Watch::new(channel, Some(machine))?;
    loop {
        let ready = watch.wait()?;
        if ready.exit {
            return Ok(End::Exited);
        }
        if !ready.channel {
            continue;
        }
        let packet = match channel.receive::<Request>() {
            Ok(packet) => packet,
            Err(ChannelError::Closed) => return Ok(End::ShimGone),
            Err(ChannelError::Malformed(error)) => {
                reply(channel, Err(invalid(&format!("the request can't be understood: {error}"))))?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let result = match packet.message {
            Request::Prepare(_) | Request::Boot(_) | Request::Restore(_) => {
                Err(invalid("a machine is running already"))
            }
            Request::Save => match <[OwnedFd; 1]>::try_from(packet.fds) {
                Ok([file]) => return Ok(End::Save(file)),
                Err(_) => Err(invalid("saving needs one descriptor")),
            },
            Request::ConnectVsock { port } => connect_vsock(handles, port, packet.fds),
            Request::AttachDisk(disk) => {
                machine.attach_disk(&disk, packet.fds).map_err(|error| slot_refused(&error))
            }
            Request::AttachNet(net) => {
                machine.attach_net(&net, packet.fds).map_err(|error| slot_refused(&error))
            }
            Request::DetachDevice { slot } => {
                machine.detach_device(slot).map_err(|error| slot_refused(&error))
            }
        };
        reply(channel, result)?;
    }
}

fn connect_vsock(handles: &Handles, port: u32, fds: Vec<OwnedFd>) -> Result<(), Refusal> {
    let Ok([stream]) = <[OwnedFd; 1]>::try_from(fds) else {
        return Err(invalid("a connection needs one descriptor"));
    };
    handles.vsock.connect(port, stream).map_err(|error| Refusal {
        kind: RefusalKind::Resources,
        message: format!("can't connect to port {port} of the guest: {error}"),
    })
}

fn slot_refused(error: &SlotError) -> Refusal {
    let kind = match error {
        SlotError::Config(_) | SlotError::Taken(_) | SlotError::Empty(_) | SlotError::Template => {
            RefusalKind::InvalidRequest
        }
        SlotError::Disk { .. } => RefusalKind::Disk,
        SlotError::Tap(_) | SlotError::Wire { .. } | SlotError::Stuck(_) => RefusalKind::Resources,
    };
    refusal_of(kind, error)
}

fn reply(channel: &Channel, result: Result<(), Refusal>) -> Result<(), ChannelError> {
    channel.send(&FromVmm::Reply(result), &[])
}

fn invalid(message: &str) -> Refusal {
    Refusal { kind: RefusalKind::InvalidRequest, message: message.to_owned() }
}

fn refusal(error: &MachineError) -> Refusal {
    let kind = match error {
        MachineError::Resources(ResourceError::Disk { .. }) => RefusalKind::Disk,
        MachineError::Resources(_) => RefusalKind::InvalidRequest,
        MachineError::Boot(crate::boot::BootError::CommandLine(_)) => RefusalKind::InvalidRequest,
        MachineError::Boot(_) => RefusalKind::Kernel,
        MachineError::NoKvm(_)
        | MachineError::Lacking(_)
        | MachineError::Kvm { .. }
        | MachineError::Vcpu { .. } => RefusalKind::Kvm,
        MachineError::Memory(_) | MachineError::Host { .. } | MachineError::Devices(_) => {
            RefusalKind::Resources
        }
        MachineError::Template(_) => RefusalKind::Template,
    };
    refusal_of(kind, error)
}

fn refusal_of(kind: RefusalKind, error: &dyn std::error::Error) -> Refusal {
    let mut message = chain(error);
    crate::logger::truncate(&mut message, REFUSAL_MAX);
    Refusal { kind, message }
}

/// Waits for the control socket and the end of the machine.
struct Watch {
    epoll: Epoll,
}

/// What is ready.
#[derive(Debug, Default)]
struct Ready {
    channel: bool,
    exit: bool,
}

const CHANNEL: u64 = 0;
const EXIT: u64 = 1;

impl Watch {
    fn new(channel: &Channel, machine: Option<&RunningMachine>) -> Result<Self, ControlError> {
        let epoll = Epoll::new().map_err(ControlError::Wait)?;
        let add = |fd, token| {
            epoll
                .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
                .map_err(ControlError::Wait)
        };
        add(channel.as_raw_fd(), CHANNEL)?;
        if let Some(machine) = machine {
            add(machine.exit_event().as_raw_fd(), EXIT)?;
        }
        Ok(Watch { epoll })
    }

    /// Waits without a time limit: the shim closes its end when it is gone or has enough.
    fn wait(&self) -> Result<Ready, ControlError> {
        let mut events = [EpollEvent::default(); 2];
        let count = loop {
            match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => break result.map_err(ControlError::Wait)?,
            }
        };
        let mut ready = Ready::default();
        for event in &events[..count] {
            match event.data() {
                CHANNEL => ready.channel = true,
                _ => ready.exit = true,
            }
        }
        Ok(ready)
    }
}
