//! The one thread that owns the store. It takes what waits, does it in memory, syncs it in one batch, and only then answers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use prost::bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::mvccpb::Event;
use crate::mvccpb::event::EventType;
use crate::rpc::watch_create_request::FilterType;
use crate::rpc::{
    DeleteRangeRequest, LeaseTimeToLiveResponse, RequestOp, ResponseHeader, TxnRequest, TxnResponse,
    WatchCreateRequest, WatchResponse, request_op,
};

use super::disk::{Batch, Disk, Loaded};
use super::lease::Leases;
use super::mvcc::{Mvcc, Record, Refused, check_put, check_txn, in_range, taken};

/// Commands that are taken into one batch.
const LARGEST_BATCH: usize = 1024;
/// Responses that a watcher may leave unread; then it is told to begin again.
const WATCHER_LAG: usize = 4096;
/// A watcher that asked for it hears the revision so often while nothing happens (etcd: 10 minutes).
const PROGRESS: Duration = Duration::from_secs(600);

/// How a command is answered.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Refused>>;

/// The stream of one connection's watchers, which knows how much of it is unread.
#[derive(Debug, Clone)]
pub(crate) struct WatchSink {
    sender: mpsc::UnboundedSender<WatchResponse>,
    unread: Arc<AtomicUsize>,
}

impl WatchSink {
    pub(crate) fn new(sender: mpsc::UnboundedSender<WatchResponse>, unread: Arc<AtomicUsize>) -> Self {
        Self { sender, unread }
    }

    fn send(&self, response: WatchResponse) {
        self.unread.fetch_add(1, Ordering::Relaxed);
        // A stream that is gone is unwatched by its own task.
        let _ = self.sender.send(response);
    }

    fn lag(&self) -> usize {
        self.unread.load(Ordering::Relaxed)
    }
}

/// What the services ask.
#[derive(Debug)]
pub(crate) enum Command {
    /// Any read or write of keys.
    Txn(TxnRequest, Reply<TxnResponse>),
    /// Put, delete or range as a single request: the same, without a transaction's checks.
    One(RequestOp, Reply<TxnResponse>),
    Compact(i64, Reply<ResponseHeader>),
    Grant {
        id: i64,
        ttl: i64,
        reply: Reply<(ResponseHeader, i64, i64)>,
    },
    Revoke(i64, Reply<ResponseHeader>),
    KeepAlive(i64, Reply<(ResponseHeader, Option<i64>)>),
    TimeToLive {
        id: i64,
        keys: bool,
        reply: Reply<LeaseTimeToLiveResponse>,
    },
    Leases(Reply<(ResponseHeader, Vec<i64>)>),
    Header(Reply<ResponseHeader>),
    Watch {
        stream: u64,
        id: i64,
        request: WatchCreateRequest,
        sink: WatchSink,
    },
    Unwatch {
        stream: u64,
        id: Option<i64>,
        sink: Option<WatchSink>,
    },
    Progress {
        stream: u64,
        sink: WatchSink,
    },
}

/// One watcher of one stream.
#[derive(Debug)]
struct Watcher {
    key: Bytes,
    range_end: Bytes,
    prev_kv: bool,
    no_put: bool,
    no_delete: bool,
    /// Revisions below are not told.
    from: i64,
    progress: bool,
    sink: WatchSink,
}

/// The store and everything that hangs on it.
pub(crate) struct Engine {
    mvcc: Mvcc,
    leases: Leases,
    watchers: BTreeMap<(u64, i64), Watcher>,
    disk: Disk,
    ids: (u64, u64),
    start: Instant,
    batch: Batch,
    /// Answers that wait for the disk.
    replies: Vec<Box<dyn FnOnce() + Send>>,
    next_lease: i64,
    progress_at: Duration,
}

