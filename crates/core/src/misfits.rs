//! Containers that do not fit into the network any more: by their attachments, for `status` to say. Nothing of theirs is changed.

use crate::attach::Attachment;
use crate::host::HostState;
use crate::net::{Inet, Prefix};
use crate::reconcile::Finding;

/// Those attached to `host` that have a larger MTU than the network carries, or an address that is of `ours` (the networks, and subnets
/// that this node had) and of none of the subnets that it has.
pub fn misfits(
    attachments: &[Attachment],
    host: &HostState,
    mtu: Option<u32>,
    ours: &[Prefix],
    subnets: &[Prefix],
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for Attachment { request, .. } in attachments {
        let Some(link) = host.link(request.host_device) else { continue };
        let object = format!("container {}, device {}", request.container_id, request.ifname);
        if let (Some(has), Some(fits)) = (link.mtu, mtu)
            && has.get() > fits
        {
            findings.push(Finding {
                code: "container-mtu".into(),
                object: object.clone(),
                evidence: format!("its MTU is {has}, and the network carries {fits}: large packets are lost or cut"),
                fix: format!("start it anew, or set {fits} on {} and on its other end", link.name),
            });
        }
        let holds = |prefixes: &[Prefix], inet: &Inet| prefixes.iter().any(|prefix| prefix.contains(inet.addr));
        let stranded = |inet: &&Inet| !subnets.is_empty() && holds(ours, inet) && !holds(subnets, inet);
        let stranded: Vec<String> =
            request.addresses.iter().filter(stranded).map(|inet| inet.addr.to_string()).collect();
        if !stranded.is_empty() {
            findings.push(Finding {
                code: "container-stranded".into(),
                object,
                evidence: format!(
                    "{}: of a subnet that this node no longer holds; it runs, and containers of other nodes do not reach it there",
                    stranded.join(", ")
                ),
                fix: "end it, and all others of that subnet: containers that start then get addresses of the node's own subnet".into(),
            });
        }
    }
    findings
}
