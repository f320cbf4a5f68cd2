//! What the node stands on: its underlay, the network config, and what clashes with it; and what follows when the host changes.

use twill_core::backend::{Refusal, Underlay};
use twill_core::config::{self, NetworkConfig};
use twill_core::host::HostState;
use twill_core::iface;
use twill_core::lease::Lease;
use twill_core::lease_set::LeaseName;
use twill_core::net::{Mtu, Prefix};
use twill_store::StoreError;

use super::super::compose::{self, Network};
use super::say::OF_FAMILIES;
use super::{End, Session};

const CLASH_FIX: &str = "choose another Network, or remove what clashes";

/// Why an interface is not taken: one of them at a time.
const REFUSALS: [&str; 4] = ["iface-missing", "iface-down", "iface-without-address", "iface-without-mtu"];

impl Session {
    /// Underlay and config; `None`: something is wrong, was said, and was waited for.
    pub(super) async fn network(&mut self) -> Result<(Option<Network>, NetworkConfig), StoreError> {
        loop {
            let host = self.host.borrow_and_update().clone();
            let chosen = match iface::choose(&host, &self.settings.wishes) {
                Ok(chosen) => chosen,
                Err(refusal) => {
                    self.wait_for(refusal.code, &refusal.message, &refusal.hint).await;
                    continue;
                }
            };
            self.show_underlay(&chosen);
            self.has_moved(&chosen.underlay);
            self.say_asked();
            let raw = self.ask_config().await?;
            self.say_reached();
            let Some(raw) = raw else {
                let value = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
                let hint = format!("write one: etcdctl put {} '{value}'", self.settings.store.config_key());
                self.wait_for("config-missing", "the store has no network config", &hint).await;
                continue;
            };
            let (config, ignored) = match NetworkConfig::parse(&raw.value) {
                Ok(parsed) => parsed,
                Err(fault) => {
                    let message = fault.at(&self.settings.store.config_key());
                    self.wait_for("bad-config", &message, "correct it in the store; it is read again").await;
                    continue;
                }
            };
            self.show_ignored(&ignored);
            let carried = chosen.underlay.mtu;
            match self.carry(&config, chosen.underlay, &host) {
                Ok(network) => {
                    self.cache.follow(raw);
                    return Ok((Some(network), config));
                }
                Err(refusals) => self.on_refusals(refusals, &config, carried).await,
            }
        }
    }

    /// What this host carries of a network; refused where that is nothing.
    pub(super) fn carry(
        &self,
        config: &NetworkConfig,
        underlay: Underlay,
        host: &HostState,
    ) -> Result<Network, Vec<Refusal>> {
        let mut network = Network::new(config, underlay, host, &self.state, self.settings.way_out)?;
        let clashes = self.clashes(&network, host);
        let overlapping: Vec<Prefix> = clashes.iter().map(|(prefix, _)| *prefix).collect();
        if !network.leave_out(&overlapping) {
            let message = clashes.into_iter().next().map_or_else(String::new, |(_, message)| message);
            return Err(vec![Refusal { code: "network-overlap", message, hint: CLASH_FIX.into() }]);
        }
        for (_, message) in clashes.iter().filter(|(_, message)| !self.has_found("network-overlap", message)) {
            tracing::warn!(code = "network-overlap", hint = CLASH_FIX, "{message}: the other family goes on");
        }
        self.show_clashes(&clashes);
        Ok(network)
    }

    /// This host carries no family: says why, for each, and waits.
    async fn on_refusals(&mut self, mut refusals: Vec<Refusal>, config: &NetworkConfig, carried: Mtu) {
        let mut first = refusals.remove(0);
        if first.code == "mtu-too-small" {
            first.message += "; until it carries one there is no tunnel, and no file for new containers";
            if self.waiting.as_ref().is_none_or(|(code, _)| *code != first.code) {
                self.withdraw(config, carried).await;
            }
        }
        // What was waited for before may be one of the others now.
        self.waiting.take_if(|(code, _)| refusals.iter().any(|refusal| refusal.code == *code));
        OF_FAMILIES.iter().for_each(|code| self.unfind(code));
        for Refusal { code, message, hint } in &refusals {
            self.find(code, "node", message, hint);
        }
        self.wait_for(first.code, &first.message, &first.hint).await;
    }

    /// Networks of the config that something on this host overlaps, and what.
    fn clashes(&self, network: &Network, host: &HostState) -> Vec<(Prefix, String)> {
        let networks = network.configured();
        let (devices, remembered) = compose::ours(network, networks, &self.state, &self.subnet_env());
        let first = |prefix: &Prefix| {
            let clash = config::overlaps(&[*prefix], host, &devices, &remembered).into_iter().next()?;
            Some((*prefix, format!("the network {prefix} overlaps what this host has: {clash}")))
        };
        networks.iter().filter_map(first).collect()
    }

    fn show_clashes(&self, clashes: &[(Prefix, String)]) {
        match clashes.first() {
            Some((_, message)) => self.find("network-overlap", "host", message, CLASH_FIX),
            None => self.unfind("network-overlap"),
        }
    }

    /// The underlay's address, MTU or device may have changed; the lease follows in place.
    pub(super) async fn on_host(&mut self, network: &mut Network, own: &mut Lease) -> Result<Option<End>, StoreError> {
        let host = self.host.borrow_and_update().clone();
        let chosen = match iface::choose(&host, &self.settings.wishes) {
            Ok(chosen) => chosen,
            Err(refusal) => {
                self.find_one_of(&REFUSALS, refusal.code, "underlay", &refusal.message, &refusal.hint);
                return Ok(None);
            }
        };
        REFUSALS.iter().for_each(|code| self.unfind(code));
        let clashes = self.clashes(network, &host);
        self.show_clashes(&clashes);
        if network.overlapping.iter().any(|prefix| !clashes.iter().any(|(still, _)| still == prefix)) {
            return Ok(Some(End::Again));
        }
        if chosen.underlay == network.cx.underlay {
            return Ok(None);
        }
        tracing::info!(interface = %chosen.underlay.link, "the underlay has changed");
        let (was, now) = (network.left_out(&network.cx.underlay), network.left_out(&chosen.underlay));
        let too_small = now.iter().any(|refusal| refusal.code == "mtu-too-small" && !was.contains(refusal));
        if now.len() < was.len() || too_small {
            // Another set of families: begin again with it. An address that is lost for a while takes no family down.
            return Ok(Some(End::Again));
        }
        self.show_underlay(&chosen);
        // Before the store is asked, which may be away with the address.
        self.show_left_out(&now);
        network.cx.underlay = chosen.underlay;
        self.establish(network, own).await;
        let all: Vec<LeaseName> = self.leases.names().cloned().collect();
        self.send_peers(network, own, all);
        if self.has_moved(&network.cx.underlay) {
            // The watch hangs as well.
            return Ok(Some(End::Again));
        }
        match self.refresh(network, own.clone()).await? {
            Some(lease) => *own = lease,
            None => return Ok(Some(End::Again)),
        }
        Ok(None)
    }

    /// True when the underlay has other addresses than before: connections to the store are made anew, since an old one would hang.
    fn has_moved(&mut self, underlay: &Underlay) -> bool {
        let now = [underlay.v4, underlay.v6];
        let before = std::mem::replace(&mut self.asked_from, now);
        let gone = before.iter().flatten().any(|inet| !now.contains(&Some(*inet)));
        if gone {
            self.store.reconnect();
        }
        gone
    }
}
