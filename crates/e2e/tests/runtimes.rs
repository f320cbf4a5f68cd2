//! Real container runtimes on two hosts, each on the subnet that its agent leased: their containers reach each other.
//!
//! ```text
//!   one 10.168.0.2 ─ eth0 ─────────── eth0 ─ 10.168.0.3 two
//!     twill agent --serve-store         twill agent --store
//!     dockerd                           dockerd                    README, "from the lab to real hosts"
//!     podman, by twill-cni              containerd, by twill-cni
//!     podman, by netavark               podman, by twill-cni
//! ```

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use twill_e2e::net::{Bed, Host};
use twill_e2e::{bin, eventually, installed};

/// A daemon of the test: told to end, then ended, by pid.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.0.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

/// Two hosts with their agents; all files of a host are below a folder of its name.
struct Site {
    hosts: [Host; 2],
    _agents: [Daemon; 2],
    image: PathBuf,
    dir: tempfile::TempDir,
    _bed: Bed,
}

/// `None`: what the test needs is lacking, and it was said.
fn site(programs: &[&str]) -> Option<Site> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP: container runtimes need root");
        return None;
    }
    if !programs.iter().all(|program| installed(program)) {
        return None;
    }
    let bed = Bed::new()?;
    let (one, two) = (bed.host("one"), bed.host("two"));
    bed.wire(&one, "eth0", &two, "eth0");
    one.ip("addr add 10.168.0.2/24 dev eth0");
    two.ip("addr add 10.168.0.3/24 dev eth0");
    let dir = tempfile::tempdir().unwrap();
    let first = agent(&one, dir.path(), &["--serve-store", "10.168.0.2:2379", "--insecure"]);
    let second = agent(&two, dir.path(), &["--store", "http://10.168.0.2:2379"]);
    let image = image(dir.path());
    Some(Site { hosts: [one, two], _agents: [first, second], image, dir, _bed: bed })
}

impl Site {
    fn home(&self, n: usize) -> PathBuf {
        self.dir.path().join(&self.hosts[n].name)
    }

    /// Runs `twill WORDS` with the host's folders; gives its stdout.
    fn twill(&self, n: usize, words: &str) -> Result<String, String> {
        let home = self.home(n);
        let mut command = self.hosts[n].command(bin("twill"));
        command.args(words.split_whitespace()).env("TWILL_STATE_DIR", home.join("state"));
        command.env("TWILL_RUN_DIR", home.join("run")).env("TWILL_SUBNET_FILE", home.join("subnet.env"));
        text(command)
    }

    /// `twill cni install` into the host's folder.
    fn install(&self, n: usize) {
        let home = self.home(n);
        std::fs::create_dir_all(home.join("bin")).unwrap();
        let words = format!("cni install --bin-dir {0}/bin --conf-dir {0}/net.d", home.display());
        eventually("the node is ready", || self.twill(n, &words));
    }
}

/// The command's stdout, or what it says of its failure.
fn text(mut command: Command) -> Result<String, String> {
    let out = command.stdin(Stdio::null()).output().unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if out.status.success() { Ok(said(&out.stdout)) } else { Err(said(&out.stderr) + &said(&out.stdout)) }
}

