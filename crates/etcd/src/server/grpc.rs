//! etcd's services: each call becomes a command to the engine.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::rpc;
use crate::rpc::cluster_server::{Cluster, ClusterServer};
use crate::rpc::kv_server::{Kv, KvServer};
use crate::rpc::lease_server::{Lease, LeaseServer};
use crate::rpc::maintenance_server::{Maintenance, MaintenanceServer};
use crate::rpc::watch_server::{Watch, WatchServer};
use crate::rpc::{
    RequestOp, ResponseHeader, ResponseOp, TxnResponse, WatchCreateRequest, WatchResponse, request_op, response_op,
    watch_request,
};

use super::disk::{Disk, DiskError};
use super::engine::{Command, Engine, Reply, WatchSink};
use super::mvcc::Refused;

/// The release of etcd whose API this is; etcdctl shows it.
const VERSION: &str = "3.4.0";
/// etcd's limit on a write, in bytes (server/embed/config.go `DefaultMaxRequestBytes`), and what gRPC takes in beyond it.
const LARGEST_WRITE: usize = 3 << 19;
const LARGEST_REQUEST: usize = LARGEST_WRITE + (512 << 10);
/// How long clients may take to go when the store ends.
const FAREWELL: std::time::Duration = std::time::Duration::from_secs(1);

/// The store could not be started, or has stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Its data.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Its thread.
    #[error("start the store's thread")]
    Thread(#[source] std::io::Error),
    /// Its socket.
    #[error("serve the store")]
    Serve(#[source] tonic::transport::Error),
    /// Its disk failed while it ran. What it acknowledged is there; opened anew, it may go on.
    #[error("the store's disk failed")]
    Ended,
}

/// A running store: its thread works, and [`Server::serve`] lets clients in.
#[derive(Debug, Clone)]
pub struct Server {
    commands: Sender<Command>,
    streams: Arc<AtomicU64>,
    client_url: Arc<str>,
    /// Closed when the thread has ended and let go of the data.
    ended: watch::Receiver<()>,
}

impl Server {
    /// Opens the data in `dir` and starts the thread that owns it. `random` becomes the identity of a new store and seeds lease ids.
    pub fn open(dir: &Path, random: [u8; 16], client_url: &str) -> Result<Server, ServerError> {
        let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, b| n << 8 | u64::from(*b)).max(1);
        let (cluster, member) = (number(&random[..8]), number(&random[8..]));
        let (disk, loaded) = Disk::open(dir, (cluster, member))?;
        let engine = Engine::new(disk, loaded, member as i64);
        let (commands, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name("store".into());
        let (alive, ended) = watch::channel(());
        let work = move || {
            engine.run(&receiver);
            drop(alive);
        };
        thread.spawn(work).map_err(ServerError::Thread)?;
        Ok(Server { commands, streams: Arc::default(), client_url: client_url.into(), ended })
    }

    /// Serves clients until `shutdown` ends, or the disk fails: [`ServerError::Ended`], and no client is left on its connection.
    pub async fn serve(self, listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<(), ServerError> {
        // An answer of several frames would wait for the client's delayed acknowledgement (RFC 9293, section 3.7.4): 40 ms each time.
        let clients = TcpIncoming::from(listener).with_nodelay(Some(true));
        let (mut ended, over) = (self.ended.clone(), self.ended.clone());
        let (staying, mut leaving) = watch::channel(());
        let stop = async move {
            tokio::select! {
                () = shutdown => {}
                _ = ended.changed() => {}
            }
            drop(staying);
        };
        let serving = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(std::time::Duration::from_secs(30)))
            .add_service(KvServer::new(self.clone()).max_decoding_message_size(LARGEST_REQUEST))
            .add_service(WatchServer::new(self.clone()))
            .add_service(LeaseServer::new(self.clone()))
            .add_service(MaintenanceServer::new(self.clone()))
            .add_service(ClusterServer::new(self))
            .serve_with_incoming_shutdown(clients, stop);
        tokio::select! {
            served = serving => served.map_err(ServerError::Serve)?,
            // Told to go they are; a client that holds a stream open, as each watcher does, is not waited for.
            () = async { let _ = leaving.changed().await; tokio::time::sleep(FAREWELL).await } => {}
        }
        if over.has_changed().is_err() { Err(ServerError::Ended) } else { Ok(()) }
    }

    /// Sends a command and waits for its answer.
    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?.map_err(status)
    }

    /// One request that is not a transaction.
    async fn one(
        &self,
        request: request_op::Request,
    ) -> Result<(Option<ResponseHeader>, response_op::Response), Status> {
        let TxnResponse { header, responses, .. } =
            self.ask(|reply| Command::One(RequestOp { request: Some(request) }, reply)).await?;
        let response = responses.into_iter().next().and_then(|ResponseOp { response }| response);
        Ok((header, response.ok_or_else(stopped)?))
    }
}

