//! What a user reads: tables, JSON and YAML on stdout, errors with their way out on stderr.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::json;
use twill_core::words::written_out;

/// `-o`, on every command that prints state.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Output {
    /// How to print: for people, or for programs (documented, stable)
    #[arg(short = 'o', long = "output", value_enum, default_value = "table", global = true)]
    pub(crate) format: Format,
}

/// The formats of `-o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns for people
    Table,
    /// One JSON object with "schema": 1
    Json,
    /// The same object as YAML
    Yaml,
}

/// Exit code of a command that worked and has findings to show.
pub(crate) const FINDINGS: u8 = 3;
/// Exit code of a command that was typed wrong.
pub(crate) const USAGE: u8 = 2;

/// An error that a user meets: a stable code, what happened, and the way out.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Stable kebab-case code, the same in JSON, logs and docs.
    pub(crate) code: &'static str,
    /// The act and the object.
    pub(crate) message: String,
    /// What to do next.
    pub(crate) hint: Option<String>,
    /// Exit code.
    pub(crate) exit: u8,
}

impl Failure {
    /// A failure with exit code 1.
    pub(crate) fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, exit: 1 }
    }

    /// Adds the way out.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Sets another exit code.
    pub(crate) fn exit(mut self, exit: u8) -> Self {
        self.exit = exit;
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl Output {
    /// Prints `value` (an object; `"schema": 1` is put first), or what `table` draws of it.
    pub(crate) fn print<T: Serialize>(&self, value: &T, table: impl FnOnce() -> String) -> anyhow::Result<()> {
        let text = match self.format {
            Format::Table => written_out(&table(), &['\n', '\t']),
            Format::Json => serde_json::to_string_pretty(&with_schema(value)?)?,
            Format::Yaml => serde_saphyr::to_string(&with_schema(value)?)?,
        };
        // Who keeps the answer in a file must know that it is not there.
        write_text(&text).map_err(|e| Failure::new("output-lost", format!("write the answer to stdout: {e}")).into())
    }
}

/// The object with `"schema": 1` in front.
fn with_schema<T: Serialize>(value: &T) -> serde_json::Result<serde_json::Value> {
    let mut object = serde_json::Map::new();
    object.insert("schema".into(), json!(1));
    if let serde_json::Value::Object(fields) = serde_json::to_value(value)? {
        object.extend(fields);
    }
    Ok(serde_json::Value::Object(object))
}

/// Columns without borders, as wide as their content; a header, then a line for each row.
pub(crate) fn columns<R: IntoIterator<Item = String>>(header: &[&str], rows: impl IntoIterator<Item = R>) -> String {
    let head = header.iter().map(|&h| h.to_owned()).collect::<Vec<_>>();
    let lines: Vec<Vec<String>> = std::iter::once(head)
        .chain(rows.into_iter().map(|r| r.into_iter().map(|cell| on_a_line(&cell)).collect()))
        .collect();
    let widths: Vec<usize> = (0..header.len())
        .map(|column| {
            lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let text = lines.iter().map(|line| {
        let cells = line.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect::<Vec<_>>();
        cells.join("  ").trim_end().to_owned()
    });
    text.collect::<Vec<_>>().join("\n")
}

/// How long something is past.
pub(crate) fn ago(seconds: u64) -> String {
    match seconds {
        0 => "now".into(),
        s @ 1..=119 => format!("{s} s ago"),
        s @ 120..=7199 => format!("{} min ago", s / 60),
        s => format!("{} h ago", s / 3600),
    }
}

/// What others chose, on one line.
pub(crate) fn on_a_line(text: &str) -> String {
    written_out(text, &[])
}

/// True when a person looks at stdout.
pub(crate) fn to_terminal() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stdout())
}

/// Writes `text` and a newline to stdout, where that can be done.
pub(crate) fn print_text(text: &str) {
    let _ = write_text(text);
}

/// Writes `text` and a newline to stdout; a reader that has gone away ends the output quietly.
fn write_text(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let newline: &[u8] = if text.ends_with('\n') { b"" } else { b"\n" };
    let written = out.write_all(text.as_bytes()).and_then(|()| out.write_all(newline)).and_then(|()| out.flush());
    written.or_else(|e| if e.kind() == std::io::ErrorKind::BrokenPipe { Ok(()) } else { Err(e) })
}

/// A line on stderr; where that cannot be written nobody is to be told.
fn on_stderr(text: impl fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// A progress line for a person who waits; on stderr, so that stdout stays output only.
pub(crate) fn progress(text: impl fmt::Display) {
    on_stderr(text);
}

/// Shows an error as `error: …` and `hint: …` (and, where JSON was asked for, as one JSON object on stdout), and says its exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let message = error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
    let failure = error.downcast_ref::<Failure>();
    let hint = failure.and_then(|f| f.hint.as_deref());
    on_stderr(format_args!("error: {message}"));
    if let Some(hint) = hint {
        on_stderr(format_args!("hint: {hint}"));
    }
    if wants_json() {
        let code = failure.map_or("failed", |f| f.code);
        print_text(&json!({"schema": 1, "error": {"code": code, "message": message, "hint": hint}}).to_string());
    }
    ExitCode::from(failure.map_or(1, |f| f.exit))
}

/// Shows what clap has to say: help and version on stdout, a word that it does not know on stderr and as [`report`] does.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    // A reader that has gone away ends the output quietly.
    let _ = error.print();
    if error.use_stderr() && wants_json() {
        let text = error.render().to_string();
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let message = lines.next().unwrap_or_default().trim_start_matches("error: ");
        let hint = lines.collect::<Vec<_>>().join("; ");
        print_text(&json!({"schema": 1, "error": {"code": "usage", "message": message, "hint": hint}}).to_string());
    }
    ExitCode::from(error.exit_code() as u8)
}

/// True when `-o json` stands among the arguments, even those that could not be parsed.
fn wants_json() -> bool {
    let words: Vec<String> = std::env::args().take_while(|w| w != "--").collect();
    words.iter().any(|w| w == "-ojson" || w == "-o=json" || w == "--output=json")
        || words.windows(2).any(|w| (w[0] == "-o" || w[0] == "--output") && w[1] == "json")
}

/// Logs go to stderr, one line each; `RUST_LOG` chooses, info without it.
pub(crate) fn log_to_stderr() {
    use std::io::IsTerminal;
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "info,h2=warn,hyper=warn,tonic=warn".into());
    let color = std::io::stderr().is_terminal();
    // A second call changes nothing.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Said on stderr too, and a panic where that cannot be written: a full disk would end the agent.
        .log_internal_errors(false)
        .with_ansi(color)
        .with_target(false)
        .try_init();
}
