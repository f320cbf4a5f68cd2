//! `twill lab` alone: a lab from nothing to nothing, told as it goes.

use std::process::ExitCode;

use serde_json::json;
use twill_lab::layout::Families;
use twill_lab::{Backend, Spec, StoreKind, enter, start};

use super::{home, look};
use crate::output::{Failure, Output, progress};

/// Makes a lab, shows who reaches whom and one path, and removes everything.
pub(super) fn run(families: Families, output: Output) -> anyhow::Result<ExitCode> {
    // A name of its own, so that it is in nobody's way.
    let name = format!("once-{}", std::process::id())
        .parse()
        .map_err(|e: twill_core::net::BadValue| Failure::new("bad-lab-name", e.to_string()))?;
    let (backend, store) = (Backend::Vxlan, StoreKind::Embedded);
    let spec = Spec { name, scenario: None, nodes: 2, containers: 1, backend, store, families };
    let home = home()?;
    let started = start::up(&home, &spec, |text| progress(text)).map_err(Failure::from)?;
    let state = started.state.clone();
    enter::user(&state).map_err(Failure::from)?;
    let matrix = twill_lab::ping::matrix(&state).map_err(Failure::from)?;
    let explanation = look::explain(&state, "container-1", "container-2")?;
    started.end().map_err(Failure::from)?;
    let value = json!({"ping": matrix, "explain": explanation});
    output.print(&value, || {
        format!("\n{}\n\nthe way from container-1 to container-2:\n\n{explanation}", look::matrix_text(&state, &matrix))
    })?;
    progress("everything is removed again; `twill lab up` makes a lab that stays");
    Ok(look::exit(&matrix))
}