/// A write that etcd would take.
fn fits(write: &impl prost::Message) -> Result<(), Status> {
    if write.encoded_len() > LARGEST_WRITE {
        return Err(Status::invalid_argument("etcdserver: request is too large"));
    }
    Ok(())
}

fn stopped() -> Status {
    Status::unavailable("etcdserver: the store has stopped")
}

fn status(refused: Refused) -> Status {
    let code = match refused {
        Refused::Compacted | Refused::Future => Code::OutOfRange,
        Refused::LeaseNotFound => Code::NotFound,
        Refused::LeaseExists => Code::FailedPrecondition,
        Refused::LeaseTooLong => Code::OutOfRange,
        Refused::EmptyKey
        | Refused::DuplicateKey
        | Refused::KeyNotFound
        | Refused::ValueProvided
        | Refused::LeaseProvided => Code::InvalidArgument,
    };
    Status::new(code, refused.to_string())
}

#[tonic::async_trait]
impl Kv for Server {
    async fn range(&self, request: Request<rpc::RangeRequest>) -> Result<Response<rpc::RangeResponse>, Status> {
        let mut request = request.into_inner();
        // "Now" for etcd, but in a transaction it is refused.
        request.revision = request.revision.max(0);
        match self.one(request_op::Request::RequestRange(request)).await? {
            (header, response_op::Response::ResponseRange(response)) => {
                Ok(Response::new(rpc::RangeResponse { header, ..response }))
            }
            _ => Err(stopped()),
        }
    }

    async fn put(&self, request: Request<rpc::PutRequest>) -> Result<Response<rpc::PutResponse>, Status> {
        fits(request.get_ref())?;
        match self.one(request_op::Request::RequestPut(request.into_inner())).await? {
            (header, response_op::Response::ResponsePut(response)) => {
                Ok(Response::new(rpc::PutResponse { header, ..response }))
            }
            _ => Err(stopped()),
        }
    }

    async fn delete_range(
        &self,
        request: Request<rpc::DeleteRangeRequest>,
    ) -> Result<Response<rpc::DeleteRangeResponse>, Status> {
        match self.one(request_op::Request::RequestDeleteRange(request.into_inner())).await? {
            (header, response_op::Response::ResponseDeleteRange(response)) => {
                Ok(Response::new(rpc::DeleteRangeResponse { header, ..response }))
            }
            _ => Err(stopped()),
        }
    }

    async fn txn(&self, request: Request<rpc::TxnRequest>) -> Result<Response<rpc::TxnResponse>, Status> {
        fits(request.get_ref())?;
        self.ask(|reply| Command::Txn(request.into_inner(), reply)).await.map(Response::new)
    }

    async fn compact(
        &self,
        request: Request<rpc::CompactionRequest>,
    ) -> Result<Response<rpc::CompactionResponse>, Status> {
        let header = self.ask(|reply| Command::Compact(request.into_inner().revision, reply)).await?;
        Ok(Response::new(rpc::CompactionResponse { header: Some(header) }))
    }
}

type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Watch for Server {
    type WatchStream = Outgoing<WatchResponse>;

    async fn watch(
        &self,
        request: Request<Streaming<rpc::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let unread = Arc::new(AtomicUsize::new(0));
        let sink = WatchSink::new(sender, Arc::clone(&unread));
        tokio::spawn(take_watch_requests(self.clone(), request.into_inner(), sink));
        let stream = UnboundedReceiverStream::new(receiver).map(move |response| {
            unread.fetch_sub(1, Ordering::Relaxed);
            Ok(response)
        });
        // A client begins again elsewhere only where it is told so; the plain end of a stream ends its watch.
        let ended = self.ended.clone();
        let word = tokio_stream::once(()).filter_map(move |()| ended.has_changed().is_err().then(|| Err(stopped())));
        Ok(Response::new(Box::pin(stream.chain(word))))
    }
}

