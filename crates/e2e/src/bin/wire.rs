//! What a test's hosts and containers send and receive: streams and datagrams whose every byte is known.
//!
//! ```text
//! wire stream-send ADDR:PORT BYTES        wire stream-receive ADDR:PORT BYTES
//! wire streams-send ADDR:PORT NUMBER       wire streams-receive ADDR:PORT   side by side, whatever bytes, until they are killed
//! wire datagrams-send ADDR:PORT FROM TO   wire datagrams-receive ADDR:PORT FROM TO
//! wire packet FROM:PORT TO:PORT HEX…      one datagram for each payload; `-` is an empty one
//! wire flood FROM:PORT TO:PORT HEX        the same datagram over and over, until it is killed
//! wire relay NEAR FAR OWN OTHER HARM       datagrams between a UDP port and the relay whose unix socket is OTHER; the way out does harm:
//!                                         some of loss, double, reorder with commas between
//! ```
//! A receiver prints `ready` once it listens, and `same` once everything has come, in order and unchanged.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

/// Datagrams and bytes that may be on their way: a receiver's queue takes so many.
const WINDOW: (usize, usize) = (24, 40_000);
const CHUNK: usize = 1 << 16;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["stream-send", to, bytes] => stream_send(to, bytes.parse().unwrap()),
        ["stream-receive", at, bytes] => stream_receive(at, bytes.parse().unwrap()),
        ["streams-send", to, number] => streams_send(to, number.parse().unwrap()),
        ["streams-receive", at] => streams_receive(at),
        ["datagrams-send", to, from, until] => datagrams_send(to, from.parse().unwrap(), until.parse().unwrap()),
        ["datagrams-receive", at, from, until] => datagrams_receive(at, from.parse().unwrap(), until.parse().unwrap()),
        ["packet", from, to, ref payloads @ ..] => {
            let socket = UdpSocket::bind(from).unwrap();
            for payload in payloads {
                socket.send_to(&unhex(payload), to).unwrap();
            }
        }
        ["flood", from, to, payload] => {
            let (socket, bytes) = (UdpSocket::bind(from).unwrap(), unhex(payload));
            say("ready");
            loop {
                // The other side's queue, or its refusal, is no matter here.
                let _ = socket.send_to(&bytes, to);
            }
        }
        ["relay", near, far, own, other, harm] => relay(near, far, own, other, harm),
        _ => panic!("wire: {words:?}"),
    }
}

/// A wire in two halves, one in each namespace.
fn relay(near: &str, far: &str, own: &str, other: &str, harm: &str) {
    let socket = UdpSocket::bind(near).unwrap();
    let local = UnixDatagram::bind(own).unwrap();
    let (from_far, to_far) = (socket.try_clone().unwrap(), local.try_clone().unwrap());
    let far: SocketAddr = far.parse().unwrap();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(len) = to_far.recv(&mut buffer) {
            // A host whose port is closed for a while is no matter.
            let _ = socket.send_to(&buffer[..len], far);
        }
    });
    say("ready");
    let does = |what: &str| harm.split(',').any(|word| word == what);
    let (loss, double, reorder) = (does("loss"), does("double"), does("reorder"));
    let (mut random, mut buffer, mut held) = (Bytes(7), vec![0; 1 << 16], None::<(Vec<u8>, u8)>);
    // The other half may not be there yet: that is a loss as well.
    let pass = |bytes: &[u8]| drop(local.send_to(bytes, other));
    while let Ok((len, from)) = from_far.recv_from(&mut buffer) {
        let mut dice = [0; 3];
        random.fill(&mut dice);
        let one_in = |dice: u8, number: u8| dice.is_multiple_of(number);
        if from != far || (loss && one_in(dice[0], 100)) {
            continue;
        }
        if reorder && held.is_none() && one_in(dice[1], 30) {
            held = Some((buffer[..len].to_vec(), 4));
            continue;
        }
        pass(&buffer[..len]);
        if double && one_in(dice[2], 50) {
            pass(&buffer[..len]);
        }
        held = held.and_then(|(late, left)| {
            if left == 0 {
                pass(&late);
                None
            } else {
                Some((late, left - 1))
            }
        });
    }
}

