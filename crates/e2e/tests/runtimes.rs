//! Real container runtimes on two hosts, each on the subnet that its agent leased. Over each backend their containers reach each other
//! by their own addresses and the outside by their host's, and publish ports.
//!
//! ```text
//!   one 10.168.0.2 ─ eth0 ── br0 10.168.0.9 outside ── eth0 ─ 10.168.0.3 two
//!     twill agent --serve-store                          twill agent --store
//!     dockerd                                            dockerd             README, "from the lab to real hosts"
//!     podman, by twill-cni                               containerd, by twill-cni: `ctr`, and a pod as a kubelet starts it
//!     podman, by netavark                                podman, by twill-cni
//! ```

use std::borrow::BorrowMut;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use twill_e2e::net::{Bed, Host};
use twill_e2e::{bin, eventually, installed};

/// A daemon of the test: told to end, then ended, by pid.
struct Daemon(Child);

impl Daemon {
    fn end(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.0.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.0.wait();
    }

    /// What it has said, once it has ended.
    fn ended(mut self) -> String {
        self.end();
        let mut said = String::new();
        if let Some(stdout) = &mut self.0.stdout {
            stdout.read_to_string(&mut said).unwrap();
        }
        said
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
    }
}

/// Two hosts with their agents; all files of a host are below a folder of its name.
struct Site {
    hosts: [Host; 2],
    outside: Host,
    _agents: [Daemon; 2],
    image: PathBuf,
    dir: tempfile::TempDir,
    _bed: Bed,
}

/// Both agents run, by this backend. `None`: what the test needs is lacking, and it was said.
fn site(backend: &str, programs: &[&str]) -> Option<Site> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP: container runtimes need root");
        return None;
    }
    if !["busybox", "iptables", "etcdctl", "tcpdump"].iter().chain(programs).all(|program| installed(program)) {
        return None;
    }
    let bed = Bed::new()?;
    let hosts = [bed.host("one"), bed.host("two")];
    let outside = bed.host("outside");
    outside.ip("link add br0 type bridge");
    outside.ip("link set br0 up");
    outside.ip("addr add 10.168.0.9/24 dev br0");
    for (n, host) in hosts.iter().enumerate() {
        bed.wire(host, "eth0", &outside, &host.name);
        outside.ip(&format!("link set {} master br0", host.name));
        host.ip(&format!("addr add {}/24 dev eth0", ADDRESSES[n]));
        host.ip("route add default via 10.168.0.9");
    }
    let dir = tempfile::tempdir().unwrap();
    let first = agent(&hosts[0], dir.path(), &["--serve-store", "10.168.0.2:2379", "--insecure"]);
    let second = agent(&hosts[1], dir.path(), &["--store", "http://10.168.0.2:2379"]);
    let image = image(dir.path());
    let site = Site { hosts, outside, _agents: [first, second], image, dir, _bed: bed };
    site.switch_to(backend);
    Some(site)
}

/// Of the hosts, on the underlay.
const ADDRESSES: [&str; 2] = ["10.168.0.2", "10.168.0.3"];
/// The host port that leads to port 80 of a container.
const PORT: u16 = 8080;
/// What a container runs.
const SERVE: [&str; 7] = ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"];