/// Takes one client's watch requests until it leaves.
async fn take_watch_requests(server: Server, mut requests: Streaming<rpc::WatchRequest>, sink: WatchSink) {
    let stream = server.streams.fetch_add(1, Ordering::Relaxed);
    let mut next_id = 0;
    let mut ended = server.ended.clone();
    loop {
        let request = tokio::select! {
            request = requests.message() => request,
            _ = ended.changed() => return,
        };
        let Ok(Some(request)) = request else { break };
        let command = match request.request_union {
            Some(watch_request::RequestUnion::CreateRequest(request)) => {
                watch_command(stream, &mut next_id, request, &sink)
            }
            Some(watch_request::RequestUnion::CancelRequest(cancel)) => {
                Command::Unwatch { stream, id: Some(cancel.watch_id), sink: Some(sink.clone()) }
            }
            Some(watch_request::RequestUnion::ProgressRequest(_)) => Command::Progress { stream, sink: sink.clone() },
            None => continue,
        };
        if server.commands.send(command).is_err() {
            return;
        }
    }
    let _ = server.commands.send(Command::Unwatch { stream, id: None, sink: None });
}

fn watch_command(stream: u64, next_id: &mut i64, mut request: WatchCreateRequest, sink: &WatchSink) -> Command {
    let id = if request.watch_id != 0 {
        request.watch_id
    } else {
        *next_id += 1;
        *next_id - 1
    };
    // A range from the empty key is one from the first key, as etcd has it.
    if request.key.is_empty() {
        request.key = vec![0].into();
    }
    Command::Watch { stream, id, request, sink: sink.clone() }
}

#[tonic::async_trait]
impl Lease for Server {
    type LeaseKeepAliveStream = Outgoing<rpc::LeaseKeepAliveResponse>;

    async fn lease_grant(
        &self,
        request: Request<rpc::LeaseGrantRequest>,
    ) -> Result<Response<rpc::LeaseGrantResponse>, Status> {
        let rpc::LeaseGrantRequest { ttl, id } = request.into_inner();
        let (header, id, ttl) = self.ask(|reply| Command::Grant { id, ttl, reply }).await?;
        Ok(Response::new(rpc::LeaseGrantResponse { header: Some(header), id, ttl, error: String::new() }))
    }

    async fn lease_revoke(
        &self,
        request: Request<rpc::LeaseRevokeRequest>,
    ) -> Result<Response<rpc::LeaseRevokeResponse>, Status> {
        let header = self.ask(|reply| Command::Revoke(request.into_inner().id, reply)).await?;
        Ok(Response::new(rpc::LeaseRevokeResponse { header: Some(header) }))
    }

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<rpc::LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let server = self.clone();
        let answers = request.into_inner().then(move |request| {
            let server = server.clone();
            async move {
                let id = request?.id;
                let (header, ttl) = server.ask(|reply| Command::KeepAlive(id, reply)).await?;
                // etcd says 0 for a lease that is gone.
                Ok(rpc::LeaseKeepAliveResponse { header: Some(header), id, ttl: ttl.unwrap_or(0) })
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<rpc::LeaseTimeToLiveRequest>,
    ) -> Result<Response<rpc::LeaseTimeToLiveResponse>, Status> {
        let rpc::LeaseTimeToLiveRequest { id, keys } = request.into_inner();
        self.ask(|reply| Command::TimeToLive { id, keys, reply }).await.map(Response::new)
    }

    async fn lease_leases(
        &self,
        _: Request<rpc::LeaseLeasesRequest>,
    ) -> Result<Response<rpc::LeaseLeasesResponse>, Status> {
        let (header, ids) = self.ask(Command::Leases).await?;
        let leases = ids.into_iter().map(|id| rpc::LeaseStatus { id }).collect();
        Ok(Response::new(rpc::LeaseLeasesResponse { header: Some(header), leases }))
    }
}

#[tonic::async_trait]
impl Maintenance for Server {
    async fn status(&self, _: Request<rpc::StatusRequest>) -> Result<Response<rpc::StatusResponse>, Status> {
        let header = self.ask(Command::Header).await?;
        Ok(Response::new(rpc::StatusResponse {
            version: VERSION.into(),
            leader: header.member_id,
            raft_term: header.raft_term,
            raft_index: header.revision as u64,
            raft_applied_index: header.revision as u64,
            header: Some(header),
            ..rpc::StatusResponse::default()
        }))
    }
}

#[tonic::async_trait]
impl Cluster for Server {
    async fn member_list(
        &self,
        _: Request<rpc::MemberListRequest>,
    ) -> Result<Response<rpc::MemberListResponse>, Status> {
        let header = self.ask(Command::Header).await?;
        let member = rpc::Member {
            id: header.member_id,
            name: "twill".into(),
            client_ur_ls: vec![self.client_url.to_string()],
            ..rpc::Member::default()
        };
        Ok(Response::new(rpc::MemberListResponse { header: Some(header), members: vec![member] }))
    }
}
