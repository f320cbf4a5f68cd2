//! `twill show …` says what `ip -j`, `bridge -j` and `route -n` say of the same namespace.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;
use twill_e2e::net::{Bed, Host};
use twill_e2e::{bin, eventually, installed};

/// A node as in the vxlan scenario, with a container's port in its bridge, and some routes of other kinds.
fn node(bed: &Bed) -> Host {
    let host = bed.host("node1");
    for line in [
        "link add docker0 type bridge",
        "link add veth1 type veth peer name c1",
        "link set veth1 master docker0 up",
        "link set c1 up",
        "link set docker0 up",
        "addr add 10.1.15.1/24 dev docker0",
        "addr add fd00:15::1/64 dev docker0 nodad",
        "link add eth0 type veth peer name far",
        "link set eth0 up",
        "link set far up",
        "addr add 10.168.0.2/24 dev eth0",
        "link add flannel.1 type vxlan id 1 dstport 8472 local 10.168.0.2 dev eth0 nolearning",
        "link set flannel.1 up",
        "addr add 10.1.15.0/32 dev flannel.1",
        "neigh add 10.1.16.0 lladdr 5e:f8:4f:00:e3:37 dev flannel.1 nud permanent",
        "neigh add 10.1.15.2 lladdr 02:00:00:00:00:12 dev docker0 nud stale",
        "neigh add fd00:15::2 lladdr 02:00:00:00:00:12 dev docker0 nud permanent",
        "route add default via 10.168.0.1 dev eth0",
        "route add 10.1.16.0/24 via 10.1.16.0 dev flannel.1 onlink proto 116",
        "route add blackhole 10.9.0.0/16",
        "route add unreachable 10.8.0.0/16 metric 7",
        "route add 10.7.0.0/16 via 10.168.0.9 dev eth0 table 77",
        "-6 route add fd00:16::/64 via fd00:15::9 dev docker0 metric 5",
    ] {
        host.ip(line);
    }
    host.run("bridge fdb add 5e:f8:4f:00:e3:37 dev flannel.1 dst 10.168.0.3");
    host.run("bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 10.168.0.4");
    host.run("bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 10.168.0.5");
    host.run("bridge fdb add 02:00:00:00:00:12 dev veth1 master static");
    host
}

fn show(host: &Host, words: &str) -> String {
    let twill: PathBuf = bin("twill");
    host.run(&format!("{} show {words}", twill.display()))
}

fn show_json(host: &Host, words: &str) -> Value {
    let json: Value = serde_json::from_str(&show(host, &format!("{words} -o json"))).unwrap();
    assert_eq!(json["schema"], 1);
    json
}

/// The two sets are one; the kernel may still be adding its own entries when the first is read.
fn same(what: &str, look: impl Fn() -> (BTreeSet<String>, BTreeSet<String>)) {
    let found = eventually(what, || {
        let (ours, theirs) = look();
        if ours == theirs { Ok(ours) } else { Err(format!("\n  twill {ours:#?}\n  others {theirs:#?}")) }
    });
    assert!(!found.is_empty(), "{what}: something was there to compare");
}

