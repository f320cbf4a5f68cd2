//! nftables over netlink (NETLINK_NETFILTER): tables are read, replaced whole in one transaction, and watched.
//!
//! - `uapi`: the kernel's numbers; `encode`, `decode`: model ⇄ messages; [`codec`]: both without a socket
//!
//! A change is a batch between two bracket messages, which the kernel takes as a whole or not at all
//! (net/netfilter/nfnetlink.c `nfnetlink_rcv_batch`): a table is never half there, and never missing between old and new.

pub mod codec;
mod decode;
mod encode;
mod uapi;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::netlink;
use twill_core::firewall::{
    Base, Chain, ChainName, Expr, Family, Head, Keys, Leftover, Rule, Set, Table, TableName, Verdict, beside, policy,
};
use twill_core::host::Object;
use twill_core::reconcile::{Op, StepError};

use self::uapi::{BATCH_BEGIN, BATCH_END, GROUP, SUBSYSTEM, chain, msg, rule, set, table};
use crate::netlink::socket::{Refusal, Socket};
use crate::netlink::wire::{Writer, flag};

/// Elements in one message: the attribute that holds them has a length of 16 bits.
const ELEMENTS: usize = 1024;

/// So many chains that the kind nat leads to are read.
const TRANSLATING: usize = 64;

/// The chains of a table, and where they are entered.
type Bases = BTreeMap<Box<str>, Option<Base>>;
/// What the elements of a set stand for, with the verdict of each where it is a map's.
type Spans = Vec<(Keys, Option<Verdict>)>;

/// The sets and maps of a table that its rules look something up in, each read once.
#[derive(Default)]
struct Lookups {
    /// Those whose elements are intervals, once that was asked.
    intervals: Option<BTreeSet<Box<str>>>,
    spans: BTreeMap<Box<str>, Spans>,
}

/// nftables of the namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Nft {
    requests: Socket,
    monitor: Socket,
}

/// A kernel that has no tables at all (net/netfilter/nfnetlink.c answers EINVAL for a subsystem that it does not have).
pub(crate) fn lacks_nftables(error: &io::Error) -> bool {
    [libc::EPROTONOSUPPORT, libc::EOPNOTSUPP, libc::EINVAL].map(Some).contains(&error.raw_os_error())
}

