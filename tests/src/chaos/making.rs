//! A round in which a template is made beside a pod, with faults: what is half made is never used, nothing of it stays, and a template
//! is made again.

use super::Played;
use super::harm::{self, Target, Whom};
use super::schedule::{Harm, Schedule, Step};
use crate::cases::Environment;
use crate::cases::template::Templates;
use crate::failure::{Explain, Outcome};
use crate::process::eventually;
use crate::shim::CALL_LIMIT;
use crate::{ensure, ensure_eq, fail, node};

/// A template of this size is made sooner.
const SIZE: &str = "memory = \"64Mi\"\n";

/// Plays a round.
///
/// # Errors
/// What is not as it has to be.
pub(crate) fn play(environment: &Environment, schedule: &Schedule) -> Outcome<Played> {
    let templates = Templates::on_a_file_system(environment, SIZE)?;
    let pod = templates.pod(environment, "echo up; exec sleep 100000", &[])?;
    pod.shim.expect_started("booted")?;
    let shim = node::process(pod.shim.pid()?).explain(|| "the shim's process".into())?;
    let mut target = Target::pod(Whom::This(shim), String::new());
    target.parent = Whom::Maker;
    target.records = templates.store();
    let harming = target.harming(schedule.during(Step::Make));
    templates.settled()?;
    let hits = harming.join().unwrap_or_default();
    harm::relieve();

    let met = |harm| hits.iter().any(|(other, _)| *other == harm);
    let mut reason = None;
    if met(Harm::KillShim) {
        reason = Some("the shim was killed".to_owned());
        let host = environment.host()?;
        host.delete(&pod.bundle)?;
        host.delete(&pod.bundle)?;
        let _ = std::fs::remove_file(pod.shim.address.trim_start_matches("unix://"));
        pod.bundle.remove()?;
    } else {
        let log = pod.shim.log.until("template ", CALL_LIMIT)?;
        match log.lines().find(|line| line.contains("no template could be made")) {
            Some(line) => reason = Some(line.to_owned()),
            None => {
                ensure!(log.contains(" made in "), "the log says nothing of the template: {log:?}");
            }
        }
        ensure!(reason.is_none() || !hits.is_empty(), "failed without a fault: {reason:?}");
        eventually("what was half made is removed", CALL_LIMIT, || {
            let half_made = templates.half_made();
            ensure_eq!(half_made.len(), 0, "half made {half_made:?}");
            Ok(())
        })?;
        let output = pod.exec_script("probe", "echo unharmed")?;
        ensure_eq!(output.stdout, "unharmed\n", "the pod that asked for the template");
        pod.finish()?;
    }

    // What is in the store is whole, and pods start from it; else one is made for the next.
    let there = templates.sound()?;
    let how = match there {
        0 => "booted",
        1 => "restored",
        more => fail!("{more} templates"),
    };
    templates.run_pod(environment, &[], how, None)?;
    templates.expect(1)?;
    ensure!(templates.have_working_sets(), "a template has no working set");
    templates.sound()?;
    templates.run_pod(environment, &[], "restored", None)?;
    Ok(Played { hits, reason })
}