#[test]
fn containers_of_two_docker_daemons_reach_each_other() {
    let Some(site) = site(&["dockerd", "docker", "iptables", "busybox"]) else { return };
    let daemons = [0, 1].map(|n| docker(&site, n));
    let mut addresses = Vec::new();
    for (_, socket) in &daemons {
        assert!(docker_cli(socket, &["import", site.image.to_str().unwrap(), "box:1"]).0);
        let (ok, text) = docker_cli(socket, &["run", "--detach", "--name", "box", "box:1", "/bin/sleep", "600"]);
        assert!(ok, "{text}");
        let (_, address) = docker_cli(socket, &["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "box"]);
        addresses.push(address.trim().to_owned());
    }
    for (from, to) in [(0, 1), (1, 0)] {
        eventually(&format!("{} reaches {}", addresses[from], addresses[to]), || {
            let (ok, text) = docker_cli(&daemons[from].1, &["exec", "box", "/bin/ping", "-c1", "-W1", &addresses[to]]);
            if ok { Ok(()) } else { Err(text) }
        });
    }
    for (_, socket) in &daemons {
        assert!(docker_cli(socket, &["rm", "--force", "box"]).0);
    }
}

/// podman on a host, all its files in the host's folder.
struct Podman<'a> {
    host: &'a Host,
    home: PathBuf,
}

impl<'a> Podman<'a> {
    fn new(site: &'a Site, n: usize, backend: &str) -> Self {
        let home = site.home(n);
        ["net.d", "bin"].iter().for_each(|folder| std::fs::create_dir_all(home.join(folder)).unwrap());
        let conf = format!(
            "[network]\nnetwork_backend = \"{backend}\"\ncni_plugin_dirs = [\"{0}/bin\"]\nnetwork_config_dir = \"{0}/net.d\"\n\
             [engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n",
            home.display()
        );
        std::fs::write(home.join("containers.conf"), conf).unwrap();
        let podman = Self { host: &site.hosts[n], home };
        podman.run(&["import", site.image.to_str().unwrap(), "box:1"]);
        podman
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.host.command("podman");
        command.env("CONTAINERS_CONF", self.home.join("containers.conf")).args(["--storage-driver", "vfs"]);
        for (flag, name) in [("--root", "store"), ("--runroot", "runroot"), ("--tmpdir", "tmp")] {
            command.arg(flag).arg(self.home.join(name));
        }
        command.args(words);
        command
    }

    fn run(&self, words: &[&str]) -> String {
        text(self.command(words)).unwrap_or_else(|e| panic!("podman {words:?}: {e}"))
    }

    /// Starts the container `box` on the network `twill`; gives its address.
    fn start(&self, more: &[&str]) -> String {
        let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"];
        let words = [&["run", "--detach", "--name", "box", "--network", "twill"], &limits[..], more].concat();
        self.run(&[&words[..], &["box:1", "/bin/httpd", "-f", "-p", "80", "-h", "/www"]].concat());
        let address = self.run(&["inspect", "-f", "{{.NetworkSettings.Networks.twill.IPAddress}}", "box"]);
        address.trim().to_owned()
    }

    fn reaches(&self, address: &str) {
        eventually(&format!("podman's container reaches {address}"), || {
            text(self.command(&["exec", "box", "/bin/ping", "-c1", "-W1", address]))
        });
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        let _ = self.command(&["rm", "--force", "--time", "0", "box"]).output();
    }
}

/// containerd on a host, in a mount namespace where `ctr` finds the plugin: it looks in /etc/cni and /opt/cni alone.
struct Containerd<'a> {
    daemon: Option<Daemon>,
    host: &'a Host,
    home: PathBuf,
}

