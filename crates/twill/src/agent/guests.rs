//! What `status` says of this node's containers, from their attachments. Nothing of theirs is ever changed.

use std::path::Path;

use twill_cni::records::Records;
use twill_core::attach::Attachment;
use twill_core::host::HostState;
use twill_core::misfits::misfits;
use twill_core::net::Prefix;
use twill_core::reconcile::Finding;
use twill_core::state_file::State;
use twill_kernel::files;

use super::view::View;

/// Names of the attachment files: `ID:DEVICE`.
pub(crate) fn attached(state_dir: &Path) -> Vec<String> {
    let files = std::fs::read_dir(state_dir.join("attachments")).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        files.filter_map(|f| f.file_name().to_str()?.strip_suffix(".json").map(str::to_owned)).collect();
    names.sort();
    names
}

/// Containers that do not fit into the network as it is now.
pub(crate) fn findings(state_dir: &Path, host: &HostState, view: &View) -> Vec<Finding> {
    let prefixes = |texts: &[String]| texts.iter().filter_map(|text| text.parse().ok()).collect::<Vec<Prefix>>();
    let boot = files::boot_id().unwrap_or_default();
    let mut attachments = Records::new(state_dir.join("attachments")).all().unwrap_or_default();
    attachments.retain(|attachment| attachment.boot_id == boot);
    attachments.sort_by_key(Attachment::file_name);
    // A former network's containers are ours as well.
    let state = std::fs::read(state_dir.join("state.json")).ok().and_then(|bytes| State::parse(&bytes).ok());
    let ours: Vec<Prefix> =
        prefixes(&view.networks).into_iter().chain(state.into_iter().flat_map(|s| s.former)).collect();
    misfits(&attachments, host, view.mtu, &ours, &prefixes(&view.subnets))
}
