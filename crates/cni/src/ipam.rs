//! Who holds which address: host-local's folder, shared with every process that takes its lock.
//!
//! ```text
//!   <dataDir>/<network>/lock                 flock(2), held while files below are looked at and made
//!                      /10.1.15.2            "<container>\r\n<device>"
//!                      /last_reserved_ip.0   of range set 0: the walk goes on behind it
//!                      /asked.0              of range set 0: given by name since the walk came by; the walk passes them by once
//!                      /.last_reserved_ip.0  where the next one is written; the two change places
//!                      /.spare               of an address that was freed, or half made: the next one is made of it
//! ```
//! A file comes into being whole (written beside, then renamed), so that a process that is killed holds an address or does not. Whoever
//! takes an address writes the attachment down first: a leak always has a file that tells of it. What the walk remembers is written
//! before the address is: whoever is killed, no address comes back before the others were used.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use twill_core::ipam::{Given, Holder, RangeSet};
use twill_core::net::LinkName;
use twill_kernel::files::{self, Lock, Unsynced};

use crate::error::{Act, CniError, Code};
use crate::records::Records;

/// More bytes than an address file has.
const LIMIT: u64 = 4096;
/// How many holders an error names.
const NAMED: usize = 10;

/// The folder of one network, locked.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    _lock: Lock,
}

/// Addresses that are free, and what the walk has to remember when they are taken.
#[derive(Debug, Default)]
pub struct Choice {
    /// One of each set.
    pub given: Vec<Given>,
    /// Files of the folder and their content.
    marks: Vec<(String, String)>,
}

/// An address and who holds it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Held {
    /// The address.
    pub ip: IpAddr,
    /// Its holder; `None`: the file says nothing, as a program that was killed leaves it.
    pub holder: Option<Holder>,
    /// What is called so is no address file: a directory, say. Nobody here has made it, and nobody removes it.
    pub is_odd: bool,
}

impl Held {
    /// The holder for people.
    pub fn who(&self) -> String {
        if self.is_odd { "nobody (no address file has that name)".to_owned() } else { who(self.holder.as_ref()) }
    }
}

impl Folder {
    /// Makes the folder when it is missing, and waits for its lock.
    pub fn open(dir: &Path) -> Result<Self, CniError> {
        Self::lock(dir)
    }

    /// `None`: there is no such folder, hence nobody holds anything.
    pub fn find(dir: &Path) -> Result<Option<Self>, CniError> {
        if dir.is_dir() { Self::lock(dir).map(Some) } else { Ok(None) }
    }

    fn lock(dir: &Path) -> Result<Self, CniError> {
        let lock = Lock::exclusive(&dir.join("lock")).act(|| format!("lock {}", dir.display()))?;
        Ok(Self { dir: dir.to_owned(), _lock: lock })
    }

    fn file(&self, ip: IpAddr) -> PathBuf {
        self.dir.join(ip.to_string())
    }

    /// One free address of each set; those asked for by name where there are any. Nothing is taken yet.
    pub fn choose(&self, sets: &[RangeSet], asked: &[IpAddr]) -> Result<Choice, CniError> {
        if let Some(ip) = asked.iter().find(|ip| !sets.iter().any(|set| set.find(**ip).is_some())) {
            let ranges: Vec<String> = sets.iter().map(RangeSet::to_string).collect();
            let msg = format!("{ip} is asked for, and lies in no range of the network: {}", ranges.join(", "));
            return Err(CniError::new(Code::Addresses, msg, "ask for an address inside of them"));
        }
        for set in sets {
            let mut of_set = asked.iter().filter(|ip| set.find(**ip).is_some());
            if let Some(first) = of_set.next()
                && let Some(other) = of_set.find(|ip| *ip != first)
            {
                let msg = format!("{first} and {other} are asked for, and a container gets one address of {set}");
                return Err(CniError::new(Code::Addresses, msg, "ask for one of them"));
            }
        }
        let mut choice = Choice::default();
        for (n, set) in sets.iter().enumerate() {
            let given = match asked.iter().find(|ip| set.find(**ip).is_some()) {
                Some(ip) => {
                    let mut passed_by = self.asked(n);
                    passed_by.insert(*ip);
                    choice.marks.push((asked_file(n), lines(&passed_by)));
                    self.ask(set, *ip)?
                }
                None => self.walk(set, n, &mut choice)?,
            };
            choice.given.push(given);
        }
        Ok(choice)
    }

    /// The next one of the circle. One that somebody has asked for by name was used later than its place in the circle says.
    fn walk(&self, set: &RangeSet, n: usize, choice: &mut Choice) -> Result<Given, CniError> {
        let last = self.last(n);
        let before = self.asked(n);
        let mut asked = before.clone();
        let is_free = |ip: IpAddr| !self.is_there(ip);
        let given = set.next(last, |ip| !asked.remove(&ip) && is_free(ip));
        let given = given.or_else(|| set.next(last, is_free)).ok_or_else(|| self.full(set))?;
        if asked != before {
            choice.marks.push((asked_file(n), lines(&asked)));
        }
        choice.marks.push((last_file(n), given.inet.addr.to_string()));
        Ok(given)
    }

    fn ask(&self, set: &RangeSet, ip: IpAddr) -> Result<Given, CniError> {
        let Some(given) = set.ask(ip) else {
            let msg = format!("{ip} is asked for, and is the gateway of {set}");
            return Err(CniError::new(Code::Addresses, msg, "ask for another address"));
        };
        if !self.is_there(ip) {
            return Ok(given);
        }
        let msg = format!("{ip} is asked for, and {} holds it", self.look_at(ip)?.who());
        Err(CniError::new(
            Code::Addresses,
            msg,
            format!("ask for another address; when that container is gone: twill ipam free {ip}"),
        ))
    }

