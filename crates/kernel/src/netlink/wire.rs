//! Netlink's bytes (include/uapi/linux/netlink.h): a header of 16 bytes, a fixed struct, then attributes padded to 4.

/// Message flags.
pub(crate) mod flag {
    pub(crate) const REQUEST: u16 = 0x1;
    pub(crate) const ACK: u16 = 0x4;
    pub(crate) const DUMP_INTR: u16 = 0x10;
    pub(crate) const REPLACE: u16 = 0x100;
    pub(crate) const EXCL: u16 = 0x200;
    pub(crate) const DUMP: u16 = 0x300;
    pub(crate) const CREATE: u16 = 0x400;
    pub(crate) const APPEND: u16 = 0x800;
    /// In an acknowledgement: extended acknowledgement attributes follow.
    pub(crate) const ACK_TLVS: u16 = 0x200;
    /// In an acknowledgement: the request's payload is not repeated.
    pub(crate) const CAPPED: u16 = 0x100;
}

/// Message types below RTM_BASE.
pub(crate) const ERROR: u16 = 2;
pub(crate) const DONE: u16 = 3;
/// Marks an attribute that holds attributes.
const NESTED: u16 = 0x8000;

const HEADER: usize = 16;

/// Writes messages one after the other into one buffer.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    pub(crate) buf: Vec<u8>,
    start: usize,
}

impl Writer {
    /// Begins a message; its length is filled in by [`Writer::end`].
    pub(crate) fn begin(&mut self, kind: u16, flags: u16, seq: u32) {
        self.start = self.buf.len();
        self.buf.extend_from_slice(&[0; 4]);
        self.buf.extend_from_slice(&kind.to_ne_bytes());
        self.buf.extend_from_slice(&flags.to_ne_bytes());
        self.buf.extend_from_slice(&seq.to_ne_bytes());
        self.buf.extend_from_slice(&[0; 4]);
    }

    /// Ends the message.
    pub(crate) fn end(&mut self) {
        let len = (self.buf.len() - self.start) as u32;
        self.buf[self.start..self.start + 4].copy_from_slice(&len.to_ne_bytes());
    }

    /// Takes back everything after the first `len` bytes, where `start` was the last message begun; both from [`Writer::mark`].
    pub(crate) fn rewind(&mut self, (len, start): (usize, usize)) {
        self.buf.truncate(len);
        self.start = start;
    }

    /// A place to [`Writer::rewind`] to.
    pub(crate) fn mark(&self) -> (usize, usize) {
        (self.buf.len(), self.start)
    }

    /// Asks the kernel to acknowledge the message that was begun last; gives its sequence number.
    pub(crate) fn ask_ack(&mut self) -> u32 {
        let at = self.start + 6;
        let flags = u16::from_ne_bytes([self.buf[at], self.buf[at + 1]]) | flag::ACK;
        self.buf[at..at + 2].copy_from_slice(&flags.to_ne_bytes());
        u32_at(&self.buf, self.start + 8).unwrap_or(0)
    }

    /// Adds plain bytes: the fixed struct of a message.
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    /// Adds an attribute.
    pub(crate) fn attr(&mut self, kind: u16, value: &[u8]) {
        self.buf.extend_from_slice(&((value.len() + 4) as u16).to_ne_bytes());
        self.buf.extend_from_slice(&kind.to_ne_bytes());
        self.buf.extend_from_slice(value);
        self.buf.resize(self.buf.len().next_multiple_of(4), 0);
    }

    /// Adds a text attribute with its final NUL.
    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes);
    }

    /// Adds an attribute that holds what `fill` writes.
    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Writer)) {
        let at = self.buf.len();
        self.buf.extend_from_slice(&[0; 2]);
        self.buf.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        fill(self);
        let len = (self.buf.len() - at) as u16;
        self.buf[at..at + 2].copy_from_slice(&len.to_ne_bytes());
    }
}

/// One received message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// nlmsg_type.
    pub kind: u16,
    /// nlmsg_flags.
    pub flags: u16,
    /// nlmsg_seq.
    pub seq: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

/// The messages of a datagram; ends at the first one that does not fit.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = u32_at(bytes, 0)? as usize;
        if len < HEADER {
            return None;
        }
        let message = bytes.get(..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16_at(message, 4)?,
            flags: u16_at(message, 6)?,
            seq: u32_at(message, 8)?,
            payload: &message[HEADER..],
        })
    })
}

/// The attributes in `bytes` as (type without flags, value); ends at the first one that does not fit.
pub fn attrs(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & 0x3fff;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The last attribute of a type.
pub(crate) fn attr(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attrs(bytes).filter(|(k, _)| *k == kind).map(|(_, value)| value).last()
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Text up to its NUL.
pub(crate) fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes.split(|b| *b == 0).next()?).ok()
}
