//! Waiting, and saying why: in the log once, and in `status` for as long as it holds.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use twill_core::backend::Refusal;
use twill_core::iface;
use twill_core::reconcile::Finding;
use twill_store::StoreError;

use super::super::compose::Network;
use super::super::view::UnderlayView;
use super::{CONFIG_FINDINGS, Command, Session, at};
use crate::output::Failure;

/// Why a family that the config names is left out: of each what holds is shown, whatever is waited for.
pub(super) const OF_FAMILIES: [&str; 2] = ["family-missing", "mtu-too-small"];

/// Why the store is not read: one holds at a time.
const OF_STORE: [&str; 3] = ["store-away", "store-denied", "store-compacted"];

fn cannot_leave(code: &'static str, why: &str) -> Failure {
    Failure::new(code, format!("the lease cannot be given back now: {why}"))
        .hint("try again when this is cured, or remove everything here with: twill clean")
}

/// Waiting, and saying why.
impl Session {
    /// Says once what is missing, and waits until the host changes, or a while has passed. It is a finding until [`Session::waits_no_more`].
    pub(super) async fn wait_for(&mut self, code: &'static str, message: &str, hint: &str) {
        if self.waiting.as_ref().is_none_or(|(_, said)| said != message) {
            tracing::warn!(code, hint, "{message}: waiting");
            self.waits_no_more();
            OF_FAMILIES.iter().filter(|_| !OF_FAMILIES.contains(&code)).for_each(|code| self.unfind(code));
            self.waiting = Some((code, message.to_owned()));
        }
        self.find(code, "node", message, hint);
        self.set_state("waiting");
        let mut host = self.host.clone();
        let change = async { drop(timeout(Duration::from_millis(500), host.changed()).await) };
        self.answer_until(change, code, message).await;
    }

    /// What was waited for is there.
    pub(super) fn waits_no_more(&mut self) {
        // Those of a family that is still left out stay.
        if let Some((code, _)) = self.waiting.take().filter(|(code, _)| !OF_FAMILIES.contains(code)) {
            self.unfind(code);
        }
    }

    /// Lets time pass.
    pub(super) async fn pause(&mut self, wait: Duration) {
        self.answer_until(sleep(wait), "store-away", "the store is away").await;
    }

    /// Answers what is asked meanwhile by a node that follows no watch.
    async fn answer_until(&mut self, end: impl Future<Output = ()>, code: &'static str, why: &str) {
        tokio::pin!(end);
        loop {
            let unwritten = self.unwritten.due();
            tokio::select! {
                () = &mut end => return,
                () = at(unwritten), if unwritten.is_some() => self.write_again(),
                Some(command) = self.commands.recv() => match command {
                    Command::Peers(reply) => {
                        let peers = self.stands_on.as_ref().map(|on| self.peer_views(&on.0, &on.1));
                        drop(reply.send(peers.unwrap_or_default()));
                    }
                    Command::Accept(reply) => drop(reply.send(self.accept_nothing(code, why))),
                    Command::Leaving(reply) => drop(reply.send(Err(cannot_leave(code, why)))),
                    Command::Leave(reply) => drop(reply.send(Err(cannot_leave(code, why)))),
                },
            }
        }
    }

    /// What a listing lacks stays while no listing is followed.
    fn accept_nothing(&self, code: &'static str, why: &str) -> Result<usize, Failure> {
        if self.withheld.is_empty() && self.kept.is_empty() {
            return Ok(0);
        }
        Err(Failure::new(code, format!("nothing is withdrawn now: {why}")).hint("try again when this is cured"))
    }

    /// Neither an answer nor a failure is there yet.
    pub(super) fn say_asked(&self) {
        if let Ok(mut view) = self.view.lock()
            && view.store.state == "not-asked"
        {
            view.store.state = "connecting".into();
        }
    }

    pub(super) fn say_away(&mut self, error: &StoreError) {
        let message = error.to_string();
        if self.last_away != error.code() {
            tracing::warn!(code = error.code(), hint = error.hint(), "{message}: the data path keeps running");
            self.last_away = error.code();
        }
        if let Ok(mut view) = self.view.lock() {
            view.store.state = "away".into();
        }
        self.find_one_of(&OF_STORE, error.code(), "store", &message, error.hint());
    }

    /// The store has answered.
    pub(super) fn say_reached(&mut self) {
        self.last_away = "";
        OF_STORE.iter().for_each(|code| self.unfind(code));
        if let Ok(mut view) = self.view.lock() {
            if view.store.state != "up" {
                tracing::info!(endpoints = view.store.endpoints, "the store answers");
            }
            view.store.state = "up".into();
        }
    }

