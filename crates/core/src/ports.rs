//! Host ports: what of a container is reached by an address of its host.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// A transport protocol with ports (CNI's names).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// One port of the host that leads to a container: an element of CNI's capability `portMappings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMap {
    /// The host's port.
    pub host_port: u16,
    /// The container's port.
    pub container_port: u16,
    /// The protocol.
    #[serde(default)]
    pub protocol: Transport,
    /// The host's address; `None`: all of them, of both families. An unspecified one: all of its family.
    #[serde(default, rename = "hostIP", skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

impl Transport {
    /// IPPROTO_*.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// By its name, in small or capital letters.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Tcp, Self::Udp, Self::Sctp].into_iter().find(|known| known.to_string().eq_ignore_ascii_case(name))
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

impl PortMap {
    /// True when it is for this family.
    pub fn is_for(&self, v4: bool) -> bool {
        self.host_ip.is_none_or(|ip| ip.is_ipv4() == v4)
    }

    /// The one address of the host that it is for; `None`: every one of its family.
    pub fn only_at(&self) -> Option<IpAddr> {
        self.host_ip.filter(|ip| !ip.is_unspecified())
    }

    /// True when each packet that is for `other` is for this one, and led to the same port.
    pub fn covers(&self, other: &PortMap) -> bool {
        let family = [true, false].iter().all(|v4| self.is_for(*v4) || !other.is_for(*v4));
        let address = self.only_at().is_none_or(|ip| other.only_at() == Some(ip));
        let ports = |map: &PortMap| (map.protocol, map.host_port, map.container_port);
        ports(self) == ports(other) && family && address
    }

    /// True when some packet is for both.
    pub fn clashes(&self, other: &PortMap) -> bool {
        let family = [true, false].iter().any(|v4| self.is_for(*v4) && other.is_for(*v4));
        let address = self.only_at().zip(other.only_at()).is_none_or(|(one, two)| one == two);
        (self.protocol, self.host_port) == (other.protocol, other.host_port) && family && address
    }
}

impl fmt::Display for PortMap {
    /// `8080/tcp`, `10.0.0.1:8080/tcp`, `[fd00::1]:8080/tcp`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            None => write!(f, "{}/{}", self.host_port, self.protocol),
            Some(ip) => write!(f, "{}/{}", std::net::SocketAddr::new(ip, self.host_port), self.protocol),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(host_ip: &str, host_port: u16, protocol: Transport) -> PortMap {
        PortMap { host_port, container_port: 80, protocol, host_ip: host_ip.parse().ok() }
    }

    #[test]
    fn two_maps_clash_when_a_packet_is_for_both() {
        let all = map("", 8080, Transport::Tcp);
        for (other, clashes) in [
            (map("", 8080, Transport::Tcp), true),
            (map("", 8081, Transport::Tcp), false),
            (map("", 8080, Transport::Udp), false),
            (map("10.0.0.1", 8080, Transport::Tcp), true),
            (map("::", 8080, Transport::Tcp), true),
        ] {
            assert_eq!((all.clashes(&other), other.clashes(&all)), (clashes, clashes), "{other}");
        }
        let one = map("10.0.0.1", 8080, Transport::Tcp);
        assert!(one.clashes(&map("0.0.0.0", 8080, Transport::Tcp)));
        assert!(!one.clashes(&map("10.0.0.2", 8080, Transport::Tcp)));
        assert!(!one.clashes(&map("::", 8080, Transport::Tcp)), "another family");
    }

    #[test]
    fn a_map_reads_as_people_write_it_and_keeps_as_cni_writes_it() {
        assert_eq!(map("", 8080, Transport::Tcp).to_string(), "8080/tcp");
        assert_eq!(map("fd00::1", 53, Transport::Udp).to_string(), "[fd00::1]:53/udp");
        let json = r#"{"hostPort":53,"containerPort":80,"protocol":"sctp","hostIP":"10.0.0.1"}"#;
        let kept: PortMap = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&kept).unwrap(), json);
        assert_eq!(Transport::parse("UDP"), Some(Transport::Udp));
        assert_eq!(Transport::parse("icmp"), None);
    }
}
