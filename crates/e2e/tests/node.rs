//! What a node says of itself: shapes for programs, `plan` beside flanneld, `--check`, `--serve-store`, `peers --probe`.

use std::io::Read;
use std::path::Path;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::{Value, json};
use twill_e2e::net::Bed;
use twill_e2e::node::{CONFIG, Node, spawn};
use twill_e2e::{bin, eventually, installed};

fn node() -> Option<(Node, tempfile::TempDir)> {
    if !installed("etcdctl") {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    Some((Node::new(Bed::new()?, dir.path()), dir))
}

/// The shape of a value: each field with the name of its type; a list has the shape of its first item.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(fields) => fields.iter().map(|(k, v)| (k.clone(), shape(v))).collect(),
        Value::Array(items) => Value::Array(items.first().map(shape).into_iter().collect()),
        Value::String(_) => "text".into(),
        Value::Number(_) => "number".into(),
        Value::Bool(_) => "bool".into(),
        Value::Null => "null".into(),
    }
}

#[test]
fn shapes_for_programs_are_as_documented() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(200);
    node.put("subnets/10.1.201.0-24", "{");
    let plan = json!({"schema": "number", "steps": [{"op": "text", "object": "text", "why": "text"}]});
    assert_eq!(shape(&node.twill_json("plan")), plan);
    let finding = json!({"code": "text", "object": "text", "evidence": "text", "fix": "text"});
    let check = json!({"schema": "number", "interface": "text", "why": "text", "addresses": ["text"], "mtu": "number", "store": "text",
        "networks": ["text"], "backend": "text", "ports": ["text"], "findings": [finding]});
    assert_eq!(shape(&node.twill_json("agent --check")), check);
    let _agent = node.agent("");
    node.await_peer(200, true);
    node.host.ip("route del 10.1.200.0/24");
    node.await_peer(200, true);
    let repair = json!({"unix_ms": "number", "op": "text", "object": "text", "before": "null", "why": "text"});
    let status = json!({"schema": "number", "node": "text", "state": "text", "subnets": ["text"], "networks": ["text"],
        "backend": "text", "devices": ["text"], "mtu": "number",
        "underlay": {"interface": "text", "addresses": ["text"], "mtu": "number", "why": "text"},
        "store": {"endpoints": "text", "state": "text", "revision": "number", "open": "bool"}, "tunnel": "null",
        "peers": "number", "findings": [finding], "repairs": {"total": "number", "recent": [repair]}});
    eventually("status has its shape", || {
        let got = shape(&node.status());
        if got == status { Ok(()) } else { Err(got) }
    });
    let peers = node.twill_json("peers");
    assert_eq!(peers["peers"].as_array().unwrap().len(), 2, "{peers:#}");
    let peer = peers["peers"].as_array().unwrap().iter().find(|p| p["fault"].is_null()).unwrap();
    let want = json!({"lease": "text", "subnets": ["text"], "address": "text", "vtep": "text", "mac": "text",
        "ways": [{"family": "text", "address": "text", "vtep": "text"}], "node": "null", "fault": "null"});
    assert_eq!(shape(peer), want);
    let leases = node.twill_json("leases");
    let rows = leases["leases"].as_array().unwrap();
    assert_eq!((rows.len(), leases["schema"].as_i64()), (3, Some(1)));
    let own = rows.iter().find(|r| !r["node"].is_null()).unwrap();
    let want = json!({"lease": "text", "public_ip": "text", "backend": "text", "node": "text", "reservation": "bool",
        "revision": "number", "fault": "null"});
    assert_eq!(shape(own), want);
    assert_eq!(shape(&node.twill_json("store ls")), json!({"schema": "number", "keys": ["text"]}));
    assert_eq!(shape(&node.twill_json("resync --accept")), json!({"schema": "number", "withdrawn": "number"}));
    // Everything in the guide, and the same object in YAML.
    let guide = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/guide/json.md")).unwrap();
    for (command, answer) in
        [("`status`", &status), ("`peers`", &peers["peers"][0]), ("`leases`", own), ("`plan`", &plan)]
    {
        for field in answer.as_object().unwrap().keys().filter(|k| *k != "schema") {
            assert!(guide.contains(&format!("`{field}`")), "{command}: {field}");
        }
    }
    let yaml = node.twill("leases -o yaml").1.unwrap();
    assert!(yaml.starts_with("schema: 1\n") && yaml.contains("\nleases:\n") && yaml.contains("lease: "), "{yaml}");
}

