//! When to try again, and when to stop fighting. Pure: `now` is the time since the agent's start.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use crate::host::Key;

use super::{Finding, Plan, Step, StepError};

/// So many reverts …
const FIGHT_REVERTS: usize = 5;
/// … in so long a time are a fight with somebody else.
const FIGHT_WINDOW: Duration = Duration::from_secs(10);
/// What is reverted again within so short a time counts once: `ip route flush` goes on until it sees nothing.
const BURST: Duration = Duration::from_millis(5);
/// How long we leave a fought-over object alone, and the longest backoff of a failing step.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// The same for what is in the firewall: while it is gone, what leaves has the wrong address, and nothing is guarded. Whoever flushes the
/// ruleset, however often, has it back within 200 ms; more than ten times a second nobody is answered.
const FIREWALL_WAIT: Duration = Duration::from_millis(100);
/// As [`BURST`], in the chain of somebody else: docker that starts puts one rule after the other before ours.
const FOREIGN_BURST: Duration = Duration::from_secs(1);
/// The first backoff of a failing step.
const FIRST_WAIT: Duration = Duration::from_millis(100);

/// Keeps, for each key in trouble, when it may be touched again.
#[derive(Debug, Default)]
pub struct Healer {
    troubled: HashMap<Key, Trouble>,
}

#[derive(Debug, Default)]
struct Trouble {
    /// When it was put right after somebody had changed it.
    reverts: VecDeque<Duration>,
    /// Failed attempts in a row, and the kernel's last word.
    failures: u32,
    error: Option<StepError>,
    /// Not to be touched before.
    not_before: Option<Duration>,
    /// Somebody else manages this.
    fought: bool,
    /// The object, in one line.
    object: String,
}

impl Healer {
    /// Takes out the steps that must wait, and says when the first of them may be tried again.
    pub fn filter(&mut self, plan: Plan, now: Duration) -> (Plan, Option<Duration>) {
        if self.troubled.is_empty() {
            return (plan, None);
        }
        let mut wake: Option<Duration> = None;
        let mut held = vec![false; plan.steps.len()];
        for (n, step) in plan.steps.iter().enumerate() {
            let key = step.op.object().key();
            let waits = self.troubled.get(&key).and_then(|t| t.not_before).filter(|&at| at > now);
            if let Some(at) = waits {
                wake = Some(wake.map_or(at, |w| w.min(at)));
            }
            held[n] = waits.is_some() || step.needs.iter().any(|&need| held[need as usize]);
        }
        (without(plan, &held), wake)
    }

    /// Notes how a step ended; `repair` says that it put right what somebody had changed.
    pub fn record(&mut self, step: &Step, result: &Result<(), StepError>, repair: bool, now: Duration) {
        let key = step.op.object().key();
        match result {
            Ok(()) if !repair => {
                self.troubled.remove(&key);
            }
            Ok(()) => {
                let (wait, burst) = match key {
                    Key::Table(_) => (FIREWALL_WAIT, BURST),
                    Key::Head(_) => (FIREWALL_WAIT, FOREIGN_BURST),
                    _ => (LONGEST_WAIT, BURST),
                };
                let trouble = self.troubled.entry(key).or_default();
                trouble.failures = 0;
                trouble.error = None;
                trouble.object = step.op.object().to_string();
                trouble.reverts.retain(|&at| now.saturating_sub(at) < FIGHT_WINDOW);
                if trouble.reverts.back().is_none_or(|&at| now.saturating_sub(at) >= burst) {
                    trouble.reverts.push_back(now);
                }
                trouble.fought = trouble.reverts.len() >= FIGHT_REVERTS;
                trouble.not_before = trouble.fought.then(|| now + wait);
            }
            Err(StepError::Skipped(_)) => {}
            Err(error) => {
                let trouble = self.troubled.entry(key).or_default();
                trouble.failures += 1;
                trouble.object = step.op.object().to_string();
                trouble.error = Some(error.clone());
                let wait = FIRST_WAIT * 2u32.saturating_pow(trouble.failures.min(10) - 1);
                trouble.not_before = Some(now + wait.min(LONGEST_WAIT));
            }
        }
    }

    /// Forgets the failures of keys that a plan of everything no longer touches.
    pub fn cured(&mut self, whole: &Plan) {
        if self.troubled.values().any(|t| t.error.is_some()) {
            let touched: HashSet<Key> = whole.steps.iter().map(|step| step.op.object().key()).collect();
            self.troubled.retain(|key, t| t.error.is_none() || touched.contains(key));
        }
    }

    /// Forgets keys that have been quiet for a whole window.
    pub fn settle(&mut self, now: Duration) {
        self.troubled.retain(|_, t| {
            let waiting = t.not_before.is_some_and(|at| at + FIGHT_WINDOW > now);
            let recent = t.reverts.back().is_some_and(|&at| now.saturating_sub(at) < FIGHT_WINDOW);
            waiting || recent
        });
    }

    /// What a person should know.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings: Vec<Finding> = self.troubled.values().filter_map(Trouble::finding).collect();
        findings.sort_by(|a, b| a.object.cmp(&b.object));
        findings
    }
}

impl Trouble {
    fn finding(&self) -> Option<Finding> {
        if self.fought {
            return Some(Finding {
                code: "fought-over".into(),
                object: self.object.clone(),
                evidence: format!(
                    "somebody else manages this: reverted {FIGHT_REVERTS} times in {} s",
                    FIGHT_WINDOW.as_secs()
                ),
                fix: "find and stop the other program (another flannel, systemd-networkd, a script)".into(),
            });
        }
        let error = self.error.as_ref()?;
        Some(Finding {
            code: "kernel-refused".into(),
            object: self.object.clone(),
            evidence: format!("{error} ({} times)", self.failures),
            fix: "see the kernel's word; it is tried again with backoff".into(),
        })
    }
}

