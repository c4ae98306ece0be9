//! Joining a pod's interfaces to taps by traffic control, and letting go of them.

use std::io;

use bulkhead_netlink::{Instruction, Socket};

use super::filter::{allowed, everything, nothing};
use super::{Interface, NetError, Tap};

/// Our programs on an interface are known by their priority; others of a smaller number come before.
const PRIORITY: u16 = 0xb417;
const LAST: u16 = PRIORITY + 1;

/// An interface and the tap that it is joined to.
#[derive(Debug)]
pub(crate) struct Joined {
    /// The interface.
    pub interface: Interface,
    /// Its tap.
    pub tap: Tap,
}

/// Joins every interface of the socket's namespace, which the calling thread is in, to a tap with as many `queues`; but
/// for those `known` by their numbers. With `spoof_check` what comes from addresses that an interface does not have stays
/// inside.
pub(crate) fn join_all(
    socket: &mut Socket,
    known: &[u32],
    queues: u8,
    spoof_check: bool,
) -> Result<Vec<Joined>, NetError> {
    let mut joined = Vec::new();
    for interface in Interface::read_all(socket, known)? {
        match join(socket, &interface, queues, spoof_check) {
            Ok(tap) => joined.push(Joined { interface, tap }),
            Err(error) => {
                // Their taps go with `joined`.
                let indices = joined.iter().map(|joined| joined.interface.index);
                for index in indices.chain([interface.index]) {
                    let _ = socket.remove_program(index, PRIORITY);
                }
                return Err(error);
            }
        }
    }
    Ok(joined)
}

fn join(socket: &mut Socket, interface: &Interface, queues: u8, spoof_check: bool) -> Result<Tap, NetError> {
    let failed = |source: io::Error| NetError::Join {
        name: interface.name.clone(),
        step: if Socket::is_unknown(&source) {
            "the host's kernel needs the modules sch_ingress, cls_bpf and act_mirred"
        } else {
            "traffic control"
        },
        source,
    };
    let tap = Tap::make(socket, interface, queues)?;
    let program = if spoof_check { allowed(interface.mac, &interface.ips()) } else { everything() };
    socket.add_ingress(tap.index).map_err(failed)?;
    socket.decide(tap.index, LAST, &nothing()).map_err(failed)?;
    redirect(socket, tap.index, &program, interface.index).map_err(failed)?;
    // Left by a shim that was killed.
    socket.remove_program(interface.index, PRIORITY).map_err(failed)?;
    socket.add_ingress(interface.index).map_err(failed)?;
    redirect(socket, interface.index, &everything(), tap.index).map_err(failed)?;
    Ok(tap)
}

fn redirect(socket: &mut Socket, from: u32, program: &[Instruction], to: u32) -> io::Result<()> {
    socket.redirect(from, PRIORITY, program, to)
}

/// Lets go of every interface of the socket's namespace.
pub(crate) fn release(socket: &mut Socket) -> Result<(), NetError> {
    let links = socket.links().map_err(|source| NetError::Read { what: "interfaces", source })?;
    let mut result = Ok(());
    for link in links.iter().filter(|link| !link.is_loopback()) {
        let removed = socket.remove_program(link.index, PRIORITY);
        result = result.and(removed.map(drop).map_err(|source| NetError::Join {
            name: link.name.clone(),
            step: "it stays joined",
            source,
        }));
    }
    result
}

#[cfg(test)]
mod tests;
