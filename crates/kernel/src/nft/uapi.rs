//! Numbers of include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h.

/// NFNL_SUBSYS_NFTABLES: the high byte of every message type.
pub(super) const SUBSYSTEM: u16 = 10;
/// NFNLGRP_NFTABLES as a bit of the group mask.
pub(super) const GROUP: u32 = 1 << 6;
/// NFNL_MSG_BATCH_BEGIN and NFNL_MSG_BATCH_END.
pub(super) const BATCH_BEGIN: u16 = 0x10;
pub(super) const BATCH_END: u16 = 0x11;

/// Message types with their subsystem.
pub(super) mod msg {
    const fn of(kind: u16) -> u16 {
        (super::SUBSYSTEM << 8) | kind
    }
    pub(in super::super) const NEW_TABLE: u16 = of(0);
    pub(in super::super) const GET_TABLE: u16 = of(1);
    pub(in super::super) const DEL_TABLE: u16 = of(2);
    pub(in super::super) const NEW_CHAIN: u16 = of(3);
    pub(in super::super) const GET_CHAIN: u16 = of(4);
    pub(in super::super) const DEL_CHAIN: u16 = of(5);
    pub(in super::super) const NEW_RULE: u16 = of(6);
    pub(in super::super) const GET_RULE: u16 = of(7);
    pub(in super::super) const DEL_RULE: u16 = of(8);
    pub(in super::super) const NEW_SET: u16 = of(9);
    pub(in super::super) const GET_SET: u16 = of(10);
    pub(in super::super) const NEW_ELEMENT: u16 = of(12);
    pub(in super::super) const GET_ELEMENT: u16 = of(13);
    pub(in super::super) const DEL_ELEMENT: u16 = of(14);
    pub(in super::super) const GET_OBJECT: u16 = of(19);
    pub(in super::super) const GET_FLOWTABLE: u16 = of(23);
}

/// NFTA_TABLE_*.
pub(super) mod table {
    pub(in super::super) const NAME: u16 = 1;
    pub(in super::super) const FLAGS: u16 = 2;
    pub(in super::super) const USERDATA: u16 = 6;
    pub(in super::super) const OWNER: u16 = 7;
    /// NFT_TABLE_F_DORMANT.
    pub(in super::super) const DORMANT: u32 = 1;
}

/// NFTA_CHAIN_*, NFTA_HOOK_*.
pub(super) mod chain {
    pub(in super::super) const TABLE: u16 = 1;
    pub(in super::super) const NAME: u16 = 3;
    pub(in super::super) const HOOK: u16 = 4;
    pub(in super::super) const POLICY: u16 = 5;
    pub(in super::super) const TYPE: u16 = 7;
    pub(in super::super) const HOOKNUM: u16 = 1;
    pub(in super::super) const PRIORITY: u16 = 2;
}

/// NFTA_RULE_*, NFTA_LIST_ELEM, NFTA_EXPR_*.
pub(super) mod rule {
    pub(in super::super) const TABLE: u16 = 1;
    pub(in super::super) const CHAIN: u16 = 2;
    pub(in super::super) const HANDLE: u16 = 3;
    pub(in super::super) const EXPRESSIONS: u16 = 4;
    pub(in super::super) const USERDATA: u16 = 7;
    pub(in super::super) const ELEMENT: u16 = 1;
    pub(in super::super) const EXPR_NAME: u16 = 1;
    pub(in super::super) const EXPR_DATA: u16 = 2;
}