#[test]
fn plan_beside_flanneld_takes_no_lease_and_touches_nothing() {
    let Some((node, dir)) = node() else { return };
    // A stand-in: a process of that name, and what it would have made.
    let stand_in = dir.path().join("flanneld");
    std::fs::copy("/bin/sleep", &stand_in).unwrap();
    let mut flanneld = node.host.command(&stand_in).arg("infinity").stdin(Stdio::null()).spawn().unwrap();
    node.host.ip("link add flannel.1 type vxlan id 1 dstport 8472 local 10.168.0.2 dev eth0 nolearning");
    node.host.ip("link set flannel.1 up");
    node.put_peer(200);
    let facts = |node: &Node| {
        ["-d -j link show", "-j addr show", "-j route show table all", "-j neigh show"].map(|w| node.host.ip(w))
    };
    let (before, leases) = (facts(&node), node.leases());
    let pid = flanneld.id();
    eventually("the agent refuses beside it", || {
        let (code, err) = node.twill("agent --check -o json");
        let text = err.unwrap_or_default();
        if code == Some(3) && text.contains("flanneld-running") { Ok(()) } else { Err((pid, text)) }
    });
    for words in ["plan -o json", "plan", "plan --diff"] {
        let (code, out) = node.twill(words);
        let out = out.unwrap();
        assert!(code == Some(0) && out.contains("10.1.200.0"), "{out}");
    }
    assert_eq!(node.leases(), leases, "no lease was taken");
    assert_eq!(facts(&node), before, "nothing was touched");
    assert!(!node.file("state/state.json").exists() && !node.file("subnet.env").exists());
    flanneld.kill().unwrap();
    flanneld.wait().unwrap();
}

#[test]
fn check_names_the_capability_that_is_missing_and_the_network_that_overlaps() {
    let Some((node, dir)) = node() else { return };
    if !installed("setpriv") {
        return;
    }
    node.host.ip("route add 10.1.99.0/24 via 10.168.0.3");
    let found = node.twill_json("agent --check");
    assert_eq!(found["findings"][0]["code"], "network-overlap", "{found:#}");
    assert!(found["findings"][0]["evidence"].as_str().unwrap().contains("10.1.99.0/24"), "{found:#}");
    assert_eq!((&found["interface"], &found["ports"][0]), (&json!("eth0"), &json!("udp/8472")));
    assert_eq!((&found["mtu"], &found["networks"][0]), (&json!(1450), &json!("10.1.0.0/16")));
    node.host.ip("route del 10.1.99.0/24");
    let mut command = node.host.command("setpriv");
    command.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]).arg(bin("twill"));
    command.args(["agent", "--check", "--iface", "eth0", "-o", "json", "--state-dir"]).arg(dir.path().join("state"));
    let out = command.stdin(Stdio::null()).output().unwrap();
    let check: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(3), "{check:#}");
    let named: Vec<_> = check["findings"].as_array().unwrap().iter().map(|f| (&f["code"], &f["object"])).collect();
    assert_eq!(named, [(&json!("capability-missing"), &json!("CAP_NET_ADMIN"))], "{check:#}");
}

