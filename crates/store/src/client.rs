//! The client: several endpoints, certificates, a user, deadlines; every write is a compare-and-swap.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status, Streaming};
use twill_core::lease::RawLease;
use twill_etcd::mvccpb::{KeyValue, event::EventType};
use twill_etcd::rpc::auth_client::AuthClient;
use twill_etcd::rpc::kv_client::KvClient;
use twill_etcd::rpc::lease_client::LeaseClient;
use twill_etcd::rpc::watch_client::WatchClient;
use twill_etcd::rpc::{
    AuthenticateRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, RequestOp, ResponseOp, TxnRequest, TxnResponse, WatchCreateRequest, WatchRequest,
    WatchResponse, compare, range_request, request_op, response_op, watch_request,
};
use twill_etcd::{prefix_end, rpc};

use crate::endpoint::{endpoint, refused};
use crate::pem::innermost;
use crate::{Listing, RawConfig, StoreError, Swap, WatchEvent};

/// How long one request may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// Leases for each page of a listing: about 250 KB.
const PAGE: i64 = 1000;

/// Where the store is, and who we are to it.
#[derive(Clone, Default)]
pub struct StoreConfig {
    /// `http://` and `https://` URLs.
    pub endpoints: Vec<String>,
    /// Key prefix, e.g. `/coreos.com/network`.
    pub prefix: String,
    /// File of the certificate authority, PEM. This one and the next two are read for each connection, since certificates end while an
    /// agent runs.
    pub ca: Option<PathBuf>,
    /// Files of the client certificate and its key, PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// User, and the file with the password: it is read for each token, since a password changes while an agent runs.
    pub user: Option<(String, PathBuf)>,
}

impl std::fmt::Debug for StoreConfig {
    /// Without secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreConfig")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

/// A store that speaks etcd's API. Connects when it is first asked, and again whenever it must.
#[derive(Debug)]
pub struct EtcdStore {
    config: StoreConfig,
    /// Made when first used: a channel belongs to the runtime that drives it.
    channels: Vec<(Endpoint, OnceLock<Channel>)>,
    /// The endpoint that answered last.
    current: Mutex<usize>,
    token: Mutex<Option<MetadataValue<tonic::metadata::Ascii>>>,
}

impl EtcdStore {
    /// Checks endpoints; connects later, and reads the certificates then.
    pub fn new(config: StoreConfig) -> Result<Self, StoreError> {
        if config.endpoints.is_empty() {
            return Err(refused("--store", "at least one endpoint like http://127.0.0.1:2379 is needed"));
        }
        let channel = |url: &String| Ok((endpoint(url)?, OnceLock::new()));
        let channels = config.endpoints.iter().map(channel).collect::<Result<_, _>>()?;
        Ok(Self { config, channels, current: Mutex::new(0), token: Mutex::new(None) })
    }

    /// Lets go of all connections: the address that they come from is gone, and the kernel tells nobody; or they have failed, and the next
    /// ones are to be made with the certificates that lie there then.
    pub fn reconnect(&mut self) {
        self.channels.iter_mut().for_each(|(_, channel)| drop(channel.take()));
    }

    /// The endpoints, for messages.
    pub fn endpoints(&self) -> String {
        self.config.endpoints.join(",")
    }

    /// True when nothing authenticates either side.
    pub fn is_open(&self) -> bool {
        self.config.user.is_none() && self.config.identity.is_none()
    }

    /// The network config; `None`: there is none yet.
    pub async fn config(&self) -> Result<Option<RawConfig>, StoreError> {
        let request = RangeRequest { key: self.key("config").into(), ..RangeRequest::default() };
        let response = self.range("read the network config", request).await?;
        Ok(response.kvs.into_iter().next().map(|kv| RawConfig { value: kv.value.into(), mod_rev: kv.mod_revision }))
    }

    /// Writes a network config where there is none; true: written.
    pub async fn create_config(&self, value: &[u8]) -> Result<bool, StoreError> {
        let key = self.key("config");
        let put = PutRequest { key: key.clone().into(), value: value.to_vec().into(), ..PutRequest::default() };
        let txn = TxnRequest {
            compare: vec![absent(&key)],
            success: vec![op(request_op::Request::RequestPut(put))],
            failure: vec![],
        };
        Ok(self.txn("write the network config", txn).await?.succeeded)
    }

