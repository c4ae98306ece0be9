//! What happens in a round, drawn from the seed: the same seed and number give the same round.

use std::fmt;
use std::time::Duration;

/// A sequence of numbers that a seed determines (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// The sequence of a round.
    pub(crate) fn of(seed: u64, round: u64) -> Self {
        let mut random = Self(seed ^ round.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `end`, which is not 0.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// Who leads the pod through its life, or what else is made beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scene {
    /// The campaign itself speaks to the shim, as containerd does.
    Shim,
    /// A containerd does, which is killed and started again.
    Containerd,
    /// A template is made for the pods to come.
    Making,
}

/// A step of a pod's life, as containerd goes through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// The pod is made, with its first container.
    Create,
    /// The container's process starts.
    Start,
    /// Another process runs in it.
    Exec,
    /// The container is killed.
    Kill,
    /// The container is deleted, and the pod ends.
    Delete,
    /// A shim's first process is there, and has not told containerd its address: a moment within the pod's making.
    Launch,
    /// containerd was killed, and is started again.
    Restart,
    /// A template is made in the background.
    Make,
}

impl Step {
    /// Those of the pod itself, in order.
    pub(crate) const ALL: [Step; 5] = [Step::Create, Step::Start, Step::Exec, Step::Kill, Step::Delete];

    /// Those that `ctr` knows: the first one starts the process, too.
    const OF_CTR: [Step; 5] = [Step::Create, Step::Launch, Step::Exec, Step::Kill, Step::Delete];

    /// Somewhat longer than the step takes in the nested host: a fault may come after its end as well.
    fn length(self, scene: Scene) -> Duration {
        Duration::from_millis(match (self, scene) {
            (Step::Create, Scene::Containerd) => 110,
            (Step::Exec, Scene::Containerd) => 60,
            (Step::Kill, Scene::Containerd) => 50,
            (Step::Delete, Scene::Containerd) => 90,
            (Step::Create, _) => 90,
            (Step::Start, _) => 8,
            (Step::Exec, _) => 25,
            (Step::Kill, _) => 12,
            (Step::Delete, _) => 45,
            (Step::Launch, _) => 16,
            (Step::Restart, _) => 400,
            (Step::Make, _) => 3000,
        })
    }
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Harm {
    /// SIGKILL for the shim.
    KillShim,
    /// SIGKILL for the VMM.
    KillVmm,
    /// SIGKILL for the file server.
    KillFileServer,
    /// SIGKILL for containerd.
    KillContainerd,
    /// SIGKILL for the process that makes a template. In that step what is done to a VMM, a file server, memory and a disk is done to
    /// the maker's.
    KillMaker,
    /// The guest resets itself, its agent with it.
    EndGuest,
    /// The guest stops, and nobody hears of it.
    StopGuest,
    /// The pod's control group has no more memory.
    NoMemory,
    /// The shim may open nothing more.
    NoDescriptors,
    /// The file system of the pods' records is full.
    DiskFull,
}

/// One thing that goes wrong, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    /// What.
    pub harm: Harm,
    /// In which step.
    pub step: Step,
    /// How long after its beginning.
    pub after: Duration,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} us into {:?}", self.harm, self.after.as_micros(), self.step)
    }
}

/// What goes wrong in a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Schedule {
    /// Where.
    pub scene: Scene,
    /// What.
    pub faults: Vec<Fault>,
    /// How long a containerd that was killed stays away.
    pub away: Duration,
}

impl Schedule {
    /// A round's: one fault, or in every third round two.
    pub(crate) fn of(seed: u64, round: u64) -> Self {
        let mut random = Random::of(seed, round);
        let scene = match random.below(16) {
            0..9 => Scene::Shim,
            9..14 => Scene::Containerd,
            _ => Scene::Making,
        };
        let count = if random.below(3) == 0 { 2 } else { 1 };
        let away = random.one_of(&[0, 20, 500]);
        let faults = match scene {
            Scene::Shim => (0..count).map(|_| fault(&mut random)).collect(),
            Scene::Containerd => faults_of_containerd(&mut random, count),
            Scene::Making => (0..count).map(|_| fault_of_making(&mut random)).collect(),
        };
        Self { scene, faults, away: Duration::from_millis(away) }
    }

    /// Each of several faults alone: what a schedule that failed may come down to.
    pub(crate) fn smaller(&self) -> Vec<Schedule> {
        if self.faults.len() < 2 {
            return Vec::new();
        }
        self.faults.iter().map(|fault| Schedule { faults: vec![*fault], ..self.clone() }).collect()
    }

    /// Whether there is this kind of fault in it.
    pub(crate) fn has(&self, harm: Harm) -> bool {
        self.faults.iter().any(|fault| fault.harm == harm)
    }

