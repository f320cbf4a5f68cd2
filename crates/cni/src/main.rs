//! The plugin's program: environment and stdin in, stdout and exit code out.

use std::io::{Read, Write};
use std::process::ExitCode;

use twill_cni::beside::Beside;
use twill_cni::result::Version;

/// musl's own asks the kernel for every other page by itself: a tenth of an ADD.
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    let vars = |name: &str| std::env::var(name).ok();
    if vars("CNI_COMMAND").is_none() && std::env::args().len() > 1 {
        return about();
    }
    let is_add = vars("CNI_COMMAND").as_deref() == Some("ADD");
    let beside = if is_add { Beside::start() } else { Beside::default() };
    let mut stdin = Vec::with_capacity(8 << 10);
    let _ = std::io::stdin().read_to_end(&mut stdin);
    let done = twill_cni::run(&vars, &stdin, &beside);
    let text = done.said.as_ref().unwrap_or_else(|text| text);
    let mut stdout = std::io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) if done.said.is_ok() => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        // A runtime that was told nothing takes the ADD for failed.
        Err(error) => {
            let left = twill_cni::take_back(done, &vars, &stdin).err().unwrap_or_default();
            let _ = writeln!(std::io::stderr(), "twill-cni: write the answer: {error} {left}");
            ExitCode::FAILURE
        }
    }
}

/// For people: runtimes give no arguments.
fn about() -> ExitCode {
    let spoken: Vec<&str> = Version::ALL.iter().map(|version| version.as_str()).collect();
    let text = format!("twill-cni {}{}{}\n", env!("CARGO_PKG_VERSION"), twill_cni::ABOUT, spoken.join(", "));
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