impl Nft {
    /// Opens both sockets. Refused: a kernel without nfnetlink.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = |groups| Socket::open(Some(netlink::NETFILTER), groups);
        Ok(Self { requests: socket(0)?, monitor: socket(GROUP)? })
    }

    /// True when something was changed, by us or by others, since it was last asked.
    pub(crate) fn changed(&mut self) -> io::Result<bool> {
        let (told, lost) = self.monitor.collect()?;
        Ok(lost || !told.is_empty())
    }

    /// Our tables, and of the others' what may drop packets that we forward, and what flannel left.
    pub(crate) fn tables(&mut self) -> io::Result<Vec<Table>> {
        self.whole(|_| true)
    }

    /// One table of ours.
    pub(crate) fn table(&mut self, name: &TableName) -> io::Result<Option<Table>> {
        Ok(self.whole(|found| found == name)?.pop())
    }

    fn whole(&mut self, which: impl Fn(&TableName) -> bool) -> io::Result<Vec<Table>> {
        loop {
            if let Some(tables) = self.collect(&which)? {
                return Ok(tables);
            }
        }
    }

    /// One attempt; `None`: somebody changed something in between.
    fn collect(&mut self, which: &dyn Fn(&TableName) -> bool) -> io::Result<Option<Vec<Table>>> {
        let mut found: BTreeMap<TableName, (Table, Bases)> = BTreeMap::new();
        let mut whole = self.requests.dump(
            msg::GET_TABLE,
            |w| w.put(&header(0)),
            |m| {
                let table = decode::table(m.payload).filter(|table| which(&table.name));
                found.extend(table.map(|table| (table.name.clone(), (table, BTreeMap::new()))));
            },
        )?;
        whole &= self.requests.dump(
            msg::GET_CHAIN,
            |w| w.put(&header(0)),
            |m| {
                let Some((of, name, base)) = decode::chain(m.payload) else { return };
                if let Some((_, bases)) = found.get_mut(&of) {
                    bases.insert(name, base);
                }
            },
        )?;
        let mut tables = Vec::new();
        for (mut table, bases) in found.into_values() {
            let roots = beside::roots(&table.name, &bases);
            let translating = beside::translating(&table.name, &bases);
            if roots.is_empty()
                && translating.is_empty()
                && !table.name.is_twills()
                && !beside::is_flannels(&table.name)
            {
                continue;
            }
            self.fill(&mut table, &bases, roots, usize::MAX, &mut whole)?;
            self.fill(&mut table, &bases, translating, TRANSLATING, &mut whole)?;
            if table.name == TableName::twill() {
                table.sets = self.sets(&table.name, &mut whole)?;
            }
            if table.name.is_twills() {
                table.others = self.others(&table.name, &mut whole)?;
            }
            tables.push(table);
        }
        Ok(whole.then_some(tables))
    }

    /// Reads these chains of a table, what they lead to, up to so many, and what they look up.
    fn fill(
        &mut self,
        table: &mut Table,
        bases: &Bases,
        todo: Vec<Box<str>>,
        mut most: usize,
        whole: &mut bool,
    ) -> io::Result<()> {
        let (name, foreign) = (table.name.clone(), !table.is_ours());
        let mut lookups = Lookups::default();
        let mut todo = VecDeque::from(todo);
        while let Some(chain) = todo.pop_front() {
            if most == 0 || table.chains.contains_key(&chain) {
                continue;
            }
            most -= 1;
            let rules = self.rules(&name, &chain, whole)?.into_iter();
            let mut rules: Vec<Rule> =
                rules.map(|(handle, rule)| Rule { handle: foreign.then_some(handle), ..rule }).collect();
            for expr in rules.iter_mut().flat_map(|rule| &mut rule.exprs) {
                match expr {
                    Expr::Choose { map, ways, .. } => {
                        let spans = self.spans(&name, map, &mut lookups, whole)?.iter();
                        ways.extend(spans.filter_map(|(keys, verdict)| Some((keys.clone(), verdict.clone()?))));
                    }
                    Expr::Member { set, keys, .. } if foreign => {
                        let spans = self.spans(&name, set, &mut lookups, whole)?.iter();
                        keys.extend(spans.map(|(keys, _)| keys.clone()));
                    }
                    _ => {}
                }
                todo.extend(expr.leads_to().cloned());
            }
            table.chains.insert(chain.clone(), Chain { base: bases.get(&chain).copied().flatten(), rules });
        }
        Ok(())
    }

    /// The plain sets of addresses of a table.
    fn sets(&mut self, table: &TableName, whole: &mut bool) -> io::Result<BTreeMap<Box<str>, Set>> {
        let mut sets: BTreeMap<Box<str>, Set> = BTreeMap::new();
        let fill = |w: &mut Writer| {
            w.put(&header(encode::family(table.family)));
            w.text(set::TABLE, &table.name);
        };
        *whole &= self.requests.dump(msg::GET_SET, fill, |m| {
            let ours = decode::set(m.payload).filter(|(of, _, _)| of == table);
            sets.extend(ours.and_then(|(_, name, what)| Some((name, what?))));
        })?;
        for (name, what) in &mut sets {
            let fill = |w: &mut Writer| {
                w.put(&header(encode::family(table.family)));
                w.text(set::LIST_TABLE, &table.name);
                w.text(set::LIST_SET, name);
            };
            *whole &=
                self.requests.dump(msg::GET_ELEMENT, fill, |m| what.elements.extend(decode::elements(m.payload)))?;
        }
        Ok(sets)
    }

    /// What is in a table beside chains and the plain sets of addresses.
    fn others(&mut self, table: &TableName, whole: &mut bool) -> io::Result<BTreeSet<Box<str>>> {
        let mut others = BTreeSet::new();
        for kind in [msg::GET_SET, msg::GET_OBJECT, msg::GET_FLOWTABLE] {
            // A table's name has the same place in all of them.
            let fill = |w: &mut Writer| {
                w.put(&header(encode::family(table.family)));
                w.text(set::TABLE, &table.name);
            };
            *whole &= self.requests.dump(kind, fill, |m| {
                let plain = kind == msg::GET_SET && !decode::is_foreign_set(m.payload);
                others.extend(decode::named(m.payload).filter(|(of, _)| of == table && !plain).map(|(_, name)| name));
            })?;
        }
        Ok(others)
    }

    /// What is in a set or map of somebody else's table.
    fn spans<'s>(
        &mut self,
        table: &TableName,
        set: &str,
        known: &'s mut Lookups,
        whole: &mut bool,
    ) -> io::Result<&'s Spans> {
        if known.intervals.is_none() {
            let mut intervals = BTreeSet::new();
            let fill = |w: &mut Writer| {
                w.put(&header(encode::family(table.family)));
                w.text(set::TABLE, &table.name);
            };
            *whole &= self.requests.dump(msg::GET_SET, fill, |m| {
                let told = decode::intervals(m.payload).filter(|(of, _, intervals)| of == table && *intervals);
                intervals.extend(told.map(|(_, name, _)| name));
            })?;
            known.intervals = Some(intervals);
        }
        if !known.spans.contains_key(set) {
            let mut elements = Vec::new();
            let fill = |w: &mut Writer| {
                w.put(&header(encode::family(table.family)));
                w.text(set::LIST_TABLE, &table.name);
                w.text(set::LIST_SET, set);
            };
            *whole &= self.requests.dump(msg::GET_ELEMENT, fill, |m| elements.extend(decode::keyed(m.payload)))?;
            let intervals = known.intervals.as_ref().is_some_and(|all| all.contains(set));
            known.spans.insert(set.into(), decode::spans(elements, intervals));
        }
        Ok(&known.spans[set])
    }

    /// The rules of a chain in order, each with its handle.
    fn rules(&mut self, table: &TableName, chain: &str, whole: &mut bool) -> io::Result<Vec<(u64, Rule)>> {
        let fill = |w: &mut Writer| {
            w.put(&header(encode::family(table.family)));
            w.text(rule::TABLE, &table.name);
            w.text(rule::CHAIN, chain);
        };
        let mut rules = Vec::new();
        *whole &= self.requests.dump(msg::GET_RULE, fill, |m| rules.extend(decode::rule(m.payload)))?;
        Ok(rules)
    }

    /// The rules of one chain; none where it is not there.
    pub(crate) fn rules_of(&mut self, table: &TableName, chain: &str) -> io::Result<Vec<Rule>> {
        loop {
            let mut whole = true;
            let rules = self.rules(table, chain, &mut whole)?;
            if whole {
                return Ok(rules.into_iter().map(|(_, rule)| rule).collect());
            }
        }
    }

    /// Handles of the rules of a table that `which` names, in the chains that `chains` names.
    fn handles(
        &mut self,
        table: &TableName,
        chain: Option<&str>,
        which: impl Fn(&Rule) -> bool,
    ) -> io::Result<Vec<(Box<str>, u64)>> {
        let mut names = Vec::new();
        self.requests.dump(
            msg::GET_CHAIN,
            |w| w.put(&header(encode::family(table.family))),
            |m| {
                names.extend(decode::chain(m.payload).filter(|(of, _, _)| of == table).map(|(_, name, _)| name));
            },
        )?;
        names.retain(|name| chain.is_none_or(|chain| **name == *chain));
        let mut handles = Vec::new();
        for name in names {
            let rules = self.rules(table, &name, &mut true)?;
            handles.extend(rules.into_iter().filter(|(_, rule)| which(rule)).map(|(handle, _)| (name.clone(), handle)));
        }
        Ok(handles)
    }

    /// Carries out one step as one transaction.
    pub(crate) fn apply(&mut self, op: &Op) -> Result<(), StepError> {
        let refused = match op {
            Op::Delete(Object::Leftover(left)) if left.comment.is_some() => self.delete_commented(left),
            op => self.transact(op),
        };
        let refused = match refused {
            Ok(None) => return Ok(()),
            Ok(Some(refusal)) => (refusal.errno, refusal.text),
            Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), error.to_string()),
        };
        Err(StepError::Refused { errno: refused.0, text: refused.1 })
    }

    /// The rules of `POSTROUTING` with the comment, and the chain.
    fn delete_commented(&mut self, left: &Leftover) -> io::Result<Option<Refusal>> {
        let Leftover { at, comment, .. } = left;
        let jump = Expr::Verdict(Verdict::Jump(at.chain.clone()));
        let which = |rule: &Rule| rule.comment == *comment && rule.exprs.contains(&jump);
        let gone = self.handles(&at.table, Some(beside::POSTROUTING), which)?;
        if gone.is_empty() {
            return Ok(None);
        }
        let mut batch = Batch::new(&mut self.requests);
        batch.delete_rules(&at.table, &gone);
        batch.delete_chain(at);
        let refused = batch.commit()?;
        if refused.as_ref().is_none_or(|refused| refused.errno != libc::EBUSY) {
            return Ok(refused);
        }
        // Others lead to the chain, which the kernel knows without a look at every rule.
        let mut batch = Batch::new(&mut self.requests);
        batch.delete_rules(&at.table, &gone);
        batch.commit()
    }

    fn transact(&mut self, op: &Op) -> io::Result<Option<Refusal>> {
        let gone = match op.object() {
            Object::Head(head) => {
                let tagged = |rule: &Rule| rule.comment.as_deref() == Some(policy::TAG);
                self.handles(&head.at.table, Some(&head.at.chain), tagged)?
            }
            Object::Leftover(left) if left.bare.is_some() => {
                self.handles(&left.at.table, Some(&left.at.chain), |rule| beside::bare_rule(rule) == left.bare)?
            }
            Object::Leftover(left) => {
                let at = &left.at;
                let leads_there = |rule: &Rule| rule.exprs.contains(&Expr::Verdict(Verdict::Jump(at.chain.clone())));
                self.handles(&at.table, None, leads_there)?
            }
            _ => Vec::new(),
        };
        let counted = match op.object() {
            Object::Table(new) if new.chains.contains_key(policy::STRANGERS) => {
                packets(&mut self.requests, &new.name, policy::STRANGERS).unwrap_or_default()
            }
            _ => 0,
        };
        let mut batch = Batch::new(&mut self.requests);
        match op {
            Op::Create(Object::Table(new)) => batch.create(new, counted),
            Op::Delete(Object::Table(old)) => batch.delete(&old.name),
            Op::Delete(Object::Head(old)) => batch.delete_rules(&old.at.table, &gone),
            Op::Delete(Object::Leftover(left)) => {
                batch.delete_rules(&left.at.table, &gone);
                if left.bare.is_none() {
                    batch.delete_chain(&left.at);
                }
            }
            Op::Create(object) | Op::Update { to: object, .. } | Op::Recreate { to: object, .. } => match object {
                Object::Table(new) => match op {
                    Op::Update { from: Object::Table(old), .. } if new.differs_in_elements(old) => {
                        batch.change_elements(old, new)
                    }
                    _ => batch.replace(new, counted),
                },
                Object::Head(new) => {
                    batch.delete_rules(&new.at.table, &gone);
                    batch.insert_rules(new);
                }
                _ => {}
            },
            Op::Delete(_) => {}
        }
        batch.commit()
    }
}

