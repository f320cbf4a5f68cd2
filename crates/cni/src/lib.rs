//! The CNI plugin: ADD, DEL, CHECK, STATUS, GC and VERSION of the specification 1.1.0, in one program.
//!
//! - [`mod@env`], [`conf`]: what the runtime and the configuration say, checked once; [`clear`]: what of it concerns who leaves
//! - [`ipam`]: which addresses are held; [`records`]: which attachments there are; [`ports`]: what they ask of the firewall
//! - [`verb`]: one file for each verb; devices are made by `kernel::attach`, as in the lab; [`beside`]: who takes the addresses meanwhile
//! - [`mod@sweep`]: what containers have left that are gone
//! - [`result`], [`error`]: what is answered
//!
//! ```text
//!   ADD: look at both namespaces ────────────────────▶ bridge, pair, routes ─▶ answer
//!   beside it: lock ─ choose ─ write down ─ take ─ unlock ─▶ disk ──────────────┘
//!                                  └─ its file is locked: nobody takes it for a leak
//!   DEL: pair away ─▶ rules away ─▶ lock ─ free ─ unlock ─▶ forget ─▶ disk ─▶ answer
//! ```

pub mod beside;
pub mod clear;
pub mod conf;
pub mod env;
pub mod error;
pub mod ipam;
mod masquerade;
pub mod ports;
pub mod records;
pub mod result;
pub mod sweep;
pub mod verb;

use beside::Beside;
use clear::Clear;
use conf::Conf;
use env::{Target, Vars, Verb};
use error::CniError;
use records::Records;
use result::Version;
use twill_core::host::Object;

/// What the program of every release says of itself, after name and version: `twill cni` knows it by these bytes, so they never change.
pub const ABOUT: &str = ": a CNI plugin, run by container runtimes; speaks CNI ";

/// What goes to stdout, and whether it is an error.
pub type Said = Result<String, String>;

/// One call that was done.
#[derive(Debug)]
pub struct Done {
    /// The answer.
    pub said: Said,
    /// The host's sysctls that an ADD has switched, as they were.
    switched: Vec<Object>,
}

/// Runs one call: the environment says which, stdin is the configuration. For an ADD there may be a thread beside this one.
pub fn run(vars: Vars<'_>, stdin: &[u8], beside: &Beside) -> Done {
    match answer(vars, stdin, beside) {
        Ok((said, switched)) => Done { said: Ok(said), switched },
        Err(error) => Done { said: Err(error.to_json(&conf::version_of(stdin))), switched: Vec::new() },
    }
}

/// Takes back an ADD that was done and could not be answered; of any other call there is nothing to take back.
pub fn take_back(done: Done, vars: Vars<'_>, stdin: &[u8]) -> Said {
    let back = || {
        let (conf, target) = (Clear::parse(stdin)?, Target::leaving(vars)?);
        let switched = verb::add::switch_back(&done.switched, &Records::new(conf.attachments()), &target);
        verb::all([switched, verb::del::run(&conf, &target).map(drop)])
    };
    match (done.said, env::verb(vars)) {
        (Ok(_), Ok(Verb::Add)) => back().map(|()| String::new()).map_err(|e| e.to_json(&conf::version_of(stdin))),
        (said, _) => said.map(|_| String::new()),
    }
}

fn answer(vars: Vars<'_>, stdin: &[u8], beside: &Beside) -> Result<verb::add::Added, CniError> {
    let verb = env::verb(vars)?;
    let conf = || Conf::parse(stdin);
    let said = match verb {
        Verb::Add => return verb::add::run(conf()?, Target::read(vars)?, beside),
        Verb::Del => verb::del::run(&Clear::parse(stdin)?, &Target::leaving(vars)?),
        Verb::Check => verb::check::run(conf()?, &Target::read(vars)?),
        Verb::Status => verb::status::run(&conf()?),
        Verb::Gc => verb::gc::run(&Clear::parse(stdin)?),
        Verb::Version => Ok(Version::list(&conf::version_of(stdin))),
    };
    said.map(|said| (said, Vec::new()))
}
