//! The firewalls of others on a host: Debian's firewalld, docker and iptables as they are, and the rule set of kube-proxy's nftables mode.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::eventually;
use crate::net::Host;

/// Which one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foreign {
    /// `iptables` and `ip6tables` of nftables, whose forward chains drop.
    IptablesNft,
    /// The same of legacy iptables.
    IptablesLegacy,
    /// firewalld, which rejects what it does not know.
    Firewalld,
    /// dockerd, which makes the policy of FORWARD drop.
    Docker,
    /// The same where `iptables` is the legacy one.
    DockerLegacy,
    /// kube-proxy's nftables mode: a forward chain that rejects the addresses of services without endpoints.
    KubeProxy,
}

/// What `twill agent --check` asks to be opened between all nodes, and the store's, in the words of firewalld.
pub const OPEN: [&str; 3] = ["--add-port=8472/udp", "--add-port=8285/udp", "--add-port=2379/tcp"];

/// Programs that run as long as this lives; rules stay.
#[derive(Debug, Default)]
pub struct Running {
    children: Vec<Child>,
    /// firewalld's bus.
    bus: String,
}

impl Running {
    /// `firewall-cmd WORDS`, which must work.
    pub fn ask(&self, host: &Host, words: &[&str]) {
        let mut command = host.command("firewall-cmd");
        let out = command.args(words).env("DBUS_SYSTEM_BUS_ADDRESS", &self.bus).output().unwrap();
        assert!(out.status.success(), "{words:?}: {out:?}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            let _ = kill_process(Pid::from_child(child), Signal::TERM);
            let _ = child.wait();
        }
    }
}

/// kube-proxy's chains as far as they filter and masquerade. The peer's network stands where services without endpoints do.
const KUBE_PROXY: &str = "table IPV kube-proxy {
  set cluster-ips { type IPV_addr; flags interval; elements = { NETWORK } }
  map no-endpoint-services { type IPV_addr . inet_proto . inet_service : verdict; }
  chain filter-forward {
    type filter hook forward priority -110; policy accept;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }
  chain service-endpoints-check {
    IPH daddr . meta l4proto . th dport vmap @no-endpoint-services
  }
  chain cluster-ips-check {
    IPH daddr @cluster-ips reject
    IPH daddr SERVICES drop
  }
  chain nat-postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    jump masquerading
  }
  chain masquerading {
    meta mark & 0x00004000 == 0 return
    meta mark set meta mark ^ 0x00004000
    masquerade fully-random
  }
}
";

impl Foreign {
    /// Programs that this host must have.
    pub fn needs(self) -> &'static [&'static str] {
        match self {
            Foreign::IptablesNft => &["iptables-nft", "ip6tables-nft"],
            Foreign::IptablesLegacy => &["iptables-legacy", "ip6tables-legacy"],
            Foreign::Firewalld => &["firewalld", "firewall-cmd", "dbus-daemon"],
            Foreign::Docker => &["dockerd", "docker", "iptables-nft"],
            Foreign::DockerLegacy => &["dockerd", "docker", "iptables-legacy"],
            Foreign::KubeProxy => &["nft"],
        }
    }

    /// True for programs that run as the host's root only.
    pub fn needs_root(self) -> bool {
        matches!(self, Foreign::Firewalld | Foreign::Docker | Foreign::DockerLegacy)
    }

    /// Starts it in the host's namespace, files below `dir`.
    pub fn start(self, host: &Host, dir: &Path) -> Running {
        match self {
            Foreign::IptablesNft => {
                for program in ["iptables-nft", "ip6tables-nft"] {
                    host.run(&format!("{program} -A FORWARD -m conntrack --ctstate INVALID -j DROP"));
                    host.run(&format!("{program} -P FORWARD DROP"));
                }
                Running::default()
            }
            Foreign::IptablesLegacy => {
                for program in ["iptables-legacy", "ip6tables-legacy"] {
                    host.run(&format!("{program} -w -P FORWARD DROP"));
                }
                Running::default()
            }
            Foreign::KubeProxy => {
                for (ip, header, network, services) in [
                    ("ipv4", "ip", "10.1.16.0/24", "10.96.0.0/12"),
                    ("ipv6", "ip6", "fd00:1:0:10::/64", "fd00:96::/108"),
                ] {
                    let text = KUBE_PROXY.replace("IPV_addr", &format!("{ip}_addr")).replace("IPV", header);
                    let text = text.replace("IPH", header).replace("NETWORK", network).replace("SERVICES", services);
                    host.feed("nft -f -", &text);
                }
                Running::default()
            }
            Foreign::Firewalld => firewalld(host, dir),
            Foreign::Docker => docker(host, dir, "nft"),
            Foreign::DockerLegacy => docker(host, dir, "legacy"),
        }
    }
}

