//! `twill cni install` and `uninstall`: whenever either is killed, the programs of others come back as they were.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};
use twill_e2e::cni::{netns, start};
use twill_e2e::net::Bed;
use twill_e2e::node::{Daemon, Node};
use twill_e2e::{bin, eventually, installed};

#[test]
fn install_puts_the_plugin_in_place_once_the_node_is_ready_and_uninstall_gives_the_names_back() {
    let Some(bed) = Bed::new() else { return };
    if !installed("etcdctl") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(bed, dir.path());
    let (bins, confs) = (node.file("bin"), node.file("net.d"));
    std::fs::create_dir(&bins).unwrap();
    std::fs::write(bins.join("bridge"), "the original").unwrap();
    let at = format!("--bin-dir {} --conf-dir {}", bins.display(), confs.display());
    let (code, err) = node.twill(&format!("cni install {at}"));
    assert!(code == Some(1) && err.unwrap_err().contains("no agent"), "not before the node is ready");
    assert!(!bins.join("twill-cni").exists() && !confs.exists());
    let agent = node.agent("");
    let ready = || node.twill(&format!("cni install {at} --dry-run"));
    eventually("the node is ready", || ready().1);
    // An agent that does not answer is named, and not waited for without end.
    agent.hold();
    let (code, err) = node.twill(&format!("cni install {at}"));
    agent.signal(Signal::CONT);
    let err = err.unwrap_err();
    assert!(code == Some(1) && err.contains("does not answer") && err.contains("systemctl restart twill"), "{err}");
    assert!(!bins.join("twill-cni").exists() && !confs.exists(), "a dry run");
    let (code, err) = node.twill(&format!("cni install {at} --take-over host-local"));
    assert!(code == Some(2) && err.unwrap_err().contains("bridge"), "host-local alone");
    node.twill(&format!("cni install {at} --take-over flannel,bridge,host-local")).1.unwrap();
    let program = std::fs::read(bin("twill-cni")).unwrap();
    for name in ["twill-cni", "flannel", "bridge", "host-local"] {
        assert!(std::fs::read(bins.join(name)).unwrap() == program, "{name}");
    }
    // A newer release goes wherever the older one is, asked for again or not.
    let older = [program.as_slice(), b"older"].concat();
    ["twill-cni", "flannel"].iter().for_each(|name| std::fs::write(bins.join(name), &older).unwrap());
    node.twill(&format!("cni install {at}")).1.unwrap();
    assert!(["twill-cni", "flannel"].iter().all(|name| std::fs::read(bins.join(name)).unwrap() == program));
    let conflist: Value = serde_json::from_slice(&std::fs::read(confs.join("10-twill.conflist")).unwrap()).unwrap();
    assert_eq!(conflist["cniVersion"], "1.0.0");
    // A container starts by what was installed, and holds off the uninstallation.
    let container = node.container("c");
    let mut conf = conflist["plugins"][0].clone();
    conf["cniVersion"] = json!("1.0.0");
    conf["name"] = conflist["name"].clone();
    conf["ipam"] = json!({"dataDir": node.file("networks")});
    let call = |verb: &str| {
        let mut command = node.host.command(bins.join("twill-cni"));
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", "c")
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", netns(&container));
        start(command, conf.to_string().as_bytes()).wait_with_output().unwrap()
    };
    let said = call("ADD");
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stdout));
    let (code, err) = node.twill(&format!("cni uninstall {at}"));
    assert!(code == Some(1) && err.unwrap_err().contains("1 containers are attached: c"));
    assert!(call("DEL").status.success());
    node.twill(&format!("cni uninstall {at}")).1.unwrap();
    let left: Vec<_> = std::fs::read_dir(&bins).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["bridge"]);
    assert_eq!(std::fs::read(bins.join("bridge")).unwrap(), b"the original");
    // What its package brings while the name is ours stays, and not what was kept.
    node.twill(&format!("cni install {at} --take-over bridge")).1.unwrap();
    std::fs::write(bins.join("bridge"), "a newer original").unwrap();
    node.twill(&format!("cni install {at} --take-over bridge")).1.unwrap();
    assert!(std::fs::read(bins.join("bridge")).unwrap() == program);
    node.twill(&format!("cni uninstall {at}")).1.unwrap();
    assert_eq!(std::fs::read(bins.join("bridge")).unwrap(), b"a newer original");
    node.twill(&format!("cni install {at} --take-over bridge")).1.unwrap();
    std::fs::write(bins.join("bridge"), "a newer original").unwrap();
    node.twill(&format!("cni uninstall {at}")).1.unwrap();
    let left: Vec<_> = std::fs::read_dir(&bins).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(
        (left, std::fs::read(bins.join("bridge")).unwrap()),
        (vec!["bridge".into()], b"a newer original".to_vec())
    );
    assert_eq!(std::fs::read_dir(&confs).unwrap().count(), 0);
}

/// What changes a name. strace counts each call by itself, and of each line a program uses one.
const CALLS: [&str; 3] = ["?rename,?renameat,?renameat2", "?link,?linkat", "?unlink,?unlinkat"];
const TAKE: &str = "--take-over flannel,bridge,host-local";

