//! A stream that is masqueraded outlives its agent, in each family: no byte is lost, and the connection keeps its place.
//!
//! ```text
//!   container 10.1.15.2, fd00:1:0:f::2 ─ cni0 ─ node ─ eth0 10.168.0.2, fd00:168::2 ───── eth0 10.168.0.3, fd00:168::3 ─ other: reads
//! ```

use std::path::PathBuf;
use std::process::{Child, Stdio};

use rustix::process::Signal;
use twill_e2e::net::Bed;
use twill_e2e::site::Site;
use twill_e2e::{eventually, installed};

/// Numbers, one in each line, from the container to the outside.
struct Stream {
    to: &'static str,
    file: PathBuf,
    ends: [Child; 3],
}

impl Stream {
    fn start(site: &Site, to: &'static str, name: &str) -> Stream {
        let file = site.node.file(name);
        let port = if to.contains(':') { "7006" } else { "7004" };
        let mut reader = site.node.other.command("busybox");
        // At the end of its input it would say so, and the other end leave.
        reader.args(["nc", "-l", "-p", port]).stdin(Stdio::piped());
        let reader = reader.stdout(std::fs::File::create(&file).unwrap()).spawn().unwrap();
        eventually("somebody listens", || {
            let listening = site.node.other.run("ss -Htln");
            if listening.contains(port) { Ok(()) } else { Err(listening) }
        });
        let mut counter = site.container.command("sh");
        counter.args(["-c", "n=0; while echo $n; do n=$((n+1)); sleep 0.02; done"]).stdin(Stdio::null());
        let mut counter = counter.stdout(Stdio::piped()).spawn().unwrap();
        let mut writer = site.container.command("busybox");
        let writer = writer.args(["nc", to, port]).stdin(counter.stdout.take().unwrap()).spawn().unwrap();
        Stream { to, file, ends: [counter, writer, reader] }
    }

    /// How many numbers have come: each one more than the one before.
    fn come(&self) -> usize {
        let text = std::fs::read_to_string(&self.file).unwrap();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let numbers: Vec<usize> = whole.lines().map(|line| line.parse().unwrap()).collect();
        assert!(numbers.iter().enumerate().all(|(n, number)| n == *number), "{numbers:?}");
        numbers.len()
    }

    /// Waits until ten more have come.
    fn flows(&self, when: &str) {
        let before = self.come();
        eventually(&format!("{when} bytes flow to {}", self.to), || {
            let now = self.come();
            if now >= before + 10 { Ok(()) } else { Err((before, now)) }
        });
    }

    /// The connection as the node tracks it: its number, its ends, and that it is established.
    fn tracked(&self, site: &Site) -> String {
        let family = if self.to.contains(':') { "ipv6" } else { "ipv4" };
        let words = ["-L", "-o", "id", "-f", family, "-p", "tcp", "-d", self.to];
        let out = site.node.host.command("conntrack").args(words).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        // Without the seconds that it has left.
        let words: Vec<&str> = text.split_whitespace().filter(|word| word.parse::<u32>().is_err()).collect();
        words.join(" ")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        for child in &mut self.ends {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_masqueraded_stream_outlives_its_agent() {
    let Some(bed) = Bed::new() else { return };
    if !["busybox", "conntrack", "etcdctl", "nft", "ss"].iter().all(|program| installed(program)) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let site = Site::new(bed, dir.path());
    site.speak_ipv6();
    let config = r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"udp"}}"#;
    for backend in ["vxlan", "udp"] {
        site.node.put("config", &config.replace("udp", backend));
        let mut agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
        if backend == "vxlan" {
            site.plug();
            site.plug6();
        }
        let streams = [("10.168.0.3", "10.168.0.2"), ("fd00:168::3", "fd00:168::2")]
            .map(|(to, node)| (Stream::start(&site, to, &format!("{backend}-{to}")), node));
        let before = streams.each_ref().map(|(stream, node)| {
            stream.flows("at first");
            let tracked = stream.tracked(&site);
            assert!(tracked.contains("ESTABLISHED") && tracked.contains(&format!("dst={node} ")), "{tracked}");
            tracked
        });
        // What changes in nftables from here on, by anybody.
        let log = site.node.file(&format!("{backend}-monitor"));
        let mut monitor = site.node.host.command("nft");
        monitor.arg("monitor").stdin(Stdio::null()).stdout(std::fs::File::create(&log).unwrap());
        let mut monitor = monitor.spawn().unwrap();
        eventually("nft tells of changes", || {
            site.node.host.try_run("nft add table ip shown");
            site.node.host.try_run("nft delete table ip shown");
            let seen = std::fs::read_to_string(&log).unwrap();
            if seen.contains("shown") { Ok(()) } else { Err(seen) }
        });
        let flow = |when: &str| streams.iter().for_each(|(stream, _)| stream.flows(when));
        for signal in [Signal::TERM, Signal::KILL] {
            agent.end(signal);
            flow("without an agent");
            agent = site.node.agent("");
            flow("with the next one");
        }
        monitor.kill().unwrap();
        monitor.wait().unwrap();
        let told = std::fs::read_to_string(&log).unwrap();
        assert!(!told.contains("twill"), "a restart changes nothing: {told}");
        // Even a firewall that is flushed meanwhile takes no connection away.
        site.node.host.run("nft flush ruleset");
        flow("after a flush");
        for ((stream, _), before) in streams.iter().zip(before) {
            assert_eq!(stream.tracked(&site), before);
        }
        agent.end(Signal::TERM);
        assert_eq!(site.node.twill("clean").0, Some(0));
    }
}