impl<'a> Containerd<'a> {
    fn new(site: &'a Site, n: usize) -> Self {
        let home = site.home(n);
        let conf = format!(
            "version = 2\nroot = \"{0}/cd-root\"\nstate = \"{0}/cd-state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{0}/cd.sock\"\n",
            home.display()
        );
        std::fs::write(home.join("containerd.toml"), conf).unwrap();
        std::fs::create_dir_all(home.join("etc")).unwrap();
        std::fs::create_dir_all(home.join("work")).unwrap();
        let script = format!(
            "set -e; mount -t tmpfs none /opt; mkdir -p /opt/cni; ln -s {0}/bin /opt/cni/bin; \
             mount -t overlay -o lowerdir=/etc,upperdir={0}/etc,workdir={0}/work overlay /etc; rm -rf /etc/cni; mkdir /etc/cni; \
             ln -s {0}/net.d /etc/cni/net.d; exec containerd --config {0}/containerd.toml",
            home.display()
        );
        let log = std::fs::File::create(home.join("containerd.log")).unwrap();
        let mut command = site.hosts[n].command("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let containerd = Self { daemon: Some(Daemon(child)), host: &site.hosts[n], home };
        eventually("containerd answers", || {
            let log = || std::fs::read_to_string(containerd.home.join("containerd.log"));
            text(containerd.ctr(&["version"])).map_err(|e| (e, log()))
        });
        containerd
    }

    fn ctr(&self, words: &[&str]) -> Command {
        let mut command = self.host.command("nsenter");
        let daemon = self.daemon.as_ref().map_or(0, |daemon| daemon.0.id());
        command.arg(format!("--mount=/proc/{daemon}/ns/mnt")).args(["--", "ctr", "--address"]);
        command.arg(self.home.join("cd.sock")).args(words);
        command
    }

    fn run(&self, words: &[&str]) -> String {
        text(self.ctr(words)).unwrap_or_else(|e| panic!("ctr {words:?}: {e}"))
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        for words in [["task", "rm", "--force", "box"].as_slice(), &["container", "rm", "box"]] {
            let _ = self.ctr(words).output();
        }
    }
}

#[test]
fn podman_and_containerd_attach_by_the_plugin_reach_each_other_and_publish_ports() {
    let needs = ["podman", "runc", "containerd", "ctr", "busybox", "iptables"];
    let Some(site) = site(&needs) else { return };
    (0..2).for_each(|n| site.install(n));
    let podman = Podman::new(&site, 0, "cni");
    let first = podman.start(&["--publish", "8080:80"]);
    let save = site.dir.path().join("saved.tar");
    podman.run(&["save", "--output", save.to_str().unwrap(), "localhost/box:1"]);
    let containerd = Containerd::new(&site, 1);
    containerd.run(&["image", "import", "--snapshotter", "native", save.to_str().unwrap()]);
    let run = ["run", "--detach", "--cni", "--snapshotter", "native", "localhost/box:1", "box", "/bin/sleep", "600"];
    containerd.run(&run);
    let shown = containerd.run(&["task", "exec", "--exec-id", "show", "box", "/bin/ip", "-4", "addr", "show", "eth0"]);
    let second = shown
        .split_whitespace()
        .skip_while(|word| *word != "inet")
        .nth(1)
        .unwrap()
        .split('/')
        .next()
        .unwrap()
        .to_owned();
    // Both addresses are the node's own, as its files say.
    for (n, address) in [&first, &second].into_iter().enumerate() {
        let listed =
            site.twill(n, &format!("ipam list -o json --data-dir {}/state/networks", site.home(n).display())).unwrap();
        let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
        assert_eq!(
            (&listed["addresses"][0]["address"], &listed["addresses"][0]["state"]),
            (&address.as_str().into(), &"attached".into())
        );
    }
    podman.reaches(&second);
    eventually("containerd's container reaches podman's", || {
        text(containerd.ctr(&["task", "exec", "--exec-id", "ping", "box", "/bin/ping", "-c1", "-W1", &first]))
    });
    // The published port, from another host.
    let ask = r#"exec 3<>/dev/tcp/10.168.0.2/8080; printf 'GET /name HTTP/1.0\r\n\r\n' >&3; cat <&3"#;
    eventually("the published port answers", || {
        let mut command = site.hosts[1].command("timeout");
        command.args(["2", "bash", "-c", ask]);
        text(command).and_then(|said| if said.ends_with("\nbox") { Ok(()) } else { Err(said) })
    });
    // When they end, nothing is held any more. `ctr` of 1.6 calls no DEL for a container that runs detached: that is a leak.
    podman.run(&["rm", "--force", "--time", "0", "box"]);
    drop(containerd);
    for n in 0..2 {
        let data = format!("--data-dir {}/state/networks", site.home(n).display());
        eventually("the address is free", || {
            site.twill(n, &format!("ipam free --leaked {data}"))?;
            let listed = site.twill(n, &format!("ipam list {data}"))?;
            if listed.lines().count() == 1 { Ok(()) } else { Err(listed) }
        });
    }
}

#[test]
fn podmans_own_network_is_made_by_the_printed_line_and_reaches_the_other_host() {
    let Some(site) = site(&["podman", "runc", "busybox", "iptables"]) else { return };
    if !Path::new("/usr/lib/podman/netavark").exists() {
        return println!("SKIP: netavark is not installed");
    }
    let own = Podman::new(&site, 0, "netavark");
    let line = site.twill(0, "cni podman").unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[..3], ["podman", "network", "create"], "{line}");
    own.run(&words[1..]);
    let first = own.start(&[]);
    site.install(1);
    let by_plugin = Podman::new(&site, 1, "cni");
    let second = by_plugin.start(&[]);
    own.reaches(&second);
    by_plugin.reaches(&first);
}

/// An agent on `host`, with all its files below `dir`; gives it back once it has written subnet.env.
fn agent(host: &Host, dir: &Path, store: &[&str]) -> Daemon {
    let home = dir.join(&host.name);
    std::fs::create_dir_all(&home).unwrap();
    let child = host
        .command(bin("twill"))
        .args(["agent", "--iface", "eth0", "--state-dir"])
        .arg(home.join("state"))
        .arg("--run-dir")
        .arg(home.join("run"))
        .arg("--subnet-file")
        .arg(home.join("subnet.env"))
        .args(store)
        .stderr(std::fs::File::create(home.join("agent.log")).unwrap())
        .spawn()
        .unwrap();
    let daemon = Daemon(child);
    eventually("the agent writes subnet.env", || {
        std::fs::read_to_string(home.join("subnet.env"))
            .map_err(|e| (e, std::fs::read_to_string(home.join("agent.log"))))
    });
    daemon
}