/// The plan without the held steps, its needs renumbered.
fn without(plan: Plan, held: &[bool]) -> Plan {
    let mut place = Vec::with_capacity(held.len());
    let mut count = 0;
    for &is_held in held {
        place.push(count);
        count += u32::from(!is_held);
    }
    let kept = plan.steps.into_iter().zip(held).filter(|(_, is_held)| !**is_held);
    let steps = kept.map(|(mut step, _)| {
        step.needs.iter_mut().for_each(|need| *need = place[*need as usize]);
        step
    });
    Plan { steps: steps.collect() }
}

#[cfg(test)]
mod tests {
    use super::super::{Op, Why};
    use super::*;
    use crate::firewall::{ChainName, Head, Policy, Table};
    use crate::host::Object;

    fn step() -> Step {
        let object = Object::Sysctl { path: "net/ipv4/ip_forward".into(), value: "1".into() };
        Step { op: Op::Create(object), needs: vec![], why: Why::Differs }
    }

    #[test]
    fn five_reverts_in_ten_seconds_are_a_fight() {
        let mut healer = Healer::default();
        for n in 0..5 {
            let (plan, wake) = healer.filter(Plan { steps: vec![step()] }, Duration::from_secs(n));
            assert_eq!((plan.steps.len(), wake), (1, None), "revert {n} is repaired at once");
            healer.record(&step(), &Ok(()), true, Duration::from_secs(n));
        }
        let (plan, wake) = healer.filter(Plan { steps: vec![step()] }, Duration::from_secs(5));
        assert_eq!((plan.steps.len(), wake), (0, Some(Duration::from_secs(34))));
        assert_eq!(healer.findings()[0].code, "fought-over");
        healer.settle(Duration::from_secs(60));
        assert!(healer.findings().is_empty());
    }

    #[test]
    fn what_is_fought_over_in_the_firewall_is_back_within_200_ms_every_time() {
        let table = Table { comment: Some("twill".into()), ..Policy::default().table() };
        let head = Head { at: ChainName { table: table.name.clone(), chain: "c".into() }, rules: vec![], first: true };
        for (object, burst_is_a_fight) in
            [(Object::Table(Box::new(table)), true), (Object::Head(Box::new(head)), false)]
        {
            let step = Step { op: Op::Create(object), needs: vec![], why: Why::Differs };
            let mut healer = Healer::default();
            let mut now = Duration::ZERO;
            let mut repair = |healer: &mut Healer, later: u64| {
                now += Duration::from_millis(later);
                let (plan, wake) = healer.filter(Plan { steps: vec![step.clone()] }, now);
                assert!(wake.is_none_or(|at| at - now <= Duration::from_millis(200)), "{wake:?} at {now:?}");
                if plan.steps.is_empty() {
                    now = wake.unwrap();
                    assert_eq!(healer.filter(Plan { steps: vec![step.clone()] }, now).0.steps.len(), 1);
                }
                healer.record(&step, &Ok(()), true, now);
            };
            (0..20).for_each(|_| repair(&mut healer, 20));
            assert_eq!(healer.findings().is_empty(), !burst_is_a_fight, "as docker starts");
            (0..20).for_each(|_| repair(&mut healer, 1100));
            assert_eq!(healer.findings()[0].code, "fought-over");
        }
    }

    #[test]
    fn a_burst_is_one_revert_and_bursts_that_go_on_are_a_fight() {
        let mut healer = Healer::default();
        let at = |healer: &mut Healer, ms| healer.record(&step(), &Ok(()), true, Duration::from_millis(ms));
        (0..5).for_each(|ms| at(&mut healer, ms));
        assert!(healer.findings().is_empty());
        (5..100).for_each(|ms| at(&mut healer, ms));
        assert_eq!(healer.findings()[0].code, "fought-over");
    }

    #[test]
    fn a_failure_is_over_when_a_plan_of_everything_leaves_its_key_alone() {
        let mut healer = Healer::default();
        healer.record(
            &step(),
            &Err(StepError::Refused { errno: 19, text: "no such device".into() }),
            false,
            Duration::ZERO,
        );
        healer.cured(&Plan { steps: vec![step()] });
        assert_eq!(healer.findings()[0].code, "kernel-refused");
        healer.cured(&Plan::default());
        assert!(healer.findings().is_empty());
    }

    #[test]
    fn five_reverts_over_a_minute_are_none() {
        let mut healer = Healer::default();
        for n in 0..9 {
            healer.record(&step(), &Ok(()), true, Duration::from_secs(n * 7));
        }
        assert!(healer.findings().is_empty());
    }

    #[test]
    fn a_failing_step_waits_longer_each_time_and_takes_its_dependants_with_it() {
        let mut healer = Healer::default();
        let refused = Err(StepError::Refused { errno: 1, text: "operation not permitted".into() });
        healer.record(&step(), &refused, false, Duration::ZERO);
        healer.record(&step(), &refused, false, Duration::ZERO);
        let other = Object::Sysctl { path: "net/ipv4/conf/all/rp_filter".into(), value: "0".into() };
        let dependant = Step { op: Op::Create(other), needs: vec![0], why: Why::Missing };
        let (plan, wake) = healer.filter(Plan { steps: vec![step(), dependant] }, Duration::from_millis(150));
        assert_eq!((plan.steps.len(), wake), (0, Some(Duration::from_millis(200))));
    }
}
