//! What is read of a tunnel from a file or from another process: understood, written and understood again it is the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::state_file::TunnelMemory;
use twill_tunnel::counters::Snapshot;
use twill_tunnel::peers::Peers;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(memory) = TunnelMemory::parse(bytes) {
        let again = TunnelMemory::parse(&memory.to_json().unwrap()).expect("what we write can be read");
        assert_eq!(again, memory);
        let peers = Peers::new(memory.peers.clone(), memory.spec.local.port());
        for (peer, subnet) in memory.peers.iter().flat_map(|peer| peer.subnets.iter().map(move |subnet| (peer, subnet)))
        {
            assert!(peers.of(subnet.addr()).is_some() && peers.at_host(peer.host).is_some());
        }
    }
    if let Ok(snapshot) = serde_json::from_slice::<Snapshot>(bytes) {
        let again: Snapshot = serde_json::from_slice(&serde_json::to_vec(&snapshot).unwrap()).unwrap();
        assert_eq!(again, snapshot);
    }
});
