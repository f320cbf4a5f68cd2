//! The supervisor: builds the lab, holds it, and does what the control socket asks.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::children::Children;
use crate::error::{Act, LabError};
use crate::home::LabDir;
use crate::lab::Lab;
use crate::layout::Spec;
use crate::proto::{LabState, Request, STAY, Word, say};

/// How long a killed process may take to be gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// Builds the lab, tells the client on stdout, and serves until it ends.
pub(crate) fn run(dir: LabDir, spec: Spec, user_namespace: bool) -> Result<(), LabError> {
    let children = Children::new();
    // Held while the lab is built: nobody removes what is still being made.
    let building = Arc::new(Mutex::new(()));
    let held = building.lock().unwrap_or_else(PoisonError::into_inner);
    watch_client(dir.clone(), Arc::clone(&children), Arc::clone(&building));
    let listener = UnixListener::bind(dir.socket()).act(|| format!("listen on {}", dir.socket().display()))?;
    let progress = |text: String| {
        let _ = say(&mut io::stdout(), &Word::Progress(text));
    };
    let built = Lab::build(dir.clone(), spec, user_namespace, Arc::clone(&children), &progress);
    let lab = match built {
        Ok(lab) => lab,
        Err(error) => {
            end(&dir, &children);
            return Err(error);
        }
    };
    drop(held);
    // The client may be gone: then its end of stdin is closed, and the lab ends by that.
    let _ = say(&mut io::stdout(), &Word::Done(Box::new(lab.state())));
    close_stdout();
    let lab = Arc::new(Mutex::new(lab));
    for stream in listener.incoming().flatten() {
        let (lab, children, dir) = (Arc::clone(&lab), Arc::clone(&children), dir.clone());
        thread::spawn(move || serve(stream, &lab, &children, &dir));
    }
    Ok(())
}

/// Nobody reads stdout any more.
fn close_stdout() {
    if let Ok(null) = fs::OpenOptions::new().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(null);
    }
}

/// Ends the lab when the client's end of stdin is closed without the word to stay.
fn watch_client(dir: LabDir, children: Arc<Children>, building: Arc<Mutex<()>>) {
    thread::spawn(move || {
        let mut line = String::new();
        let _ = io::stdin().lock().read_line(&mut line);
        if line.trim_end() != STAY {
            // Without its processes a lab that is being built fails soon.
            children.end_all(PATIENCE);
            let _built = building.lock();
            end(&dir, &children);
            std::process::exit(0);
        }
    });
}

/// Ends every process and removes every trace; what is left is this process, and the namespaces that it holds.
fn end(dir: &LabDir, children: &Children) {
    children.end_all(PATIENCE);
    if let Err(error) = dir.remove() {
        tracing::warn!(%error, "cannot remove the lab's folder");
    }
}

fn serve(stream: UnixStream, lab: &Mutex<Lab>, children: &Children, dir: &LabDir) {
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut line = String::new();
    if BufReader::new(stream).read_line(&mut line).is_err() || line.is_empty() {
        return;
    }
    let asked = serde_json::from_str::<Request>(&line).act(|| "understand the request".into());
    let down = matches!(asked, Ok(Request::Down));
    let answer = asked.and_then(|request| answer(request, lab, children, dir, &writer));
    let word = match answer {
        Ok(state) => Word::Done(Box::new(state)),
        Err(error) => Word::Failed(error),
    };
    let _ = say(&mut writer, &word);
    if down {
        std::process::exit(0);
    }
}

fn answer(
    request: Request,
    lab: &Mutex<Lab>,
    children: &Children,
    dir: &LabDir,
    writer: &UnixStream,
) -> Result<LabState, LabError> {
    let progress = |text: String| {
        let mut to = writer;
        let _ = say(&mut to, &Word::Progress(text));
    };
    let mut lab = lock(lab);
    match request {
        Request::Status => {}
        Request::NodeAdd => lab.add_host(&progress)?,
        Request::Agent { act, node } => lab.act_on_agent(act, &node)?,
        Request::Down => end(dir, children),
    }
    Ok(lab.state())
}

fn lock(lab: &Mutex<Lab>) -> MutexGuard<'_, Lab> {
    lab.lock().unwrap_or_else(PoisonError::into_inner)
}
