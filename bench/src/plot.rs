//! A run's samples as a picture: a bar to the median, a dot for each sample.

use std::fmt::Write;

use crate::report::median;

const LEFT: f64 = 330.0;
const WIDTH: f64 = 520.0;
const LINE: f64 = 22.0;

/// Bars with one scale.
#[derive(Debug)]
pub(crate) struct Panel {
    /// What is measured, and in what.
    pub(crate) title: String,
    /// Each bar's name and samples.
    pub(crate) bars: Vec<(String, Vec<f64>)>,
}

/// All panels, one below the other.
pub(crate) fn svg(panels: &[Panel]) -> String {
    let lines: usize = panels.iter().map(|panel| panel.bars.len() + 2).sum();
    let height = lines as f64 * LINE + 10.0;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        LEFT + WIDTH + 90.0
    );
    let mut y = LINE;
    for panel in panels {
        let most = panel.bars.iter().flat_map(|(_, samples)| samples).copied().fold(f64::MIN_POSITIVE, f64::max);
        let x = |value: f64| LEFT + value / most * WIDTH;
        writeln!(text, "<text x=\"8\" y=\"{y}\" font-weight=\"bold\">{}</text>", panel.title).unwrap();
        for (name, samples) in &panel.bars {
            y += LINE;
            let middle = median(samples);
            let (end, top) = (x(middle), y - LINE * 0.65);
            let color = if name.starts_with("twill") { "#2a6fb0" } else { "#b8bcc2" };
            writeln!(text, "<text x=\"{}\" y=\"{y}\" text-anchor=\"end\">{name}</text>", LEFT - 8.0).unwrap();
            let (width, high) = (end - LEFT, LINE * 0.7);
            writeln!(text, "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{width:.1}\" height=\"{high}\" fill=\"{color}\"/>")
                .unwrap();
            for sample in samples {
                let (at, middle) = (x(*sample), top + high / 2.0);
                writeln!(text, "<circle cx=\"{at:.1}\" cy=\"{middle}\" r=\"2.2\" fill=\"#222\" fill-opacity=\"0.5\"/>")
                    .unwrap();
            }
            writeln!(text, "<text x=\"{}\" y=\"{y}\">{middle:.3}</text>", LEFT + WIDTH + 10.0).unwrap();
        }
        y += LINE * 2.0;
    }
    text + "</svg>\n"
}
