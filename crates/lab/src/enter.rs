//! Going into a lab's namespaces from outside.

use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};

use twill_kernel::netns::{self, Netns};
use twill_kernel::process;

use crate::agent;
use crate::children::own_program;
use crate::error::{Act, LabError};
use crate::home::LabDir;
use crate::proto::{AgentState, LabState};

/// Enters the lab's user namespace, where it has one: from then on its network namespaces may be entered.
/// The process must not have a second thread.
pub fn user(state: &LabState) -> Result<(), LabError> {
    if !state.user_namespace {
        return Ok(());
    }
    let path = format!("/proc/{}/ns/user", state.pid);
    netns::enter_user(Path::new(&path)).act(|| "enter the lab's user namespace".into())
}

/// Opens a place's network namespace; [`user`] comes before.
pub fn open(state: &LabState, place: &str) -> Result<Netns, LabError> {
    let path = state.netns(place)?;
    Netns::open(Path::new(&path)).act(|| format!("open the network namespace of {place}"))
}

/// Opens every place's network namespace; [`user`] comes before.
pub fn open_all(state: &LabState) -> Result<Vec<(String, Netns)>, LabError> {
    state.places().into_iter().map(|(place, _)| Ok((place.clone(), open(state, &place)?))).collect()
}

/// Runs a command in a place, with this process's own stdin, stdout and stderr. It ends with the lab.
/// The process must not have a second thread, and stays in the place.
pub fn exec(state: &LabState, dir: &LabDir, place: &str, words: &[OsString]) -> Result<ExitStatus, LabError> {
    let mut command = inside(state, place)?;
    command.envs(settings(state, dir, place)?);
    let mut child = command.args(words).spawn().act(|| format!("start a command in {place}"))?;
    child.wait().act(|| format!("wait for the command in {place}"))
}

/// What this very program prints in a place.
pub fn output(netns: &Netns, words: &[&str]) -> Result<String, LabError> {
    let mut command = own_program()?;
    let act = || format!("run twill {}", words.join(" "));
    let ran = netns.run(|| command.args(words).output()).and_then(|ran| ran).act(act)?;
    if !ran.status.success() {
        let said = String::from_utf8_lossy(&ran.stderr);
        return Err(LabError::new("lab-failed", format!("{}: {}", act(), said.trim_end())));
    }
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}

/// What an agent's host tells this program's other commands: those of a real host need no flags either.
fn settings(state: &LabState, dir: &LabDir, place: &str) -> Result<Vec<(&'static str, OsString)>, LabError> {
    let host = state.hosts.iter().find(|host| host.name == place && host.agent != AgentState::None);
    let Some(host) = host else { return Ok(Vec::new()) };
    let folder = dir.node(place);
    let subnets = [host.subnet].into_iter().chain(host.second.map(|(_, subnet)| subnet));
    let subnets = subnets.map(|subnet| subnet.to_string()).collect::<Vec<_>>().join(",");
    Ok(vec![
        ("TWILL_CONFIG", agent::settings(&folder).into()),
        ("TWILL_STORE", state.store_url()?.into()),
        ("TWILL_IFACE", agent::IFACE.into()),
        ("TWILL_SUBNET", subnets.into()),
        ("TWILL_STATE_DIR", agent::state_dir(&folder).into()),
        ("TWILL_RUN_DIR", agent::run_dir(&folder).into()),
        ("TWILL_SUBNET_FILE", agent::subnet_file(&folder).into()),
        // Where the lab writes down its containers' addresses.
        ("TWILL_IPAM_DIR", folder.join("networks").into()),
    ])
}

/// `lab inside -- …`, to be run in a place.
fn inside(state: &LabState, place: &str) -> Result<Command, LabError> {
    user(state)?;
    let netns = open(state, place)?;
    let path = format!("/proc/{}/ns/pid", state.pid);
    netns::enter_pid(Path::new(&path)).act(|| "enter the lab's PID namespace".into())?;
    netns.enter().act(|| format!("enter the network namespace of {place}"))?;
    let mut command = own_program()?;
    command.args(["lab", "inside", "--"]);
    Ok(command)
}

/// Becomes the command that [`exec`] was asked for; it ends with the client. Only comes back when that fails.
#[expect(clippy::disallowed_methods, reason = "it is the user's own command that becomes this process")]
pub fn become_command(words: &[OsString]) -> std::io::Error {
    process::die_with_parent();
    // One is root in there: root's programs are found, also from a user's shell that does not know their folders.
    let mut path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    // This very program is found as well, wherever it lies.
    if let Some(folder) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
        path.push(":");
        path.push(folder);
    }
    match words.split_first() {
        Some((program, rest)) => Command::new(program).args(rest).env("PATH", path).exec(),
        None => std::io::Error::from(std::io::ErrorKind::InvalidInput),
    }
}

/// The exit code that a shell would give: a signal is 128 and its number.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
