//! Carrying out a plan: steps → requests → batches → answers → mirror.

use std::fs::File;
use std::ops::RangeInclusive;

use twill_core::host::{Link, LinkKind, Object};
use twill_core::reconcile::{Op, Outcome, Plan, StepError, effect};

use super::dump::{Stale, add_twins, remove_entries};
use super::{Firewall, LinuxKernel};
use crate::legacy;
use crate::netlink::encode::Encoder;
use crate::netlink::socket::{Refusal, Socket};
use crate::netlink::wire::Writer;
use crate::tun::{Offloads, TunDevice};
use crate::{refused, sysctl};

/// Kernel memory that a small message takes in a receive buffer, rounded up.
const TRUESIZE: usize = 2048;

/// One run through a plan.
pub(super) struct Applier<'a> {
    kernel: &'a mut LinuxKernel,
    plan: &'a Plan,
    outcome: Outcome,
    writer: Writer,
    files: Vec<File>,
    /// The steps of the batch that is being written, with the numbers of their requests.
    batch: Vec<(RangeInclusive<u32>, usize)>,
    /// What refusals have put in doubt; read once, at the end.
    stale: Stale,
    /// Steps and bytes that a batch may have.
    steps: usize,
    bytes: usize,
}

impl<'a> Applier<'a> {
    pub(super) fn new(kernel: &'a mut LinuxKernel, plan: &'a Plan) -> Self {
        let monitor = kernel.monitor.as_ref().map_or(usize::MAX, Socket::granted);
        let room = kernel.requests.granted().min(monitor) / TRUESIZE;
        Self {
            plan,
            outcome: Outcome { steps: Vec::with_capacity(plan.steps.len()) },
            writer: Writer::default(),
            files: Vec::new(),
            batch: Vec::new(),
            stale: Stale::default(),
            steps: room.clamp(32, 1024),
            // The kernel counts the buffer's bookkeeping as well, and refuses a batch that does not fit as a whole.
            bytes: kernel.requests.sendable() / 4,
            kernel,
        }
    }

    pub(super) fn run(mut self) -> Outcome {
        for (n, step) in self.plan.steps.iter().enumerate() {
            // The index of a device that is not made yet cannot be written.
            let open = self.batch.first().map_or(usize::MAX, |(_, first)| *first);
            if step.needs.iter().any(|need| *need as usize >= open)
                || self.batch.len() >= self.steps
                || self.writer.buf.len() >= self.bytes
            {
                self.flush();
            }
            let failed =
                step.needs.iter().find(|need| self.outcome.steps.get(**need as usize).is_some_and(Result::is_err));
            if let Some(need) = failed {
                self.outcome.steps.push(Err(StepError::Skipped(*need)));
                continue;
            }
            let before = *self.kernel.requests.seq();
            let result = self.write(&step.op);
            if result.is_ok() && !matches!(step.op.object(), Object::Sysctl { .. }) && !is_firewalls(step.op.object()) {
                self.batch.push((before + 1..=*self.kernel.requests.seq(), n));
            }
            self.outcome.steps.push(result);
        }
        self.flush();
        if self.kernel.refresh(std::mem::take(&mut self.stale)).is_err() {
            self.kernel.pending.all = true;
        }
        self.outcome
    }

    /// Writes a step's requests into the batch; a sysctl and a table are done at once.
    fn write(&mut self, op: &Op) -> Result<(), StepError> {
        if let Object::Sysctl { path, value } = op.object() {
            return sysctl::write(path, value).map_err(|e| refused(&e, format!("write {path}: {e}"))).map(|()| {
                self.kernel.mirror.insert(op.object().clone());
            });
        }
        if is_firewalls(op.object()) {
            return self.table(op);
        }
        match op {
            Op::Create(Object::Link(link)) if link.kind == LinkKind::Tun => self.make_tun(None, link),
            Op::Recreate { from: Object::Link(from), to: Object::Link(link) } if link.kind == LinkKind::Tun => {
                self.make_tun(Some(from), link)
            }
            _ => self.encode(op),
        }
    }

    fn encode(&mut self, op: &Op) -> Result<(), StepError> {
        let before = self.writer.mark();
        let LinuxKernel { names, requests, .. } = &mut *self.kernel;
        let mut encoder = Encoder { writer: &mut self.writer, names, seq: requests.seq(), files: &mut self.files };
        encoder.op(op).map_err(|text| {
            self.writer.rewind(before);
            StepError::Refused { errno: libc::ENODEV, text }
        })
    }