impl AsFd for Nft {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.monitor.as_fd()
    }
}

/// Packets that the counters of a chain's rules have seen, in the calling thread's namespace.
pub fn counted(table: &TableName, chain: &str) -> io::Result<u64> {
    packets(&mut Socket::open(Some(netlink::NETFILTER), 0)?, table, chain)
}

fn packets(socket: &mut Socket, table: &TableName, chain: &str) -> io::Result<u64> {
    let fill = |w: &mut Writer| {
        w.put(&header(encode::family(table.family)));
        w.text(rule::TABLE, &table.name);
        w.text(rule::CHAIN, chain);
    };
    let mut packets = 0;
    socket.dump(msg::GET_RULE, fill, |m| packets += decode::counted(m.payload))?;
    Ok(packets)
}

/// struct nfgenmsg: family, version, resource.
fn header(family: u8) -> [u8; 4] {
    [family, 0, 0, 0]
}

/// A transaction in the making.
struct Batch<'a> {
    socket: &'a mut Socket,
    writer: Writer,
}

impl<'a> Batch<'a> {
    fn new(socket: &'a mut Socket) -> Self {
        let mut batch = Self { socket, writer: Writer::default() };
        batch.bracket(BATCH_BEGIN);
        batch
    }

    fn bracket(&mut self, kind: u16) {
        let seq = self.socket.next_seq();
        self.writer.begin(kind, flag::REQUEST, seq);
        let [high, low] = SUBSYSTEM.to_be_bytes();
        self.writer.put(&[0, 0, high, low]);
        self.writer.end();
    }