/// dockerd on a host as README.md sets it up: `twill docker install`, and the other hosts let in.
fn docker(site: &Site, n: usize) -> (Daemon, PathBuf) {
    let (host, home) = (&site.hosts[n], site.home(n));
    let file = home.join("daemon.json");
    std::fs::write(&file, r#"{"log-level": "warn"}"#).unwrap();
    site.twill(n, &format!("docker install --file {}", file.display())).unwrap();
    let socket = home.join("docker.sock");
    let child = host
        .command("dockerd")
        .arg("--config-file")
        .arg(home.join("daemon.json"))
        .arg("--data-root")
        .arg(home.join("data"))
        .arg("--exec-root")
        .arg(home.join("exec"))
        .arg("--pidfile")
        .arg(home.join("docker.pid"))
        .arg("--host")
        .arg(format!("unix://{}", socket.display()))
        .args(["--storage-driver", "vfs"])
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(home.join("docker.log")).unwrap())
        .spawn()
        .unwrap();
    let daemon = Daemon(child);
    eventually("dockerd answers", || {
        let (ok, text) = docker_cli(&socket, &["info"]);
        if ok { Ok(()) } else { Err((text, std::fs::read_to_string(home.join("docker.log")))) }
    });
    // Docker drops what it does not know; the agent's rules stand where docker leaves room for the rules of others.
    eventually("the agent's accepts stand in DOCKER-USER", || {
        let text = host.run("iptables -S DOCKER-USER");
        let first = text.lines().find(|line| line.starts_with("-A")).unwrap_or_default();
        if first.ends_with("-m comment --comment twill -j ACCEPT") { Ok(()) } else { Err(text) }
    });
    (daemon, socket)
}

/// Runs the docker client against one daemon.
fn docker_cli(socket: &Path, words: &[&str]) -> (bool, String) {
    let out =
        Command::new("docker").arg("--host").arg(format!("unix://{}", socket.display())).args(words).output().unwrap();
    let text = if out.status.success() { out.stdout } else { out.stderr };
    (out.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// A root file system with nothing but busybox.
fn image(dir: &Path) -> PathBuf {
    let bin = dir.join("rootfs/bin");
    std::fs::create_dir_all(&bin).unwrap();
    let path = std::env::var_os("PATH").unwrap();
    let busybox = std::env::split_paths(&path).map(|d| d.join("busybox")).find(|p| p.is_file()).unwrap();
    std::fs::copy(busybox, bin.join("busybox")).unwrap();
    for name in ["ping", "sleep", "ip", "httpd"] {
        std::os::unix::fs::symlink("busybox", bin.join(name)).unwrap();
    }
    let www = dir.join("rootfs/www");
    std::fs::create_dir_all(&www).unwrap();
    std::fs::write(www.join("name"), "box").unwrap();
    let tar = dir.join("box.tar");
    assert!(
        Command::new("tar").arg("-C").arg(dir.join("rootfs")).arg("-cf").arg(&tar).arg(".").status().unwrap().success()
    );
    tar
}

#[test]
fn docker_install_merges_names_a_clash_and_uninstall_takes_its_keys_out() {
    let dir = tempfile::tempdir().unwrap();
    let (file, env) = (dir.path().join("docker/daemon.json"), dir.path().join("subnet.env"));
    let twill = |words: &str| {
        let mut command = Command::new(bin("twill"));
        command.args(["docker"]).args(words.split_whitespace()).arg("--file").arg(&file);
        command.env("TWILL_STATE_DIR", dir.path()).env("TWILL_SUBNET_FILE", &env);
        text(command)
    };
    let settings = || serde_json::from_slice::<serde_json::Value>(&std::fs::read(&file).unwrap()).unwrap();
    assert!(twill("install").unwrap_err().contains("hint: start `twill agent`"), "no lease yet");
    std::fs::write(
        &env,
        "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.15.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    )
    .unwrap();
    assert!(twill("install --dry-run").unwrap().contains("\"bip\": \"10.1.15.1/24\"") && !file.exists());
    let said = twill("install").unwrap();
    assert!(said.contains("systemctl restart docker"), "{said}");
    let keys = serde_json::json!({"bip": "10.1.15.1/24", "mtu": 1450, "ip-masq": false});
    assert_eq!(settings(), keys);
    // Another lease later on: our own keys follow.
    std::fs::write(
        &env,
        "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.16.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n",
    )
    .unwrap();
    twill("install").unwrap();
    assert_eq!((&settings()["bip"], &settings()["ip-masq"]), (&"10.1.16.1/24".into(), &true.into()));
    twill("uninstall").unwrap();
    assert!(!file.exists(), "it was made by the installation");
    // What a person has set stays as it is.
    let theirs = serde_json::json!({"log-level": "warn", "bip": "172.20.0.1/16"});
    std::fs::write(&file, theirs.to_string()).unwrap();
    let refused = twill("install").unwrap_err();
    assert!(
        refused.contains("\"bip\" is \"172.20.0.1/16\", and must be \"10.1.16.1/24\"") && refused.contains("hint:"),
        "{refused}"
    );
    assert_eq!(settings(), theirs);
    std::fs::write(&file, r#"{"log-level": "warn"}"#).unwrap();
    twill("install").unwrap();
    assert_eq!(settings()["log-level"], "warn");
    twill("uninstall").unwrap();
    assert_eq!(settings(), serde_json::json!({"log-level": "warn"}));
}