    /// All leases, read page by page at one revision.
    pub async fn list(&self) -> Result<Listing, StoreError> {
        let first = self.key("subnets/");
        let end = prefix_end(first.as_bytes());
        let mut next = first.clone().into_bytes();
        let mut listing = Listing::default();
        loop {
            let request = RangeRequest {
                key: next.into(),
                range_end: end.clone().into(),
                limit: PAGE,
                revision: listing.revision,
                sort_target: range_request::SortTarget::Key.into(),
                ..RangeRequest::default()
            };
            let response = self.range("list the leases", request).await?;
            if listing.revision == 0 {
                let header = response.header.unwrap_or_default();
                (listing.revision, listing.cluster_id) = (header.revision, header.cluster_id);
            }
            next = response.kvs.last().map_or_else(Vec::new, |kv| [&kv.key, &[0][..]].concat());
            listing.entries.extend(response.kvs.into_iter().filter_map(|kv| raw_lease(kv, &first)));
            if !response.more || next.is_empty() {
                return Ok(listing);
            }
        }
    }

    /// One lease.
    pub async fn get(&self, name: &str) -> Result<Option<RawLease>, StoreError> {
        let first = self.key("subnets/");
        let request = RangeRequest { key: format!("{first}{name}").into(), ..RangeRequest::default() };
        let response = self.range("read a lease", request).await?;
        Ok(response.kvs.into_iter().next().and_then(|kv| raw_lease(kv, &first)))
    }

    /// Everything below `<prefix>` from revision `from` on.
    pub async fn watch(&self, from: i64) -> Result<WatchStream, StoreError> {
        let act = "watch the store";
        let prefix = self.key("");
        let create = WatchCreateRequest {
            range_end: prefix_end(prefix.as_bytes()).into(),
            key: prefix.clone().into(),
            start_revision: from,
            progress_notify: true,
            ..WatchCreateRequest::default()
        };
        let request = WatchRequest { request_union: Some(watch_request::RequestUnion::CreateRequest(create)) };
        // The request stream stays open for as long as the watch lives.
        let (keep, requests) = tokio::sync::mpsc::channel(1);
        let _ = keep.send(request).await;
        let call = self.call(act, |channel, token| {
            let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
            async move { WatchClient::new(channel).watch(with(Request::new(requests), token)).await }
        });
        let responses = call.await?.into_inner();
        Ok(WatchStream { responses, _keep: keep, prefix, from, endpoints: self.endpoints() })
    }

    /// Writes a lease where there is none, on an etcd lease of its own that lasts `ttl` seconds.
    pub async fn create(&self, name: &str, value: &[u8], ttl: i64) -> Result<Swap, StoreError> {
        let etcd_lease = self.grant(ttl).await?;
        let swap = self.swap(name, value, etcd_lease, absent(&self.key(&format!("subnets/{name}")))).await;
        if !matches!(swap, Ok(Swap::Done { .. })) {
            // Nothing hangs on it; it would end by itself.
            let _ = self.revoke(etcd_lease).await;
        }
        swap
    }

    /// Rewrites a lease that still has revision `mod_rev`, on an etcd lease (0: none, a reservation).
    pub async fn update(&self, name: &str, value: &[u8], mod_rev: i64, etcd_lease: i64) -> Result<Swap, StoreError> {
        self.swap(name, value, etcd_lease, unchanged(&self.key(&format!("subnets/{name}")), mod_rev)).await
    }

    /// Deletes a lease that still has revision `mod_rev`.
    pub async fn delete(&self, name: &str, mod_rev: i64) -> Result<Swap, StoreError> {
        let key = self.key(&format!("subnets/{name}"));
        let delete = DeleteRangeRequest { key: key.clone().into(), ..DeleteRangeRequest::default() };
        let txn = TxnRequest {
            compare: vec![unchanged(&key, mod_rev)],
            success: vec![op(request_op::Request::RequestDeleteRange(delete))],
            failure: vec![get(&key)],
        };
        self.ended("delete a lease", txn, 0).await
    }

    /// A new etcd lease.
    pub async fn grant(&self, ttl: i64) -> Result<i64, StoreError> {
        let response =
            self.unary("grant an etcd lease", LeaseGrantRequest { ttl, id: 0 }, |channel, request| async move {
                LeaseClient::new(channel).lease_grant(request).await
            });
        Ok(response.await?.id)
    }

