//! The backend changes in the network config, and running agents follow.

use super::*;

#[test]
fn running_agents_follow_from_udp_to_vxlan_and_back() {
    let Some((net, _dir)) = running().filter(|_| installed("nft")) else { return };
    let put = |backend: &str| {
        let config = format!(r#"{{"Network":"100.96.0.0/16","Backend":{{"Type":"{backend}"}}}}"#);
        assert!(net.etcdctl(&["put", "/coreos.com/network/config", &config]).status.success());
    };
    let pids = [1, 2].map(|number| net.site(number).agent_pid());
    for (backend, device, other, mtu, overhead) in
        [("vxlan", "flannel.1", "flannel0", 1450, 50), ("udp", "flannel0", "flannel.1", 1472, 28)]
    {
        put(backend);
        for number in [1, 2] {
            let site = net.site(number);
            eventually(&format!("node {number} is on {backend}"), || {
                let links = site.host.json("link show");
                let named = |name: &str| links.as_array().unwrap().iter().find(|link| link["ifname"] == name).cloned();
                let new = named(device).is_some_and(|link| link["mtu"] == mtu);
                let env = std::fs::read_to_string(site.file("subnet.env")).unwrap();
                let says = env.contains(&format!("FLANNEL_MTU={}", 1500 - overhead))
                    && env.contains(&format!("FLANNEL_SUBNET=100.96.{number}.1/24"));
                let bound = site.host.run("ss -Hnul").contains(":8285") != (backend == "udp");
                let rules = site.host.run("nft list table inet twill");
                let guarded = rules.contains("@peers") == (backend == "udp");
                let status = site.status();
                let tunnel = status["tunnel"].is_null() == (backend == "vxlan") && status["backend"] == backend;
                if new && named(other).is_none() && says && !bound && guarded && tunnel {
                    Ok(())
                } else {
                    Err((links.to_string(), env, rules, status.to_string(), site.log()))
                }
            });
        }
        net.await_both_ways();
        transfer(&net.site(1).container, &net.site(2).container, "100.96.2.2:7000", "stream", &["5000000"]);
        let lease = net.lease(1);
        assert_eq!(lease.contains("vxlan"), backend == "vxlan", "{lease}");
    }
    assert_eq!([1, 2].map(|number| net.site(number).agent_pid()), pids, "the same agents");
}