/// `-` is nothing.
fn unhex(hex: &str) -> Vec<u8> {
    let digit = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    (0..hex.trim_start_matches('-').len()).step_by(2).map(digit).collect()
}

/// Bytes that look random and are always the same (xorshift64*, Vigna 2014).
struct Bytes(u64);

impl Bytes {
    fn fill(&mut self, to: &mut [u8]) {
        for word in to.chunks_mut(8) {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let random = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
            word.copy_from_slice(&random[..word.len()]);
        }
    }
}

fn stream_send(to: &str, bytes: usize) {
    let mut stream = TcpStream::connect(to).unwrap();
    let (mut random, mut chunk) = (Bytes(bytes as u64 + 1), vec![0; CHUNK]);
    let mut left = bytes;
    while left > 0 {
        random.fill(&mut chunk);
        let len = left.min(CHUNK);
        stream.write_all(&chunk[..len]).unwrap();
        left -= len;
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    // Until the other side has it all.
    let _ = stream.read(&mut [0]);
}

fn stream_receive(at: &str, bytes: usize) {
    let listener = TcpListener::bind(at).unwrap();
    say("ready");
    let (mut stream, _) = listener.accept().unwrap();
    let (mut random, mut chunk, mut want) = (Bytes(bytes as u64 + 1), vec![0; CHUNK], vec![0; CHUNK]);
    let mut left = bytes;
    while left > 0 {
        random.fill(&mut want);
        let len = left.min(CHUNK);
        stream.read_exact(&mut chunk[..len]).unwrap();
        assert!(chunk[..len] == want[..len], "another byte among the last {left}");
        left -= len;
    }
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "and no more");
    say("same");
}

fn streams_send(to: &str, number: usize) {
    let streams: Vec<_> = (0..number).map(|_| TcpStream::connect(to).unwrap()).collect();
    std::thread::scope(|scope| {
        for mut stream in streams {
            scope.spawn(move || while stream.write_all(&[0x5a; CHUNK]).is_ok() {});
        }
    });
}

fn streams_receive(at: &str) {
    let listener = TcpListener::bind(at).unwrap();
    say("ready");
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        std::thread::spawn(move || while matches!(stream.read(&mut [0; CHUNK]), Ok(1..)) {});
    }
}

/// Its first byte says in which attempt it was sent.
fn datagram(size: usize, attempt: u8) -> Vec<u8> {
    let mut bytes = vec![0; size];
    Bytes(size as u64).fill(&mut bytes);
    bytes[0] = attempt;
    bytes
}

/// Each size once, several on their way, each answered by its size. What a busy machine's queues lose is sent again, with all behind it.
fn datagrams_send(to: &str, from: usize, until: usize) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let (mut answered, mut next, mut attempt) = (from, from, 0);
    while answered <= until {
        while next <= until && next < answered + WINDOW.0.min(WINDOW.1 / next).max(1) {
            socket.send(&datagram(next, attempt)).unwrap();
            next += 1;
        }
        let mut answer = [0; 8];
        match socket.recv(&mut answer) {
            Ok(_) => answered = answered.max(usize::from_le_bytes(answer) + 1),
            // The receiver has ended: what it printed counts.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => return,
            Err(_) => {
                attempt += 1;
                assert!(attempt < 40, "no answer for {answered}");
                next = answered;
            }
        }
    }
}

fn datagrams_receive(at: &str, from: usize, until: usize) {
    let socket = UdpSocket::bind(at).unwrap();
    say("ready");
    let mut buffer = vec![0; 1 << 16];
    let (mut expected, mut attempt, mut last) = (from, 0, 0);
    while expected <= until {
        let (len, sender) = socket.recv_from(&mut buffer).unwrap();
        assert!(buffer[..len] == datagram(len, buffer[0]), "another byte in the datagram of {len}");
        if buffer[0] != attempt {
            (attempt, last) = (buffer[0], 0);
        }
        assert!(len > last, "{len} came after {last}");
        last = len;
        if len == expected {
            expected += 1;
        }
        if len < expected {
            socket.send_to(&(expected - 1).to_le_bytes(), sender).unwrap();
        }
    }
    say("same");
}

fn say(word: &str) {
    println!("{word}");
    std::io::stdout().flush().unwrap();
}