    /// Starts an etcd lease's time anew; gives its seconds, or `None` when it has ended.
    pub async fn keep_alive(&self, etcd_lease: i64) -> Result<Option<i64>, StoreError> {
        let act = "keep an etcd lease alive";
        let call = self.call(act, |channel, token| async move {
            let once = tokio_stream::once(LeaseKeepAliveRequest { id: etcd_lease });
            let work = async {
                LeaseClient::new(channel)
                    .lease_keep_alive(with(Request::new(once), token))
                    .await?
                    .into_inner()
                    .message()
                    .await
            };
            tokio::time::timeout(DEADLINE, work).await.map_err(|_| Status::deadline_exceeded("no answer"))?
        });
        Ok(call.await?.map(|response| response.ttl).filter(|ttl| *ttl > 0))
    }

    async fn revoke(&self, id: i64) -> Result<(), StoreError> {
        let request = LeaseRevokeRequest { id };
        self.unary("revoke an etcd lease", request, |channel, request| async move {
            LeaseClient::new(channel).lease_revoke(request).await
        })
        .await
        .map(|_| ())
    }

    /// Keys below `prefix` with nothing else, for `store ls`.
    pub async fn keys(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let request = RangeRequest {
            key: prefix.to_owned().into(),
            range_end: prefix_end(prefix.as_bytes()).into(),
            keys_only: true,
            ..RangeRequest::default()
        };
        let response = self.range("list keys", request).await?;
        Ok(response.kvs.into_iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned()).collect())
    }

    async fn swap(&self, name: &str, value: &[u8], etcd_lease: i64, compare: Compare) -> Result<Swap, StoreError> {
        let key = self.key(&format!("subnets/{name}"));
        let put = PutRequest {
            key: key.clone().into(),
            value: value.to_vec().into(),
            lease: etcd_lease,
            ..PutRequest::default()
        };
        let txn = TxnRequest {
            compare: vec![compare],
            success: vec![op(request_op::Request::RequestPut(put))],
            failure: vec![get(&key)],
        };
        self.ended("write a lease", txn, etcd_lease).await
    }

    /// Runs a compare-and-swap whose failure branch reads the key.
    async fn ended(&self, act: &'static str, txn: TxnRequest, etcd_lease: i64) -> Result<Swap, StoreError> {
        let response = self.txn(act, txn).await?;
        if response.succeeded {
            return Ok(Swap::Done { revision: response.header.unwrap_or_default().revision, etcd_lease });
        }
        let found = response.responses.into_iter().next().and_then(|ResponseOp { response }| match response {
            Some(response_op::Response::ResponseRange(range)) => range.kvs.into_iter().next(),
            _ => None,
        });
        Ok(Swap::Lost(found.and_then(|kv| raw_lease(kv, &self.key("subnets/")))))
    }

    async fn range(&self, act: &'static str, request: RangeRequest) -> Result<rpc::RangeResponse, StoreError> {
        self.unary(act, request, |channel, request| async move {
            KvClient::new(channel).max_decoding_message_size(16 << 20).range(request).await
        })
        .await
    }

    async fn txn(&self, act: &'static str, request: TxnRequest) -> Result<TxnResponse, StoreError> {
        self.unary(act, request, |channel, request| async move { KvClient::new(channel).txn(request).await }).await
    }

