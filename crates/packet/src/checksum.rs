//! The internet checksum (RFC 1071), and the pseudo headers that UDP, TCP and ICMPv6 add to it.

use std::net::IpAddr;

/// A sum under way: 16-bit words in one's complement, carried in 64 bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes; an odd last byte counts as the upper half of a word, so only the last call may have an odd length.
    #[must_use]
    pub fn with(mut self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        for word in words {
            self.0 += u64::from(u32::from_be_bytes(*word));
        }
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        self.0 += u64::from(u32::from_be_bytes(last));
        // 2^32 words of 32 bits fit before the carry is lost; fold so that sums can go on for ever.
        self.0 = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        self
    }

    /// Adds the pseudo header of `protocol` over `len` bytes from `src` to `dst` (RFC 768, RFC 8200 section 8.1).
    /// Addresses of two families add nothing that a receiver could check.
    #[must_use]
    pub fn pseudo(self, src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Self {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let sum = match (src, dst) {
            (IpAddr::V4(s), IpAddr::V4(d)) => self.with(&s.octets()).with(&d.octets()),
            (IpAddr::V6(s), IpAddr::V6(d)) => self.with(&s.octets()).with(&d.octets()),
            _ => self,
        };
        sum.with(&len.to_be_bytes()).with(&[0, 0, 0, protocol])
    }

    /// The checksum: the complement of the sum.
    pub const fn finish(self) -> u16 {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }
}

/// The checksum of `bytes` alone.
pub fn of(bytes: &[u8]) -> u16 {
    Sum::default().with(bytes).finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 to the letter: one word at a time.
    fn slow(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn example_of_rfc_1071() {
        assert_eq!(of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn equals_the_slow_twin(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..300) {
            let cut = cut.min(bytes.len()) / 2 * 2;
            prop_assert_eq!(of(&bytes), slow(&bytes));
            prop_assert_eq!(Sum::default().with(&bytes[..cut]).with(&bytes[cut..]).finish(), slow(&bytes));
        }
    }
}