#[test]
fn check_names_what_the_agent_would_stumble_over() {
    let Some((node, _dir)) = node() else { return };
    let named = |flags: &str| {
        let check = node.twill_json(&format!("agent --check {flags}"));
        let findings = check["findings"].as_array().unwrap().clone();
        let text = |f: &Value, key: &str| f[key].as_str().unwrap().to_owned();
        findings.iter().map(|f| (text(f, "code"), text(f, "evidence"), text(f, "fix"))).collect::<Vec<_>>()
    };
    // The store is to be served at another host's address.
    for (there, is_here) in [
        ("10.168.0.3:2399", false),
        ("192.0.2.1:2399", false),
        ("[fd00::7]:2399", false),
        ("10.168.0.2:2399", true),
        ("0.0.0.0:2399", true),
    ] {
        let found = named(&format!("--serve-store {there} --insecure"));
        let want: &[&str] = if is_here { &[] } else { &["store-listen"] };
        assert_eq!(found.iter().map(|f| f.0.as_str()).collect::<Vec<_>>(), want, "{there}: {found:?}");
        assert!(is_here || found[0].1.contains(there), "{found:?}");
    }
    assert_eq!(named(""), [], "nothing is in the way");
    // The network has a family that the underlay lacks.
    node.host.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=0");
    let dual = r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"vxlan"}}"#;
    node.put("config", dual);
    let found = named("");
    assert!(found.len() == 1 && found[0].0 == "family-missing" && found[0].2.contains("ip -6 addr add"), "{found:?}");
    node.host.ip("addr add fd00:168::2/64 dev eth0 nodad");
    assert_eq!(named(""), [], "the family is there");
    // Somebody's tunnel has our VNI and port, for one family or for the other; the way out works.
    for (device, more) in [("stranger", ""), ("stranger6", "local fd00:168::2")] {
        node.host.ip(&format!("link add {device} type vxlan id 1 dstport 8472 dev eth0 {more}"));
        let found = named("");
        assert!(found.len() == 1 && found[0].0 == "vni-taken" && found[0].1.contains(device), "{found:?}");
        node.host.run(found[0].2.split(',').next().unwrap());
        assert_eq!(named(""), [], "{device} is gone");
    }
    node.host.ip("link add stranger type vxlan id 2 dstport 8472 dev eth0");
    assert_eq!(named(""), [], "another VNI is nobody's business");
    node.host.ip("link del stranger");
    // Somebody has the port of the tunnel.
    let (udp, v6) =
        (CONFIG.replace("vxlan", "udp"), dual.replace(r#""Network":"10.1.0.0/16""#, r#""EnableIPv4":false"#));
    for (config, at, codes) in [
        (CONFIG, "0.0.0.0:8472", &["port-taken"][..]),
        (CONFIG, "10.168.0.2:8472", &["port-taken"]),
        (&udp, "0.0.0.0:8285", &["port-taken"]),
        (&udp, "127.0.0.1:8285", &[]),
        // A tunnel of IPv6 leaves the port in IPv4 to others.
        (&v6, "0.0.0.0:8472", &[]),
        (&v6, "[fd00:168::2]:8472", &["port-taken"]),
    ] {
        node.put("config", config);
        let mut holder = node.host.command(env!("CARGO_BIN_EXE_wire"));
        holder.args(["datagrams-receive", at, "1", "2"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut holder = holder.spawn().unwrap();
        holder.stdout.take().unwrap().read_exact(&mut [0; 6]).expect("it says that it is ready");
        let found = named("");
        assert_eq!(found.iter().map(|f| f.0.as_str()).collect::<Vec<_>>(), codes, "{at}: {found:?}");
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert_eq!(named(""), [], "nobody has it any more");
    }
    // A VXLAN device shares its port with its like alone, and while it is up.
    let udp = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"udp","Port":8472}}"#;
    node.host.ip("link add stranger type vxlan id 2 dstport 8472 dev eth0");
    for (config, state, code) in [(udp, "down", None), (udp, "up", Some("port-taken")), (CONFIG, "up", None)] {
        node.put("config", config);
        node.host.ip(&format!("link set stranger {state}"));
        let found = named("");
        assert_eq!(found.first().map(|f| f.0.as_str()), code, "{config}: {found:?}");
    }
    node.host.ip("link del stranger");
    // Or of the store that is to be served: another one, which has no config.
    let mut store = node.host.command(bin("twill"));
    store.args(["store", "serve", "--listen", "0.0.0.0:2399", "--insecure", "--data"]).arg(node.file("other"));
    let store = spawn(store, &node.file("other.log"));
    let flags = "--serve-store 10.168.0.2:2399 --insecure";
    let found = eventually("its port is taken", || {
        let found = named(flags);
        if found.is_empty() { Err(node.log("other.log")) } else { Ok(found) }
    });
    assert!(found.len() == 1 && found[0].0 == "store-listen" && found[0].1.contains("10.168.0.2:2399"), "{found:?}");
    store.end(Signal::KILL);
    assert_eq!(named(flags), [], "nobody has it any more");
    // Our own device is no stranger.
    let _agent = node.agent("");
    assert_eq!(named(""), [], "beside a running agent");
}

#[test]
fn check_reads_the_data_of_a_store_that_does_not_run_and_changes_nothing() {
    let Some((mut node, _dir)) = node() else { return };
    node.kill_store();
    let data = node.file("state/store");
    let check = || node.twill_json("agent --check --serve-store");
    let none = check();
    assert_eq!((&none["networks"], &none["findings"]), (&json!(["10.244.0.0/16"]), &json!([])), "{none:#}");
    assert!(
        none["store"].as_str().unwrap().ends_with(&format!("the store in {} would get", data.display())),
        "{none:#}"
    );
    assert!(!node.file("state").exists(), "nothing is made");
    let agent = node.agent("--serve-store --network 10.1.0.0/16");
    node.put("config", r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":4789}}"#);
    node.put("subnets/10.1.41.0-24", "garbage");
    let elsewhere = node.twill_json("agent --check --serve-store 127.0.0.1:2380");
    let found = &elsewhere["findings"][0];
    assert!(found["code"] == "store-data" && found["fix"].as_str().unwrap().contains("another store runs"), "{found}");
    assert!(check()["store"].as_str().unwrap().ends_with(", which answers"), "{:#}", check());
    node.host.ip("route add 10.1.99.0/24 via 10.168.0.3");
    let mut agent = Some(agent);
    for signal in [Signal::KILL, Signal::TERM] {
        // Beside the route that is in its way it would wait, and serve its store.
        let running = agent.take().unwrap_or_else(|| node.agent_at_once("--serve-store"));
        eventually("its store answers", || node.twill("store ls").1);
        running.end(signal);
        let all = || {
            let files = std::fs::read_dir(&data).unwrap().map(|file| file.unwrap().path());
            files
                .map(|path| (path.metadata().unwrap().modified().unwrap(), std::fs::read(path).unwrap()))
                .collect::<Vec<_>>()
        };
        let before = all();
        let found = check();
        assert!(found["store"].as_str().unwrap().contains("whose store does not run"), "{signal:?}: {found:#}");
        assert_eq!((&found["networks"], &found["ports"]), (&json!(["10.1.0.0/16"]), &json!(["udp/4789"])), "{found:#}");
        let codes: Vec<_> = found["findings"].as_array().unwrap().iter().map(|f| f["code"].as_str().unwrap()).collect();
        assert_eq!(codes, ["network-overlap", "bad-lease-value"], "{signal:?}: {found:#}");
        assert!(all() == before, "nothing is changed");
    }
}

#[test]
fn an_agent_without_the_capability_says_so_and_takes_nothing() {
    let Some((node, dir)) = node() else { return };
    if !installed("setpriv") {
        return;
    }
    let mut cases = vec![("setpriv", vec!["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"])];
    // All capabilities, and none of them over a network that belongs to the users above.
    if node.host.try_run("unshare --user --map-root-user true").status.success() {
        cases.push(("unshare", vec!["--user", "--map-root-user"]));
    } else {
        println!("SKIP: no user namespace can be made here");
    }
    for (wrapper, words) in cases {
        let log = format!("{wrapper}.log");
        let mut command = node.host.command(wrapper);
        command.args(words).arg(bin("twill")).args(["agent", "--iface", "eth0"]);
        for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--subnet-file", "subnet.env")] {
            command.arg(flag).arg(dir.path().join(name));
        }
        // An agent that went on would never end.
        let agent = twill_e2e::node::spawn(command, &dir.path().join(&log));
        eventually("the agent says so", || {
            let said = node.log(&log);
            if said.contains("error: this process lacks CAP_NET_ADMIN over its network namespace") {
                Ok(())
            } else {
                Err(said)
            }
        });
        assert_eq!(agent.wait(), Some(1), "{wrapper}");
        let said = node.log(&log);
        let hint = said.split("hint: ").nth(1).unwrap_or_default();
        assert!(said.lines().count() == 2, "one error with its way out: {said}");
        for word in ["run as root", "setcap", "AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW"] {
            assert!(hint.contains(word), "{said}");
        }
        assert_eq!(node.leases(), [], "no lease");
        assert!(!node.file("subnet.env").exists() && !node.file("state").exists(), "no file");
    }
}

/// Starts the first host's agent with the store inside, in its own folders.
fn serve(host: &twill_e2e::net::Host, dir: &Path, flags: &str) -> std::process::Child {
    let mut command = host.command(bin("twill"));
    command.args(["agent", "--iface", "eth0"]).args(flags.split_whitespace());
    for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--subnet-file", "subnet.env")] {
        command.arg(flag).arg(dir.join(name));
    }
    let log = std::fs::File::create(dir.join("agent.log")).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

fn end(mut child: std::process::Child) -> Option<i32> {
    let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM);
    child.wait().unwrap().code()
}

