//! The one client against Debian's etcd: several endpoints, certificates on both sides, user and password, prefix.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use twill_e2e::net::{Bed, Host};
use twill_e2e::{bin, eventually, installed};

/// A child of the test, killed by pid when it goes.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.0), Signal::KILL);
        let _ = self.0.wait();
    }
}

const CONFIG: &str = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// An etcd of one member on the host; `urls` are what clients type.
fn etcd(host: &Host, dir: &Path, urls: &str, flags: &[&str]) -> Daemon {
    let mut command = host.command("etcd");
    command.arg("--data-dir").arg(dir).args(["--listen-client-urls", urls, "--advertise-client-urls", urls]);
    command.args(["--listen-peer-urls", "http://127.0.0.1:0"]).args(flags);
    command.env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH);
    Daemon(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

fn etcdctl(host: &Host, words: &[&str]) -> Result<String, String> {
    let out = host.command("etcdctl").env("ETCDCTL_API", "3").args(words).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stderr)) }
}

/// Exit code, stdout and stderr of `twill WORDS`.
fn twill(host: &Host, words: &str) -> (i32, String, String) {
    let out = host.try_run(&format!("{} {words}", bin("twill").display()));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
}

/// A host with an underlay, which is what an agent asks for.
fn host(bed: &Bed) -> (Host, Host) {
    let (host, other) = (bed.host("node"), bed.host("other"));
    bed.wire(&host, "eth0", &other, "eth0");
    host.ip("addr add 10.168.0.2/24 dev eth0");
    (host, other)
}

/// Starts an agent with its files in `dir`, and waits until it has its subnet.
fn agent(host: &Host, dir: &Path, flags: &str) -> Daemon {
    let log = dir.join("agent.log");
    let mut command: Command = host.command(bin("twill"));
    command.args(["agent", "--iface", "eth0"]).args(flags.split_whitespace());
    for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--subnet-file", "subnet.env")] {
        command.arg(flag).arg(dir.join(name));
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
    let daemon = Daemon(command.spawn().unwrap());
    eventually("the agent writes subnet.env", || {
        std::fs::read_to_string(dir.join("subnet.env")).map_err(|_| std::fs::read_to_string(&log))
    });
    daemon
}

fn openssl(dir: &Path, line: &str) {
    let out = Command::new("openssl").args(line.split_whitespace()).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "openssl {line}: {}", String::from_utf8_lossy(&out.stderr));
}

/// `NAME.pem` and `NAME-key.pem`, by the authority `ca.pem`, which is made where it is not there.
fn certificate(dir: &Path, name: &str) {
    let key = |n: &str| format!("-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {n}-key.pem");
    if !dir.join("ca.pem").exists() {
        openssl(dir, &format!("req -x509 {} -subj /CN=ca -days 2 -out ca.pem", key("ca")));
    }
    openssl(dir, &format!("req {} -subj /CN={name} -out {name}.csr", key(name)));
    let uses = "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n";
    std::fs::write(dir.join("uses"), uses).unwrap();
    openssl(
        dir,
        &format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 -extfile uses -out {name}.pem"
        ),
    );
}

