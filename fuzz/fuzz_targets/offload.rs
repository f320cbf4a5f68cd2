//! Any bytes as a packet behind a virtio-net header: refused, or cut into parts that, merged and cut again, are the same parts.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_packet::offload::{Coalescer, Inner, Merge, Vnet, segment};

fuzz_target!(|bytes: &[u8]| {
    let Some(vnet) = Vnet::parse(bytes) else { return };
    assert_eq!(Vnet::parse(&vnet.emit()), Some(vnet));
    let mut buffer = vec![0xaa];
    let Ok(cut) = segment(&vnet, &bytes[Vnet::LEN..], &mut buffer) else {
        assert_eq!(buffer, [0xaa]);
        return;
    };
    assert_eq!(buffer.len(), 1 + cut.size * (cut.count - 1) + cut.last);
    let before = buffer.clone();
    let mut coalescer = Coalescer::new(Merge { tcp4: true, tcp6: true, udp: true });
    let mut pushed = Vec::new();
    for index in 0..cut.count {
        let start = 1 + index * cut.size;
        let range = start..start + if index + 1 == cut.count { cut.last } else { cut.size };
        if let Ok(inner) = Inner::check(&buffer[range.clone()]) {
            pushed.extend_from_slice(&before[range.clone()]);
            coalescer.push(&buffer, range, inner);
        }
    }
    coalescer.finish(&mut buffer);
    let (mut again, mut out) = (Vec::new(), Vec::new());
    for item in coalescer.items() {
        again.clear();
        coalescer.pieces(item).for_each(|piece| again.extend_from_slice(&buffer[piece]));
        assert!(segment(&item.vnet, &again, &mut out).is_ok());
    }
    // One flow, cut by one hand: the identification rises by one, so the bytes come back exactly.
    assert_eq!(out, pushed);
});
