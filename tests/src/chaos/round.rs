//! A round in which the campaign leads a pod's life as containerd does, with faults, and what has to be true afterwards.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};

use super::harm::{self, Target, Whom};
use super::schedule::{Harm, Schedule, Step};
use super::{Hits, Played};
use crate::bundle::{self, Bundle};
use crate::cases::status;
use crate::failure::{Explain, Failure, Outcome};
use crate::node;
use crate::process::eventually;
use crate::shim::{CALL_LIMIT, CreateOptions, Shim, ShimHost};
use crate::stdio::{Stdio, Streams};
use crate::{ensure, fail};

/// How long a shim may take to end that has nothing left to do.
const END_LIMIT: Duration = Duration::from_secs(10);

/// What the container's process came to: killed, or a bus error, when the file server was gone first.
const KILLED: [u32; 2] = [137, 128 + 7];

/// The pod's life, as far as it came.
struct Life<'a> {
    host: &'a ShimHost,
    schedule: &'a Schedule,
    bundle: Bundle,
    shim: Shim,
    target: Target,
    hits: Hits,
    created: bool,
}

/// Plays a round.
///
/// # Errors
/// What is not as it has to be.
pub(crate) fn play(host: &ShimHost, id: &str, schedule: &Schedule) -> Outcome<Played> {
    let mut spec = bundle::spec(id, bundle::process(&["sleep", "100000"]));
    let bundle = {
        if schedule.has(Harm::EndGuest) {
            privilege(&mut spec);
        }
        host.bundle(id, &spec)?
    };
    let shim = host.start(&bundle)?;
    let process = node::process(shim.pid()?).explain(|| "the shim's process".into())?;
    let target = Target::pod(Whom::This(process), format!("bulkhead-test/{id}"));
    let mut life = Life { host, schedule, bundle, shim, target, hits: Hits::new(), created: false };
    let lived = life.live(&spec);
    life.end(lived.err())
}