    fn full(&self, set: &RangeSet) -> CniError {
        let held: Vec<Held> =
            self.held().unwrap_or_default().into_iter().filter(|held| set.find(held.ip).is_some()).collect();
        let named: Vec<String> = held.iter().take(NAMED).map(|h| format!("{} by {}", h.ip, h.who())).collect();
        let more = if held.len() > NAMED { format!(" and {} more", held.len() - NAMED) } else { String::new() };
        CniError::new(
            Code::Addresses,
            format!("every address of {set} is held: {}{more}", named.join(", ")),
            "`twill ipam list` shows all of them, `twill ipam free` frees what no container has; or give the node a larger subnet",
        )
    }

    /// The address that was given last.
    fn last(&self, set: usize) -> Option<IpAddr> {
        fs::read_to_string(self.dir.join(last_file(set))).ok()?.trim().parse().ok()
    }

    /// What was given by its name since the walk came by.
    fn asked(&self, set: usize) -> BTreeSet<IpAddr> {
        let text = fs::read_to_string(self.dir.join(asked_file(set))).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Takes what was chosen. Whatever fails, nothing is taken.
    ///
    /// Nobody waits until the disk has the circle's place: it keeps a container from the connections of an address's last holder, of
    /// which no kernel knows any more when the machine comes back.
    pub fn take(&self, choice: &Choice, holder: &Holder) -> Result<Option<Unsynced>, CniError> {
        let mut changes = Vec::new();
        for (name, content) in &choice.marks {
            let file = self.dir.join(name);
            let put = files::put_over(&file, &self.dir.join(format!(".{name}")), content.as_bytes());
            put.act(|| format!("write {}", file.display()))?;
        }
        for (n, given) in choice.given.iter().enumerate() {
            let file = self.file(given.inet.addr);
            match files::put_new(&file, holder.to_string().as_bytes()) {
                Ok(put) => changes.push(put),
                Err(error) => {
                    let error = Err(error).act(|| format!("write {}", file.display()));
                    let left = choice.given[..n].iter().filter_map(|taken| self.free(taken.inet.addr).err());
                    return error.map_err(|error| left.fold(error, CniError::and));
                }
            }
        }
        Ok(Unsynced::of_folder(changes))
    }

    /// Who holds an address.
    pub fn holder(&self, ip: IpAddr) -> Result<Option<Holder>, CniError> {
        self.look_at(ip).map(|held| held.holder)
    }

    /// An address that is held: nobody looks into what is no file, or longer than one of ours.
    pub fn look_at(&self, ip: IpAddr) -> Result<Held, CniError> {
        let file = self.file(ip);
        let is_odd = match fs::metadata(&file) {
            Ok(meta) => !meta.is_file() || meta.len() > LIMIT,
            // A symbolic link to nowhere.
            Err(_) => self.is_there(ip),
        };
        if is_odd {
            return Ok(Held { ip, holder: None, is_odd });
        }
        let text = files::read_limited(&file, LIMIT).act(|| format!("read {}", file.display()))?;
        Ok(Held { ip, holder: text.and_then(|text| Holder::parse(&String::from_utf8_lossy(&text))), is_odd })
    }

    fn is_there(&self, ip: IpAddr) -> bool {
        fs::symlink_metadata(self.file(ip)).is_ok()
    }

    /// Frees an address; `None`: nobody held it.
    pub fn free(&self, ip: IpAddr) -> Result<Option<Unsynced>, CniError> {
        let file = self.file(ip);
        files::set_aside(&file).act(|| format!("remove {}", file.display()))
    }

    /// Frees those of these addresses that the container's device holds.
    pub fn release(&self, ips: &[IpAddr], container_id: &str, ifname: &str) -> Result<Vec<Unsynced>, CniError> {
        let mut freed = Vec::new();
        for ip in ips {
            if self.holder(*ip)?.is_some_and(|holder| holder.is(container_id, ifname)) {
                freed.extend(self.free(*ip)?);
            }
        }
        Ok(freed)
    }

    /// Every address that is held, in order.
    pub fn held(&self) -> Result<Vec<Held>, CniError> {
        let read = || -> io::Result<Vec<IpAddr>> {
            let names = fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
            Ok(names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect())
        };
        let mut ips = read().act(|| format!("list {}", self.dir.display()))?;
        ips.sort();
        ips.into_iter().map(|ip| self.look_at(ip)).collect()
    }
}

/// host-local's, that either plugin goes on where the other was.
fn last_file(set: usize) -> String {
    format!("last_reserved_ip.{set}")
}

fn asked_file(set: usize) -> String {
    format!("asked.{set}")
}

fn lines(ips: &BTreeSet<IpAddr>) -> String {
    ips.iter().map(|ip| format!("{ip}\n")).collect()
}

/// The container at the other end of a host's device, for people.
pub fn who_has_device(device: LinkName, records: &Records) -> String {
    let all = records.all().unwrap_or_default();
    let found = all.iter().find(|attachment| attachment.request.host_device == device);
    found.map_or_else(|| device.to_string(), |attachment| format!("{} by {device}", attachment.request.container_id))
}

/// A holder for people.
pub fn who(holder: Option<&Holder>) -> String {
    match holder {
        None => "nobody (an empty file)".to_owned(),
        Some(Holder { container_id, ifname: Some(ifname) }) => format!("{container_id}:{ifname}"),
        Some(holder) => holder.container_id.clone(),
    }
}
