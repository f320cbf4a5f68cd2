//! What was measured: printed, judged, kept.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::plot::{self, Panel};

/// All rows of a run.
#[derive(Debug)]
pub(crate) struct Report {
    rows: Vec<Value>,
    text: String,
    load: (u64, u64),
    panels: Vec<Panel>,
}

impl Report {
    pub(crate) fn new() -> Self {
        Self { rows: Vec::new(), text: String::new(), load: cpu(), panels: Vec::new() }
    }

    /// A row whose median must not be above `target`.
    pub(crate) fn at_most(&mut self, what: &str, samples: &[f64], target: f64) {
        self.row(what, samples, median(samples), Some((median(samples) <= target, format!("≤ {target}"))));
    }

    /// A row whose median must not be below `target`.
    pub(crate) fn at_least(&mut self, what: &str, samples: &[f64], target: f64) {
        self.row(what, samples, median(samples), Some((median(samples) >= target, format!("≥ {target}"))));
    }

    /// A row whose 99th percentile must not be above `target`.
    pub(crate) fn p99_at_most(&mut self, what: &str, samples: &[f64], target: f64) {
        let p99 = percentile(samples, 0.99);
        self.row(what, samples, p99, Some((p99 <= target, format!("≤ {target}"))));
    }

    /// A row whose highest sample must not be above `target`.
    pub(crate) fn max_at_most(&mut self, what: &str, samples: &[f64], target: f64) {
        let most = percentile(samples, 1.0);
        self.row(what, samples, most, Some((most <= target, format!("≤ {target}"))));
    }

    /// A row without a target.
    pub(crate) fn note(&mut self, what: &str, samples: &[f64]) {
        self.row(what, samples, median(samples), None);
    }

    fn row(&mut self, what: &str, samples: &[f64], value: f64, verdict: Option<(bool, String)>) {
        let (idle, all) = cpu();
        let busy = 1.0 - (idle - self.load.0) as f64 / ((all - self.load.1) as f64).max(1.0);
        self.load = (idle, all);
        let (word, target) =
            verdict.map_or(("", String::new()), |(met, target)| (if met { "met" } else { "MISSED" }, target));
        let line = format!("| {what} | {value:.3} | {target} | {word} | {:.0} % |", busy * 100.0);
        println!("{line}");
        writeln!(self.text, "{line}").unwrap();
        self.rows.push(json!({"what": what, "value": value, "target": target, "verdict": word, "machine_busy": busy, "samples": samples}));
    }

    /// Something for the run's picture.
    pub(crate) fn plot(&mut self, panel: Panel) {
        self.panels.push(panel);
    }

    /// Writes the run's folder.
    pub(crate) fn keep(&self, wanted: &[String]) {
        let word = |program: &str, args: &[&str]| {
            let out = Command::new(program).args(args).output().map(|o| o.stdout).unwrap_or_default();
            String::from_utf8_lossy(&out).lines().next().unwrap_or_default().to_owned()
        };
        let date = word("date", &["+%Y-%m-%d"]);
        let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("runs");
        let dir = (1..).map(|n| runs.join(format!("{date}-{n}"))).find(|d| !d.exists()).unwrap();
        std::fs::create_dir_all(&dir).unwrap();
        let readme = format!(
            "# {}\n\n`cargo run --release -p twill-bench -- {}`\n\nkernel {} · {} cores · {} · {} · commit {}\n\n\
             \"busy\" is how much of the whole machine worked while the row was measured, by /proc/stat; raw numbers in raw.json.\n\n\
             | what | value | target | verdict | busy |\n|---|---|---|---|---|\n{}",
            dir.file_name().unwrap().to_string_lossy(),
            wanted.join(" "),
            word("uname", &["-r"]),
            word("nproc", &[]),
            word("rustc", &["--version"]),
            word("ip", &["-V"]),
            word("git", &["rev-parse", "--short", "HEAD"]),
            self.text
        );
        std::fs::write(dir.join("README.md"), readme).unwrap();
        std::fs::write(dir.join("raw.json"), serde_json::to_string_pretty(&json!({"rows": self.rows})).unwrap())
            .unwrap();
        if !self.panels.is_empty() {
            std::fs::write(dir.join("plot.svg"), plot::svg(&self.panels)).unwrap();
        }
        println!("kept in {}", dir.display());
    }
}

/// Idle and all jiffies of the machine.
pub(crate) fn cpu() -> (u64, u64) {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let numbers: Vec<u64> =
        stat.lines().next().unwrap().split_whitespace().skip(1).map(|n| n.parse().unwrap()).collect();
    (numbers[3] + numbers[4], numbers.iter().sum())
}

pub(crate) fn median(samples: &[f64]) -> f64 {
    percentile(samples, 0.5)
}

fn percentile(samples: &[f64], part: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len()) - 1]
}