impl Engine {
    pub(crate) fn new(disk: Disk, mut loaded: Loaded, lease_seed: i64) -> Self {
        let mvcc = Mvcc::of(&mut loaded);
        let mut leases = Leases::default();
        for (id, ttl) in loaded.leases {
            // TTLs start anew in full: what was left when the server stopped is unknown.
            let _ = leases.grant(id, ttl, Duration::ZERO);
        }
        Self {
            mvcc,
            leases,
            watchers: BTreeMap::new(),
            disk,
            ids: (loaded.cluster, loaded.member),
            start: Instant::now(),
            batch: Batch::default(),
            replies: Vec::new(),
            next_lease: lease_seed & 0x7fff_ffff_ffff,
            progress_at: PROGRESS,
        }
    }

    /// Works until every sender is gone, or the disk fails.
    pub(crate) fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let first = match self.wait(commands) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let waiting = first.into_iter().chain(commands.try_iter()).take(LARGEST_BATCH);
            waiting.for_each(|command| self.on_command(command));
            self.expire();
            if let Err(error) = self.flush() {
                tracing::error!(error = %error, cause = ?std::error::Error::source(&error).map(ToString::to_string), "the store's disk failed, nothing more is acknowledged");
                return;
            }
            self.tell_progress();
        }
    }

    fn wait(&self, commands: &Receiver<Command>) -> Result<Command, RecvTimeoutError> {
        let progress = self.watchers.values().any(|w| w.progress).then_some(self.progress_at);
        match [self.leases.next_end(), progress].into_iter().flatten().min() {
            Some(at) => commands.recv_timeout(at.saturating_sub(self.now())),
            None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Txn(request, reply) => {
                let result = check_txn(&request).and_then(|()| self.txn(&request));
                self.answer(reply, result);
            }
            Command::One(op, reply) => {
                let result = self.txn(&TxnRequest { compare: vec![], success: vec![op], failure: vec![] });
                self.answer(reply, result);
            }
            Command::Compact(rev, reply) => {
                let result = self.compact(rev);
                self.answer(reply, result);
            }
            Command::Grant { id, ttl, reply } => {
                let result = self.grant(id, ttl);
                self.answer(reply, result);
            }
            Command::Revoke(id, reply) => {
                let result = if self.revoke(id) { Ok(self.header()) } else { Err(Refused::LeaseNotFound) };
                self.answer(reply, result);
            }
            Command::KeepAlive(id, reply) => {
                let ttl = self.leases.keep_alive(id, self.now());
                self.answer(reply, Ok((self.header(), ttl)));
            }
            Command::TimeToLive { id, keys, reply } => {
                let response = self.time_to_live(id, keys);
                self.answer(reply, Ok(response));
            }
            Command::Leases(reply) => {
                let ids = self.leases.ids().collect();
                self.answer(reply, Ok((self.header(), ids)));
            }
            Command::Header(reply) => self.answer(reply, Ok(self.header())),
            Command::Watch { stream, id, request, sink } => self.watch(stream, id, request, sink),
            Command::Unwatch { stream, id, sink } => self.unwatch(stream, id, sink),
            Command::Progress { stream, sink } => {
                // Only a stream with watchers is told; the id -1 speaks for all of them.
                if self.watchers.range((stream, i64::MIN)..=(stream, i64::MAX)).next().is_some() {
                    let response =
                        WatchResponse { header: Some(self.header()), watch_id: -1, ..WatchResponse::default() };
                    self.replies.push(Box::new(move || sink.send(response)));
                }
            }
        }
    }

    /// Answers once the batch is on the disk.
    fn answer<T: Send + 'static>(&mut self, reply: Reply<T>, result: Result<T, Refused>) {
        self.replies.push(Box::new(move || drop(reply.send(result))));
    }

    fn txn(&mut self, request: &TxnRequest) -> Result<TxnResponse, Refused> {
        let path = self.mvcc.path(request);
        for check in [Self::check_put, Self::check_range] {
            self.check(request, &mut path.iter().copied(), check)?;
        }
        let mut txn = self.mvcc.txn();
        let response = txn.run(request, &mut path.into_iter());
        let records = txn.commit();
        self.publish(&records);
        self.batch.records.extend(records);
        let mut response = response?;
        response.header = Some(self.header());
        Ok(response)
    }

    /// What must hold before anything is written, of the lists that are taken: what is refused half way would stay written.
    fn check(
        &self,
        request: &TxnRequest,
        path: &mut impl Iterator<Item = bool>,
        check: fn(&Self, &request_op::Request) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        for op in taken(request, path.next().unwrap_or_default()) {
            match op.request.as_ref() {
                Some(request_op::Request::RequestTxn(nested)) => self.check(nested, path, check)?,
                Some(request) => check(self, request)?,
                None => return Err(Refused::KeyNotFound),
            }
        }
        Ok(())
    }

    /// The lease exists, and what is to be kept.
    fn check_put(&self, request: &request_op::Request) -> Result<(), Refused> {
        let request_op::Request::RequestPut(put) = request else { return Ok(()) };
        check_put(put)?;
        if (put.ignore_value || put.ignore_lease) && self.mvcc.last(&put.key).is_none() {
            return Err(Refused::KeyNotFound);
        }
        let known = put.lease == 0 || self.leases.get(put.lease).is_some();
        if known { Ok(()) } else { Err(Refused::LeaseNotFound) }
    }

    /// The revision can be read.
    fn check_range(&self, request: &request_op::Request) -> Result<(), Refused> {
        let request_op::Request::RequestRange(range) = request else { return Ok(()) };
        if range.key.is_empty() {
            return Err(Refused::EmptyKey);
        }
        if range.revision > self.mvcc.rev() {
            return Err(Refused::Future);
        }
        if range.revision != 0 && self.mvcc.compacted() > 0 && range.revision < self.mvcc.compacted() {
            return Err(Refused::Compacted);
        }
        Ok(())
    }

    fn compact(&mut self, rev: i64) -> Result<ResponseHeader, Refused> {
        let gone = self.mvcc.compact(rev)?;
        let mut all = self.batch.compaction.take().map_or(Vec::new(), |(_, gone)| gone);
        // A row that this very batch writes must not be written after it has gone.
        self.batch.records.retain(|r| !gone.contains(&(r.version.rev, r.version.sub)));
        all.extend(gone);
        self.batch.compaction = Some((rev, all));
        Ok(self.header())
    }

    fn grant(&mut self, id: i64, ttl: i64) -> Result<(ResponseHeader, i64, i64), Refused> {
        let mut id = id;
        while id == 0 {
            self.next_lease += 1;
            id = Some(self.next_lease).filter(|id| self.leases.get(*id).is_none()).unwrap_or(0);
        }
        let granted = self.leases.grant(id, ttl, self.now())?;
        self.batch.leases.push((id, Some(granted)));
        Ok((self.header(), id, granted))
    }

    /// Ends a lease and deletes its keys, all in one revision.
    fn revoke(&mut self, id: i64) -> bool {
        if !self.leases.revoke(id) {
            return false;
        }
        self.batch.leases.push((id, None));
        let keys: Vec<Bytes> = self.mvcc.keys_of(id).cloned().collect();
        let mut txn = self.mvcc.txn();
        for key in keys {
            let _ = txn.delete(&DeleteRangeRequest { key, ..DeleteRangeRequest::default() });
        }
        let records = txn.commit();
        self.publish(&records);
        self.batch.records.extend(records);
        true
    }

    fn expire(&mut self) {
        while let Some(id) = self.leases.ended(self.now()) {
            self.revoke(id);
        }
    }

    fn time_to_live(&self, id: i64, keys: bool) -> LeaseTimeToLiveResponse {
        let mut response =
            LeaseTimeToLiveResponse { header: Some(self.header()), id, ttl: -1, ..LeaseTimeToLiveResponse::default() };
        if let Some(lease) = self.leases.get(id) {
            response.ttl = lease.ends.saturating_sub(self.now()).as_secs() as i64;
            response.granted_ttl = lease.ttl;
            if keys {
                response.keys = self.mvcc.keys_of(id).cloned().collect();
            }
        }
        response
    }

    /// Writes the batch, then gives all answers.
    fn flush(&mut self) -> Result<(), super::disk::DiskError> {
        let batch = std::mem::take(&mut self.batch);
        if !batch.is_empty() {
            self.disk.write(&batch)?;
        }
        self.replies.drain(..).for_each(|reply| reply());
        Ok(())
    }

    fn header(&self) -> ResponseHeader {
        ResponseHeader { cluster_id: self.ids.0, member_id: self.ids.1, revision: self.mvcc.rev(), raft_term: 1 }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

/// Watchers.
impl Engine {
    fn watch(&mut self, stream: u64, id: i64, request: WatchCreateRequest, sink: WatchSink) {
        let mut response =
            WatchResponse { header: Some(self.header()), watch_id: id, created: true, ..WatchResponse::default() };
        let empty = !matches!(&request.range_end[..], [] | [0]) && request.key >= request.range_end;
        if empty || self.watchers.contains_key(&(stream, id)) {
            response.watch_id = -1;
            response.canceled = true;
            response.cancel_reason =
                if empty { "mvcc: watcher range is empty" } else { "mvcc: duplicate watch ID provided" }.into();
            self.replies.push(Box::new(move || sink.send(response)));
            return;
        }
        let created = sink.clone();
        self.replies.push(Box::new(move || created.send(response)));
        if request.start_revision > 0 && request.start_revision < self.mvcc.compacted() {
            let response = WatchResponse {
                header: Some(self.header()),
                watch_id: id,
                canceled: true,
                compact_revision: self.mvcc.compacted(),
                cancel_reason: Refused::Compacted.to_string(),
                ..WatchResponse::default()
            };
            self.replies.push(Box::new(move || sink.send(response)));
            return;
        }
        let filtered = |kind: FilterType| request.filters.contains(&(kind as i32));
        let watcher = Watcher {
            no_put: filtered(FilterType::Noput),
            no_delete: filtered(FilterType::Nodelete),
            from: if request.start_revision > 0 { request.start_revision } else { self.mvcc.rev() + 1 },
            progress: request.progress_notify,
            prev_kv: request.prev_kv,
            key: request.key,
            range_end: request.range_end,
            sink,
        };
        if watcher.from <= self.mvcc.rev() {
            let events = self.mvcc.events(&watcher.key, &watcher.range_end, watcher.from, watcher.prev_kv);
            let events: Vec<Event> = events.into_iter().filter(|e| watcher.wants(e)).collect();
            if !events.is_empty() {
                let response =
                    WatchResponse { header: Some(self.header()), watch_id: id, events, ..WatchResponse::default() };
                let sink = watcher.sink.clone();
                self.replies.push(Box::new(move || sink.send(response)));
            }
        }
        self.watchers.insert((stream, id), watcher);
    }

    fn unwatch(&mut self, stream: u64, id: Option<i64>, sink: Option<WatchSink>) {
        let Some(id) = id else {
            self.watchers.retain(|(s, _), _| *s != stream);
            return;
        };
        if self.watchers.remove(&(stream, id)).is_some()
            && let Some(sink) = sink
        {
            let response =
                WatchResponse { header: Some(self.header()), watch_id: id, canceled: true, ..WatchResponse::default() };
            self.replies.push(Box::new(move || sink.send(response)));
        }
    }

    /// Tells every watcher what was written, once it is on the disk.
    fn publish(&mut self, records: &[Record]) {
        if records.is_empty() {
            return;
        }
        let header = self.header();
        let mut late = Vec::new();
        for (place, watcher) in &self.watchers {
            let mine = records
                .iter()
                .filter(|r| r.version.rev >= watcher.from && in_range(&r.key, &watcher.key, &watcher.range_end));
            let events = mine.filter_map(|r| self.mvcc.event(&r.key, (r.version.rev, r.version.sub), watcher.prev_kv));
            let events: Vec<Event> = events.filter(|e| watcher.wants(e)).collect();
            if events.is_empty() {
                continue;
            }
            let mut response =
                WatchResponse { header: Some(header), watch_id: place.1, events, ..WatchResponse::default() };
            if watcher.sink.lag() > WATCHER_LAG {
                response.events.clear();
                response.canceled = true;
                response.cancel_reason = "the watcher reads too slowly".into();
                late.push(*place);
            }
            let sink = watcher.sink.clone();
            self.replies.push(Box::new(move || sink.send(response)));
        }
        late.iter().for_each(|place| {
            self.watchers.remove(place);
        });
    }

    fn tell_progress(&mut self) {
        if self.now() < self.progress_at {
            return;
        }
        self.progress_at = self.now() + PROGRESS;
        for ((_, id), watcher) in self.watchers.iter().filter(|(_, w)| w.progress) {
            watcher.sink.send(WatchResponse { header: Some(self.header()), watch_id: *id, ..WatchResponse::default() });
        }
    }
}

impl Watcher {
    fn wants(&self, event: &Event) -> bool {
        if event.r#type == EventType::Put as i32 { !self.no_put } else { !self.no_delete }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::{Compare, PutRequest, RangeRequest, compare};

    fn put(key: &'static str, value: &'static str) -> request_op::Request {
        request_op::Request::RequestPut(PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() })
    }

    fn nested(compare: Vec<Compare>, success: Vec<RequestOp>, failure: Vec<RequestOp>) -> request_op::Request {
        request_op::Request::RequestTxn(TxnRequest { compare, success, failure })
    }

    fn ops(requests: impl IntoIterator<Item = request_op::Request>) -> Vec<RequestOp> {
        requests.into_iter().map(|request| RequestOp { request: Some(request) }).collect()
    }

    /// A transaction's answer, and then the keys with their values.
    fn run(engine: &mut Engine, success: Vec<RequestOp>) -> (Result<TxnResponse, Refused>, Vec<(Bytes, Bytes)>) {
        let request = TxnRequest { success, ..TxnRequest::default() };
        let answer = check_txn(&request).and_then(|()| engine.txn(&request));
        let all = RangeRequest { key: "a".into(), range_end: vec![0].into(), ..RangeRequest::default() };
        let kvs = engine.mvcc.range(&all).unwrap().kvs;
        (answer, kvs.into_iter().map(|kv| (kv.key, kv.value)).collect())
    }

    #[test]
    fn a_transaction_decides_and_checks_everything_before_it_writes() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, loaded) = Disk::open(dir.path(), (1, 2)).unwrap();
        let mut engine = Engine::new(disk, loaded, 0);
        let kept = request_op::Request::RequestPut(PutRequest {
            key: "none".into(),
            ignore_value: true,
            ..PutRequest::default()
        });
        let (answer, keys) = run(&mut engine, ops([put("a", "1"), nested(vec![], ops([kept]), vec![])]));
        assert_eq!((answer, keys), (Err(Refused::KeyNotFound), vec![]), "nothing of what is refused is written");
        assert_eq!(engine.mvcc.rev(), 1);
        let absent = Compare { key: "a".into(), target: compare::CompareTarget::Version as i32, ..Compare::default() };
        let unknown =
            request_op::Request::RequestPut(PutRequest { key: "c".into(), lease: 7, ..PutRequest::default() });
        let choice = nested(vec![absent], ops([put("b", "absent")]), ops([unknown]));
        let (answer, keys) = run(&mut engine, ops([put("a", "1"), choice]));
        assert!(answer.is_ok(), "the list that is not taken may name what is not there: {answer:?}");
        assert_eq!(keys, [("a".into(), "1".into()), ("b".into(), "absent".into())], "compared before the first write");
    }
}
