//! README, "from the lab to real hosts": docker on two hosts, each on the subnet that its agent leased, reach each other.
//!
//! ```text
//!   host1 10.168.0.2 ─ eth0 ─────────── eth0 ─ 10.168.0.3 host2
//!     twill agent --serve-store           twill agent --store
//!     dockerd, bip from subnet.env        dockerd, bip from subnet.env
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

#[test]
fn containers_of_two_docker_daemons_reach_each_other() {
    if !rustix::process::geteuid().is_root() {
        return println!("SKIP: dockerd needs root");
    }
    if !["dockerd", "docker", "iptables", "busybox"].iter().all(|program| installed(program)) {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let (one, two) = (bed.host("one"), bed.host("two"));
    bed.wire(&one, "eth0", &two, "eth0");
    one.ip("addr add 10.168.0.2/24 dev eth0");
    two.ip("addr add 10.168.0.3/24 dev eth0");
    let dir = tempfile::tempdir().unwrap();

    let _first = agent(&one, dir.path(), &["--serve-store", "10.168.0.2:2379", "--insecure"]);
    let _second = agent(&two, dir.path(), &["--store", "http://10.168.0.2:2379"]);
    let daemons = [docker(&one, dir.path()), docker(&two, dir.path())];

    let image = image(dir.path());
    let mut addresses = Vec::new();
    for (_, socket) in &daemons {
        assert!(docker_cli(socket, &["import", image.to_str().unwrap(), "box:1"]).0);
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

/// dockerd on `host` as README.md sets it up: bip and mtu from subnet.env, and the other hosts let in.
fn docker(host: &Host, dir: &Path) -> (Daemon, PathBuf) {
    let home = dir.join(&host.name);
    let env = std::fs::read_to_string(home.join("subnet.env")).unwrap();
    let value = |key: &str| env.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('=')).unwrap().to_owned();
    let config =
        serde_json::json!({"bip": value("FLANNEL_SUBNET"), "mtu": value("FLANNEL_MTU").parse::<u32>().unwrap()});
    std::fs::write(home.join("daemon.json"), config.to_string()).unwrap();
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
    host.run("iptables -I DOCKER-USER -i flannel.1 -o docker0 -j ACCEPT");
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
    for name in ["ping", "sleep"] {
        std::os::unix::fs::symlink("busybox", bin.join(name)).unwrap();
    }
    let tar = dir.join("box.tar");
    assert!(
        Command::new("tar").arg("-C").arg(dir.join("rootfs")).arg("-cf").arg(&tar).arg(".").status().unwrap().success()
    );
    tar
}