#[test]
fn mutual_certificates_open_the_store_and_nothing_else_does() {
    if !installed("etcd") || !installed("etcdctl") || !installed("openssl") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let (host, _other) = host(&bed);
    let dir = tempfile::tempdir().unwrap();
    let (d, url) = (dir.path().display().to_string(), "https://127.0.0.1:2379");
    for name in ["server", "node"] {
        certificate(dir.path(), name);
    }
    let flags = [
        "--client-cert-auth",
        &format!("--trusted-ca-file={d}/ca.pem"),
        &format!("--cert-file={d}/server.pem"),
        &format!("--key-file={d}/server-key.pem"),
    ];
    let _etcd = etcd(&host, &dir.path().join("etcd"), url, &flags);
    let (ca, mine) = (format!("{d}/ca.pem"), [format!("{d}/node.pem"), format!("{d}/node-key.pem")]);
    let known = ["--endpoints", url, "--cacert", &ca, "--cert", &mine[0], "--key", &mine[1]];
    eventually("etcd answers", || {
        etcdctl(&host, &[&known[..], &["put", "/coreos.com/network/config", CONFIG]].concat())
    });
    let us = format!("--store {url} --ca {ca} --cert {} --key {}", mine[0], mine[1]);
    assert_eq!(twill(&host, &format!("store ls {us}")), (0, "/coreos.com/network/config\n".into(), String::new()));
    let running = agent(&host, dir.path(), &us);
    let leases = etcdctl(&host, &[&known[..], &["get", "--prefix", "/coreos.com/network/subnets/"]].concat()).unwrap();
    assert!(leases.contains(r#""PublicIP":"10.168.0.2""#), "{leases}");
    // Who names no store is let in by the agent's certificates.
    let (code, out, err) = twill(&host, &format!("leases -o json --run-dir {d}/run"));
    assert!(code == 0 && out.contains("10.168.0.2"), "{out} {err}");
    drop(running);
    // Without a certificate, or with an authority that did not sign the server's, nobody comes in.
    std::fs::create_dir(dir.path().join("foreign")).unwrap();
    certificate(&dir.path().join("foreign"), "node");
    for flags in [
        format!("--ca {ca}"),
        format!("--ca {d}/foreign/ca.pem --cert {} --key {}", mine[0], mine[1]),
        format!("--ca {ca} --cert {d}/foreign/node.pem --key {d}/foreign/node-key.pem"),
    ] {
        let (code, out, err) = twill(&host, &format!("store ls --store {url} {flags}"));
        assert_eq!((code, out.as_str()), (1, ""), "{flags}: {err}");
        assert!(err.starts_with("error: list keys: ") && err.contains(url) && err.contains("hint: "), "{err}");
    }
    let (code, _, err) = twill(&host, &format!("store ls --store {url} --ca {d}/nowhere.pem"));
    assert!(code == 1 && err.contains("--ca") && err.contains("nowhere.pem"), "{err}");
}

#[test]
fn certificates_are_read_again_for_a_new_connection() {
    if !installed("etcd") || !installed("etcdctl") || !installed("openssl") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let (host, _other) = host(&bed);
    let dir = tempfile::tempdir().unwrap();
    let (d, url) = (dir.path().display().to_string(), "https://127.0.0.1:2379");
    // Two authorities: what the second has signed is good for the second alone.
    for authority in ["old", "new"] {
        std::fs::create_dir(dir.path().join(authority)).unwrap();
        for name in ["server", "node"] {
            certificate(&dir.path().join(authority), name);
        }
    }
    let serve = |of: &str| {
        let flags = ["--client-cert-auth", "--trusted-ca-file={}/ca.pem", "--cert-file={}/server.pem"];
        let flags: Vec<String> = flags.iter().map(|flag| flag.replace("{}", &format!("{d}/{of}"))).collect();
        let key = format!("--key-file={d}/{of}/server-key.pem");
        let flags: Vec<&str> = flags.iter().map(String::as_str).chain([key.as_str()]).collect();
        etcd(&host, &dir.path().join("etcd"), url, &flags)
    };
    let ctl = |of: &str, words: &[&str]| {
        let files = ["ca.pem", "node.pem", "node-key.pem"].map(|file| format!("{d}/{of}/{file}"));
        let known = ["--endpoints", url, "--cacert", &files[0], "--cert", &files[1], "--key", &files[2]];
        etcdctl(&host, &[&known[..], words].concat())
    };
    let put_peer = |of: &str, n: u8| {
        let key = format!("/coreos.com/network/subnets/10.1.{n}.0-24");
        let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:00:{n:02x}"}}"#);
        let value = format!(r#"{{"PublicIP":"10.168.0.{n}","BackendType":"vxlan","BackendData":{data}}}"#);
        ctl(of, &["put", &key, &value])
    };
    let routed = |n: u8| {
        eventually("the peer's route appears", || {
            let routes = host.run(&format!("ip route show 10.1.{n}.0/24"));
            if routes.contains("dev flannel.1") { Ok(()) } else { Err(routes) }
        });
    };
    // What the agent is told lies apart, and is replaced there.
    let use_files_of = |of: &str| {
        for file in ["ca.pem", "node.pem", "node-key.pem"] {
            std::fs::copy(dir.path().join(of).join(file), dir.path().join(file)).unwrap();
        }
    };
    let server = serve("old");
    eventually("etcd answers", || ctl("old", &["put", "/coreos.com/network/config", CONFIG]));
    use_files_of("old");
    let us = format!("--store {url} --ca {d}/ca.pem --cert {d}/node.pem --key {d}/node-key.pem");
    let _agent = agent(&host, dir.path(), &us);
    put_peer("old", 200).unwrap();
    routed(200);
    drop(server);
    let _server = serve("new");
    eventually("etcd answers with the new certificate", || put_peer("new", 201));
    let run = format!("--run-dir {d}/run");
    let finds = |what: &str, words: &[&str]| {
        eventually(what, || {
            let (_, out, err) = twill(&host, &format!("status {run}"));
            if words.iter().all(|word| out.contains(word)) { Ok(()) } else { Err(out + &err) }
        });
    };
    finds("the new server is a stranger", &["store-away"]);
    // Half of a rotation: the certificate has come, and its key has not.
    use_files_of("new");
    std::fs::copy(dir.path().join("old/node-key.pem"), dir.path().join("node-key.pem")).unwrap();
    finds("the halves do not fit", &["store-denied", "use the certificates"]);
    use_files_of("new");
    routed(201);
    finds("all is well", &["findings  none"]);
    assert!(host.run("ip route show 10.1.200.0/24").contains("flannel.1"), "nothing was lost meanwhile");
}

#[test]
fn user_and_password_open_the_store_and_a_prefix_is_kept_to() {
    if !installed("etcd") || !installed("etcdctl") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let (host, _other) = host(&bed);
    let dir = tempfile::tempdir().unwrap();
    let serve = || etcd(&host, &dir.path().join("etcd"), "http://127.0.0.1:2379", &[]);
    let server = serve();
    eventually("etcd answers", || etcdctl(&host, &["put", "/mine/config", CONFIG]));
    for words in [
        "user add root:secret",
        "role add root",
        "user grant-role root root",
        "user add twill:pass-word",
        "role add network",
        "role grant-permission --prefix network readwrite /mine/",
        "user grant-role twill network",
        "auth enable",
    ] {
        etcdctl(&host, &words.split_whitespace().collect::<Vec<_>>()).unwrap();
    }
    let password = dir.path().join("password");
    std::fs::write(&password, "pass-word\n").unwrap();
    let us = format!("--prefix /mine --user twill --password-file {}", password.display());
    let _agent = agent(&host, dir.path(), &us);
    let all = etcdctl(&host, &["--user", "root:secret", "get", "--prefix", "/", "--keys-only"]).unwrap();
    let keys: Vec<&str> = all.split_whitespace().collect();
    assert!(keys.len() == 2 && keys[0] == "/mine/config" && keys[1].starts_with("/mine/subnets/10.1."), "{keys:?}");
    let (code, out, err) = twill(&host, &format!("leases {us} -o json"));
    let leases: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &leases["leases"][0]["public_ip"]), (0, &Value::from("10.168.0.2")), "{err}");
    // A change is heard through the watch, as this user.
    let peer =
        r#"{"PublicIP":"10.168.0.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}"#;
    etcdctl(&host, &["--user", "root:secret", "put", "/mine/subnets/10.1.200.0-24", peer]).unwrap();
    eventually("the peer's route appears", || {
        let routes = host.run("ip route show 10.1.200.0/24");
        if routes.contains("dev flannel.1") { Ok(()) } else { Err(routes) }
    });
    std::fs::write(&password, "wrong\n").unwrap();
    for (flags, about) in [(us.as_str(), "authentication failed"), ("--prefix /mine", "user name is empty")] {
        let (code, _, err) = twill(&host, &format!("leases {flags}"));
        assert!(code == 1 && err.contains("refuses") && err.contains(about) && !err.contains("wrong"), "{err}");
        assert!(err.contains("hint: check --user, --password-file"), "{err}");
    }
    // Another password, and no token outlives it: the running agent is refused until its file has that password.
    for words in ["user delete twill", "user add twill:next-word", "user grant-role twill network"] {
        let words = words.split_whitespace();
        etcdctl(&host, &["--user", "root:secret"].into_iter().chain(words).collect::<Vec<_>>()).unwrap();
    }
    drop(server);
    let _server = serve();
    let run = dir.path().join("run").display().to_string();
    eventually("the agent is refused", || {
        let (_, out, err) = twill(&host, &format!("status --run-dir {run}"));
        if out.contains("store-denied") { Ok(()) } else { Err(out + &err) }
    });
    std::fs::write(&password, "next-word\n").unwrap();
    let other = peer.replace(".9", ".10").replace(":09", ":0a");
    let put = ["--user", "root:secret", "put", "/mine/subnets/10.1.201.0-24", other.as_str()];
    eventually("etcd answers again", || etcdctl(&host, &put));
    eventually("the agent reads its file again, and the next peer's route appears", || {
        let routes = host.run("ip route show 10.1.201.0/24");
        if routes.contains("dev flannel.1") { Ok(()) } else { Err(routes) }
    });
}

#[test]
fn the_next_endpoint_is_asked_when_one_is_dead_or_dies() {
    if !installed("etcd") || !installed("etcdctl") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let (host, _other) = host(&bed);
    let dir = tempfile::tempdir().unwrap();
    // Three members of one cluster, so that two are a quorum; port 9 is nobody's.
    let peers: Vec<String> = (1..=3).map(|n| format!("m{n}=http://127.0.0.1:{n}2380")).collect();
    let cluster = peers.join(",");
    let mut members: Vec<Daemon> = (1..=3)
        .map(|n| {
            let (url, peer) = (format!("http://127.0.0.1:{n}2379"), format!("http://127.0.0.1:{n}2380"));
            let mut command = host.command("etcd");
            command.arg("--data-dir").arg(dir.path().join(format!("m{n}"))).args(["--name", &format!("m{n}")]);
            command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
            command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
            command.args(["--initial-cluster", &cluster]).env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH);
            Daemon(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
        })
        .collect();
    let ctl = |words: &[&str]| etcdctl(&host, &[&["--endpoints", "http://127.0.0.1:32379"], words].concat());
    eventually("the cluster answers", || ctl(&["put", "/coreos.com/network/config", CONFIG]));
    let us = "--store http://127.0.0.1:9,http://127.0.0.1:12379,http://127.0.0.1:22379";
    assert_eq!(twill(&host, &format!("store ls {us}")).1, "/coreos.com/network/config\n", "the first is dead");
    let _agent = agent(&host, dir.path(), us);
    let put_peer = |n: u8| {
        let value = format!(
            r#"{{"PublicIP":"10.168.0.{n}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{n:02x}"}}}}"#
        );
        eventually("a peer is written", || {
            ctl(&["put", &format!("/coreos.com/network/subnets/10.1.{n}.0-24"), &value])
        });
        eventually("its route appears", || {
            let routes = host.run(&format!("ip route show 10.1.{n}.0/24"));
            if routes.contains("dev flannel.1") { Ok(()) } else { Err(routes) }
        });
    };
    put_peer(200);
    // The one that the agent watches dies.
    drop(members.remove(0));
    put_peer(201);
    let log = std::fs::read_to_string(dir.path().join("agent.log")).unwrap();
    assert!(host.run("ip route show 10.1.200.0/24").contains("flannel.1"), "nothing was lost: {log}");
    let (code, out, err) = twill(&host, &format!("status --run-dir {}/run -o json", dir.path().display()));
    let status: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &status["store"]["state"]), (0, &Value::from("up")), "{status:#} {err}");
}

