//! What a first program for this would be, and about what flannel's is: one packet, one datagram, one thread.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, poll};
use twill_e2e::net::Host;
use twill_kernel::tun::{HEADER, Offloads, Tun, TunDevice};

use super::load::on;

/// The device's name.
pub(crate) const DEVICE: &str = "naive0";

/// A tunnel between `own` and `peer`; it runs until the program ends.
pub(crate) fn start(host: &Host, own: SocketAddr, peer: SocketAddr) {
    let (tun, udp) = on(host, || (TunDevice::open(DEVICE, Offloads::NONE).unwrap(), UdpSocket::bind(own).unwrap()));
    udp.set_nonblocking(true).unwrap();
    std::thread::spawn(move || {
        let mut packet = vec![0; 65_536];
        loop {
            let mut fds = [tun.as_fd(), udp.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            let _ = poll(&mut fds, None);
            while let Ok(len) = tun.read(&mut [0; HEADER], &mut packet) {
                let _ = udp.send_to(&packet[..len], peer);
            }
            while let Ok(len) = udp.recv(&mut packet) {
                let _ = tun.write(&[&[0; HEADER], &packet[..len]].map(std::io::IoSlice::new));
            }
        }
    });
}
