//! Lease values: `{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{…},"Twill":{"node":"…"}}`.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::net::{BadValue, NodeId};

use super::go_json::Fields;

/// A value larger than this is nobody's lease.
const LARGEST: usize = 64 * 1024;

/// A lease's value: flannel's JSON, in types.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LeaseAttrs {
    /// Underlay IPv4 address of the holder.
    pub public_ip: Option<Ipv4Addr>,
    /// Underlay IPv6 address of the holder.
    pub public_ipv6: Option<Ipv6Addr>,
    /// `BackendType`; `None` for flannel's udp.
    pub backend_type: Option<String>,
    /// `BackendData`, checked by the backend only.
    pub backend_data: Option<serde_json::Value>,
    /// `BackendV6Data`.
    pub backend_v6_data: Option<serde_json::Value>,
    /// `Twill.node`: the holder's identity; flannel's leases have none.
    pub node: Option<NodeId>,
    /// Unknown keys inside `Twill`, kept on rewrite.
    pub twill_extra: serde_json::Map<String, serde_json::Value>,
}

/// Why a lease's value cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadAttrs {
    /// Far over any real lease.
    #[error("its value has {0} bytes, and 65536 are allowed")]
    TooLong(usize),
    /// Not JSON, or not an object.
    #[error("its value: {0}: {1}")]
    Json(BadValue, String),
    /// One field is wrong.
    #[error("{0}: {1}")]
    Field(&'static str, BadValue),
}

/// Reads a lease's value as Go would. A bad field is named with what is allowed.
pub fn parse(value: &[u8]) -> Result<LeaseAttrs, BadAttrs> {
    if value.len() > LARGEST {
        return Err(BadAttrs::TooLong(value.len()));
    }
    let fields = Fields::parse(value)
        .map_err(|e| BadAttrs::Json(BadValue::new(String::from_utf8_lossy(value), "a JSON object"), e.to_string()))?;
    let twill = fields.get("Twill").map(|raw| json::<Map<String, Value>>("Twill", raw, "an object")).transpose()?;
    let mut twill_extra = twill.unwrap_or_default();
    let node = match twill_extra.remove("node") {
        None => None,
        Some(Value::String(text)) => Some(text.parse().map_err(|e| BadAttrs::Field("Twill.node", e))?),
        Some(other) => return Err(BadAttrs::Field("Twill.node", BadValue::new(other, "a string"))),
    };
    let text = |key| fields.get(key).map(|raw| json::<String>(key, raw, "a string")).transpose();
    let public_ip = text("PublicIP")?.map(|s| address::<Ipv4Addr>("PublicIP", &s, "an IPv4 address")).transpose()?;
    let public_ipv6 =
        text("PublicIPv6")?.map(|s| address::<Ipv6Addr>("PublicIPv6", &s, "an IPv6 address")).transpose()?;
    let data = |key| fields.get(key).map(|raw| json::<Value>(key, raw, "JSON")).transpose();
    Ok(LeaseAttrs {
        // flannel writes 0.0.0.0 where it has no IPv4 address.
        public_ip: public_ip.filter(|ip| !ip.is_unspecified()),
        public_ipv6: public_ipv6.filter(|ip| !ip.is_unspecified()),
        backend_type: text("BackendType")?.filter(|s| !s.is_empty()),
        backend_data: data("BackendData")?,
        backend_v6_data: data("BackendV6Data")?,
        node,
        twill_extra,
    })
}

fn json<'a, T: serde::Deserialize<'a>>(
    key: &'static str,
    raw: &'a RawValue,
    allowed: &'static str,
) -> Result<T, BadAttrs> {
    serde_json::from_str(raw.get()).map_err(|_| BadAttrs::Field(key, BadValue::new(raw.get(), allowed)))
}

fn address<T: std::str::FromStr>(key: &'static str, text: &str, allowed: &'static str) -> Result<T, BadAttrs> {
    text.parse().map_err(|_| BadAttrs::Field(key, BadValue::new(text, allowed)))
}

impl LeaseAttrs {
    /// The value's bytes, keys in flannel's order, ours last.
    pub fn to_json(&self) -> Vec<u8> {
        let mut object = Map::new();
        let v4 = self.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED);
        object.insert("PublicIP".into(), Value::String(v4.to_string()));
        object.insert("PublicIPv6".into(), self.public_ipv6.map_or(Value::Null, |ip| Value::String(ip.to_string())));
        if let Some(kind) = &self.backend_type {
            object.insert("BackendType".into(), Value::String(kind.clone()));
        }
        for (key, data) in [("BackendData", &self.backend_data), ("BackendV6Data", &self.backend_v6_data)] {
            if let Some(data) = data {
                object.insert(key.into(), data.clone());
            }
        }
        let mut twill = Map::new();
        if let Some(node) = self.node {
            twill.insert("node".into(), Value::String(node.to_string()));
        }
        twill.extend(self.twill_extra.clone());
        if !twill.is_empty() {
            object.insert("Twill".into(), Value::Object(twill));
        }
        Value::Object(object).to_string().into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flannels_values_are_read_and_written_to_the_byte() {
        for text in [
            r#"{"PublicIP":"192.168.77.1","PublicIPv6":null}"#,
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#,
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":"fd00::1","BackendType":"vxlan","BackendData":{"VNI":1},"BackendV6Data":{"VNI":1},"Twill":{"node":"000102030405060708090a0b0c0d0e0f","later":[1]}}"#,
        ] {
            let attrs = parse(text.as_bytes()).unwrap();
            assert_eq!(String::from_utf8(attrs.to_json()).unwrap(), text);
        }
    }

    #[test]
    fn keys_in_any_case_and_the_last_duplicate_wins() {
        let attrs = parse(br#"{"PublicIP":"1.1.1.1","publicip":"2.2.2.2","PublicIP":"3.3.3.3","Other":{}}"#).unwrap();
        assert_eq!(attrs.public_ip, Some(Ipv4Addr::new(3, 3, 3, 3)));
    }

    #[test]
    fn a_bad_field_is_named_with_its_value() {
        let error = parse(br#"{"PublicIP":"1.1.1"}"#).unwrap_err();
        assert_eq!(error.to_string(), r#"PublicIP: "1.1.1" is not an IPv4 address"#);
        let error = parse(b"garbage").unwrap_err().to_string();
        assert_eq!(error, r#"its value: "garbage" is not a JSON object: expected value at line 1 column 1"#);
        assert!(parse(b"[]").is_err() && parse(b"").is_err() && parse(b"{\"PublicIP\":1}").is_err());
    }
}
