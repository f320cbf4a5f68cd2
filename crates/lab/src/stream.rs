//! A TCP stream between two places, to see what carrying it takes.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::thread;

use twill_kernel::netns::Netns;

use crate::error::{Act, LabError};

/// Sends so many bytes from one place to another, whose address is `address`, and waits until they are there. Gives
/// how many calls wrote them.
pub fn carry(from: &Netns, to: &Netns, address: IpAddr, bytes: usize) -> Result<u64, LabError> {
    let listener = to.run(|| TcpListener::bind((address, 0)));
    let listener = listener.and_then(|bound| bound).act(|| format!("listen on {address}"))?;
    let at = listener.local_addr().act(|| format!("listen on {address}"))?;
    let stream = from.run(|| TcpStream::connect(at)).and_then(|done| done).act(|| format!("connect to {address}"))?;
    let (receiver, _) = listener.accept().act(|| format!("accept on {address}"))?;
    let sent = thread::scope(|scope| {
        let drain = scope.spawn(move || io::copy(&mut &receiver, &mut io::sink()));
        let sent = send(&stream, bytes);
        let got = drain.join().unwrap_or_else(|_| Err(io::Error::other("the thread that receives panicked")));
        got.and(sent)
    });
    sent.act(|| format!("send {bytes} bytes to {address}"))
}

fn send(mut stream: &TcpStream, bytes: usize) -> io::Result<u64> {
    let chunk = [0x5a; 1 << 16];
    let (mut left, mut calls) = (bytes, 0);
    while left > 0 {
        left -= stream.write(&chunk[..left.min(chunk.len())])?;
        calls += 1;
    }
    stream.shutdown(Shutdown::Write)?;
    // The other side closes once it has everything.
    stream.read(&mut [0]).map(|_| calls)
}