fn quiet(mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// firewalld on a bus of its own, with the ports open that the nodes need.
fn firewalld(host: &Host, dir: &Path) -> Running {
    let (bus, config) = (dir.join("bus"), dir.join("bus.conf"));
    let allow = ["method_call", "method_return", "error", "signal"]
        .map(|kind| format!(r#"<allow send_type="{kind}"/><allow receive_type="{kind}"/>"#))
        .concat();
    let text = format!(
        r#"<busconfig><type>system</type><listen>unix:path={}</listen><auth>EXTERNAL</auth><policy context="default"><allow user="*"/><allow own="*"/>{allow}</policy></busconfig>"#,
        bus.display()
    );
    std::fs::write(&config, text).unwrap();
    let address = format!("unix:path={}", bus.display());
    let mut command = host.command("dbus-daemon");
    command.arg(format!("--config-file={}", config.display())).args(["--nofork", "--nopidfile"]);
    let mut all = Running { children: vec![quiet(command)], bus: address.clone() };
    eventually("the bus listens", || if bus.exists() { Ok(()) } else { Err(()) });
    let mut command = host.command("firewalld");
    command.args(["--nofork", "--nopid", "--system-config"]).arg(dir.join("firewalld"));
    command.arg("--log-file").arg(dir.join("firewalld.log")).env("DBUS_SYSTEM_BUS_ADDRESS", &address);
    std::fs::create_dir_all(dir.join("firewalld")).unwrap();
    all.children.push(quiet(command));
    // As an admin opens them.
    eventually("firewalld opens the ports", || {
        let mut command = host.command("firewall-cmd");
        command.args(OPEN);
        let out = command.env("DBUS_SYSTEM_BUS_ADDRESS", &address).output().unwrap();
        if out.status.success() { Ok(()) } else { Err(out) }
    });
    all
}

/// dockerd with a bridge of its own, and with `iptables` of the back end that is named.
fn docker(host: &Host, dir: &Path, back_end: &str) -> Running {
    let home = dir.join("docker");
    std::fs::create_dir_all(home.join("bin")).unwrap();
    for program in ["iptables", "ip6tables"] {
        let target = format!("/usr/sbin/xtables-{back_end}-multi");
        std::os::unix::fs::symlink(target, home.join("bin").join(program)).unwrap();
    }
    let path = format!("{}:{}", home.join("bin").display(), std::env::var("PATH").unwrap());
    let socket = home.join("docker.sock");
    let mut command = host.command("dockerd");
    command.arg("--host").arg(format!("unix://{}", socket.display())).args(["--storage-driver", "vfs"]);
    for (flag, name) in
        [("--data-root", "data"), ("--exec-root", "exec"), ("--pidfile", "pid"), ("--config-file", "daemon.json")]
    {
        command.arg(flag).arg(home.join(name));
    }
    // Docker 20.10 has ip6tables among its experiments.
    let config = r#"{"log-level": "warn", "bip": "172.30.0.1/24", "ipv6": true, "fixed-cidr-v6": "fd00:172:30::/64",
        "experimental": true, "ip6tables": true}"#;
    std::fs::write(home.join("daemon.json"), config).unwrap();
    command.env("PATH", path);
    let log = std::fs::File::create(home.join("log")).unwrap();
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let running = Running { children: vec![child], bus: String::new() };
    eventually("dockerd answers", || {
        let mut command = Command::new("docker");
        let out = command.arg("--host").arg(format!("unix://{}", socket.display())).arg("info").output().unwrap();
        if out.status.success() { Ok(()) } else { Err((out, std::fs::read_to_string(home.join("log")))) }
    });
    running
}