fn says(dir: &Path, words: &[&str]) {
    eventually("the log says so", || {
        let log = std::fs::read_to_string(dir.join("agent.log")).unwrap();
        if words.iter().all(|w| log.contains(w)) { Ok(()) } else { Err(log) }
    });
}

#[test]
fn the_first_host_serves_the_store_and_tells_the_next_one_what_to_type() {
    let Some(bed) = Bed::new() else { return };
    let (a, b) = (bed.host("a"), bed.host("b"));
    bed.wire(&a, "eth0", &b, "eth0");
    a.ip("addr add 10.168.0.2/24 dev eth0");
    b.ip("addr add 10.168.0.3/24 dev eth0");
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    // Another address without --insecure: refused, with the way out.
    assert_eq!(end_now(serve(&a, dirs[0].path(), "--serve-store 10.168.0.2:2379")), Some(1));
    says(dirs[0].path(), &["error: refuse to serve the store at 10.168.0.2:2379", "hint: add --insecure"]);
    // A network that this host has already.
    assert_eq!(end_now(serve(&a, dirs[0].path(), "--serve-store --network 10.168.0.0/16")), Some(1));
    says(
        dirs[0].path(),
        &["the network 10.168.0.0/16 overlaps what this host has: ", "hint: choose another with --network"],
    );
    // Without an address: loopback only.
    let alone = serve(&a, dirs[0].path(), "--serve-store");
    eventually("the agent has its subnet", || std::fs::read_to_string(dirs[0].path().join("subnet.env")));
    let listens = a.run("ss -Hltn");
    assert!(listens.contains("127.0.0.1:2379") && listens.lines().count() == 1, "{listens}");
    let env = std::fs::read_to_string(dirs[0].path().join("subnet.env")).unwrap();
    assert!(env.contains("FLANNEL_NETWORK=10.244.0.0/16"), "the default network: {env}");
    end(alone);
    // All is lost but the device: it is ours, and no stranger's.
    std::fs::remove_dir_all(dirs[0].path().join("state")).unwrap();
    std::fs::remove_file(dirs[0].path().join("subnet.env")).unwrap();
    let again = serve(&a, dirs[0].path(), "--serve-store");
    eventually("the agent has its subnet again", || std::fs::read_to_string(dirs[0].path().join("subnet.env")));
    end(again);
    // For others: both hosts say that nothing authenticates, and the line that is printed works as it is: with all addresses, the one that
    // the tunnel goes by.
    let first = serve(&a, dirs[0].path(), "--serve-store 0.0.0.0:2379 --insecure");
    says(
        dirs[0].path(),
        &["nothing authenticates", "on the next host type: twill agent --store http://10.168.0.2:2379"],
    );
    let log = std::fs::read_to_string(dirs[0].path().join("agent.log")).unwrap();
    let line = log.lines().find_map(|l| l.split("on the next host type: twill agent ").nth(1)).unwrap().to_owned();
    let next = serve(&b, dirs[1].path(), &line);
    says(dirs[1].path(), &["nothing authenticates the store to us"]);
    for (host, dir) in [(&a, &dirs[0]), (&b, &dirs[1])] {
        eventually("both know each other", || {
            let out = host.try_run(&format!(
                "{} status -o json --run-dir {}/run",
                bin("twill").display(),
                dir.path().display()
            ));
            let status: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
            if status["peers"] == 1 && status["store"]["open"] == true { Ok(()) } else { Err(status) }
        });
    }
    probes(&a, &b, dirs[0].path());
    end(next);
    end(first);
}

