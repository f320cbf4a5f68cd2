//! Where a store is: what an endpoint may say, and how it is connected to.

use std::time::Duration;

use tonic::transport::Endpoint;

use crate::StoreError;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(2);
/// A silent connection is asked whether it lives after this, and given up after the next.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// HTTP/2 flow control: a page comes without waiting for us to ask for more.
const WINDOW: u32 = 1 << 20;

pub(crate) fn refused(what: &str, reason: impl ToString) -> StoreError {
    StoreError::Config { what: what.to_owned(), reason: reason.to_string() }
}

/// `http://HOST:PORT` or `https://HOST:PORT`, and nothing more.
pub(crate) fn endpoint(url: &str) -> Result<Endpoint, StoreError> {
    // A password is not printed, not even where it has no place.
    if let Some((_, host)) = url.rsplit_once('@') {
        let what = format!("store endpoint {:?}", format!("…@{host}"));
        return Err(refused(&what, "user and password are told by --user and --password-file"));
    }
    let what = format!("store endpoint {url:?}");
    let plain = url.starts_with("http://");
    if !plain && !url.starts_with("https://") {
        return Err(refused(&what, "must begin with http:// or https://"));
    }
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|e| refused(&what, e))?;
    // A port that is no port would be taken for none at all.
    let authority = endpoint.uri().authority().map_or("", |authority| authority.as_str());
    let port = authority.rsplit_once(']').map_or(authority, |(_, port)| port).rsplit_once(':');
    if port.is_some() && !matches!(endpoint.uri().port_u16(), Some(1..)) {
        return Err(refused(&what, "its port must be 1 to 65535"));
    }
    // It would be passed over without a word.
    if endpoint.uri().path_and_query().is_some_and(|path| path != "/") {
        return Err(refused(&what, "must end behind the port: the keys' prefix is told by --prefix"));
    }
    Ok(endpoint
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true))
}