#[test]
fn a_store_that_lists_and_takes_nothing_keeps_no_node_from_its_repairs() {
    if !installed("etcd") || !installed("etcdctl") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let (host, _other) = host(&bed);
    let dir = tempfile::tempdir().unwrap();
    let _server = etcd(&host, &dir.path().join("etcd"), "http://127.0.0.1:2379", &[]);
    eventually("etcd answers", || etcdctl(&host, &["put", "/mine/config", CONFIG]));
    let peer =
        r#"{"PublicIP":"10.168.0.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}"#;
    etcdctl(&host, &["put", "/mine/subnets/10.1.200.0-24", peer]).unwrap();
    drop(agent(&host, dir.path(), "--prefix /mine"));
    for words in [
        "user add root:secret",
        "role add root",
        "user grant-role root root",
        "user add twill:pass-word",
        "role add network",
        "role grant-permission --prefix network read /mine/",
        "user grant-role twill network",
        "auth enable",
    ] {
        etcdctl(&host, &words.split_whitespace().collect::<Vec<_>>()).unwrap();
    }
    let leases = || etcdctl(&host, &["--user", "root:secret", "get", "--prefix", "/mine/subnets/"]).unwrap();
    let before = leases();
    let password = dir.path().join("password");
    std::fs::write(&password, "pass-word\n").unwrap();
    host.ip("link del flannel.1");
    std::fs::remove_file(dir.path().join("subnet.env")).unwrap();
    std::fs::remove_file(dir.path().join("state/cache.json")).unwrap_or_default();
    // Its lease is to say another address, and cannot.
    let us = format!("--prefix /mine --user twill --password-file {} --public-ip 10.168.0.7", password.display());
    let _agent = agent(&host, dir.path(), &us);
    let run = dir.path().join("run").display().to_string();
    let status = || twill(&host, &format!("status --run-dir {run}")).1;
    eventually("the peer's route is back, and status says by what", || {
        let (routes, said) = (host.run("ip route show 10.1.200.0/24"), status());
        let right =
            routes.contains("dev flannel.1") && said.contains("store-denied") && said.contains("listing-cached");
        if right { Ok(()) } else { Err((routes, said)) }
    });
    assert_eq!(leases(), before, "no lease is taken by it");
    let grant = "--user root:secret role grant-permission --prefix network readwrite /mine/";
    etcdctl(&host, &grant.split_whitespace().collect::<Vec<_>>()).unwrap();
    eventually("the lease says what is true, and nothing is left to say", || {
        let (now, said) = (leases(), status());
        let right = now.contains("10.168.0.7") && !said.contains("store-denied") && !said.contains("listing-cached");
        if right { Ok(()) } else { Err((now, said)) }
    });
}
