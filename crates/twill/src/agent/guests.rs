//! What `status` says of this node's containers, from their attachments. Nothing of theirs is ever changed.

use std::path::Path;

use twill_core::attach::Attachment;
use twill_core::host::HostState;
use twill_core::misfits::misfits;
use twill_core::net::Prefix;
use twill_core::reconcile::Finding;
use twill_kernel::files;

use super::view::View;

/// Longest attachment file that is read.
const LONGEST: u64 = 1 << 20;

/// Containers that do not fit into the network as it is now.
pub(crate) fn findings(state_dir: &Path, host: &HostState, view: &View) -> Vec<Finding> {
    let prefixes = |texts: &[String]| texts.iter().filter_map(|text| text.parse().ok()).collect::<Vec<Prefix>>();
    let boot = files::boot_id().unwrap_or_default();
    let entries = std::fs::read_dir(state_dir.join("attachments")).into_iter().flatten().flatten();
    let mut attachments: Vec<Attachment> = entries
        .filter_map(|entry| Attachment::parse(&files::read_limited(&entry.path(), LONGEST).ok()??).ok())
        .filter(|attachment| attachment.boot_id == boot)
        .collect();
    attachments.sort_by_key(Attachment::file_name);
    misfits(&attachments, host, view.mtu, &prefixes(&view.networks), &prefixes(&view.subnets))
}
