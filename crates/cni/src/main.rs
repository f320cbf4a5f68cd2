//! The plugin's program: environment and stdin in, stdout and exit code out.

use std::io::{Read, Write};
use std::process::ExitCode;

use twill_cni::result::Version;

fn main() -> ExitCode {
    let vars = |name: &str| std::env::var(name).ok();
    if vars("CNI_COMMAND").is_none() && std::env::args().len() > 1 {
        return about();
    }
    let mut stdin = Vec::with_capacity(8 << 10);
    let _ = std::io::stdin().read_to_end(&mut stdin);
    let (text, code) = match twill_cni::run(&vars, &stdin) {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(text) => (text, ExitCode::FAILURE),
    };
    // A runtime that does not listen cannot be told.
    let _ = std::io::stdout().write_all(text.as_bytes());
    code
}

/// For people: runtimes give no arguments.
fn about() -> ExitCode {
    let spoken: Vec<&str> = Version::ALL.iter().map(|version| version.as_str()).collect();
    let text = format!("twill-cni {}{}{}\n", env!("CARGO_PKG_VERSION"), twill_cni::ABOUT, spoken.join(", "));
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