/// NFTA_SET_*, NFTA_SET_ELEM_LIST_*, NFTA_SET_ELEM_*.
pub(super) mod set {
    pub(in super::super) const TABLE: u16 = 1;
    pub(in super::super) const NAME: u16 = 2;
    pub(in super::super) const FLAGS: u16 = 3;
    pub(in super::super) const KEY_TYPE: u16 = 4;
    pub(in super::super) const KEY_LEN: u16 = 5;
    pub(in super::super) const ID: u16 = 10;
    /// What `nft` calls ipv4_addr and ipv6_addr.
    pub(in super::super) const TYPE_V4: u32 = 7;
    pub(in super::super) const TYPE_V6: u32 = 8;
    pub(in super::super) const LIST_TABLE: u16 = 1;
    pub(in super::super) const LIST_SET: u16 = 2;
    pub(in super::super) const LIST_ELEMENTS: u16 = 3;
    pub(in super::super) const ELEMENT_KEY: u16 = 1;
    pub(in super::super) const ELEMENT_DATA: u16 = 2;
    pub(in super::super) const ELEMENT_FLAGS: u16 = 3;
    pub(in super::super) const ELEMENT_KEY_END: u16 = 10;
    /// NFT_SET_ELEM_INTERVAL_END, NFT_SET_ELEM_CATCHALL.
    pub(in super::super) const INTERVAL_END: u32 = 1;
    pub(in super::super) const CATCHALL: u32 = 2;
    /// NFT_SET_ANONYMOUS, NFT_SET_INTERVAL.
    pub(in super::super) const ANONYMOUS: u32 = 1;
    pub(in super::super) const INTERVAL: u32 = 4;
}

/// NFTA_LOOKUP_* and NFT_LOOKUP_F_INV.
pub(super) mod lookup {
    pub(in super::super) const SET: u16 = 1;
    pub(in super::super) const SREG: u16 = 2;
    pub(in super::super) const DREG: u16 = 3;
    pub(in super::super) const FLAGS: u16 = 5;
    pub(in super::super) const INVERTED: u32 = 1;
}

/// NFTA_COUNTER_PACKETS.
pub(super) const COUNTER_PACKETS: u16 = 2;

/// NFTNL_UDATA_TABLE_COMMENT and NFTNL_UDATA_RULE_COMMENT: how `nft` keeps a comment in the user data.
pub(super) const UDATA_COMMENT: u8 = 0;

/// NFT_REG_1: 16 bytes, enough for every value here; a second value has the next, and verdicts have a register of their own.
pub(super) const REG: u32 = 1;
pub(super) const REG_NEXT: u32 = 2;
/// NFT_REG32_00, of 4 bytes, the first of those that lie in NFT_REG_1.
pub(super) const REG_SMALL: u32 = 8;
pub(super) const REG_VERDICT: u32 = 0;

/// NFTA_META_*, NFT_META_*; NFTA_CT_* has the same numbers for register and key.
pub(super) mod meta {
    pub(in super::super) const DREG: u16 = 1;
    pub(in super::super) const KEY: u16 = 2;
    pub(in super::super) const SREG: u16 = 3;
    pub(in super::super) const KEY_PROTOCOL: u32 = 1;
    pub(in super::super) const KEY_MARK: u32 = 3;
    pub(in super::super) const KEY_IIF: u32 = 4;
    pub(in super::super) const KEY_OIF: u32 = 5;
    pub(in super::super) const KEY_PKTTYPE: u32 = 19;
    pub(in super::super) const KEY_IIFNAME: u32 = 6;
    pub(in super::super) const KEY_OIFNAME: u32 = 7;
    pub(in super::super) const KEY_NFPROTO: u32 = 15;
    pub(in super::super) const KEY_L4PROTO: u32 = 16;
    pub(in super::super) const CT_STATE: u32 = 0;
    pub(in super::super) const CT_STATUS: u32 = 2;
}

/// NFTA_FIB_*: the destination's type, of NFT_FIB_RESULT_ADDRTYPE and NFTA_FIB_F_DADDR.
pub(super) mod fib {
    pub(in super::super) const DREG: u16 = 1;
    pub(in super::super) const RESULT: u16 = 2;
    pub(in super::super) const FLAGS: u16 = 3;
    pub(in super::super) const TYPE: u32 = 3;
    pub(in super::super) const OF_DESTINATION: u32 = 1 << 1;
}

/// NFTA_NAT_*: NFT_NAT_DNAT; the kernel tells each register twice, and that address and port are given.
pub(super) mod nat {
    pub(in super::super) const TYPE: u16 = 1;
    pub(in super::super) const FAMILY: u16 = 2;
    pub(in super::super) const ADDRESS: u16 = 3;
    pub(in super::super) const ADDRESS_LAST: u16 = 4;
    pub(in super::super) const PORT: u16 = 5;
    pub(in super::super) const PORT_LAST: u16 = 6;
    pub(in super::super) const FLAGS: u16 = 7;
    pub(in super::super) const OF_DESTINATION: u32 = 1;
    pub(in super::super) const BOTH_GIVEN: u32 = 3;
}

