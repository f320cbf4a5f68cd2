//! `/run/flannel/subnet.env`: what container runtimes read. Order, names and base+1 are flannel's (`pkg/subnet/subnet.go`).

use std::fmt;

use crate::net::{Inet, Mtu, Prefix};

/// The file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnv {
    /// IPv4 network and own subnet.
    pub v4: Option<(Prefix, Prefix)>,
    /// IPv6 network and own subnet.
    pub v6: Option<(Prefix, Prefix)>,
    /// MTU for containers.
    pub mtu: Mtu,
    /// True when the daemon masquerades, so that docker must not.
    pub ip_masq: bool,
}

impl fmt::Display for SubnetEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (pair, infix) in [(self.v4, ""), (self.v6, "IPV6_")] {
            let Some((network, subnet)) = pair else { continue };
            let gateway = subnet.nth(1).unwrap_or(subnet.addr());
            writeln!(f, "FLANNEL_{infix}NETWORK={network}")?;
            writeln!(f, "FLANNEL_{infix}SUBNET={gateway}/{}", subnet.len())?;
        }
        writeln!(f, "FLANNEL_MTU={}", self.mtu)?;
        writeln!(f, "FLANNEL_IPMASQ={}", self.ip_masq)
    }
}

/// A file without what a container needs: the names that are missing or have no meaning.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it lacks {0}")]
pub struct Lacks(pub String);

impl SubnetEnv {
    /// Reads a file as a CNI plugin needs it: a network and its subnet of one family at least, MTU and IPMASQ.
    pub fn parse(text: &str) -> Result<Self, Lacks> {
        let pair = |infix: &str| {
            let network: Prefix =
                value(text, &format!("FLANNEL_{infix}NETWORK"))?.split(',').next()?.trim().parse().ok()?;
            Some((network, subnet(text, &format!("FLANNEL_{infix}SUBNET"))?))
        };
        let (v4, v6) = (pair("").filter(|(n, _)| n.is_v4()), pair("IPV6_").filter(|(n, _)| !n.is_v4()));
        let mtu = value(text, "FLANNEL_MTU").and_then(|mtu| mtu.parse::<Mtu>().ok());
        let ip_masq = value(text, "FLANNEL_IPMASQ").and_then(|word| word.parse::<bool>().ok());
        match (mtu, ip_masq) {
            (Some(mtu), Some(ip_masq)) if v4.is_some() || v6.is_some() => Ok(Self { v4, v6, mtu, ip_masq }),
            _ => {
                let subnets = (v4.is_none() && v6.is_none()).then_some("FLANNEL_NETWORK and FLANNEL_SUBNET (or IPV6)");
                let lacks =
                    [subnets, mtu.is_none().then_some("FLANNEL_MTU"), ip_masq.is_none().then_some("FLANNEL_IPMASQ")];
                Err(Lacks(lacks.into_iter().flatten().collect::<Vec<_>>().join(", ")))
            }
        }
    }
}

/// The subnets that an earlier file names, IPv4 first: the wish of a restarted daemon. Unreadable lines are passed over, as flannel does.
pub fn subnets(text: &str) -> Vec<Prefix> {
    ["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"].into_iter().filter_map(|key| subnet(text, key)).collect()
}

/// The last value of a key, without quotes.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let lines = text.lines().rev().map(|line| line.trim().strip_prefix("export ").unwrap_or(line.trim()));
    let value = lines.filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).next()?;
    Some(value.trim_matches(['"', '\'', ' ']))
}

fn subnet(text: &str, key: &str) -> Option<Prefix> {
    let mut good = value(text, key)?.split(',').filter_map(|part| part.trim().parse::<Inet>().ok());
    let first = good.next()?;
    // More than one entry counts as none.
    good.next().is_none().then(|| first.network())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_flannels_to_the_byte() {
        let env = SubnetEnv {
            v4: Some(("10.42.0.0/16".parse().unwrap(), "10.42.3.0/24".parse().unwrap())),
            v6: Some(("2001:cafe:42::/56".parse().unwrap(), "2001:cafe:42:1::/64".parse().unwrap())),
            mtu: Mtu::try_from(1450).unwrap(),
            ip_masq: true,
        };
        let text = "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.3.1/24\nFLANNEL_IPV6_NETWORK=2001:cafe:42::/56\n\
                    FLANNEL_IPV6_SUBNET=2001:cafe:42:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        assert_eq!(env.to_string(), text);
        assert_eq!(subnets(text), [env.v4.unwrap().1, env.v6.unwrap().1]);
        assert_eq!(SubnetEnv::parse(text), Ok(env));
        let lacks = SubnetEnv::parse("FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_MTU=x\nFLANNEL_IPMASQ=true\n").unwrap_err();
        assert_eq!(lacks.to_string(), "it lacks FLANNEL_NETWORK and FLANNEL_SUBNET (or IPV6), FLANNEL_MTU");
    }

    #[test]
    fn broken_and_listed_values_are_none() {
        assert!(subnets("FLANNEL_SUBNET=10.1.1.1/24,10.1.2.1/24\n").is_empty());
        assert!(subnets("FLANNEL_SUBNET=x\n\0").is_empty());
        assert_eq!(subnets("FLANNEL_SUBNET=bad,10.1.2.1/24").len(), 1);
    }
}