    /// One request with one answer and a deadline.
    async fn unary<Q: Clone, A, F>(
        &self,
        act: &'static str,
        request: Q,
        call: impl Fn(Channel, Request<Q>) -> F + Copy,
    ) -> Result<A, StoreError>
    where
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let call = self.retry(act, |channel, token| {
            let mut request = with(Request::new(request.clone()), token);
            request.set_timeout(DEADLINE);
            async move {
                tokio::time::timeout(DEADLINE, call(channel, request))
                    .await
                    .map_err(|_| Status::deadline_exceeded("no answer"))?
            }
        });
        Ok(call.await?.into_inner())
    }

    /// Tries each endpoint once, from the one that answered last on; gets a token where one is needed.
    async fn retry<A, F>(
        &self,
        act: &'static str,
        mut call: impl FnMut(Channel, Option<MetadataValue<tonic::metadata::Ascii>>) -> F,
    ) -> Result<A, StoreError>
    where
        F: Future<Output = Result<A, Status>>,
    {
        let mut last = Status::unavailable("no endpoint");
        // One more turn than endpoints: a token that has expired costs one.
        for _ in 0..=self.channels.len() {
            let at = self.current.lock().map_or(0, |at| *at);
            let result = match self.connected(at).await {
                Ok((channel, token)) => call(channel, token).await,
                Err(status) => Err(status),
            };
            match result {
                Ok(answer) => return Ok(answer),
                Err(status) if is_away(&status) => {
                    if let Ok(mut current) = self.current.lock() {
                        *current = (at + 1) % self.channels.len();
                    }
                    last = status;
                }
                Err(status) if is_expired(&status) && self.config.user.is_some() => {
                    if let Ok(mut token) = self.token.lock() {
                        *token = None;
                    }
                    last = status;
                }
                Err(status) => return Err(self.error(act, &status)),
            }
        }
        Err(self.error(act, &last))
    }

    /// As [`EtcdStore::retry`], for a call that can be made once only.
    async fn call<A, F>(
        &self,
        act: &'static str,
        call: impl FnOnce(Channel, Option<MetadataValue<tonic::metadata::Ascii>>) -> F,
    ) -> Result<A, StoreError>
    where
        F: Future<Output = Result<A, Status>>,
    {
        let at = self.current.lock().map_or(0, |at| *at);
        let result = match self.connected(at).await {
            Ok((channel, token)) => call(channel, token).await,
            Err(status) => Err(status),
        };
        result.map_err(|status| {
            if let (true, Ok(mut token)) = (is_expired(&status), self.token.lock()) {
                *token = None;
            }
            if let (true, Ok(mut current)) = (is_away(&status), self.current.lock()) {
                *current = (at + 1) % self.channels.len();
            }
            self.error(act, &status)
        })
    }

    async fn connected(&self, at: usize) -> Result<(Channel, Option<MetadataValue<tonic::metadata::Ascii>>), Status> {
        let channel = self.channel(at)?;
        let token = self.token(&channel).await?;
        Ok((channel, token))
    }

    fn channel(&self, at: usize) -> Result<Channel, Status> {
        let (endpoint, channel) = &self.channels[at % self.channels.len()];
        if let Some(channel) = channel.get() {
            return Ok(channel.clone());
        }
        let mut endpoint = endpoint.clone();
        if endpoint.uri().scheme_str() == Some("https") {
            let unusable = |error| Status::permission_denied(format!("use the certificates: {}", innermost(&error)));
            endpoint = endpoint.tls_config(tls(&self.config)?).map_err(unusable)?;
        }
        Ok(channel.get_or_init(|| endpoint.connect_lazy()).clone())
    }

    /// The token of our user, asked for when there is none.
    async fn token(&self, channel: &Channel) -> Result<Option<MetadataValue<tonic::metadata::Ascii>>, Status> {
        let Some((name, file)) = &self.config.user else { return Ok(None) };
        if let Ok(token) = self.token.lock()
            && token.is_some()
        {
            return Ok(token.clone());
        }
        let password = String::from_utf8(read("password", file)?)
            .map_err(|e| Status::permission_denied(format!("read the password in {}: {e}", file.display())))?;
        let password = password.trim_end_matches(['\n', '\r']).to_owned();
        let request = AuthenticateRequest { name: name.clone(), password };
        let mut client = AuthClient::new(channel.clone());
        let answer = tokio::time::timeout(DEADLINE, client.authenticate(request)).await;
        let answer = answer.map_err(|_| Status::deadline_exceeded("no answer"))??.into_inner();
        let fresh: MetadataValue<_> =
            answer.token.parse().map_err(|_| Status::internal("the store's token is not text"))?;
        if let Ok(mut token) = self.token.lock() {
            *token = Some(fresh.clone());
        }
        Ok(Some(fresh))
    }

    fn error(&self, act: &'static str, status: &Status) -> StoreError {
        let (endpoints, reason) = (self.endpoints(), reason(status));
        if is_away(status) {
            StoreError::Away { act, endpoints, reason }
        } else {
            StoreError::Denied { act, endpoints, reason }
        }
    }

    /// `<prefix>/<rest>`.
    fn key(&self, rest: &str) -> String {
        format!("{}/{rest}", self.config.prefix.trim_end_matches('/'))
    }
}

