//! etcd's v3 protocol: its messages and clients, and with feature `server` a store that speaks it.
//!
//! ```text
//!   gRPC (server::grpc) ──commands──▶ one thread (server::engine)
//!                                        ├─ mvcc: revisions, transactions, ranges, history   pure
//!                                        ├─ lease: who expires when                           pure
//!                                        └─ disk: redb; a batch is synced before it is answered
//! ```

/// Messages and services of etcd's API.
#[allow(
    missing_docs,
    clippy::all,
    clippy::too_many_lines,
    clippy::too_many_lines,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    reason = "generated; documented by etcd"
)]
pub mod rpc {
    tonic::include_proto!("etcdserverpb");
}

/// Keys with their revisions, and events.
#[allow(
    missing_docs,
    clippy::all,
    clippy::too_many_lines,
    clippy::too_many_lines,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    reason = "generated; documented by etcd"
)]
pub mod mvccpb {
    tonic::include_proto!("mvccpb");
}

#[cfg(feature = "server")]
pub mod server;

/// The end of the range of all keys that begin with `prefix`, as etcd clients reckon it.
pub fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}