    fn message(&mut self, kind: u16, flags: u16, family: Family, fill: impl FnOnce(&mut Writer)) {
        let seq = self.socket.next_seq();
        self.writer.begin(kind, flag::REQUEST | flags, seq);
        self.writer.put(&header(encode::family(family)));
        fill(&mut self.writer);
        self.writer.end();
    }

    /// `strangers` were counted before: a table that takes another one's place counts on.
    fn create(&mut self, new: &Table, mut strangers: u64) {
        let TableName { family, name } = &new.name;
        self.message(msg::NEW_TABLE, flag::CREATE | flag::EXCL, *family, |w| {
            w.text(table::NAME, name);
            if let Some(text) = &new.comment {
                encode::comment(w, table::USERDATA, text);
            }
        });
        for (id, (set, what)) in (1..).zip(&new.sets) {
            self.message(msg::NEW_SET, flag::CREATE, *family, |w| encode::set(w, name, set, what, id));
            self.elements(msg::NEW_ELEMENT, &new.name, set, &what.elements);
        }
        // Chains first: rules may jump to any of them.
        for (chain, what) in &new.chains {
            self.message(msg::NEW_CHAIN, flag::CREATE, *family, |w| encode::chain(w, name, chain, what));
        }
        for (chain, what) in
            new.chains.iter().flat_map(|(name, chain)| chain.rules.iter().map(move |rule| (name, rule)))
        {
            let counted = if **chain == *policy::STRANGERS { std::mem::take(&mut strangers) } else { 0 };
            self.message(msg::NEW_RULE, flag::CREATE | flag::APPEND, *family, |w| {
                w.text(rule::TABLE, name);
                w.text(rule::CHAIN, chain);
                encode::rule(w, what, counted);
            });
        }
    }