/// A watch in progress.
#[derive(Debug)]
pub struct WatchStream {
    responses: Streaming<WatchResponse>,
    _keep: tokio::sync::mpsc::Sender<WatchRequest>,
    prefix: String,
    from: i64,
    endpoints: String,
}

impl WatchStream {
    /// The next events, which happened by the given revision; no event: only the revision moves. An error ends the watch.
    pub async fn next(&mut self) -> Result<(i64, Vec<WatchEvent>), StoreError> {
        let act = "watch the store";
        let away = |reason: String| StoreError::Away { act, endpoints: self.endpoints.clone(), reason };
        let response = match self.responses.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return Err(away("the store ended the watch".into())),
            Err(status) => return Err(away(reason(&status))),
        };
        if response.compact_revision > 0 {
            return Err(StoreError::Compacted { from: self.from });
        }
        if response.canceled {
            return Err(away(response.cancel_reason));
        }
        let revision = response.header.unwrap_or_default().revision;
        let events = response
            .events
            .into_iter()
            .filter_map(|event| self.event(event.r#type == EventType::Put as i32, event.kv?));
        Ok((revision, events.collect()))
    }

    fn event(&self, put: bool, kv: KeyValue) -> Option<WatchEvent> {
        let subnets = format!("{}subnets/", self.prefix);
        let key = std::str::from_utf8(&kv.key).ok()?;
        if key.strip_prefix(&self.prefix) == Some("config") {
            let config = put.then(|| RawConfig { value: kv.value.to_vec(), mod_rev: kv.mod_revision });
            return Some(WatchEvent::Config(config));
        }
        let name = key.strip_prefix(&subnets)?.to_owned();
        if put {
            raw_lease(kv, &subnets).map(WatchEvent::Put)
        } else {
            Some(WatchEvent::Delete { name, revision: kv.mod_revision })
        }
    }
}

/// A key below `subnets/`; one whose name is no text is shown as far as it can be.
pub fn raw_lease(kv: KeyValue, subnets: &str) -> Option<RawLease> {
    let name = kv.key.strip_prefix(subnets.as_bytes())?;
    Some(RawLease {
        name: String::from_utf8_lossy(name).into_owned(),
        value: kv.value.into(),
        create_rev: kv.create_revision,
        mod_rev: kv.mod_revision,
        etcd_lease: kv.lease,
    })
}

fn tls(config: &StoreConfig) -> Result<ClientTlsConfig, Status> {
    let mut tls = ClientTlsConfig::new();
    if let Some(ca) = &config.ca {
        tls = tls.ca_certificate(Certificate::from_pem(read("certificate authority", ca)?));
    }
    if let Some((certificate, key)) = &config.identity {
        tls = tls.identity(Identity::from_pem(read("certificate", certificate)?, read("key", key)?));
    }
    Ok(tls)
}

fn read(what: &str, file: &Path) -> Result<Vec<u8>, Status> {
    std::fs::read(file).map_err(|e| Status::permission_denied(format!("read the {what} in {}: {e}", file.display())))
}

/// The request with our token.
fn with<T>(mut request: Request<T>, token: Option<MetadataValue<tonic::metadata::Ascii>>) -> Request<T> {
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", token);
    }
    request
}

/// True when another endpoint, or waiting, may help.
fn is_away(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal
    )
}

/// True when a new token may help.
fn is_expired(status: &Status) -> bool {
    status.code() == Code::Unauthenticated
}

/// The status' message with the causes below it: the transport's own says little.
fn reason(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn op(request: request_op::Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn get(key: &str) -> RequestOp {
    op(request_op::Request::RequestRange(RangeRequest { key: key.to_owned().into(), ..RangeRequest::default() }))
}

fn absent(key: &str) -> Compare {
    compares(key, compare::CompareTarget::Create, compare::TargetUnion::CreateRevision(0))
}

fn unchanged(key: &str, mod_rev: i64) -> Compare {
    compares(key, compare::CompareTarget::Mod, compare::TargetUnion::ModRevision(mod_rev))
}

fn compares(key: &str, target: compare::CompareTarget, to: compare::TargetUnion) -> Compare {
    Compare {
        result: compare::CompareResult::Equal.into(),
        target: target.into(),
        key: key.to_owned().into(),
        range_end: Default::default(),
        target_union: Some(to),
    }
}
