//! Keys with their whole history, as etcd keeps them. Pure.
//!
//! Every write makes a revision; a transaction's writes share one main revision and count on in `sub`. A deletion is a version
//! without a value. Semantics: etcd's `server/storage/mvcc` and `server/etcdserver/txn`.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use prost::bytes::Bytes;

use super::disk::Loaded;
use crate::mvccpb::{Event, KeyValue, event::EventType};
use crate::rpc::ResponseHeader;
use crate::rpc::{
    Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp,
    ResponseOp, TxnRequest, TxnResponse, compare, range_request, request_op, response_op,
};

/// Why a request is refused; the text is etcd's, since clients compare it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A revision below the compaction.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    /// A revision that is not there yet.
    #[error("etcdserver: mvcc: required revision is a future revision")]
    Future,
    /// A key is empty.
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    /// One transaction writes a key twice.
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    /// A put names a lease that does not exist.
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound,
    /// A grant names a lease that exists.
    #[error("etcdserver: lease already exists")]
    LeaseExists,
    /// A grant's TTL is beyond etcd's limit.
    #[error("etcdserver: too large lease TTL")]
    LeaseTooLong,
    /// A put keeps a value or lease of a key that is not there.
    #[error("etcdserver: key not found")]
    KeyNotFound,
    /// A put keeps the value and gives one.
    #[error("etcdserver: value is provided")]
    ValueProvided,
    /// A put keeps the lease and gives one.
    #[error("etcdserver: lease is provided")]
    LeaseProvided,
}

/// One version of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Main revision.
    pub rev: i64,
    /// Place among the writes of the revision.
    pub sub: i64,
    /// Revision that created the key's present life.
    pub create: i64,
    /// Writes since then; 0: this is a deletion.
    pub count: i64,
    /// The lease it hangs on.
    pub lease: i64,
    /// The value.
    pub value: Bytes,
}

/// One write, for the disk and for watchers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The key.
    pub key: Bytes,
    /// What was written.
    pub version: Version,
}

/// The whole store.
#[derive(Debug, Default)]
pub struct Mvcc {
    keys: BTreeMap<Bytes, Vec<Version>>,
    /// (rev, sub) → key: the history in order.
    history: BTreeMap<(i64, i64), Bytes>,
    by_lease: BTreeMap<i64, BTreeSet<Bytes>>,
    rev: i64,
    compacted: i64,
}

/// Writes of one request: they share a main revision.
#[derive(Debug)]
pub struct Txn<'a> {
    mvcc: &'a mut Mvcc,
    records: Vec<Record>,
}

impl Mvcc {
    /// An empty store; its revision is 1, as etcd's.
    pub fn new() -> Self {
        Self { rev: 1, ..Self::default() }
    }

    /// What was on disk; its records are taken out.
    pub fn of(loaded: &mut Loaded) -> Self {
        let mut mvcc = Self::new();
        std::mem::take(&mut loaded.records).into_iter().for_each(|record| mvcc.replay(record));
        mvcc.set_compacted(loaded.compacted);
        mvcc
    }

    /// Takes in a record from the disk; they come in order.
    pub fn replay(&mut self, record: Record) {
        self.rev = self.rev.max(record.version.rev);
        self.insert(&record);
    }

    /// After the records: where the history begins.
    pub fn set_compacted(&mut self, compacted: i64) {
        self.compacted = compacted;
        self.rev = self.rev.max(compacted);
    }

    /// The newest revision.
    pub fn rev(&self) -> i64 {
        self.rev
    }

    /// The revision below which history is gone; 0: none.
    pub fn compacted(&self) -> i64 {
        self.compacted
    }

    /// The keys that hang on a lease.
    pub fn keys_of(&self, lease: i64) -> impl Iterator<Item = &Bytes> {
        self.by_lease.get(&lease).into_iter().flatten()
    }