    /// The same table with other elements: what is in both is not touched.
    fn change_elements(&mut self, old: &Table, new: &Table) {
        for (name, set) in &new.sets {
            let had = old.sets.get(name).map(|set| &set.elements);
            let had = had.unwrap_or(const { &BTreeSet::new() });
            self.elements(msg::NEW_ELEMENT, &new.name, name, set.elements.difference(had));
            self.elements(msg::DEL_ELEMENT, &new.name, name, had.difference(&set.elements));
        }
    }

    fn elements<'e>(&mut self, kind: u16, of: &TableName, set: &str, elements: impl IntoIterator<Item = &'e IpAddr>) {
        let all: Vec<IpAddr> = elements.into_iter().copied().collect();
        for some in all.chunks(ELEMENTS) {
            let flags = if kind == msg::NEW_ELEMENT { flag::CREATE } else { 0 };
            self.message(kind, flags, of.family, |w| encode::elements(w, &of.name, set, some));
        }
    }

    /// Whatever is there now makes room within the same transaction.
    fn replace(&mut self, new: &Table, strangers: u64) {
        self.message(msg::NEW_TABLE, flag::CREATE, new.name.family, |w| w.text(table::NAME, &new.name.name));
        self.delete(&new.name);
        self.create(new, strangers);
    }

    fn delete(&mut self, old: &TableName) {
        self.message(msg::DEL_TABLE, 0, old.family, |w| w.text(table::NAME, &old.name));
    }

    fn delete_rules(&mut self, table: &TableName, rules: &[(Box<str>, u64)]) {
        for (chain, handle) in rules {
            self.message(msg::DEL_RULE, 0, table.family, |w| {
                w.text(rule::TABLE, &table.name);
                w.text(rule::CHAIN, chain);
                w.attr(rule::HANDLE, &handle.to_be_bytes());
            });
        }
    }

    /// Each goes to the head, so that the last goes first.
    fn insert_rules(&mut self, head: &Head) {
        let ChainName { table, chain } = &head.at;
        for what in head.rules.iter().rev() {
            self.message(msg::NEW_RULE, flag::CREATE, table.family, |w| {
                w.text(rule::TABLE, &table.name);
                w.text(rule::CHAIN, chain);
                encode::rule(w, what, 0);
            });
        }
    }

    /// A chain with all its rules.
    fn delete_chain(&mut self, at: &ChainName) {
        self.message(msg::DEL_RULE, 0, at.table.family, |w| {
            w.text(rule::TABLE, &at.table.name);
            w.text(rule::CHAIN, &at.chain);
        });
        self.message(msg::DEL_CHAIN, 0, at.table.family, |w| {
            w.text(chain::TABLE, &at.table.name);
            w.text(chain::NAME, &at.chain);
        });
    }

    /// Sends it; gives the first message that the kernel did not take: then nothing was changed.
    fn commit(mut self) -> io::Result<Option<Refusal>> {
        let last = self.writer.ask_ack();
        self.bracket(BATCH_END);
        self.socket.transact(&self.writer, last)
    }
}