    /// Netlink makes no TUN device: it comes by its own ioctl, outlives its descriptor, and is then brought to what is wanted.
    fn make_tun(&mut self, instead_of: Option<&Link>, link: &Link) -> Result<(), StepError> {
        let refused = |e: std::io::Error, act: &str| refused(&e, format!("{act} {}: {e}", link.name));
        self.flush();
        if let Some(old) = instead_of {
            self.encode(&Op::Delete(Object::Link(Box::new(old.clone()))))?;
            let mut writer = std::mem::take(&mut self.writer);
            let last = writer.ask_ack();
            self.kernel.requests.batch(&writer, last).map_err(|e| refused(e, "delete"))?;
        }
        let device = TunDevice::open(link.name.as_str(), Offloads::NONE).map_err(|e| refused(e, "make tun"))?;
        device.set_persistent(true).map_err(|e| refused(e, "keep tun"))?;
        self.kernel.absorb().map_err(|e| refused(e, "look at tun"))?;
        let found = self.kernel.mirror.link(link.name).cloned();
        let from = found.ok_or_else(|| refused(libc_error(libc::ENODEV), "look at tun"))?;
        self.encode(&Op::Update { from: Object::Link(Box::new(from)), to: Object::Link(Box::new(link.clone())) })
    }

    fn table(&mut self, op: &Op) -> Result<(), StepError> {
        // It may have been loaded meanwhile.
        if self.kernel.without_nftables().is_some() {
            self.kernel.firewall = Firewall::open(true);
            self.kernel.pending.all |= self.kernel.without_nftables().is_none();
        }
        let result = match &mut self.kernel.firewall {
            Firewall::Open(nft) => match op.object() {
                Object::Leftover(left) if left.legacy => legacy::remove(left),
                _ => nft.apply(op),
            },
            Firewall::Ignored => {
                Err(StepError::Refused { errno: libc::EOPNOTSUPP, text: "nftables is not looked at".into() })
            }
            Firewall::Lacking(error) => Err(StepError::Refused {
                errno: error.raw_os_error().unwrap_or(libc::EOPNOTSUPP),
                text: format!("this kernel has no nf_tables: {error}"),
            }),
        };
        match &result {
            Ok(()) => effect(&mut self.kernel.mirror, op),
            Err(_) => self.stale.tables = true,
        }
        result
    }

    /// Sends the batch, notes what was refused, and brings the mirror along.
    fn flush(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        let mut writer = std::mem::take(&mut self.writer);
        if batch.is_empty() {
            return;
        }
        let refused = if writer.buf.is_empty() {
            Ok(Vec::new())
        } else {
            let last = writer.ask_ack();
            self.kernel.requests.batch(&writer, last)
        };
        self.files.clear();
        match refused {
            Err(error) => {
                let refusal =
                    Refusal { seq: 0, errno: error.raw_os_error().unwrap_or(libc::EIO), text: error.to_string() };
                batch.iter().for_each(|(_, step)| self.refuse(*step, &refusal));
                self.stale.all = true;
            }
            Ok(refused) => {
                for (numbers, step) in &batch {
                    let op = &self.plan.steps[*step].op;
                    let (gone, refused): (Vec<_>, Vec<_>) =
                        refused.iter().filter(|r| numbers.contains(&r.seq)).partition(|r| went_with_another(op, r));
                    if !gone.is_empty() {
                        self.stale.add(&op.object().key());
                    }
                    match refused.first() {
                        Some(refusal) => self.refuse(*step, refusal),
                        None => self.done(*step),
                    }
                }
            }
        }
        // Own echoes are drained between batches, so that they cannot overrun the monitor.
        if self.kernel.absorb().is_err() {
            self.stale.all = true;
        }
    }

    fn refuse(&mut self, step: usize, refusal: &Refusal) {
        let text = refusal.text.clone();
        self.outcome.steps[step] = Err(StepError::Refused { errno: refusal.errno, text });
        // "It is there" and "it is not there" mean that the mirror was wrong.
        if [libc::EEXIST, libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::EADDRNOTAVAIL].contains(&refusal.errno) {
            self.stale.add(&self.plan.steps[step].op.object().key());
        }
    }

    fn done(&mut self, step: usize) {
        let op = &self.plan.steps[step].op;
        match op {
            op if matches!(op.object(), Object::Link(_)) => {
                // Index, MAC and cascades come with the link's own messages; without them it is taken to be as asked for.
                let told =
                    if self.kernel.monitor.is_some() { self.kernel.absorb() } else { self.kernel.take_as_asked(op) };
                self.stale.all |= told.is_err();
            }
            Op::Delete(Object::Route(gone)) => remove_entries(&mut self.kernel.mirror, gone),
            Op::Create(Object::Route(made)) => {
                if !matches!(self.kernel.mirror.get(&op.object().key()), Some(Object::Route(have)) if have.entries == made.entries)
                {
                    add_twins(&mut self.kernel.mirror, made.clone());
                }
            }
            op => effect(&mut self.kernel.mirror, op),
        }
    }
}

/// The hops of a multipath route look like twins, and go with the first of them that is replaced: nothing is left to be deleted.
fn went_with_another(op: &Op, refusal: &Refusal) -> bool {
    matches!(op, Op::Update { from: Object::Route(_), .. }) && refusal.errno == libc::ESRCH
}

fn libc_error(errno: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(errno)
}

/// What is changed by a transaction of nftables.
fn is_firewalls(object: &Object) -> bool {
    matches!(object, Object::Table(_) | Object::Head(_) | Object::Leftover(_))
}
