//! Messages ⇄ objects with the devices' numbers given, away from any socket: what tests and the fuzzer hold against each other.

use twill_core::host::Object;
use twill_core::net::LinkName;
use twill_core::reconcile::Op;

use super::decode::{self, AF_BRIDGE};
use super::encode::{Encoder, rtm};
use super::names::Names;
use super::wire::{Message, Writer};

/// Translates for one set of devices.
#[derive(Debug)]
pub struct Codec {
    names: Names,
}

impl Codec {
    /// Devices by their number (ifindex).
    pub fn new(devices: impl IntoIterator<Item = (u32, LinkName)>) -> Self {
        let mut names = Names::default();
        devices.into_iter().for_each(|(index, name)| names.insert(index, name));
        Self { names }
    }

    /// The object that an RTM_NEW* message tells; `None`: nothing that the mirror keeps, or not a message at all.
    pub fn read(&self, message: &Message<'_>) -> Option<Object> {
        let payload = message.payload;
        match message.kind {
            rtm::NEWLINK => decode::link(payload, &self.names).map(|link| Object::Link(Box::new(link))),
            rtm::NEWADDR => decode::addr(payload, &self.names).map(Object::Addr),
            rtm::NEWNEIGH if payload.first() == Some(&AF_BRIDGE) => decode::fdb(payload, &self.names).map(Object::Fdb),
            rtm::NEWNEIGH => decode::neigh(payload, &self.names).map(Object::Neigh),
            rtm::NEWROUTE => decode::route(payload, &self.names).map(Object::Route),
            rtm::NEWRULE => decode::rule(payload).map(Object::Rule),
            _ => None,
        }
    }

    /// The requests that make `object`, one after the other. Refused: a device without a number, or what cannot be made by netlink.
    pub fn write(&self, object: &Object) -> Result<Vec<u8>, String> {
        let (mut writer, mut seq, mut files) = (Writer::default(), 0, Vec::new());
        let mut encoder = Encoder { writer: &mut writer, names: &self.names, seq: &mut seq, files: &mut files };
        encoder.op(&Op::Create(object.clone()))?;
        Ok(writer.buf)
    }
}
