//! What the reference bridge has written with `iptables` for `ipMasq`: whoever gets a container's address next would be masqueraded by it.

use twill_kernel::left;

use crate::clear::Clear;
use crate::error::CniError;
use crate::records::Records;
use crate::verb::{all, refused};

/// Removes it for the containers of the network that are stale.
pub(crate) fn clear(
    conf: &Clear,
    records: &Records,
    is_stale: impl Fn(&str) -> Result<bool, CniError>,
) -> Result<(), CniError> {
    let Some(network) = &conf.name else { return Ok(()) };
    let found = left::masquerading(network).map_err(|failed| refused(failed, records))?;
    all(found.into_iter().map(|what| match is_stale(&what.0)? {
        true => left::remove(network, what).map_err(|failed| refused(failed, records)),
        false => Ok(()),
    }))
}
