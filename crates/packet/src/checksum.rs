//! The internet checksum (RFC 1071), and the pseudo headers that UDP, TCP and ICMPv6 add to it.

use std::net::IpAddr;

/// A sum under way: 16-bit words in one's complement, carried in 64 bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes; an odd last byte counts as the upper half of a word, so only the last call may have an odd length.
    #[must_use]
    pub fn with(self, bytes: &[u8]) -> Self {
        // Words of any width and byte order give the same sum, but for its own byte order (RFC 1071 section 2).
        let (blocks, rest) = bytes.as_chunks::<BLOCK>();
        let mut sum = if blocks.is_empty() { 0 } else { wide(blocks) };
        let (words, rest) = rest.as_chunks::<4>();
        for word in words {
            sum += u64::from(u32::from_ne_bytes(*word));
        }
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        sum += u64::from(u32::from_ne_bytes(last));
        Self(self.0 + u64::from(u16::from_be(fold(sum))))
    }

    /// Adds the pseudo header of `protocol` over `len` bytes from `src` to `dst` (RFC 768, RFC 8200 section 8.1).
    /// Addresses of two families add nothing that a receiver could check.
    #[must_use]
    pub fn pseudo(self, src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Self {
        let words = |n: u32| u64::from(n >> 16) + u64::from(n & 0xffff);
        let addresses = match (src, dst) {
            (IpAddr::V4(s), IpAddr::V4(d)) => words(s.to_bits()) + words(d.to_bits()),
            (IpAddr::V6(s), IpAddr::V6(d)) => s.segments().into_iter().chain(d.segments()).map(u64::from).sum(),
            _ => 0,
        };
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        Self(self.0 + addresses + words(len) + u64::from(protocol))
    }

    /// The checksum: the complement of the sum.
    pub const fn finish(self) -> u16 {
        !fold(self.0)
    }
}

/// Bytes that are added side by side.
const BLOCK: usize = 64;

/// The sum of all 16-bit words. Each lane sums its 32-bit words, and their upper halves apart: what is left of the first is their
/// lower halves. Compilers make vector instructions of it.
fn wide(blocks: &[[u8; BLOCK]]) -> u64 {
    let mut sum = 0;
    // So many upper halves fit into a lane.
    for run in blocks.chunks(1 << 16) {
        let (mut words, mut upper) = ([0u32; BLOCK / 4], [0u32; BLOCK / 4]);
        for block in run {
            for ((words, upper), word) in words.iter_mut().zip(&mut upper).zip(block.as_chunks::<4>().0) {
                let word = u32::from_ne_bytes(*word);
                *words = words.wrapping_add(word);
                *upper += word >> 16;
            }
        }
        for (words, upper) in words.into_iter().zip(upper) {
            sum += u64::from(words.wrapping_sub(upper << 16)) + u64::from(upper);
        }
    }
    sum
}

/// Adds the upper words to the lowest until only that is left.
const fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
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

    #[test]
    fn no_lane_overflows() {
        for byte in [0xff, 0x80] {
            let long = vec![byte; BLOCK * ((1 << 16) + 3) + 5];
            assert_eq!(of(&long), slow(&long));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn equals_the_slow_twin(bytes in proptest::collection::vec(any::<u8>(), 0..2000), cut in 0usize..2000) {
            let cut = cut.min(bytes.len()) / 2 * 2;
            prop_assert_eq!(of(&bytes), slow(&bytes));
            prop_assert_eq!(Sum::default().with(&bytes[..cut]).with(&bytes[cut..]).finish(), slow(&bytes));
        }
    }
}