fn end_now(mut child: std::process::Child) -> Option<i32> {
    child.wait().unwrap().code()
}

/// `peers --probe` on `a`: both answer; the tunnel's port closed on `b`; the underlay's echo closed; neither.
fn probes(a: &twill_e2e::net::Host, b: &twill_e2e::net::Host, dir: &Path) {
    if !installed("nft") {
        return;
    }
    let expect = |underlay: bool, overlay: bool, verdict: &str| {
        eventually(verdict, || {
            let out =
                a.try_run(&format!("{} peers --probe -o json --run-dir {}/run", bin("twill").display(), dir.display()));
            let peers: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
            let probe = &peers["peers"][0]["probe"];
            let says = probe["verdict"].as_str().is_some_and(|v| v.contains(verdict));
            let right = probe["underlay"] == underlay && probe["overlay"] == overlay && says;
            if right && out.status.code() == Some(if overlay { 0 } else { 3 }) { Ok(()) } else { Err(out) }
        });
    };
    expect(true, true, "both answer");
    let rule = |rule: &str| {
        b.try_run("nft delete table inet closed");
        for line in ["add table inet closed", "add chain inet closed in { type filter hook input priority 0 ; }"] {
            b.run(&format!("nft {line}"));
        }
        b.run(&format!("nft add rule inet closed in {rule} drop"));
    };
    rule("udp dport 8472");
    expect(true, false, "is the tunnel's UDP port open");
    rule("iifname eth0 icmp type echo-request");
    expect(false, true, "drops echo requests on the underlay");
    b.ip("link set eth0 down");
    expect(false, false, "neither answers");
}