    /// Begins to write.
    pub fn txn(&mut self) -> Txn<'_> {
        Txn { mvcc: self, records: Vec::new() }
    }

    /// Answers a range; `now` is the revision of a read without one.
    pub fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Refused> {
        self.range_at(request, self.rev)
    }

    fn range_at(&self, request: &RangeRequest, now: i64) -> Result<RangeResponse, Refused> {
        if request.key.is_empty() {
            return Err(Refused::EmptyKey);
        }
        let rev = if request.revision > 0 { request.revision } else { now };
        if rev > now {
            return Err(Refused::Future);
        }
        if request.revision > 0 && rev < self.compacted {
            return Err(Refused::Compacted);
        }
        let mut found =
            self.select(&request.key, &request.range_end).filter_map(|(key, versions)| Some((key, at(versions, rev)?)));
        if request.count_only {
            return Ok(RangeResponse { count: found.count() as i64, ..RangeResponse::default() });
        }
        // In key order the rest of a page is only counted.
        let page = if in_key_order(request) { request.limit as usize + 1 } else { usize::MAX };
        let mut kvs: Vec<KeyValue> = found.by_ref().take(page).map(|(key, version)| key_value(key, version)).collect();
        let count = (kvs.len() + found.count()) as i64;
        prune(&mut kvs, request);
        sort(&mut kvs, request);
        let more = request.limit > 0 && kvs.len() as i64 > request.limit;
        if more {
            kvs.truncate(request.limit as usize);
        }
        if request.keys_only {
            kvs.iter_mut().for_each(|kv| kv.value = Bytes::new());
        }
        Ok(RangeResponse { header: None, kvs, more, count })
    }

    /// Forgets history below `rev`; gives the records that may leave the disk.
    pub fn compact(&mut self, rev: i64) -> Result<Vec<(i64, i64)>, Refused> {
        if rev <= self.compacted {
            return Err(Refused::Compacted);
        }
        if rev > self.rev {
            return Err(Refused::Future);
        }
        self.compacted = rev;
        let mut gone = Vec::new();
        let keys: Vec<Bytes> = self.history.range(..=(rev, i64::MAX)).map(|(_, key)| key.clone()).collect();
        for key in keys {
            let Some(versions) = self.keys.get_mut(&key) else { continue };
            // The last version at the compaction stays, unless it is a deletion that no watch from there on can miss.
            let upto = versions.partition_point(|v| v.rev <= rev);
            let kept = versions.get(upto.wrapping_sub(1)).is_some_and(|v| v.count > 0 || v.rev == rev);
            gone.extend(versions.drain(..upto - usize::from(kept)).map(|v| (v.rev, v.sub)));
            if versions.is_empty() {
                self.keys.remove(&key);
            }
        }
        gone.iter().for_each(|at| {
            self.history.remove(at);
        });
        Ok(gone)
    }

    /// The events of a key range from revision `from` on, in order.
    pub fn events(&self, key: &[u8], range_end: &[u8], from: i64, prev_kv: bool) -> Vec<Event> {
        let records = self.history.range((from, 0)..).filter(|(_, k)| in_range(k, key, range_end));
        records.filter_map(|(at, key)| self.event(key, *at, prev_kv)).collect()
    }

    /// The event of one write.
    pub fn event(&self, key: &Bytes, (rev, sub): (i64, i64), prev_kv: bool) -> Option<Event> {
        let versions = self.keys.get(key)?;
        let place = versions.binary_search_by(|v| (v.rev, v.sub).cmp(&(rev, sub))).ok()?;
        let version = &versions[place];
        // What stood before the revision: a transaction's own writes do not count, and what is created anew has none.
        let before = versions[..place].iter().rfind(|v| v.rev < rev).filter(|v| v.count > 0 && version.count != 1);
        let prev_kv = before.filter(|_| prev_kv).map(|v| key_value(key, v));
        let (kind, kv) = if version.count > 0 {
            (EventType::Put, key_value(key, version))
        } else {
            (EventType::Delete, KeyValue { key: key.clone(), mod_revision: rev, ..KeyValue::default() })
        };
        Some(Event { r#type: kind.into(), kv: Some(kv), prev_kv })
    }

    fn insert(&mut self, record: &Record) {
        let version = record.version.clone();
        if let Some(old) = self.keys.get(&record.key).and_then(|v| v.last()).map(|v| v.lease).filter(|l| *l != 0)
            && let Some(keys) = self.by_lease.get_mut(&old)
        {
            keys.remove(&record.key);
            if keys.is_empty() {
                self.by_lease.remove(&old);
            }
        }
        if version.lease != 0 {
            self.by_lease.entry(version.lease).or_default().insert(record.key.clone());
        }
        self.history.insert((version.rev, version.sub), record.key.clone());
        self.keys.entry(record.key.clone()).or_default().push(version);
    }

    fn select<'s>(
        &'s self,
        key: &[u8],
        range_end: &[u8],
    ) -> impl Iterator<Item = (&'s Bytes, &'s [Version])> + use<'s> {
        let first = Bytes::copy_from_slice(key);
        let bounds = match range_end {
            [] => (Bound::Included(first.clone()), Bound::Included(first)),
            [0] => (Bound::Included(first), Bound::Unbounded),
            end if end <= key => (Bound::Included(first.clone()), Bound::Excluded(first)),
            end => (Bound::Included(first), Bound::Excluded(Bytes::copy_from_slice(end))),
        };
        self.keys.range(bounds).map(|(key, versions)| (key, versions.as_slice()))
    }

    /// Which list a transaction takes, and then each nested one in it: all of it is decided before anything is written.
    pub fn path(&self, request: &TxnRequest) -> Vec<bool> {
        let succeeded = request.compare.iter().all(|c| self.holds(c));
        let mut path = vec![succeeded];
        for op in taken(request, succeeded) {
            if let Some(request_op::Request::RequestTxn(nested)) = op.request.as_ref() {
                path.extend(self.path(nested));
            }
        }
        path
    }

    /// The version of a key that stands now.
    pub fn last(&self, key: &[u8]) -> Option<&Version> {
        self.keys.get(key)?.last().filter(|v| v.count > 0)
    }

    /// One compare; over a range it must hold for every key, and for no key unless it compares a value.
    fn holds(&self, compare: &Compare) -> bool {
        let mut found = self
            .select(&compare.key, &compare.range_end)
            .filter_map(|(_, v)| v.last().filter(|v| v.count > 0))
            .peekable();
        if found.peek().is_none() {
            let is_value = compare.target == compare::CompareTarget::Value as i32;
            return !is_value && compares(compare, None);
        }
        found.all(|version| compares(compare, Some(version)))
    }
}