/// NFTA_MATCH_* and NFTA_TARGET_*.
pub(super) mod xt {
    pub(in super::super) const NAME: u16 = 1;
    pub(in super::super) const REVISION: u16 = 2;
    pub(in super::super) const INFO: u16 = 3;
}

/// NFTA_RANGE_*.
pub(super) mod range {
    pub(in super::super) const SREG: u16 = 1;
    pub(in super::super) const OP: u16 = 2;
    pub(in super::super) const FROM: u16 = 3;
    pub(in super::super) const TO: u16 = 4;
}

/// NFTA_PAYLOAD_*.
pub(super) mod payload {
    pub(in super::super) const DREG: u16 = 1;
    pub(in super::super) const BASE: u16 = 2;
    pub(in super::super) const OFFSET: u16 = 3;
    pub(in super::super) const LEN: u16 = 4;
}

/// NFTA_BITWISE_*, NFTA_CMP_*, NFTA_IMMEDIATE_*, NFTA_DATA_*, NFTA_VERDICT_*.
pub(super) mod data {
    pub(in super::super) const BITWISE_SREG: u16 = 1;
    pub(in super::super) const BITWISE_DREG: u16 = 2;
    pub(in super::super) const BITWISE_LEN: u16 = 3;
    pub(in super::super) const BITWISE_MASK: u16 = 4;
    pub(in super::super) const BITWISE_XOR: u16 = 5;
    pub(in super::super) const BITWISE_OP: u16 = 6;
    pub(in super::super) const CMP_SREG: u16 = 1;
    pub(in super::super) const CMP_OP: u16 = 2;
    pub(in super::super) const CMP_DATA: u16 = 3;
    pub(in super::super) const IMMEDIATE_DREG: u16 = 1;
    pub(in super::super) const IMMEDIATE_DATA: u16 = 2;
    pub(in super::super) const VALUE: u16 = 1;
    pub(in super::super) const VERDICT: u16 = 2;
    pub(in super::super) const VERDICT_CODE: u16 = 1;
    pub(in super::super) const VERDICT_CHAIN: u16 = 2;
}

/// NFTA_MASQ_FLAGS and NF_NAT_RANGE_PROTO_RANDOM_FULLY.
pub(super) mod masq {
    pub(in super::super) const FLAGS: u16 = 1;
    pub(in super::super) const FULLY_RANDOM: u32 = 1 << 4;
}

/// NFTA_RT_*, NFTA_BYTEORDER_*, NFTA_EXTHDR_*: what `tcp option maxseg size set rt mtu` is made of.
pub(super) mod maxseg {
    pub(in super::super) const RT_DREG: u16 = 1;
    pub(in super::super) const RT_KEY: u16 = 2;
    pub(in super::super) const RT_TCPMSS: u32 = 3;
    pub(in super::super) const BYTEORDER_SREG: u16 = 1;
    pub(in super::super) const BYTEORDER_DREG: u16 = 2;
    pub(in super::super) const BYTEORDER_OP: u16 = 3;
    pub(in super::super) const BYTEORDER_LEN: u16 = 4;
    pub(in super::super) const BYTEORDER_SIZE: u16 = 5;
    pub(in super::super) const HTON: u32 = 1;
    pub(in super::super) const EXTHDR_TYPE: u16 = 2;
    pub(in super::super) const EXTHDR_OFFSET: u16 = 3;
    pub(in super::super) const EXTHDR_LEN: u16 = 4;
    pub(in super::super) const EXTHDR_OP: u16 = 6;
    pub(in super::super) const EXTHDR_SREG: u16 = 7;
    /// NFT_EXTHDR_OP_TCPOPT; TCPOPT_MAXSEG and where its size stands (RFC 9293).
    pub(in super::super) const OP_TCPOPT: u32 = 1;
    pub(in super::super) const TCPOPT_MAXSEG: u8 = 2;
}