fn rows<'a>(list: &'a Value, row: impl Fn(&'a Value) -> Option<String> + 'a) -> BTreeSet<String> {
    list.as_array().unwrap().iter().filter_map(row).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

#[test]
fn arp_is_what_ip_neigh_shows() {
    let Some(bed) = Bed::new() else { return };
    let host = node(&bed);
    same("neighbours", || {
        let line = |ip: &Value, dev: &Value, mac: &Value, state: &Value| {
            Some(format!("{} {} {} {}", text(ip), text(dev), text(mac), text(state)))
        };
        let ours = show_json(&host, "arp");
        let ours = rows(&ours["neighbours"], |n| line(&n["address"], &n["link"], &n["mac"], &n["state"]));
        let theirs = host.json("neigh");
        (ours, rows(&theirs, |n| line(&n["dst"], &n["dev"], &n["lladdr"], &n["state"][0])))
    });
    assert!(show(&host, "arp").contains("10.1.16.0"));
}

#[test]
fn fdb_is_what_bridge_fdb_shows() {
    let Some(bed) = Bed::new() else { return };
    let host = node(&bed);
    same("forwarding entries", || {
        let ours = show_json(&host, "fdb");
        let ours = ours["entries"].as_array().unwrap().iter().flat_map(|e| {
            let (mac, how) = (text(&e["mac"]).to_owned(), text(&e["how"]).replace("learned", ""));
            let link = text(&e["link"]).to_owned();
            match e["port"].as_str() {
                Some(port) => vec![format!("{mac} port {port} of {link} {how}")],
                None => e["hosts"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|h| format!("{mac} {link} to {} {how}", text(h)))
                    .collect(),
            }
        });
        let theirs = host.json("bridge fdb");
        let theirs = rows(&theirs, |e| {
            let (mac, dev, how) = (text(&e["mac"]), text(&e["ifname"]), text(&e["state"]));
            match (e["master"].as_str(), e["dst"].as_str()) {
                (Some(bridge), _) => e["vlan"].is_null().then(|| format!("{mac} port {dev} of {bridge} {how}")),
                (None, Some(dst)) => Some(format!("{mac} {dev} to {dst} {how}")),
                (None, None) => None,
            }
        });
        (ours.collect(), theirs)
    });
}

#[test]
fn bridge_shows_ports_and_which_mac_is_behind_which() {
    let Some(bed) = Bed::new() else { return };
    let host = node(&bed);
    let own = host.json("link show veth1")[0]["address"].as_str().unwrap().to_owned();
    let json = show_json(&host, "bridge");
    let bridge = &json["bridges"][0];
    assert_eq!((&bridge["name"], bridge["ports"].as_array().unwrap().len()), (&Value::from("docker0"), 1));
    assert_eq!(bridge["ports"][0]["name"], "veth1");
    let cam =
        |mac: &str| bridge["cam"].as_array().unwrap().iter().find(|e| e["mac"] == mac).cloned().unwrap_or_default();
    assert_eq!(cam(&own)["own"], true, "{bridge:#}");
    let container = cam("02:00:00:00:00:12");
    assert_eq!(
        (&container["port"], &container["own"], &container["how"]),
        (&"veth1".into(), &false.into(), &"static".into())
    );
}

#[test]
fn routes_are_what_ip_route_shows() {
    let Some(bed) = Bed::new() else { return };
    let host = node(&bed);
    same("routes", || {
        let ours = show_json(&host, "routes");
        // `ip -6 route` writes what IPv4 leaves out (pref, metric); the lines of IPv4 are compared to the letter.
        let lines = |v4: bool, table: &'static str| {
            rows(&ours["routes"], move |r| {
                let ours = text(&r["destination"]).contains('.') == v4 && text(&r["table"]) == table;
                ours.then(|| text(&r["line"]).replace(" table 77", ""))
            })
        };
        let mut found: BTreeSet<String> = lines(true, "main").union(&lines(true, "77")).cloned().collect();
        let v6 = rows(&ours["routes"], |r| {
            let v6 = text(&r["destination"]).contains(':').then(|| text(&r["destination"]).replace("/128", ""))?;
            Some(format!("{v6} {} {} {} {}", text(&r["link"]), text(&r["via"]), text(&r["protocol"]), r["metric"]))
        });
        found.extend(v6);
        let mut theirs: BTreeSet<String> = ["route", "route show table 77"]
            .iter()
            .flat_map(|w| host.ip(w).lines().map(|l| l.trim().to_owned()).collect::<Vec<_>>())
            .collect();
        let v6 = host.json("-6 route");
        theirs.extend(rows(&v6, |r| {
            Some(format!(
                "{} {} {} {} {}",
                text(&r["dst"]),
                text(&r["dev"]),
                text(&r["gateway"]),
                r["protocol"].as_str().unwrap_or("boot"),
                r["metric"]
            ))
        }));
        (found, theirs)
    });
    let json = show_json(&host, "routes");
    let overlay = json["routes"].as_array().unwrap().iter().find(|r| r["destination"] == "10.1.16.0/24").unwrap();
    assert_eq!((&overlay["protocol"], &overlay["onlink"]), (&"twill(116)".into(), &true.into()));
}

#[test]
fn classic_routes_are_what_route_n_prints() {
    let Some(bed) = Bed::new() else { return };
    if !installed("route") {
        return;
    }
    let host = node(&bed);
    host.ip("route add blackhole 10.1.77.0/24 metric 4294967295");
    host.ip("route add 10.1.78.0/24 dev lo metric 3000000000");
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    let theirs: BTreeSet<String> = host.run("route -n").lines().skip(2).map(words).collect();
    let ours: BTreeSet<String> = show(&host, "routes --classic").lines().skip(1).map(words).collect();
    assert_eq!(ours, theirs);
    assert!(ours.contains("10.1.77.0 0.0.0.0 255.255.255.0 U -1 0 0 *"), "{ours:#?}");
    assert!(ours.contains("10.1.16.0 10.1.16.0 255.255.255.0 UG 0 0 0 flannel.1"), "the source's own line: {ours:#?}");
}

#[test]
fn another_namespace_is_shown_by_its_path() {
    let Some(bed) = Bed::new() else { return };
    let (here, there) = (bed.host("here"), node(&bed));
    let path = format!("/proc/{}/ns/net", there.pid());
    let json = show_json(&here, &format!("fdb --netns {path}"));
    assert!(json["entries"].as_array().unwrap().iter().any(|e| e["mac"] == "5e:f8:4f:00:e3:37"), "{json:#}");
    let out = here.try_run(&format!("{} show arp --netns nobody-has-this-name", bin("twill").display()));
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1));
    assert!(
        err.contains("error: enter the network namespace /run/netns/nobody-has-this-name") && err.contains("hint: "),
        "{err}"
    );
}