    /// The store has listed all leases.
    pub(super) fn say_up(&mut self, revision: i64) {
        self.say_reached();
        CONFIG_FINDINGS.iter().for_each(|code| self.unfind(code));
        if let Ok(mut view) = self.view.lock() {
            view.store.revision = revision;
        }
    }

    pub(super) fn heard(&mut self, revision: i64) {
        if let Some((_, seen)) = &mut self.seen {
            *seen = revision.max(*seen);
        }
        if let Ok(mut view) = self.view.lock() {
            view.store.revision = revision;
        }
    }
}

/// What `status` shows.
impl Session {
    pub(super) fn set_state(&self, state: &str) {
        if let Ok(mut view) = self.view.lock()
            && view.state != "held"
        {
            view.state = state.into();
        }
    }

    pub(super) fn find(&self, code: &str, object: &str, evidence: &str, fix: &str) {
        self.find_one_of(&[], code, object, evidence, fix);
    }

    /// As [`Session::find`], in place of all others of a group.
    pub(super) fn find_one_of(&self, group: &[&str], code: &str, object: &str, evidence: &str, fix: &str) {
        if let Ok(mut view) = self.view.lock() {
            view.findings.retain(|f| f.code != code && !group.contains(&&*f.code));
            view.findings.push(Finding {
                code: code.into(),
                object: object.into(),
                evidence: evidence.into(),
                fix: fix.into(),
            });
        }
    }

    /// True when this is shown already.
    pub(super) fn has_found(&self, code: &str, evidence: &str) -> bool {
        self.view.lock().is_ok_and(|view| view.findings.iter().any(|f| f.code == code && f.evidence == evidence))
    }

    pub(super) fn unfind(&self, code: &str) {
        if let Ok(mut view) = self.view.lock() {
            view.findings.retain(|f| f.code != code);
        }
    }

    /// Each once in the log, and in `status`.
    pub(super) fn show_ignored(&self, ignored: &[String]) {
        let Ok(mut view) = self.view.lock() else { return };
        let old: Vec<Finding> = view.findings.extract_if(.., |f| f.code == "config-key-ignored").collect();
        for text in ignored {
            if !old.iter().any(|f| f.evidence == *text) {
                tracing::warn!(code = "config-key-ignored", "network config: {text}: ignored");
            }
            let (code, object, fix) =
                ("config-key-ignored".into(), "network config".into(), "remove it, or correct its spelling".into());
            view.findings.push(Finding { code, object, evidence: text.clone(), fix });
        }
    }

    /// Families that the config names and this host does not carry.
    pub(super) fn show_left_out(&self, refusals: &[Refusal]) {
        for code in OF_FAMILIES {
            match refusals.iter().find(|refusal| refusal.code == code) {
                Some(Refusal { message, hint, .. }) => {
                    if !self.has_found(code, message) {
                        tracing::warn!(code, hint, "{message}: the other family goes on");
                    }
                    self.find(code, "node", message, hint);
                }
                None => self.unfind(code),
            }
        }
    }

    pub(super) fn show_faults(&self) {
        let Ok(mut view) = self.view.lock() else { return };
        view.findings.retain(|f| !f.object.starts_with("lease "));
        view.findings.extend(self.faults.values().cloned());
    }

    pub(super) fn show_underlay(&self, chosen: &iface::Chosen) {
        let underlay = &chosen.underlay;
        let shown = UnderlayView {
            interface: underlay.link.to_string(),
            addresses: [true, false]
                .into_iter()
                .filter_map(|v4| underlay.public(v4))
                .map(|ip| ip.to_string())
                .collect(),
            mtu: underlay.mtu.get(),
            why: chosen.why.clone(),
        };
        let Ok(mut view) = self.view.lock() else { return };
        if view.underlay.as_ref() != Some(&shown) {
            tracing::info!(interface = shown.interface, addresses = ?shown.addresses, mtu = shown.mtu, "underlay: {}", shown.why);
            view.underlay = Some(shown);
        }
    }

    pub(super) fn show_network(&self, network: &Network) {
        let Ok(mut view) = self.view.lock() else { return };
        view.subnets = network.cx.subnets.iter().map(ToString::to_string).collect();
        view.networks = network.cx.networks.iter().map(ToString::to_string).collect();
        view.backend = Some(network.backend.lease_type().unwrap_or("udp").to_owned());
        view.devices = network.devices().iter().map(ToString::to_string).collect();
        view.mtu = network.mtu().ok().map(|mtu| mtu.get());
    }
}