#[test]
fn commands_that_read_the_store_ask_the_one_of_the_agent() {
    let Some((mut node, _dir)) = node() else { return };
    node.kill_store();
    let agent = node.agent("--serve-store 10.168.0.2:2379 --insecure --prefix /mine --network 10.1.0.0/16");
    let subnet = node.status()["subnets"][0].as_str().unwrap().replace('/', "-");
    assert_eq!(node.twill_json("leases")["leases"][0]["lease"], subnet.as_str());
    assert_eq!(node.twill_json("store ls")["keys"], json!(["/mine/config", format!("/mine/subnets/{subnet}")]));
    assert_eq!(node.twill("plan --diff").1.unwrap(), "nothing to change\n");
    // What is named holds, whoever runs.
    let words = ["leases", "store ls", "plan"];
    for word in words {
        let (code, said) = node.twill(&format!("{word} --store http://127.0.0.1:9"));
        let said = said.unwrap_err();
        assert!(code == Some(1) && said.contains("at http://127.0.0.1:9: "), "{said}");
    }
    assert!(
        node.twill("leases --store http://127.0.0.1:9").1.unwrap_err().contains("(--store or TWILL_STORE names it)")
    );
    agent.end(Signal::TERM);
    // Without an agent the file says where it would look, and without a file nobody does.
    let file = node.file("agent.toml");
    std::fs::write(&file, "version = 1\nserve_store = \"10.168.0.2:2380\"\n").unwrap();
    let (run, mine) = (node.file("run").display().to_string(), file.display().to_string());
    for (config, asked, from) in [
        (mine.as_str(), "http://10.168.0.2:2380", format!("no agent answers in {run}, {mine} says so")),
        ("", "http://127.0.0.1:2379", format!("the default: no agent answers in {run}, ")),
    ] {
        let mut command = node.host.command(bin("twill"));
        command.args(["leases", "--run-dir", &run]);
        if !config.is_empty() {
            command.env("TWILL_CONFIG", config);
        } else if std::path::Path::new("/etc/twill/agent.toml").exists() {
            continue;
        }
        let out = command.output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains(&format!("at {asked}: ")) && said.contains(&from), "{said}");
    }
}