impl Txn<'_> {
    /// Writes a key.
    pub fn put(&mut self, request: &PutRequest) -> Result<PutResponse, Refused> {
        check_put(request)?;
        let rev = self.mvcc.rev + 1;
        let last = self.mvcc.last(&request.key);
        if (request.ignore_value || request.ignore_lease) && last.is_none() {
            return Err(Refused::KeyNotFound);
        }
        let (create, count) = last.map_or((rev, 1), |v| (v.create, v.count + 1));
        let value = last.filter(|_| request.ignore_value).map_or_else(|| request.value.clone(), |v| v.value.clone());
        let lease = last.filter(|_| request.ignore_lease).map_or(request.lease, |v| v.lease);
        let prev_kv = last.filter(|_| request.prev_kv).map(|v| key_value(&request.key, v));
        self.write(request.key.clone(), Version { rev, sub: 0, create, count, lease, value });
        Ok(PutResponse { header: None, prev_kv })
    }

    /// Deletes keys.
    pub fn delete(&mut self, request: &DeleteRangeRequest) -> Result<DeleteRangeResponse, Refused> {
        if request.key.is_empty() {
            return Err(Refused::EmptyKey);
        }
        let alive = |(key, versions): (&Bytes, &[Version])| {
            versions.last().filter(|v| v.count > 0).map(|version| key_value(key, version))
        };
        let gone: Vec<KeyValue> = self.mvcc.select(&request.key, &request.range_end).filter_map(alive).collect();
        let rev = self.mvcc.rev + 1;
        for kv in &gone {
            self.write(kv.key.clone(), Version { rev, sub: 0, create: 0, count: 0, lease: 0, value: Bytes::new() });
        }
        let deleted = gone.len() as i64;
        Ok(DeleteRangeResponse { header: None, deleted, prev_kvs: if request.prev_kv { gone } else { Vec::new() } })
    }

    /// A transaction: of its two lists the one that [`Mvcc::path`] has decided on. What is refused has written before what
    /// comes first, so whoever calls has checked all that can be.
    pub fn run(&mut self, request: &TxnRequest, path: &mut impl Iterator<Item = bool>) -> Result<TxnResponse, Refused> {
        let succeeded = path.next().unwrap_or_default();
        let ops = taken(request, succeeded);
        let mut responses = Vec::with_capacity(ops.len());
        for op in ops {
            let response = match op.request.as_ref() {
                Some(request_op::Request::RequestRange(r)) => {
                    let now = self.rev();
                    let response = self.mvcc.range_at(r, now)?;
                    response_op::Response::ResponseRange(RangeResponse { header: at_revision(now), ..response })
                }
                Some(request_op::Request::RequestPut(r)) => {
                    let response = self.put(r)?;
                    response_op::Response::ResponsePut(PutResponse { header: at_revision(self.rev()), ..response })
                }
                Some(request_op::Request::RequestDeleteRange(r)) => {
                    let response = self.delete(r)?;
                    response_op::Response::ResponseDeleteRange(DeleteRangeResponse {
                        header: at_revision(self.rev()),
                        ..response
                    })
                }
                Some(request_op::Request::RequestTxn(r)) => {
                    let response = self.run(r, path)?;
                    response_op::Response::ResponseTxn(TxnResponse { header: at_revision(0), ..response })
                }
                None => return Err(Refused::KeyNotFound),
            };
            responses.push(ResponseOp { response: Some(response) });
        }
        Ok(TxnResponse { header: None, succeeded, responses })
    }

    /// The revision as this transaction sees it: its own writes count.
    fn rev(&self) -> i64 {
        self.mvcc.rev + i64::from(!self.records.is_empty())
    }

    /// Ends: the writes are one revision.
    pub fn commit(self) -> Vec<Record> {
        if !self.records.is_empty() {
            self.mvcc.rev += 1;
        }
        self.records
    }

    fn write(&mut self, key: Bytes, mut version: Version) {
        version.sub = self.records.len() as i64;
        let record = Record { key, version };
        self.mvcc.insert(&record);
        self.records.push(record);
    }
}

