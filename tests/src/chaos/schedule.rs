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
}

impl Step {
    /// All of them, in order.
    pub(crate) const ALL: [Step; 5] = [Step::Create, Step::Start, Step::Exec, Step::Kill, Step::Delete];

    /// Somewhat longer than the step takes in the nested host: a fault may come after its end as well.
    fn length(self) -> Duration {
        Duration::from_millis(match self {
            Step::Create => 90,
            Step::Start => 8,
            Step::Exec => 25,
            Step::Kill => 12,
            Step::Delete => 45,
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
pub(crate) struct Schedule(pub Vec<Fault>);

impl Schedule {
    /// A round's: one fault, or in every third round two.
    pub(crate) fn of(seed: u64, round: u64) -> Self {
        let mut random = Random::of(seed, round);
        let count = if random.below(3) == 0 { 2 } else { 1 };
        Self((0..count).map(|_| fault(&mut random)).collect())
    }

    /// Each of several faults alone: what a schedule that failed may come down to.
    pub(crate) fn smaller(&self) -> Vec<Schedule> {
        if self.0.len() < 2 {
            return Vec::new();
        }
        self.0.iter().map(|fault| Schedule(vec![*fault])).collect()
    }

    /// Whether there is this kind of fault in it.
    pub(crate) fn has(&self, harm: Harm) -> bool {
        self.0.iter().any(|fault| fault.harm == harm)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&faults.join(", "))
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
        // Before that there is no guest, and afterwards nobody misses it.
        Harm::StopGuest => random.one_of(&[Step::Start, Step::Exec, Step::Kill]),
        // Half of all into the step that does most.
        _ if random.below(2) == 0 => Step::Create,
        _ => random.one_of(&Step::ALL),
    };
    let length = u64::try_from(step.length().as_micros()).unwrap_or(u64::MAX);
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
        let faults: Vec<Fault> = (0..500).flat_map(|round| Schedule::of(1, round).0).collect();
        let harms: BTreeSet<Harm> = faults.iter().map(|fault| fault.harm).collect();
        let kills: BTreeSet<(Harm, Step)> = faults.iter().map(|fault| (fault.harm, fault.step)).collect();
        assert_eq!(harms.len(), 8);
        for harm in [Harm::KillShim, Harm::KillVmm, Harm::KillFileServer] {
            assert!(Step::ALL.iter().all(|step| kills.contains(&(harm, *step))), "{harm:?}");
        }
    }

    #[test]
    fn two_faults_come_down_to_one() {
        let schedule =
            (0..).map(|round| Schedule::of(3, round)).find(|schedule| schedule.0.len() == 2).unwrap();
        let smaller = schedule.smaller();
        assert_eq!(smaller.len(), 2);
        assert!(smaller.iter().all(|one| one.smaller().is_empty()));
    }
}
