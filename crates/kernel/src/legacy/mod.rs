//! The tables of legacy iptables, which nftables does not show: read, and changed in one way only, when a chain of flannel's, or of a
//! reference plugin's, goes.
//!
//! - [`entries`]: the bytes of a table, without any socket; here: the socket options that read and replace them
//!
//! Layout: include/uapi/linux/netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h, netfilter/x_tables.h.

#![allow(unsafe_code, reason = "four socket options that no safe wrapper knows")]

pub mod entries;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{FlockOperation, flock};
use rustix::net::{AddressFamily, Protocol, SocketType, ipproto, socket};
use twill_core::firewall::beside::{POSTROUTING, is_flannels_chain, may_shut};
use twill_core::firewall::{self, Base, ChainKind, ChainName, Family, Hook, Leftover, Rule, TableName};
use twill_core::reconcile::StepError;

pub use self::entries::parse;
use self::entries::{Rest, bare_networks, u32_at, without, without_bare, without_commented};
use crate::refused;

/// SOL_IP and SOL_IPV6.
const LEVELS: (libc::c_int, libc::c_int) = (0, 41);
/// To read: IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES; to write: IPT_SO_SET_REPLACE and IPT_SO_SET_ADD_COUNTERS.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
const SET_REPLACE: libc::c_int = 64;
const SET_ADD_COUNTERS: libc::c_int = 65;
/// Bytes of a table's name in each request.
const NAME: usize = 32;
/// Bytes of struct ipt_getinfo and of struct ipt_get_entries before its entries.
const INFO: usize = 84;
const ENTRIES: usize = 40;
/// Bytes of struct ipt_replace before its entries, of struct xt_counters_info before its counters, and of struct xt_counters.
const REPLACE: usize = 96;
const COUNTERS: usize = 40;
const COUNTER: usize = 16;
/// NF_INET_NUMHOOKS, the chains in the order of their numbers, and NF_INET_POST_ROUTING.
const HOOKS: usize = 5;
const HOOK_CHAINS: [(&str, Hook); HOOKS] = [
    ("PREROUTING", Hook::Prerouting),
    ("INPUT", Hook::Input),
    ("FORWARD", Hook::Forward),
    ("OUTPUT", Hook::Output),
    (POSTROUTING, Hook::Postrouting),
];
const LEAVING: usize = 4;
/// The tables, each with its priority among the chains of a hook (NF_IP_PRI_*).
const TABLES: [(&str, i32); 5] = [("raw", -300), ("mangle", -150), ("nat", -100), ("filter", 0), ("security", 50)];
/// What `iptables-legacy` holds while it changes something.
const LOCK: &str = "/run/xtables.lock";

/// All tables of both families that exist, and what flannel left in them. None is brought to life by looking. A chain of flannel's that
/// accepts stays as long as something there drops: nothing of ours can take its place.
pub(crate) fn read() -> (Vec<firewall::Table>, Vec<Leftover>) {
    let (mut tables, mut left) = (Vec::new(), Vec::new());
    for v4 in [true, false] {
        for (name, priority) in TABLES {
            let Ok(Some(whole)) = Table::read(v4, name) else { continue };
            // The longest of all, on a host of kube-proxy's; `iptables` lets nobody drop there.
            let model = (name != "nat").then(|| whole.model(name, priority));
            if name != "filter" || !model.as_ref().is_some_and(|table| may_shut(table, "FORWARD")) {
                left.extend(whole.left_by_flannel(name));
            }
            tables.extend(model);
        }
    }
    (tables, left)
}

/// The rules of `POSTROUTING` in the table `nat`; none where there is no such table.
pub(crate) fn leaving(v4: bool) -> io::Result<Vec<Rule>> {
    let table = match Table::read(v4, "nat") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        table => table?,
    };
    let chain = table.and_then(|table| table.model("nat", 0).chains.remove(POSTROUTING));
    Ok(chain.map(|chain| chain.rules).unwrap_or_default())
}

/// Removes what was left, in one replacement of its table.
pub(crate) fn remove(left: &Leftover) -> Result<(), StepError> {
    take_out(left).map_err(|error| refused(&error, format!("change a table of legacy iptables: {error}")))
}

fn take_out(left: &Leftover) -> io::Result<()> {
    let ChainName { table: TableName { family, name }, chain } = &left.at;
    let v4 = *family == Family::Ip;
    // Where there is no such file, nobody else holds it.
    let lock = File::options().create(true).truncate(false).write(true).open(LOCK).ok();
    if let Some(lock) = &lock {
        // The agent comes again; a runtime may not.
        let wait = left.comment.is_some();
        flock(lock, if wait { FlockOperation::LockExclusive } else { FlockOperation::NonBlockingLockExclusive })?;
    }
    let Some(table) = Table::read(v4, name)? else { return Ok(()) };
    let (first, last) = (table.hooks[LEAVING], table.policies[LEAVING]);
    let rest = match (left.bare, &left.comment) {
        (Some(network), _) => without_bare(v4, &table.entries, first, last, network),
        (None, Some(comment)) => without_commented(v4, &table.entries, first..last, chain, comment),
        (None, None) => without(v4, &table.entries, chain),
    };
    rest.map_or(Ok(()), |rest| table.replace(name, &rest))
}

/// One table as the kernel gives it.
#[derive(Debug)]
struct Table {
    socket: OwnedFd,
    v4: bool,
    /// Bits of the hooks that it has.
    valid: u32,
    /// Where each hook's chain begins, and where its policy stands.
    hooks: [usize; HOOKS],
    policies: [usize; HOOKS],
    count: usize,
    entries: Vec<u8>,
}

impl Table {
    fn name(&self, name: &str) -> TableName {
        TableName::new(if self.v4 { Family::Ip } else { Family::Ip6 }, name)
    }

