//! A CNI runtime for tests: calls a plugin as container runtimes do, on a [`Host`], with its files in a folder of its own.

use std::borrow::BorrowMut;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::bin;
use crate::net::{Bed, Host};

/// A host whose containers a plugin attaches.
#[derive(Debug)]
pub struct Runtime {
    /// The host.
    pub host: Host,
    dir: PathBuf,
    bed: Bed,
}

/// One call of a plugin.
#[derive(Debug, Clone)]
pub struct Call<'a> {
    /// CNI_COMMAND.
    pub verb: &'a str,
    /// The configuration.
    pub conf: &'a Value,
    /// CNI_CONTAINERID.
    pub id: &'a str,
    /// CNI_NETNS.
    pub netns: Option<String>,
    /// CNI_ARGS.
    pub args: &'a str,
}

impl Runtime {
    /// A host without any device, and a lease of 10.1.15.0/24 and fd00:15::/64.
    pub fn new(bed: Bed, dir: &Path) -> Self {
        let runtime = Self { host: bed.host("host"), dir: dir.to_owned(), bed };
        runtime.lease("10.1.15.1/24");
        runtime
    }

    /// Writes subnet.env as the agent does.
    pub fn lease(&self, gateway: &str) {
        let env = format!(
            "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET={gateway}\nFLANNEL_IPV6_NETWORK=fd00::/48\n\
             FLANNEL_IPV6_SUBNET=fd00:0:0:15::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
        std::fs::write(self.file("subnet.env"), env).unwrap();
    }

    /// Joins the host's eth0 (10.168.0.2, fd00:168::2) to that of `outside` (…3).
    pub fn wire_to(&self, outside: &Host) {
        self.bed.wire(&self.host, "eth0", outside, "eth0");
        for (host, n) in [(&self.host, 2), (outside, 3)] {
            host.ip(&format!("addr add 10.168.0.{n}/24 dev eth0"));
            host.ip(&format!("addr add fd00:168::{n}/64 dev eth0 nodad"));
        }
    }

    /// A file of this host.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A container: a namespace with a loopback device.
    pub fn container(&self, name: &str) -> Host {
        self.bed.host(name)
    }

    /// Our own configuration, all files in this host's folder, with more keys.
    pub fn conf(&self, version: &str, more: Value) -> Value {
        let mut conf = json!({"cniVersion": version, "name": "net", "type": "twill-cni", "bridge": "cni0",
            "subnetFile": self.file("subnet.env"), "stateDir": self.file("state"), "ipam": {"dataDir": self.file("networks")}});
        merge(&mut conf, more);
        conf
    }

    /// A command that makes this call by `program`; stdin is the configuration's.
    pub fn command(&self, program: &Path, call: &Call<'_>) -> Command {
        let mut command = self.host.command(program);
        command.env("CNI_COMMAND", call.verb).env("CNI_PATH", "/opt/cni/bin").env("CNI_ARGS", call.args);
        command.env("CNI_CONTAINERID", call.id).env("CNI_IFNAME", "eth0");
        match &call.netns {
            Some(netns) => command.env("CNI_NETNS", netns),
            None => command.env_remove("CNI_NETNS"),
        };
        command
    }

    /// Makes a call; gives what the plugin says, or its error object. Nothing said is `null`.
    pub fn call(&self, call: &Call<'_>) -> Result<Value, Value> {
        self.finish(self.command(&bin("twill-cni"), call), call.conf)
    }

    /// Runs a command with a configuration on stdin.
    pub fn finish(&self, mut command: Command, conf: &Value) -> Result<Value, Value> {
        self.finish_raw(&mut command, conf.to_string().as_bytes())
    }

    /// The same, with any bytes.
    pub fn finish_raw(&self, command: &mut Command, stdin: &[u8]) -> Result<Value, Value> {
        let out = start(command.stderr(Stdio::piped()), stdin).wait_with_output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let said = if text.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
        };
        let err = String::from_utf8_lossy(&out.stderr);
        assert!(err.is_empty() || out.status.code().is_none(), "{err}");
        if out.status.success() { Ok(said) } else { Err(said) }
    }

    /// ADD, which must work.
    pub fn add(&self, conf: &Value, id: &str, container: &Host) -> Value {
        self.try_verb("ADD", conf, id, Some(container)).unwrap_or_else(|e| panic!("ADD {id}: {e:#}"))
    }

    /// DEL, which must work.
    pub fn del(&self, conf: &Value, id: &str, container: Option<&Host>) {
        let said = self.try_verb("DEL", conf, id, container).unwrap_or_else(|e| panic!("DEL {id}: {e:#}"));
        assert_eq!(said, Value::Null);
    }

    /// Any verb for one container.
    pub fn try_verb(&self, verb: &str, conf: &Value, id: &str, container: Option<&Host>) -> Result<Value, Value> {
        self.call(&Call { verb, conf, id, netns: container.map(netns), args: "" })
    }

    /// Addresses that are held, by their files.
    pub fn held(&self) -> Vec<String> {
        let names = names(&self.file("networks/net"));
        names.into_iter().filter(|name| name.parse::<std::net::IpAddr>().is_ok()).collect()
    }

    /// Attachment files, and whatever else is there but the one that the next is made of.
    pub fn attachments(&self) -> Vec<String> {
        names(&self.file("state/attachments")).into_iter().filter(|name| name != ".spare").collect()
    }

    /// Everything that a failed call must leave as it was: devices, addresses, routes, files.
    pub fn everything(&self) -> Value {
        let lines = |shown: Value, words: fn(&Value) -> Vec<String>| -> BTreeSet<String> {
            shown.as_array().unwrap().iter().flat_map(words).collect()
        };
        // An IPv6 address of the link's own comes when the kernel is done with asking.
        let addresses = |link: &Value| {
            let of_link = link["addr_info"].as_array().unwrap().iter().filter(|info| info["scope"] == "global");
            of_link.map(|info| format!("{} {}/{}", link["ifname"], info["local"], info["prefixlen"])).collect()
        };
        let route = |route: &Value| vec![format!("{} {} {}", route["dst"], route["gateway"], route["dev"])];
        json!({"links": self.links(), "addresses": lines(self.host.json("addr"), addresses),
            "routes": lines(self.host.json("route"), route), "held": self.held(), "attachments": self.attachments()})
    }

    /// Names of the host's devices.
    pub fn links(&self) -> Vec<String> {
        let links = self.host.json("link");
        links.as_array().unwrap().iter().map(|link| link["ifname"].as_str().unwrap().to_owned()).collect()
    }
}

/// Starts a command with these bytes on stdin; its stdout is kept.
pub fn start(mut command: impl BorrowMut<Command>, stdin: &[u8]) -> Child {
    let mut child = command.borrow_mut().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // A plugin that is killed does not read.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child
}

/// A container's namespace as a path.
pub fn netns(container: &Host) -> String {
    format!("/proc/{}/ns/net", container.pid())
}

/// Puts the keys of `more` into `conf`, objects into objects.
pub fn merge(conf: &mut Value, more: Value) {
    match (conf, more) {
        (Value::Object(conf), Value::Object(more)) => {
            more.into_iter().for_each(|(key, value)| merge(conf.entry(key).or_insert(Value::Null), value));
        }
        (conf, more) => *conf = more,
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