/// The list that a transaction takes.
pub fn taken(request: &TxnRequest, succeeded: bool) -> &[RequestOp] {
    if succeeded { &request.success } else { &request.failure }
}

/// etcd's header of an answer inside a transaction: nothing but the revision.
fn at_revision(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..ResponseHeader::default() })
}

/// What etcd checks before it runs anything: empty keys, keys written twice.
pub fn check_txn(request: &TxnRequest) -> Result<(), Refused> {
    check_shape(request)?;
    written(&request.success)?;
    written(&request.failure)?;
    Ok(())
}

fn check_shape(request: &TxnRequest) -> Result<(), Refused> {
    if request.compare.iter().any(|c| c.key.is_empty()) {
        return Err(Refused::EmptyKey);
    }
    for op in request.success.iter().chain(&request.failure) {
        match op.request.as_ref() {
            Some(request_op::Request::RequestRange(r)) if r.key.is_empty() => return Err(Refused::EmptyKey),
            Some(request_op::Request::RequestDeleteRange(r)) if r.key.is_empty() => return Err(Refused::EmptyKey),
            Some(request_op::Request::RequestPut(r)) => check_put(r)?,
            Some(request_op::Request::RequestTxn(r)) => check_shape(r)?,
            None => return Err(Refused::KeyNotFound),
            _ => {}
        }
    }
    Ok(())
}

type Puts = BTreeSet<Bytes>;
type Deletes = Vec<(Bytes, Bytes)>;

/// The keys that a list puts, and the ranges that it deletes; nested lists exclude each other, but not their parents.
fn written(ops: &[RequestOp]) -> Result<(Puts, Deletes), Refused> {
    let (mut puts, mut deletes) = (Puts::new(), Deletes::new());
    for op in ops {
        if let Some(request_op::Request::RequestDeleteRange(r)) = op.request.as_ref() {
            deletes.push((r.key.clone(), r.range_end.clone()));
        }
    }
    for op in ops {
        let Some(request_op::Request::RequestTxn(txn)) = op.request.as_ref() else { continue };
        let (then_puts, then_deletes) = written(&txn.success)?;
        let (else_puts, else_deletes) = written(&txn.failure)?;
        let both: Puts = then_puts.union(&else_puts).cloned().collect();
        let clash = both.iter().any(|key| puts.contains(key) || deletes.iter().any(|range| deleted(key, range)));
        if clash {
            return Err(Refused::DuplicateKey);
        }
        puts.extend(both);
        deletes.extend(then_deletes.into_iter().chain(else_deletes));
    }
    for op in ops {
        let Some(request_op::Request::RequestPut(r)) = op.request.as_ref() else { continue };
        if deletes.iter().any(|range| deleted(&r.key, range)) || !puts.insert(r.key.clone()) {
            return Err(Refused::DuplicateKey);
        }
    }
    Ok((puts, deletes))
}

/// True when a list deletes what it puts; etcd does not see it of "all keys from here on".
fn deleted(key: &[u8], (first, end): &(Bytes, Bytes)) -> bool {
    *end != [0].as_slice() && in_range(key, first, end)
}