#[test]
fn an_agent_is_found_where_its_file_has_put_it() {
    let Some((node, dir)) = node() else { return };
    if Path::new("/run/twill/twill.sock").exists() {
        println!("SKIP: this machine runs an agent of its own");
        return;
    }
    let file = node.file("agent.toml");
    std::fs::write(&file, format!("version = 1\nrun_dir = \"{}\"\n", dir.path().join("run").display())).unwrap();
    let _agent = node.agent("");
    let folder = format!("no agent listens in {}", dir.path().join("other").display());
    let other = node.file("other.toml");
    std::fs::write(&other, format!("version = 1\nrun_dir = \"{}\"\n", dir.path().join("other").display())).unwrap();
    let ask = |config: Option<&Path>| {
        let mut command = node.host.command(bin("twill"));
        command.args(["status", "-o", "json"]).env_remove("XDG_RUNTIME_DIR").env("HOME", dir.path());
        command.envs(config.map(|file| ("TWILL_CONFIG", file)));
        let out = command.stdin(Stdio::null()).output().unwrap();
        let status: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        (status["subnets"].is_array(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let told = |config: Option<&Path>, said: &str| {
        let (is_found, text) = ask(config);
        assert!(is_found == said.is_empty() && text.contains(said), "{config:?}: {text}");
    };
    told(Some(&file), "");
    told(None, "no agent listens in /run/twill");
    // Whoever names a file means no other agent than that one's.
    told(Some(&other), &folder);
    told(Some(&node.file("none.toml")), "none.toml is not there");
}

#[test]
fn plan_asks_the_agent_that_runs_and_who_may_not_ask_it_is_told_so() {
    let Some((mut node, _dir)) = node() else { return };
    let _agent = node.agent("--serve-store 10.168.0.2:2379 --insecure");
    // As on the first host of the README: no store on loopback, and nobody says where it is.
    node.kill_store();
    let run = node.file("run").display().to_string();
    let out = node.host.command(bin("twill")).args(["plan", "--run-dir", &run]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "nothing to change\n", "{out:?}");
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut nobody = node.host.command("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(bin("twill")).args([
        "status",
        "--run-dir",
        &run,
    ]);
    let out = nobody.output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("root") && !said.contains("no agent"), "{out:?}");
}
