//! STATUS: would ADD work?

use twill_core::attach::Attachment;

use super::lease;
use crate::conf::Conf;
use crate::error::{CniError, Code};
use crate::records::Records;
use crate::sweep::is_gone;

/// Runs STATUS: 50 while the node has no lease, 51 when containers run without one.
pub fn run(conf: &Conf) -> Result<String, CniError> {
    lease(&mut conf.clone()).map_err(|error| {
        let records = Records::new(conf.attachments());
        let runs = |record: &Attachment| record.alone.is_none() && is_gone(record, &records).is_ok_and(|gone| !gone);
        let suffer = records.all().is_ok_and(|attached| attached.iter().any(runs));
        let code = if suffer { Code::Limited } else { Code::NotAvailable };
        CniError { code, ..error }
    })?;
    Ok(String::new())
}