impl Life<'_> {
    /// Does something while the step's faults happen.
    fn during<T>(&mut self, step: Step, work: impl FnOnce(&Self) -> T) -> T {
        let harming = self.target.harming(self.schedule.during(step));
        let result = work(self);
        self.hits.extend(harming.join().unwrap_or_default());
        harm::relieve();
        result
    }

    /// What containerd does; the first error ends it.
    fn live(&mut self, spec: &Value) -> Outcome {
        let stdio = self.shim.stdio("init", Streams::default())?;
        let created = self.during(Step::Create, |life| life.shim.create(&stdio, CreateOptions::default()));
        self.created = created.is_ok();
        created?;
        self.during(Step::Start, |life| life.shim.start(""))?;
        let script = match self.schedule.faults.iter().find(|fault| fault.harm == Harm::EndGuest) {
            Some(fault) => reset_after(fault.after),
            None => "echo out; echo err >&2".to_owned(),
        };
        let mut process = bundle::shell(&script);
        process["capabilities"] = spec["process"]["capabilities"].clone();
        let streams = self.shim.stdio("exec", Streams::default())?;
        self.during(Step::Exec, |life| life.exec(&process, &streams))?;
        self.during(Step::Kill, |life| life.kill())?;
        self.during(Step::Delete, |life| -> Outcome {
            life.shim.delete("")?;
            Ok(life.shim.shutdown()?)
        })
    }

    fn exec(&self, process: &Value, streams: &Stdio) -> Outcome {
        self.shim.exec("exec", process, streams)?;
        self.shim.start("exec")?;
        let exit = self.shim.wait("exec", CALL_LIMIT)?;
        ensure!(exit.exit_status == 0, "the exec ended with {}", exit.exit_status);
        streams.stdout.to_end(CALL_LIMIT)?;
        Ok(self.shim.delete("exec").map(drop)?)
    }

    fn kill(&self) -> Outcome {
        self.shim.kill("", 9, false)?;
        let exit = self.shim.wait("", CALL_LIMIT + Duration::from_secs(2))?;
        ensure!(self.may_end_with(exit.exit_status), "a killed container ended with {}", exit.exit_status);
        Ok(())
    }

    /// Cleans up as containerd does, and checks that nothing and nobody is in its way.
    fn end(self, error: Option<Failure>) -> Outcome<Played> {
        if let Some(Failure(reason)) = &error {
            ensure!(!self.hits.is_empty(), "failed without a fault: {reason}");
            ensure!(!reason.trim().is_empty(), "an error without a reason");
        }
        if self.target.shim_lives() && error.is_some() {
            self.finish_with_shim()?;
        }
        let ended = eventually("the shim ends", END_LIMIT, || {
            ensure!(!self.target.shim_lives(), "{:?} is still there", self.target.shim);
            Ok(())
        });
        if let Err(Failure(reason)) = ended {
            let _ = self.target.shim.find().map(|shim| node::kill_hard(shim.pid));
            self.clean_up_after_it()?;
            fail!("{reason}");
        }
        let was_killed = self.hits.iter().any(|(harm, _)| *harm == Harm::KillShim);
        if error.is_some() || was_killed {
            self.clean_up_after_it()?;
        } else {
            self.bundle.clone().remove()?;
        }
        Ok(Played { hits: self.hits, reason: error.map(|Failure(reason)| reason) })
    }

    /// The shim lives: it has to tell the end of what it has made, and let go of it.
    fn finish_with_shim(&self) -> Outcome {
        // It may be killed in the middle of that: a fault may come late.
        let gone = |result: Outcome| match result {
            Err(failure) if self.target.shim_lives() => Err(failure),
            _ => Ok(()),
        };
        if self.created {
            gone(self.expect_end())?;
        }
        // A container that was not made is not there to be deleted.
        let _ = self.shim.delete("");
        let _ = self.shim.shutdown();
        Ok(())
    }

    fn expect_end(&self) -> Outcome {
        let Ok(state) = self.shim.state("") else { return Ok(()) };
        if state.status.value() != status::STOPPED {
            let _ = self.shim.kill("", 9, true);
            if state.status.value() == status::CREATED {
                return Ok(());
            }
        }
        let exit = self.shim.wait("", CALL_LIMIT + Duration::from_secs(2))?;
        ensure!(self.may_end_with(exit.exit_status), "the container ended with {}", exit.exit_status);
        Ok(())
    }

    /// Killed, or by itself, when it could not read its files any more.
    fn may_end_with(&self, status: u32) -> bool {
        KILLED.contains(&status) || status != 0 && self.schedule.has(Harm::KillFileServer)
    }

    /// The shim is gone: its `delete` finds what there is, twice as containerd may ask.
    fn clean_up_after_it(&self) -> Outcome {
        for _ in 0..2 {
            let deleted = self.host.delete(&self.bundle)?;
            ensure!(
                self.may_end_with(deleted.exit_status) || !self.created,
                "the shim's delete reports {}",
                deleted.exit_status
            );
        }
        let _ = fs::remove_file(self.shim.address.trim_start_matches("unix://"));
        self.bundle.clone().remove()
    }
}

/// Lets the container reach the port that resets the guest.
fn privilege(spec: &mut Value) {
    let names = ["SYS_ADMIN", "SYS_RAWIO", "MKNOD", "DAC_OVERRIDE", "SYS_BOOT"];
    let all: Vec<String> = names.iter().map(|name| format!("CAP_{name}")).collect();
    spec["process"]["capabilities"] = json!({ "bounding": all, "effective": all, "permitted": all });
    spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        let options = ["nosuid"];
        mounts.push(json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": options }));
    }
}

/// The keyboard controller resets the machine.
fn reset_after(after: Duration) -> String {
    format!(
        "mknod /tmp/port c 1 4; usleep {}; printf '\\376' | dd of=/tmp/port bs=1 seek=100 conv=notrunc; sleep 100",
        after.as_micros()
    )
}
