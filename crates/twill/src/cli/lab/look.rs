//! Looking into a lab: who reaches whom, which way, and what passes.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use twill_core::net::LinkName;
use twill_kernel::capture;
use twill_lab::ping::{Matrix, matrix};
use twill_lab::{LabState, enter};
use twill_packet::decode::Value;
use twill_packet::{decode, decode_packet, render};

use super::{Named, state};
use crate::output::{FINDINGS, Failure, Format, Output, columns, print_text};

#[derive(Debug, Args)]
pub(super) struct Explain {
    #[command(flatten)]
    named: Named,
    /// Where the packet starts: container-1 …, node1 …
    from: String,
    /// Where it is meant to go: a place, or an address
    to: String,
}

#[derive(Debug, Args)]
pub(super) struct Capture {
    #[command(flatten)]
    named: Named,
    /// node1 …, container-1 …, or underlay
    place: String,
    /// The device
    device: LinkName,
    /// End after so many packets
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

/// The matrix of a lab.
pub(super) fn ping(named: &Named, output: Output) -> anyhow::Result<ExitCode> {
    let state = state(named)?;
    enter::user(&state).map_err(Failure::from)?;
    let matrix = matrix(&state).map_err(Failure::from)?;
    output.print(&matrix, || matrix_text(&state, &matrix))?;
    Ok(exit(&matrix))
}

/// 0 when everybody reaches everybody, else 3.
pub(super) fn exit(matrix: &Matrix) -> ExitCode {
    if matrix.reachable == matrix.pairs { ExitCode::SUCCESS } else { ExitCode::from(FINDINGS) }
}

/// Lines are who asks, columns who answers.
pub(super) fn matrix_text(state: &LabState, matrix: &Matrix) -> String {
    let names: Vec<&str> = state.containers().map(|c| c.name.as_str()).collect();
    let cell = |from: &str, to: &str| match matrix.answered.get(&(from.to_owned(), to.to_owned())) {
        _ if from == to => "-".to_owned(),
        Some(us) => format!("{}.{:03} ms", us / 1000, us % 1000),
        None => "FAILED".to_owned(),
    };
    let mut text = String::new();
    if names.len() <= WIDEST {
        let header: Vec<&str> = std::iter::once("from \\ to").chain(names.iter().copied()).collect();
        let rows = names.iter().map(|from| {
            std::iter::once((*from).to_owned()).chain(names.iter().map(|to| cell(from, to))).collect::<Vec<_>>()
        });
        text = columns(&header, rows) + "\n\n";
    }
    for failed in &matrix.failed {
        text += &format!("{} does not reach {}: {}\n", failed.from, failed.to, failed.error);
    }
    let rtt = matrix.rtt_us;
    text + &format!(
        "{} of {} pairs reach each other; half within {} µs, 99 % within {} µs",
        matrix.reachable, matrix.pairs, rtt.p50, rtt.p99
    )
}

/// The wait begins again after it.
const AN_HOUR: Duration = Duration::from_secs(3600);
/// Most containers that are drawn as a matrix.
const WIDEST: usize = 8;

impl Explain {
    pub(super) fn run(self, output: Output) -> anyhow::Result<ExitCode> {
        let state = state(&self.named)?;
        enter::user(&state).map_err(Failure::from)?;
        let explanation = explain(&state, &self.from, &self.to)?;
        output.print(&explanation, || explanation.to_string())?;
        Ok(if explanation.arrives() { ExitCode::SUCCESS } else { ExitCode::from(FINDINGS) })
    }
}

/// The path between two places, from the live kernel; [`enter::user`] comes before.
pub(super) fn explain(state: &LabState, from: &str, to: &str) -> Result<twill_explain::Explanation, Failure> {
    let facts = twill_lab::facts::LiveFacts::read(enter::open_all(state)?)
        .map_err(|error| Failure::new("lab-failed", format!("{error}: {}", error.source)))?;
    let (from, to) = twill_explain::ends(&facts, from, to, false).map_err(|error| {
        let hint = format!("`twill lab status --name {}` lists the places", state.spec.name);
        Failure::new("no-such-place", error.to_string()).hint(hint)
    })?;
    Ok(twill_explain::explain(&facts, &from, &to))
}

impl Capture {
    pub(super) fn run(self, output: Output) -> anyhow::Result<ExitCode> {
        let state = state(&self.named)?;
        enter::user(&state).map_err(Failure::from)?;
        let netns = enter::open(&state, &self.place).map_err(Failure::from)?;
        let opened = netns.run(|| capture::Capture::on(self.device));
        let mut capture = opened.and_then(|opened| opened).map_err(|error| {
            Failure::new("no-such-device", format!("capture on {} in {}: {error}", self.device, self.place)).hint(
                format!("`twill lab exec --name {} {} -- ip link` shows its devices", state.spec.name, self.place),
            )
        })?;
        crate::output::progress(format_args!("listening on {} in {}", self.device, self.place));
        let mut number = 0;
        let layers_of = if capture.has_frames() { decode } else { decode_packet };
        while self.count.is_none_or(|count| number < count) {
            let Some(frame) = capture.next(AN_HOUR)? else { continue };
            number += 1;
            let layers = layers_of(frame);
            if output.format == Format::Table {
                print_text(&format!("packet {number}, {} bytes\n{}", frame.len(), render(&layers)));
            } else {
                let layers = layers.iter().map(|layer| {
                    let fields = layer.header.fields().into_iter().map(|(name, value)| match value {
                        Value::Number(number) => (name.to_owned(), json!(number)),
                        Value::Text(text) => (name.to_owned(), json!(text)),
                    });
                    let fields: serde_json::Map<_, _> = fields.collect();
                    json!({"layer": layer.name(), "offset": layer.offset, "depth": layer.depth, "fields": fields})
                });
                let value = json!({"number": number, "length": frame.len(), "layers": layers.collect::<Vec<_>>()});
                output.print(&value, String::new)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