/// What etcd checks of a put before it runs it.
pub fn check_put(request: &PutRequest) -> Result<(), Refused> {
    if request.key.is_empty() {
        return Err(Refused::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(Refused::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(Refused::LeaseProvided);
    }
    Ok(())
}

/// True when `key` lies in the range that etcd's pair of key and end names.
pub fn in_range(key: &[u8], first: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == first,
        [0] => key >= first,
        end => key >= first && key < end,
    }
}

/// The version that counts at a revision; `None`: the key is not there.
fn at(versions: &[Version], rev: i64) -> Option<&Version> {
    let upto = versions.partition_point(|v| v.rev <= rev);
    versions.get(upto.checked_sub(1)?).filter(|v| v.count > 0)
}

fn compares(compare: &Compare, version: Option<&Version>) -> bool {
    use compare::{CompareResult, TargetUnion};
    let number = |pick: fn(&Version) -> i64, to: i64| version.map_or(0, pick).cmp(&to);
    let wanted = compare.target_union.as_ref();
    let ordering = match compare.target() {
        compare::CompareTarget::Value => {
            let to: &[u8] = if let Some(TargetUnion::Value(to)) = wanted { to } else { &[] };
            version.map_or(&[] as &[u8], |v| &v.value).cmp(to)
        }
        compare::CompareTarget::Version => {
            number(|v| v.count, if let Some(TargetUnion::Version(to)) = wanted { *to } else { 0 })
        }
        compare::CompareTarget::Create => {
            number(|v| v.create, if let Some(TargetUnion::CreateRevision(to)) = wanted { *to } else { 0 })
        }
        compare::CompareTarget::Mod => {
            number(|v| v.rev, if let Some(TargetUnion::ModRevision(to)) = wanted { *to } else { 0 })
        }
        compare::CompareTarget::Lease => {
            number(|v| v.lease, if let Some(TargetUnion::Lease(to)) = wanted { *to } else { 0 })
        }
    };
    match compare.result() {
        CompareResult::Equal => ordering == Ordering::Equal,
        CompareResult::NotEqual => ordering != Ordering::Equal,
        CompareResult::Greater => ordering == Ordering::Greater,
        CompareResult::Less => ordering == Ordering::Less,
    }
}

/// True for the first page of a plain listing: the first keys are the answer, whatever the later ones hold.
fn in_key_order(request: &RangeRequest) -> bool {
    use range_request::{SortOrder, SortTarget};
    let bounds = [request.min_mod_revision, request.max_mod_revision];
    let mut bounds = bounds.into_iter().chain([request.min_create_revision, request.max_create_revision]);
    request.limit > 0
        && request.sort_target() == SortTarget::Key
        && request.sort_order() != SortOrder::Descend
        && bounds.all(|bound| bound == 0)
}

fn prune(kvs: &mut Vec<KeyValue>, request: &RangeRequest) {
    let within = |value: i64, min: i64, max: i64| (min == 0 || value >= min) && (max == 0 || value <= max);
    kvs.retain(|kv| {
        within(kv.mod_revision, request.min_mod_revision, request.max_mod_revision)
            && within(kv.create_revision, request.min_create_revision, request.max_create_revision)
    });
}

fn sort(kvs: &mut [KeyValue], request: &RangeRequest) {
    use range_request::{SortOrder, SortTarget};
    // Keys come in ascending order, and stay in it where the target is the same; etcd sorts by another target than the key in
    // ascending order when none is asked for.
    let order = |a: &KeyValue, b: &KeyValue| match request.sort_target() {
        SortTarget::Key => a.key.cmp(&b.key),
        SortTarget::Version => a.version.cmp(&b.version),
        SortTarget::Create => a.create_revision.cmp(&b.create_revision),
        SortTarget::Mod => a.mod_revision.cmp(&b.mod_revision),
        SortTarget::Value => a.value.cmp(&b.value),
    };
    match request.sort_order() {
        SortOrder::Descend => kvs.sort_by(|a, b| order(b, a)),
        SortOrder::Ascend | SortOrder::None if request.sort_target() == SortTarget::Key => {}
        SortOrder::Ascend | SortOrder::None => kvs.sort_by(order),
    }
}

fn key_value(key: &Bytes, version: &Version) -> KeyValue {
    KeyValue {
        key: key.clone(),
        create_revision: version.create,
        mod_revision: version.rev,
        version: version.count,
        value: version.value.clone(),
        lease: version.lease,
    }
}