/// A node that is ready, with two releases of the plugin.
struct Site {
    _agent: Daemon,
    node: Node,
    _dir: tempfile::TempDir,
}

impl Site {
    fn new() -> Option<Site> {
        let bed = Bed::new()?;
        if !installed("etcdctl") || !installed("strace") {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let node = Node::new(bed, dir.path());
        let about = Command::new(bin("twill-cni")).arg("--help").output().unwrap().stdout;
        for release in ["a", "b"] {
            std::fs::write(node.file(release), [about.as_slice(), release.as_bytes()].concat()).unwrap();
        }
        let site = Site { _agent: node.agent(""), node, _dir: dir };
        eventually("the node is ready", || site.node.twill(&site.install("a --dry-run")).1);
        Some(site)
    }

    fn at(&self) -> String {
        format!("--bin-dir {} --conf-dir {}", self.bins().display(), self.node.file("net.d").display())
    }

    fn install(&self, release: &str) -> String {
        format!("cni install {} --plugin {}/{release}", self.at(), self.node.file("").display())
    }

    fn uninstall(&self) -> String {
        format!("cni uninstall {}", self.at())
    }

    fn bins(&self) -> PathBuf {
        self.node.file("bin")
    }

    fn run(&self, words: &str) {
        self.node.twill(words).1.unwrap_or_else(|e| panic!("{words}: {e}"));
    }

    /// A folder with the originals of bridge and host-local, and none of flannel.
    fn originals(&self) -> BTreeMap<String, Vec<u8>> {
        let _ = std::fs::remove_dir_all(self.bins());
        std::fs::create_dir(self.bins()).unwrap();
        for name in ["bridge", "host-local"] {
            std::fs::write(self.bins().join(name), format!("the original {name}")).unwrap();
        }
        files(&self.bins())
    }

    /// Kills a command at the `n`-th of these system calls; `true`: it ended before.
    fn killed(&self, words: &str, calls: &str, n: usize) -> bool {
        let mut command = self.node.host.command("strace");
        command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("inject={calls}:signal=KILL:when={n}")]);
        command.arg(bin("twill")).args(words.split_whitespace()).stdin(Stdio::null());
        for (variable, name) in
            [("TWILL_RUN_DIR", "run"), ("TWILL_STATE_DIR", "state"), ("TWILL_SUBNET_FILE", "subnet.env")]
        {
            command.env(variable, self.node.file(name));
        }
        let out = command.output().unwrap();
        assert!(out.status.code().is_none_or(|code| code == 0), "{words}: {}", String::from_utf8_lossy(&out.stderr));
        for name in ["bridge", "host-local"] {
            assert!(self.bins().join(name).exists(), "{name} is missing after {n} of {words}");
        }
        out.status.success()
    }
}

/// Every file of a folder.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

#[test]
fn whenever_an_installation_an_upgrade_or_an_uninstallation_is_killed_the_originals_come_back() {
    let Some(site) = Site::new() else { return };
    let (a, b) = (format!("{} {TAKE}", site.install("a")), format!("{} {TAKE}", site.install("b")));
    let back = |when: &str, originals: &BTreeMap<String, Vec<u8>>| {
        site.run(&site.uninstall());
        assert_eq!(&files(&site.bins()), originals, "{when}");
        assert_eq!(std::fs::read_dir(site.node.file("net.d")).map_or(0, Iterator::count), 0, "{when}");
    };
    // What was done before, what is killed, and at how many calls at least.
    for (before, victim, calls) in [(None, &a, 7), (Some(&a), &b, 4), (Some(&a), &site.uninstall(), 5)] {
        for then in [None, Some(&b)] {
            let mut kills = 0;
            for call in CALLS {
                for n in 1.. {
                    let originals = site.originals();
                    before.into_iter().for_each(|words| site.run(words));
                    let ended = site.killed(victim, call, n);
                    then.into_iter().for_each(|words| site.run(words));
                    let stale = files(&site.bins()).into_keys().any(|name| name.starts_with('.'));
                    let when = format!("{before:?}, {victim} killed at {call} {n}, {then:?}");
                    assert!(then.is_none() || !stale, "{when}");
                    back(&when, &originals);
                    if ended {
                        break;
                    }
                    kills += 1;
                }
            }
            assert!(kills >= calls, "{victim} was killed at {kills} calls");
        }
    }
}

#[test]
fn a_newer_plugin_that_is_copied_by_hand_makes_no_original_of_ours() {
    let Some(site) = Site::new() else { return };
    let take = |release| site.run(&format!("{} {TAKE}", site.install(release)));
    for copied in ["twill-cni", "bridge", "flannel"] {
        for again in [None, Some("a"), Some("b")] {
            let originals = site.originals();
            take("a");
            std::fs::copy(site.node.file("b"), site.bins().join(copied)).unwrap();
            again.into_iter().for_each(take);
            site.run(&site.uninstall());
            assert_eq!(files(&site.bins()), originals, "{copied} copied, {again:?}");
        }
    }
    // What is no plugin of ours is not put in place.
    let originals = site.originals();
    let refused = site.node.twill(&site.install("bin/bridge")).1.unwrap_err();
    assert!(refused.contains("it is no twill-cni"), "{refused}");
    assert_eq!(files(&site.bins()), originals);
}
