//! Legacy iptables on the real kernel, in a network namespace of the test's own: a chain of flannel's goes, and nothing else changes.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::disallowed_methods, reason = "a test")]

mod common;

use std::process::Command;

use twill_core::host::{Key, Object};
use twill_core::reconcile::{Op, Plan, Step, Why};
use twill_kernel::{Interest, Kernel, LinuxKernel};

use common::{in_namespace, run};

/// What `iptables-legacy-save` prints of a table, with counters but without its comments.
fn saved(program: &str, table: &str) -> Vec<String> {
    let text = run(&format!("{program}-save -c -t {table}"));
    text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
}

fn restore(program: &str, text: &str) {
    use std::io::Write;
    let mut child = Command::new(format!("{program}-restore"))
        .args(["-w", "-c"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{text}");
}

/// Chains before and behind flannel's, jumps over it in both directions, matches with data of their own, and counters.
const NAT: &str = "*nat
:PREROUTING ACCEPT [1:60]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [2:120]
:POSTROUTING ACCEPT [3:180]
:AFTER - [0:0]
:BEFORE - [0:0]
:FLANNEL-POSTRTG - [0:0]
:KUBE-MARK - [0:0]
[4:240] -A PREROUTING -m addrtype --dst-type LOCAL -j BEFORE
[5:300] -A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
[6:360] -A POSTROUTING -p udp -m multiport --dports 53,8472 -j AFTER
[7:420] -A POSTROUTING -s NET1 -g KUBE-MARK
[8:480] -A AFTER -p tcp -m conntrack --ctstate NEW -j KUBE-MARK
[9:540] -A BEFORE -j AFTER
[10:600] -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN
[11:660] -A FLANNEL-POSTRTG -s NET2 -j KUBE-MARK
[12:720] -A FLANNEL-POSTRTG -s NET2 ! -d NET3 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
[13:780] -A KUBE-MARK -j MARK --set-xmark 0x4000/0x4000
COMMIT
";

#[test]
fn flannels_chain_goes_and_all_else_stays_with_its_counters() {
    in_namespace("flannels_chain_goes_and_all_else_stays_with_its_counters", || {
        for (program, nets) in [
            ("iptables-legacy", ["192.0.2.0/24", "10.1.0.0/16", "224.0.0.0/4"]),
            ("ip6tables-legacy", ["2001:db8::/32", "fd00:1::/48", "ff00::/8"]),
        ] {
            let proof = Command::new(program).args(["-t", "nat", "-S"]).output();
            if !proof.as_ref().is_ok_and(|out| out.status.success()) {
                println!("SKIP: no legacy iptables here: {proof:?}");
                return;
            }
            let text = NAT.replace("NET1", nets[0]).replace("NET2", nets[1]).replace("NET3", nets[2]);
            restore(program, &text);
            let before = saved(program, "nat");
            assert!(before.iter().any(|line| line.contains("multiport --dports 53,8472")), "{before:#?}");
            let mut kernel = LinuxKernel::open(Interest { firewall: true, ..Interest::default() }).unwrap();
            let left: Vec<Object> = kernel
                .mirror()
                .iter()
                .filter(|(key, _)| matches!(key, Key::Leftover(_)))
                .map(|(_, o)| o.clone())
                .collect();
            let [left] = left.as_slice() else { panic!("{left:?}") };
            let step = Step { op: Op::Delete(left.clone()), needs: Vec::new(), why: Why::NotWanted };
            let outcome = kernel.apply(&Plan { steps: vec![step] });
            assert!(outcome.steps[0].is_ok(), "{:?}", outcome.steps);
            let expected: Vec<String> = before.iter().filter(|line| !line.contains("FLANNEL")).cloned().collect();
            assert_eq!(saved(program, "nat"), expected);
            // The chains still lead where they did: a jump to the wrong place would be refused, or printed otherwise.
            let fresh = LinuxKernel::open(Interest { firewall: true, ..Interest::default() }).unwrap();
            assert!(fresh.mirror().iter().all(|(key, _)| !matches!(key, Key::Leftover(_))));
        }
    });
}
