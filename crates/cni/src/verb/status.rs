//! STATUS: would ADD work?

use super::lease;
use crate::conf::Conf;
use crate::error::{CniError, Code};
use crate::records::Records;

/// Runs STATUS: 50 while the node has no lease, 51 when containers run without one.
pub fn run(conf: &Conf) -> Result<String, CniError> {
    lease(&mut conf.clone()).map_err(|error| {
        let suffer = Records::new(conf.attachments()).all().is_ok_and(|attached| !attached.is_empty());
        let code = if suffer { Code::Limited } else { Code::NotAvailable };
        CniError { code, ..error }
    })?;
    Ok(String::new())
}