    /// In the words of nftables.
    fn model(&self, name: &str, priority: i32) -> firewall::Table {
        let kind = ChainKind::Filter;
        let hooks = HOOK_CHAINS.iter().enumerate().filter(|(n, _)| self.valid & (1 << n) != 0);
        let hooks: Vec<(&str, Base, usize, usize)> = hooks
            .map(|(n, (chain, hook))| {
                (*chain, Base { kind, hook: *hook, priority, drops: false }, self.hooks[n], self.policies[n])
            })
            .collect();
        firewall::Table {
            name: self.name(name),
            comment: None,
            dormant: false,
            owner: None,
            others: BTreeSet::new(),
            sets: BTreeMap::new(),
            chains: parse(self.v4, &self.entries, &hooks),
        }
    }

    fn left_by_flannel(&self, name: &str) -> Vec<Leftover> {
        let left = |chain: &str, bare| Leftover {
            at: ChainName { table: self.name(name), chain: chain.into() },
            legacy: true,
            bare,
            comment: None,
        };
        if !["nat", "filter"].contains(&name) {
            return Vec::new();
        }
        let chains = entries::chains(self.v4, &self.entries).into_iter().filter(|chain| is_flannels_chain(chain));
        let mut found: Vec<Leftover> = chains.map(|chain| left(chain, None)).collect();
        if name == "nat" {
            let networks = bare_networks(self.v4, &self.entries, self.hooks[LEAVING], self.policies[LEAVING]);
            found.extend(networks.into_iter().map(|network| left(POSTROUTING, Some(network))));
        }
        found
    }

    fn read(v4: bool, name: &str) -> io::Result<Option<Self>> {
        let names = if v4 { "ip_tables_names" } else { "ip6_tables_names" };
        let names = std::fs::read_to_string(format!("/proc/thread-self/net/{names}"))?;
        if !names.lines().any(|known| known == name) {
            return Ok(None);
        }
        let domain = if v4 { AddressFamily::INET } else { AddressFamily::INET6 };
        let raw: Option<Protocol> = Some(ipproto::RAW);
        let socket = socket(domain, SocketType::RAW, raw)?;
        let mut info = vec![0; INFO];
        info[..name.len()].copy_from_slice(name.as_bytes());
        get(socket.as_fd(), level(v4), GET_INFO, &mut info)?;
        let number = |at: usize| u32_at(&info, at).unwrap_or(u32::MAX);
        let places = |from: usize| std::array::from_fn(|hook| number(from + 4 * hook) as usize);
        let (valid, hooks, policies, count, size) = (number(NAME), places(36), places(56), number(76), number(80));
        let mut entries = vec![0; ENTRIES + size as usize];
        entries[..name.len()].copy_from_slice(name.as_bytes());
        entries[NAME..NAME + 4].copy_from_slice(&size.to_ne_bytes());
        get(socket.as_fd(), level(v4), GET_ENTRIES, &mut entries)?;
        entries.drain(..ENTRIES);
        Ok(Some(Self { socket, v4, valid, hooks, policies, count: count as usize, entries }))
    }

    /// The kernel refuses when the number of rules is another by now. What was counted goes on from where it was.
    fn replace(&self, name: &str, rest: &Rest) -> io::Result<()> {
        let mut counters = vec![0u8; self.count * COUNTER];
        let mut request = vec![0; REPLACE];
        request[..name.len()].copy_from_slice(name.as_bytes());
        let place = |old: &usize| rest.moved.get(old).copied().unwrap_or_default() as u32;
        let numbers = [self.valid, rest.kept.len() as u32, rest.entries.len() as u32];
        let numbers = numbers.into_iter().chain(self.hooks.iter().map(place)).chain(self.policies.iter().map(place));
        for (n, number) in numbers.chain([self.count as u32]).enumerate() {
            request[NAME + 4 * n..NAME + 4 * n + 4].copy_from_slice(&number.to_ne_bytes());
        }
        request[REPLACE - 8..].copy_from_slice(&(counters.as_mut_ptr().expose_provenance() as u64).to_ne_bytes());
        request.extend_from_slice(&rest.entries);
        // The kernel writes `count` counters to the address in the request: `counters` has as many, and lives until after the call.
        set(self.socket.as_fd(), level(self.v4), SET_REPLACE, &request)?;
        let mut counted = vec![0; COUNTERS];
        counted[..name.len()].copy_from_slice(name.as_bytes());
        counted[NAME..NAME + 4].copy_from_slice(&(rest.kept.len() as u32).to_ne_bytes());
        for n in &rest.kept {
            counted.extend_from_slice(&counters[n * COUNTER..(n + 1) * COUNTER]);
        }
        set(self.socket.as_fd(), level(self.v4), SET_ADD_COUNTERS, &counted)
    }
}

const fn level(v4: bool) -> libc::c_int {
    if v4 { LEVELS.0 } else { LEVELS.1 }
}

/// `getsockopt` into a buffer whose beginning is the request.
fn get(fd: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: the descriptor is open for the borrow's life; the pointer and length describe one live buffer that the kernel reads and
    // writes within its length only; `len` is a live socklen_t.
    let code = unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, buffer.as_mut_ptr().cast(), &raw mut len) };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `setsockopt` of a whole buffer.
fn set(fd: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int, buffer: &[u8]) -> io::Result<()> {
    // SAFETY: the descriptor is open for the borrow's life; the pointer and length describe one live buffer that the kernel only reads. An
    // address within a request of SET_REPLACE is that of a live buffer as long as the request says (see `Table::replace`).
    let code = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, option, buffer.as_ptr().cast(), buffer.len() as libc::socklen_t)
    };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