/// A container that runs, and serves its name on port 80.
struct Container<'a> {
    /// Of its host.
    n: usize,
    address: String,
    by_netavark: bool,
    /// A command of busybox inside.
    exec: &'a dyn Fn(&[&str]) -> Command,
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

    /// The agents come with vxlan; another backend is one key in the store away.
    fn switch_to(&self, backend: &str) {
        let config = json!({"Network": "10.244.0.0/16", "Backend": {"Type": backend}}).to_string();
        let put = format!("etcdctl --endpoints 10.168.0.2:2379 put /coreos.com/network/config {config}");
        self.hosts[0].run(&put);
        let device = if backend == "udp" { "flannel0" } else { "flannel.1" };
        for n in 0..2 {
            eventually(&format!("{backend} runs"), || {
                let (status, links) = (self.twill(n, "status"), self.hosts[n].run("ip -br link"));
                let env = std::fs::read_to_string(self.home(n).join("subnet.env")).unwrap();
                let mtu = self.hosts[n].try_run(&format!("cat /sys/class/net/{device}/mtu")).stdout;
                let mtu = String::from_utf8(mtu).unwrap();
                if env.contains(&format!("FLANNEL_MTU={mtu}")) { Ok(()) } else { Err((status, links, env)) }
            });
        }
    }

    /// All that is promised to the containers of two hosts.
    fn joins(&self, containers: [&Container<'_>; 2]) {
        for (from, to) in [(containers[0], containers[1]), (containers[1], containers[0])] {
            // Netavark masquerades everything.
            let seen = if from.by_netavark { String::new() } else { format!("IP {}", from.address) };
            let sent = format!("{seen} > {}: ICMP echo request", to.address);
            self.pings(from, &to.address, &self.hosts[to.n], "any", &sent);
            eventually(&format!("{} serves {}", to.address, from.address), || {
                let url = format!("http://{}/name", to.address);
                let said = text((from.exec)(&["timeout", "2", "/bin/busybox", "wget", "-q", "-O", "-", &url]));
                if said.as_deref() == Ok("box") { Ok(()) } else { Err(said) }
            });
        }
        containers.iter().for_each(|container| self.reaches_the_outside(container));
    }

    /// The outside knows no way back to a container: it sees the host's address.
    fn reaches_the_outside(&self, container: &Container<'_>) {
        let sent = format!("IP {} > 10.168.0.9: ICMP echo request", ADDRESSES[container.n]);
        self.pings(container, "10.168.0.9", &self.outside, "br0", &sent);
    }

    /// A container has an answer from `to`; what it sent is seen `at` a device.
    fn pings(&self, from: &Container<'_>, to: &str, at: &Host, device: &str, sent: &str) {
        eventually(&format!("{} has an answer from {to}", from.address), || {
            let mut capture = at.command("tcpdump");
            capture.args(["-i", device, "-n", "-l", "-c", "1", "-Z", "root", "--immediate-mode", "-Q", "in"]);
            capture.arg(format!("icmp[0] == 8 and dst {to}")).stdin(Stdio::null()).stdout(Stdio::piped());
            let capture = Daemon(capture.stderr(Stdio::null()).spawn().unwrap());
            let answered = text((from.exec)(&["ping", "-c", "3", "-W", "1", to]));
            let seen = capture.ended();
            if answered.is_ok() && seen.contains(sent) {
                return Ok(());
            }
            Err((answered, seen, sent.to_owned(), self.hosts[from.n].run("nft list ruleset")))
        });
    }

    /// The outside is served by a host's port.
    fn publishes(&self, n: usize, port: u16) {
        let ask =
            format!(r#"exec 3<>/dev/tcp/{}/{port}; printf 'GET /name HTTP/1.0\r\n\r\n' >&3; cat <&3"#, ADDRESSES[n]);
        eventually("the published port answers", || {
            let mut command = self.outside.command("timeout");
            command.args(["2", "bash", "-c", &ask]);
            text(command).and_then(|said| if said.ends_with("\nbox") { Ok(()) } else { Err(said) })
        });
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
fn text(mut command: impl BorrowMut<Command>) -> Result<String, String> {
    let out = command.borrow_mut().stdin(Stdio::null()).output().unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if out.status.success() { Ok(said(&out.stdout)) } else { Err(said(&out.stderr) + &said(&out.stdout)) }
}

#[test]
fn containers_of_two_docker_daemons_reach_each_other_and_the_outside_and_publish_ports() {
    docker_over("vxlan");
}

#[test]
fn over_udp_containers_of_two_docker_daemons_reach_each_other_and_the_outside_and_publish_ports() {
    docker_over("udp");
}

fn docker_over(backend: &str) {
    let Some(site) = site(backend, &["dockerd", "docker"]) else { return };
    let daemons = [0, 1].map(|n| Docker::new(&site, n));
    let execs = [0, 1].map(|n: usize| {
        let docker = &daemons[n];
        move |words: &[&str]| docker.command(&[&["exec", "box", "/bin/busybox"], words].concat())
    });
    let addresses = [0, 1].map(|n: usize| {
        let docker = &daemons[n];
        docker.run(&["import", site.image.to_str().unwrap(), "box:1"]);
        docker.run(&[&["run", "--detach", "--name", "box", "--publish", "8080:80", "box:1"], &SERVE[..]].concat());
        docker.run(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "box"]).trim().to_owned()
    });
    let [one, two] =
        [0, 1].map(|n| Container { n, address: addresses[n].clone(), by_netavark: false, exec: &execs[n] });
    site.joins([&one, &two]);
    (0..2).for_each(|n| site.publishes(n, PORT));
    daemons.iter().for_each(|docker| drop(docker.run(&["rm", "--force", "box"])));
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
        let command = format!("CMD {}", json!(SERVE));
        podman.run(&["import", "--change", &command, site.image.to_str().unwrap(), "box:1"]);
        podman
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.host.command("podman");
        command.env("CONTAINERS_CONF", self.settings()).args(self.folders()).args(words);
        command
    }

    fn settings(&self) -> PathBuf {
        self.home.join("containers.conf")
    }

    fn folders(&self) -> Vec<String> {
        let folders = [("root", "store"), ("runroot", "runroot"), ("tmpdir", "tmp")];
        let folders = folders.map(|(flag, name)| format!("--{flag}={}", self.home.join(name).display()));
        folders.into_iter().chain(["--storage-driver=vfs".to_owned()]).collect()
    }

    fn run(&self, words: &[&str]) -> String {
        text(self.command(words)).unwrap_or_else(|e| panic!("podman {words:?}: {e}"))
    }

    /// Starts the container `box` on the network `twill`, published at [`PORT`]; gives its address.
    fn start(&self) -> String {
        let words = ["run", "--detach", "--name", "box", "--network", "twill", "--publish", "8080:80"];
        let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000", "box:1"];
        self.run(&[&words[..], &limits, &SERVE].concat());
        let address = self.run(&["inspect", "-f", "{{.NetworkSettings.Networks.twill.IPAddress}}", "box"]);
        address.trim().to_owned()
    }

    fn exec(&self, words: &[&str]) -> Command {
        self.command(&[&["exec", "box", "/bin/busybox"], words].concat())
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
            "version = 2\nroot = \"{0}/cd-root\"\nstate = \"{0}/cd-state\"\n[grpc]\naddress = \"{0}/cd.sock\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"localhost/box:1\"\ndisable_apparmor = true\n\
             disable_cgroup = true\nrestrict_oom_score_adj = true\nnetns_mounts_under_state_dir = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"native\"\n",
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

impl Containerd<'_> {
    /// A call of the kubelet's interface: one message of protobuf's wire format there, one back.
    fn cri(&self, call: &str, message: &[u8]) -> Result<Vec<u8>, String> {
        let (sent, answer) = (self.home.join("sent"), self.home.join("answer"));
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        std::fs::write(&sent, [&[0], &length[..], message].concat()).unwrap();
        let mut command = Command::new("curl");
        command.args(["-sS", "-m", "60", "--http2-prior-knowledge", "-D", "-", "-H", "content-type: application/grpc"]);
        command.args(["-H", "te: trailers", "--unix-socket"]).arg(self.home.join("cd.sock"));
        command.arg("--data-binary").arg(format!("@{}", sent.display())).arg("-o").arg(&answer);
        let said = text(command.arg(format!("http://localhost/runtime.v1.RuntimeService/{call}")))?;
        if !said.contains("grpc-status: 0") {
            return Err(said);
        }
        Ok(std::fs::read(answer).unwrap().split_off(5))
    }

    /// Starts a pod whose port 80 is published at [`PORT`]; its only container is the one that holds its network. Gives its name.
    fn start_pod(&self) -> String {
        let metadata = [text_field(1, "pod"), text_field(2, "pod"), text_field(3, "default")].concat();
        let port = [number_field(2, 80), number_field(3, PORT.into())].concat();
        let parts = [field(1, &metadata), text_field(2, "pod"), field(5, &port), field(8, &[])];
        let answer = self.cri("RunPodSandbox", &field(1, &parts.concat())).unwrap();
        String::from_utf8(answer[2..].to_vec()).unwrap()
    }

    fn stop_pod(&self, pod: &str) {
        ["StopPodSandbox", "RemovePodSandbox"]
            .iter()
            .for_each(|call| drop(self.cri(call, &text_field(1, pod)).unwrap()));
    }
}

/// A field of a protobuf message: of bytes shorter than 128.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

fn text_field(number: u8, text: &str) -> Vec<u8> {
    field(number, text.as_bytes())
}

/// A field that is a number.
fn number_field(number: u8, mut value: u32) -> Vec<u8> {
    let mut bytes = vec![number << 3];
    while value > 127 {
        bytes.push(value as u8 | 128);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        for words in [["task", "rm", "--force", "box"].as_slice(), &["container", "rm", "box"]] {
            let _ = self.ctr(words).output();
        }
    }
}

#[test]
fn podman_and_containerd_attach_by_the_plugin_reach_each_other_and_the_outside_and_publish_ports() {
    by_the_plugin_over("vxlan");
}

#[test]
fn over_udp_podman_and_containerd_attach_by_the_plugin_reach_each_other_and_the_outside_and_publish_ports() {
    by_the_plugin_over("udp");
}

fn by_the_plugin_over(backend: &str) {
    let Some(site) = site(backend, &["podman", "runc", "containerd", "ctr", "curl"]) else { return };
    let loopback = Path::new("/usr/lib/cni/loopback");
    if !loopback.exists() {
        return println!("SKIP: containernetworking-plugins is not installed");
    }
    (0..2).for_each(|n| site.install(n));
    let podman = Podman::new(&site, 0, "cni");
    let address = podman.start();
    let by_podman = Container { n: 0, address, by_netavark: false, exec: &|words| podman.exec(words) };
    let save = site.dir.path().join("saved.tar");
    podman.run(&["save", "--output", save.to_str().unwrap(), "localhost/box:1"]);
    // A pod's own, as kubelet's packages bring it.
    std::os::unix::fs::symlink(loopback, site.home(1).join("bin/loopback")).unwrap();
    let containerd = Containerd::new(&site, 1);
    for namespace in ["default", "k8s.io"] {
        let import = ["--namespace", namespace, "image", "import", "--snapshotter", "native", save.to_str().unwrap()];
        containerd.run(&import);
    }
    let run = ["run", "--detach", "--cni", "--snapshotter", "native", "localhost/box:1", "box"];
    containerd.run(&[&run[..], &SERVE].concat());
    let exec =
        |words: &[&str]| containerd.ctr(&[&["task", "exec", "--exec-id", "x", "box", "/bin/busybox"], words].concat());
    let shown = text(exec(&["ip", "-4", "addr", "show", "eth0"])).unwrap();
    let address = shown.split_whitespace().skip_while(|word| *word != "inet").nth(1).unwrap();
    let address = address.split('/').next().unwrap().to_owned();
    let by_ctr = Container { n: 1, address, by_netavark: false, exec: &exec };
    // Both addresses are the node's own, as its files say.
    for container in [&by_podman, &by_ctr] {
        let data = format!("--data-dir {}/state/networks", site.home(container.n).display());
        let listed: Value =
            serde_json::from_str(&site.twill(container.n, &format!("ipam list -o json {data}")).unwrap()).unwrap();
        let first = &listed["addresses"][0];
        assert_eq!((&first["address"], &first["state"]), (&json!(container.address), &json!("attached")));
    }
    site.joins([&by_podman, &by_ctr]);
    site.publishes(0, PORT);
    // `ctr` publishes nothing; a pod does.
    let pod = containerd.start_pod();
    site.publishes(1, PORT);
    containerd.stop_pod(&pod);
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
fn podmans_own_network_is_made_by_the_printed_line_reaches_the_other_host_and_the_outside_and_publishes_ports() {
    netavark_over("vxlan");
}

#[test]
fn over_udp_podmans_own_network_reaches_the_other_host_and_the_outside_and_publishes_ports() {
    netavark_over("udp");
}

fn netavark_over(backend: &str) {
    let Some(site) = site(backend, &["podman", "runc"]) else { return };
    if !Path::new("/usr/lib/podman/netavark").exists() {
        return println!("SKIP: netavark is not installed");
    }
    let own = Podman::new(&site, 0, "netavark");
    let line = site.twill(0, "cni podman").unwrap();
    // As it is typed, but for podman's own folders.
    let (before, after) = line.trim().split_once("podman ").unwrap();
    let mut command = site.hosts[0].command(before.split_whitespace().next().unwrap());
    command.args(before.split_whitespace().skip(1)).arg("podman").args(own.folders()).args(after.split_whitespace());
    text(command.env("CONTAINERS_CONF", own.settings())).unwrap_or_else(|e| panic!("{line}: {e}"));
    site.install(1);
    let by_plugin = Podman::new(&site, 1, "cni");
    let one = Container { n: 0, address: own.start(), by_netavark: true, exec: &|words| own.exec(words) };
    let two = Container { n: 1, address: by_plugin.start(), by_netavark: false, exec: &|words| by_plugin.exec(words) };
    site.joins([&one, &two]);
    (0..2).for_each(|n| site.publishes(n, PORT));
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
struct Docker {
    _daemon: Daemon,
    socket: PathBuf,
}

impl Docker {
    fn new(site: &Site, n: usize) -> Self {
        let (host, home) = (&site.hosts[n], site.home(n));
        let file = home.join("daemon.json");
        std::fs::write(&file, r#"{"log-level": "warn"}"#).unwrap();
        site.twill(n, &format!("docker install --file {}", file.display())).unwrap();
        let socket = home.join("docker.sock");
        let mut command = host.command("dockerd");
        let files =
            [("config-file", "daemon.json"), ("data-root", "data"), ("exec-root", "exec"), ("pidfile", "docker.pid")];
        for (flag, name) in files {
            command.arg(format!("--{flag}")).arg(home.join(name));
        }
        command.arg("--host").arg(format!("unix://{}", socket.display())).args(["--storage-driver", "vfs"]);
        let log = std::fs::File::create(home.join("docker.log")).unwrap();
        let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let docker = Docker { _daemon: Daemon(child), socket };
        eventually("dockerd answers", || {
            text(docker.command(&["info"])).map_err(|said| (said, std::fs::read_to_string(home.join("docker.log"))))
        });
        // Docker drops what it does not know; the agent's rules stand where docker leaves room for the rules of others.
        eventually("the agent's accepts stand in DOCKER-USER", || {
            let text = host.run("iptables -S DOCKER-USER");
            let first = text.lines().find(|line| line.starts_with("-A")).unwrap_or_default();
            if first.ends_with("-m comment --comment twill -j ACCEPT") { Ok(()) } else { Err(text) }
        });
        docker
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.arg("--host").arg(format!("unix://{}", self.socket.display())).args(words);
        command
    }

    fn run(&self, words: &[&str]) -> String {
        text(self.command(words)).unwrap_or_else(|e| panic!("docker {words:?}: {e}"))
    }
}

/// A root file system with nothing but busybox.
fn image(dir: &Path) -> PathBuf {
    let bin = dir.join("rootfs/bin");
    std::fs::create_dir_all(&bin).unwrap();
    let path = std::env::var_os("PATH").unwrap();
    let busybox = std::env::split_paths(&path).map(|d| d.join("busybox")).find(|p| p.is_file()).unwrap();
    std::fs::copy(busybox, bin.join("busybox")).unwrap();
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
    // The file is a link: it stays one, whether it leads to a file or not yet.
    let real = dir.path().join("kept/docker.json");
    std::fs::create_dir(dir.path().join("kept")).unwrap();
    std::fs::rename(&file, &real).unwrap();
    std::os::unix::fs::symlink("../kept/docker.json", &file).unwrap();
    for before in [Some(serde_json::json!({"log-level": "warn"})), None] {
        if before.is_none() {
            std::fs::remove_file(&real).unwrap();
        }
        for words in ["install", "uninstall"] {
            twill(words).unwrap();
            assert_eq!(std::fs::read_link(&file).unwrap(), Path::new("../kept/docker.json"), "{words}");
            let bip = std::fs::read_to_string(&real).is_ok_and(|text| text.contains("bip"));
            assert_eq!(bip, words == "install");
        }
        assert_eq!(std::fs::read(&real).ok().map(|text| serde_json::from_slice(&text).unwrap()), before);
    }
}