    /// What goes wrong in a step, in order.
    pub(crate) fn during(&self, step: Step) -> Vec<Fault> {
        let mut faults: Vec<Fault> = self.faults.iter().filter(|fault| fault.step == step).copied().collect();
        faults.sort_by_key(|fault| fault.after);
        faults
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults: Vec<String> = self.faults.iter().map(ToString::to_string).collect();
        f.write_str(&faults.join(", "))?;
        match self.scene {
            Scene::Containerd => write!(f, ", back after {} ms", self.away.as_millis()),
            _ => Ok(()),
        }
    }
}

fn fault(random: &mut Random) -> Fault {
    // Kills are three quarters of all.
    let kills = [Harm::KillShim, Harm::KillVmm, Harm::KillFileServer];
    let others = [Harm::EndGuest, Harm::StopGuest, Harm::NoMemory, Harm::NoDescriptors, Harm::DiskFull];
    let harm = if random.below(4) < 3 { random.one_of(&kills) } else { random.one_of(&others) };
    let step = match harm {
        // A process in the container does it.
        Harm::EndGuest => Step::Exec,
        // Afterwards nobody misses it.
        Harm::StopGuest => random.one_of(&[Step::Create, Step::Start, Step::Exec, Step::Kill]),
        // Half of all into the step that does most.
        _ if random.below(2) == 0 => Step::Create,
        _ => random.one_of(&Step::ALL),
    };
    at(random, Scene::Shim, harm, step)
}

/// containerd is killed; then something else happens while it is away, or before, or it is killed again.
fn faults_of_containerd(random: &mut Random, count: u64) -> Vec<Fault> {
    let step = if random.below(2) == 0 { Step::Create } else { random.one_of(&Step::OF_CTR) };
    let mut faults = vec![at(random, Scene::Containerd, Harm::KillContainerd, step)];
    if count > 1 {
        let harms =
            [Harm::KillShim, Harm::KillVmm, Harm::KillFileServer, Harm::KillContainerd, Harm::StopGuest];
        let harm = random.one_of(&harms);
        let step = match harm {
            Harm::KillContainerd => Step::Restart,
            // What hangs then is asked for anew by the next containerd.
            Harm::StopGuest => Step::Create,
            _ => random.one_of(&[step, Step::Restart]),
        };
        faults.push(at(random, Scene::Containerd, harm, step));
    }
    faults
}

fn fault_of_making(random: &mut Random) -> Fault {
    let harms = [
        Harm::KillMaker,
        Harm::KillMaker,
        Harm::KillVmm,
        Harm::KillFileServer,
        Harm::KillShim,
        Harm::NoMemory,
        Harm::DiskFull,
        Harm::DiskFull,
    ];
    let harm = random.one_of(&harms);
    at(random, Scene::Making, harm, Step::Make)
}

fn at(random: &mut Random, scene: Scene, harm: Harm, step: Step) -> Fault {
    let length = u64::try_from(step.length(scene).as_micros()).unwrap_or(u64::MAX);
    Fault { harm, step, after: Duration::from_micros(random.below(length)) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_gives_the_same_rounds_and_another_one_others() {
        let rounds = |seed| (0..20).map(|round| Schedule::of(seed, round)).collect::<Vec<_>>();
        assert_eq!(rounds(7), rounds(7));
        assert_ne!(rounds(7), rounds(8));
    }

    #[test]
    fn every_fault_and_every_step_has_its_turn() {
        let faults_in = |scene| -> BTreeSet<(Harm, Step)> {
            let rounds = (0..1000).map(|round| Schedule::of(1, round));
            let faults =
                rounds.filter(|schedule| schedule.scene == scene).flat_map(|schedule| schedule.faults);
            faults.map(|fault| (fault.harm, fault.step)).collect()
        };
        let of_shims = faults_in(Scene::Shim);
        for harm in [Harm::KillShim, Harm::KillVmm, Harm::KillFileServer] {
            assert!(Step::ALL.iter().all(|step| of_shims.contains(&(harm, *step))), "{harm:?}");
        }
        let of_containerd = faults_in(Scene::Containerd);
        let killed = [&Step::OF_CTR[..], &[Step::Restart]].concat();
        assert!(killed.iter().all(|step| of_containerd.contains(&(Harm::KillContainerd, *step))));
        assert!(of_containerd.contains(&(Harm::KillShim, Step::Restart)));
        let of_makers = faults_in(Scene::Making);
        assert_eq!(of_makers.len(), 6, "{of_makers:?}");
        let harms: BTreeSet<Harm> =
            [of_shims, of_containerd, of_makers].iter().flatten().map(|(harm, _)| *harm).collect();
        assert_eq!(harms.len(), 10);
    }

    #[test]
    fn two_faults_come_down_to_one() {
        let schedule =
            (0..).map(|round| Schedule::of(3, round)).find(|schedule| schedule.faults.len() == 2).unwrap();
        let smaller = schedule.smaller();
        assert_eq!(smaller.len(), 2);
        assert!(smaller.iter().all(|one| one.smaller().is_empty()));
    }
}
