//! What the runtime says beside the configuration: the environment variables of the specification.

use std::collections::BTreeMap;
use std::net::IpAddr;

use twill_core::net::{Inet, LinkName, MacAddr};

use crate::error::{CniError, Code};

/// The verbs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Attach a container.
    Add,
    /// Detach it.
    Del,
    /// Is it attached as it was?
    Check,
    /// Would ADD work?
    Status,
    /// Free what nobody holds.
    Gc,
    /// Which versions are spoken?
    Version,
}

/// A container's device, as the runtime names it.
#[derive(Debug, Clone)]
pub struct Target {
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_IFNAME.
    pub ifname: LinkName,
    /// CNI_NETNS; DEL may come without.
    pub netns: Option<String>,
    /// CNI_ARGS.
    pub args: Args,
}

/// What CNI_ARGS asks for; other keys are for others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Args {
    /// IP=, separated by commas, with or without a length.
    pub ips: Vec<IpAddr>,
    /// MAC=.
    pub mac: Option<MacAddr>,
}

/// Reads variables by name.
pub type Vars<'a> = &'a dyn Fn(&str) -> Option<String>;

fn missing(name: &str) -> CniError {
    CniError::new(
        Code::Environment,
        format!("{name} is not set"),
        "a container runtime sets it: see `twill cni --help`",
    )
}

fn wrong(name: &str, value: &str, allowed: &str) -> CniError {
    CniError::new(
        Code::Environment,
        format!("{name}={value}: that is not {allowed}"),
        format!("the runtime has to set {name} right"),
    )
}

/// CNI_COMMAND.
pub fn verb(vars: Vars<'_>) -> Result<Verb, CniError> {
    let word = vars("CNI_COMMAND").ok_or_else(|| missing("CNI_COMMAND"))?;
    Ok(match word.as_str() {
        "ADD" => Verb::Add,
        "DEL" => Verb::Del,
        "CHECK" => Verb::Check,
        "STATUS" => Verb::Status,
        "GC" => Verb::Gc,
        "VERSION" => Verb::Version,
        _ => return Err(wrong("CNI_COMMAND", &word, "ADD, DEL, CHECK, STATUS, GC or VERSION")),
    })
}

impl Target {
    /// The variables of ADD and CHECK.
    pub fn read(vars: Vars<'_>) -> Result<Self, CniError> {
        let args = Args::parse(&vars("CNI_ARGS").unwrap_or_default())?;
        let target = Self { args, ..Self::leaving(vars)? };
        if !can_be_made(target.ifname) {
            return Err(wrong("CNI_IFNAME", target.ifname.as_str(), NAMES));
        }
        Ok(target)
    }

    /// The variables of DEL, which has no use for CNI_ARGS.
    pub fn leaving(vars: Vars<'_>) -> Result<Self, CniError> {
        let given = |name: &str| vars(name).filter(|value| !value.is_empty());
        let need = |name: &str| given(name).ok_or_else(|| missing(name));
        let container_id = need("CNI_CONTAINERID")?;
        if !is_container_id(&container_id) {
            let allowed = "letters, digits, '_', '.' and '-' after a letter or digit, at most 200";
            return Err(wrong("CNI_CONTAINERID", &container_id, allowed));
        }
        let ifname = need("CNI_IFNAME")?;
        let ifname = ifname.parse().map_err(|_| {
            wrong("CNI_IFNAME", &ifname, "a device name of 1 to 15 bytes without '/', ':' or white space")
        })?;
        Ok(Self { container_id, ifname, netns: given("CNI_NETNS"), args: Args::default() })
    }

    /// CNI_NETNS, where it is needed.
    pub fn netns(&self) -> Result<&str, CniError> {
        self.netns.as_deref().ok_or_else(|| missing("CNI_NETNS"))
    }
}

/// What the kernel makes a device of: sysctls of all devices have two of the names, and a number takes the place of '%'.
pub(crate) fn can_be_made(name: LinkName) -> bool {
    !["all", "default"].contains(&name.as_str()) && !name.as_str().contains('%')
}

/// For people.
pub(crate) const NAMES: &str = "a device's name: the kernel has all and default for itself, and no '%' in it";

/// It becomes part of a file's name. The specification has no limit; file systems do.
fn is_container_id(id: &str) -> bool {
    id.len() <= 200
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

impl Args {
    /// `KEY=VALUE;KEY=VALUE`.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        let pairs: BTreeMap<&str, &str> = text.split(';').filter_map(|pair| pair.split_once('=')).collect();
        let bad = |key: &str, value: &str, allowed| wrong("CNI_ARGS", &format!("{key}={value}"), allowed);
        let ips = pairs.get("IP").copied().unwrap_or_default();
        let ips =
            ips.split(',').filter(|ip| !ip.is_empty()).map(|ip| address(ip).ok_or_else(|| bad("IP", ip, "an address")));
        let mac =
            pairs.get("MAC").map(|mac| unicast(mac).ok_or_else(|| bad("MAC", mac, "the MAC address of a device")));
        let mac = mac.transpose()?;
        Ok(Self { ips: ips.collect::<Result<_, _>>()?, mac })
    }
}

/// A MAC address that a device can have.
pub(crate) fn unicast(text: &str) -> Option<MacAddr> {
    text.parse().ok().filter(MacAddr::is_unicast)
}

/// An address with or without a length.
pub(crate) fn address(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| text.parse::<Inet>().ok().map(|inet| inet.addr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_ids_are_the_specifications() {
        for good in ["a", "0", "a-b_c.d", &"f".repeat(64)] {
            assert!(is_container_id(good), "{good}");
        }
        for bad in ["", ".", "-a", "a/b", "a b", "a:b", "ä", &"a".repeat(201)] {
            assert!(!is_container_id(bad), "{bad}");
        }
    }

    #[test]
    fn args_ask_for_addresses_and_a_mac() {
        let args = Args::parse("IgnoreUnknown=1;IP=10.1.15.9,fd00::9/64;MAC=02:00:00:00:00:09;K8S_POD_NAME=a").unwrap();
        assert_eq!(args.ips, ["10.1.15.9".parse::<IpAddr>().unwrap(), "fd00::9".parse().unwrap()]);
        assert_eq!(args.mac.unwrap().to_string(), "02:00:00:00:00:09");
        assert_eq!(Args::parse("").unwrap(), Args::default());
        assert_eq!(Args::parse("IP=x").unwrap_err().msg, "CNI_ARGS=IP=x: that is not an address");
    }
}
