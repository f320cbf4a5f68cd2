//! Store keys: `10.1.15.0-24`, `10.12.13.0-24&fd00:12:13::-56`, and `0.0.0.0-0&fd00:12:13::-56` for IPv6 alone.
//!
//! A key is taken only in the form that is printed, so that one subnet has one key.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::lease::LeaseKey;
use crate::net::{BadValue, Prefix};

const ALLOWED: &str = "a subnet key like 10.1.15.0-24 or 10.1.15.0-24&fd00:1::-64";

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v4 = self.v4.unwrap_or(Prefix::DEFAULT_V4);
        write!(f, "{}-{}", v4.addr(), v4.len())?;
        self.v6.map_or(Ok(()), |v6| write!(f, "&{}-{}", v6.addr(), v6.len()))
    }
}

impl FromStr for LeaseKey {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (v4, v6) = match text.split_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (text, None),
        };
        let parse = |part: &str, is_v4: bool| {
            let (addr, len) = part.rsplit_once('-')?;
            let addr: IpAddr = addr.parse().ok()?;
            let prefix = Prefix::strict(addr, len.parse().ok()?).ok()?;
            (prefix.is_v4() == is_v4).then_some(prefix)
        };
        let bad = || BadValue::new(text, ALLOWED);
        let v6 = v6.map(|part| parse(part, false).ok_or_else(bad)).transpose()?;
        let v4 = Some(parse(v4, true).ok_or_else(bad)?).filter(|p| *p != Prefix::DEFAULT_V4);
        let key = LeaseKey { v4, v6 };
        let subnets = v4.is_none_or(|p| p.len() < 32) && v6.is_none_or(|p| p.len() < 128 && p.len() > 0);
        let canonical = (v4.is_some() || v6.is_some()) && subnets && key.to_string() == text;
        if canonical { Ok(key) } else { Err(bad()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_taken_only_as_they_are_printed() {
        for good in ["10.1.15.0-24", "10.12.13.0-24&fd00:12:13::-56", "0.0.0.0-0&fd00:12:13::-56"] {
            assert_eq!(good.parse::<LeaseKey>().unwrap().to_string(), good);
        }
        let bad = "|garbage|10.1.15.0|10.1.15.0-|10.1.15.0-33|10.1.15.1-24|10.1.15.0-024|10.01.15.0-24|10.1.15.0-32|10.1.15.0-24&|\
                   10.1.15.0-24&10.2.0.0-24|fd00::-64|10.1.15.0-24&fd00:0::-64|10.1.15.0-24&FD00::-64|0.0.0.0-0|10.1.15.0-+24| 10.1.15.0-24|\
                   x10.1.15.0-24|10.1.15.0-24&fd00::-128|10.1.15.0-24/x";
        for bad in bad.split('|') {
            assert!(bad.parse::<LeaseKey>().is_err(), "{bad:?} must be refused");
        }
    }
}
