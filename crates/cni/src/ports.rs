//! Host ports and masquerading: the table `inet twill-cni`, which is a function of the attachment files and of nothing else.
//!
//! ```text
//!   ADD: lock ─ does a port clash? ─ take the addresses ─ write the rules down ─ unlock ─▶ devices ─▶ lock ─ files → table ─ unlock
//!   DEL: devices away ─▶ lock ─ files but this one → table ─ strike its rules out ─ free its addresses ─ remove the file ─ unlock
//! ```
//! A file has rules only while its addresses are held: whoever is killed in between leads nothing to the next holder.
//! The lock is one for all networks of this host, since the table is; whoever needs a network's lock as well takes this one first.

use twill_core::attach::{Attachment, Request};
use twill_core::firewall::{Table, TableName, published};
use twill_core::ports::Transport;
use twill_core::reconcile::Step;
use twill_kernel::attach::{self as kernel, Failed};
use twill_kernel::conntrack;
use twill_kernel::files::{self, Lock, Unsynced};

use crate::error::{Act, CniError, Code};
use crate::records::Records;
use crate::verb::refused;

/// The right to change the table, and the files that it is made of.
#[derive(Debug)]
pub struct Ports<'r> {
    records: &'r Records,
    boot: String,
    _lock: Lock,
}

impl<'r> Ports<'r> {
    /// Waits for the lock.
    pub fn lock(records: &'r Records) -> Result<Self, CniError> {
        let path = records.lock_file();
        let lock = Lock::exclusive(&path).act(|| format!("lock {}", path.display()))?;
        Self::of(records, lock)
    }

    fn of(records: &'r Records, lock: Lock) -> Result<Self, CniError> {
        let boot = files::boot_id().act(|| "read the boot's id".into())?;
        Ok(Self { records, boot, _lock: lock })
    }

    /// The lock, where the container has rules at all.
    pub(crate) fn lock_for(records: &'r Records, request: &Request) -> Result<Option<Self>, CniError> {
        request.has_rules().then(|| Self::lock(records)).transpose()
    }

    /// Attachments of this boot that have rules, but `except`.
    fn others(&self, except: Option<&Request>) -> Result<Vec<Attachment>, CniError> {
        let mut all = self.records.all_for_rules()?;
        all.retain(|record| {
            record.boot_id == self.boot
                && record.request.has_rules()
                && except.is_none_or(|not| !is_same(&record.request, not))
        });
        all.sort_by_key(Attachment::file_name);
        Ok(all)
    }

    /// Refused: a host port of `request` leads to another container already.
    pub(crate) fn refuse_clash(&self, request: &Request) -> Result<(), CniError> {
        if request.ports.is_empty() {
            return Ok(());
        }
        for Attachment { request: other, .. } in self.others(Some(request))? {
            let clash = request.ports.iter().find(|map| other.ports.iter().any(|theirs| theirs.clashes(map)));
            if let Some(map) = clash {
                let msg = format!("host port {map} leads to {}:{} already", other.container_id, other.ifname);
                let details = "publish another host port, or stop that container first";
                return Err(CniError::new(Code::Port, msg, details));
            }
        }
        Ok(())
    }

    /// Refused: the table is somebody else's, or this kernel has none.
    pub(crate) fn refuse_foreign(&self) -> Result<(), CniError> {
        let name = TableName::twill_cni();
        let foreign = match kernel::table(&name) {
            Ok(table) => table.filter(|table| !table.is_ours()).map(|_| Failed::TableTaken(name)),
            Err(failed) => Some(failed),
        };
        foreign.map_or(Ok(()), |failed| Err(refused(failed, self.records)))
    }

    fn table(&self, except: Option<&Request>) -> Result<Option<Table>, CniError> {
        Ok(published::table(self.others(except)?.iter().map(|record| &record.request)))
    }

    /// Brings the kernel's table to what the files say; gives what was done, if anything.
    pub(crate) fn settle(&self) -> Result<Option<Step>, CniError> {
        self.settle_to(self.table(None)?).map_err(|failed| refused(failed, self.records))
    }

    /// Takes the rules of `gone` from the table, and then from its file, which is locked until the answer is dropped.
    pub(crate) fn withdraw(&self, gone: &Attachment) -> Result<Unsynced, CniError> {
        self.clear_to(self.table(Some(&gone.request))?)?;
        Self::lead_anew(&gone.request);
        // A crash of the machine may forget it: after that the file is stale.
        self.records.put_less(&gone.without_rules())
    }

    /// Takes from the table what no file tells of: a file may have been lost, or its rules struck out by a DEL that was killed.
    pub(crate) fn clear(records: &Records) -> Result<(), CniError> {
        if !kernel::has_table(&TableName::twill_cni()).map_err(|failed| refused(failed, records))? {
            return Ok(());
        }
        let ports = Ports::lock(records)?;
        ports.clear_to(ports.table(None)?)
    }

    /// Where somebody else's table has taken the place of ours, there is nothing left.
    fn clear_to(&self, want: Option<Table>) -> Result<(), CniError> {
        match self.settle_to(want) {
            Ok(_) | Err(Failed::TableTaken(_)) => Ok(()),
            Err(failed) => Err(refused(failed, self.records)),
        }
    }

    fn settle_to(&self, want: Option<Table>) -> Result<Option<Step>, Failed> {
        kernel::settle_table(&TableName::twill_cni(), want.as_ref())
    }

    /// Clients that went on asking were led elsewhere so far, and would be for as long as they ask. Without a kernel that can be told
    /// they come when they have paused.
    pub(crate) fn lead_anew(request: &Request) {
        let udp = request.ports.iter().filter(|map| map.protocol == Transport::Udp);
        udp.for_each(|map| drop(conntrack::forget_udp(map.host_port)));
    }

    /// What of the kernel's table is not as the container's file says.
    pub(crate) fn differences(&self, request: &Request) -> Result<Vec<String>, CniError> {
        let Some(want) = self.table(None)? else { return Ok(Vec::new()) };
        let have = kernel::table(&want.name).map_err(|failed| refused(failed, self.records))?;
        Ok(published::differences(have.as_ref(), &want, request))
    }
}

/// What came of an attempt to restore the table.
#[derive(Debug)]
pub enum Restored {
    /// It was as the files say.
    Stood,
    /// It is so, since this was done.
    Done(Box<Step>),
    /// Somebody is about to change it.
    Busy,
}

/// Brings the table to what the attachment files say, for whoever sees that it was altered. Never waits for a plugin.
pub fn restore(records: &Records) -> Result<Restored, CniError> {
    if !records.has_folder() {
        return Ok(Restored::Stood);
    }
    let path = records.lock_file();
    match Lock::try_exclusive(&path).act(|| format!("lock {}", path.display()))? {
        Some(lock) => {
            let step = Ports::of(records, lock)?.settle()?;
            Ok(step.map_or(Restored::Stood, |step| Restored::Done(Box::new(step))))
        }
        None => Ok(Restored::Busy),
    }
}

fn is_same(one: &Request, other: &Request) -> bool {
    (&one.container_id, one.ifname) == (&other.container_id, other.ifname)
}
