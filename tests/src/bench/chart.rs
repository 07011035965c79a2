//! Grouped bars as SVG: no script, no font of its own, readable on light and on dark pages.

use std::fmt::Write as _;

/// A chart: a group of bars for each thing compared, in every group a bar for each series.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// Of the values.
    pub unit: String,
    /// Names of the series, in the order of bars.
    pub series: Vec<Series>,
    /// Groups from left to right.
    pub groups: Vec<Group>,
}

/// A series of bars.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Series {
    /// In the legend.
    pub name: String,
    /// Whether it stands for what we are compared with: those are drawn in greys.
    pub rival: bool,
}

/// A group of bars.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Below it.
    pub name: String,
    /// One for each series; `None` where there is no figure.
    pub values: Vec<Option<f64>>,
}

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
/// Where the values' axis begins and ends, from above.
const TOP: f64 = 84.0;
const BOTTOM: f64 = 380.0;
const LEGEND_COLUMNS: usize = 4;
/// Lines across.
const STEPS: u32 = 4;
const RIVAL_COLOURS: [&str; 4] = ["#57606a", "#818b98", "#a8b1bb", "#8a6d4f"];
/// Told apart by people who do not see all colours, on white and on black.
const OUR_COLOURS: [&str; 4] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7"];

impl Chart {
    /// The picture.
    #[must_use]
    pub fn svg(&self) -> String {
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             role=\"img\" aria-labelledby=\"title\" font-family=\"system-ui, sans-serif\" \
             font-size=\"12\">\n<title id=\"title\">{}</title>\n",
            escaped(&self.title)
        );
        svg.push_str(
            "<style>.page{fill:#fff}text{fill:#1f2328}.line{stroke:#d0d7de}.soft{fill:#59636e}\
             @media(prefers-color-scheme:dark){.page{fill:#0d1117}text{fill:#e6edf3}\
             .line{stroke:#3d444d}.soft{fill:#9198a1}}</style>\n",
        );
        // The page around the picture may be dark when the reader's system is not.
        let _ = writeln!(
            svg,
            "<rect class=\"page\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>"
        );
        text(&mut svg, (LEFT, 22.0), "font-size=\"16\"", &self.title);
        self.legend(&mut svg);
        let top = nice_ceiling(self.largest());
        self.axis(&mut svg, top);
        self.bars(&mut svg, top);
        svg.push_str("</svg>\n");
        svg
    }

    fn largest(&self) -> f64 {
        let values = self.groups.iter().flat_map(|group| &group.values);
        values.flatten().copied().fold(0.0, f64::max)
    }

    fn colours(&self) -> Vec<&'static str> {
        let mut counts = [0usize; 2];
        let colours = self.series.iter().map(|series| {
            let palette = if series.rival {
                RIVAL_COLOURS
            } else {
                OUR_COLOURS
            };
            let count = &mut counts[usize::from(series.rival)];
            *count += 1;
            palette[(*count - 1) % palette.len()]
        });
        colours.collect()
    }

    fn legend(&self, svg: &mut String) {
        let column = (WIDTH - LEFT - RIGHT) / LEGEND_COLUMNS as f64;
        for (index, (series, colour)) in self.series.iter().zip(self.colours()).enumerate() {
            let x = LEFT + (index % LEGEND_COLUMNS) as f64 * column;
            let y = 36.0 + (index / LEGEND_COLUMNS) as f64 * 18.0;
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"11\" height=\"11\" fill=\"{colour}\"/>"
            );
            text(svg, (x + 16.0, y + 10.0), "", &series.name);
        }
    }

    fn axis(&self, svg: &mut String, top: f64) {
        for step in 0..=STEPS {
            let share = f64::from(step) / f64::from(STEPS);
            let y = BOTTOM - share * (BOTTOM - TOP);
            let right = WIDTH - RIGHT;
            let _ = writeln!(
                svg,
                "<line class=\"line\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>"
            );
            let label = number(top * share);
            let place = (LEFT - 6.0, y + 4.0);
            text(svg, place, "class=\"soft\" text-anchor=\"end\"", &label);
        }
        let place = (LEFT - 6.0, TOP - 12.0);
        text(svg, place, "class=\"soft\" text-anchor=\"end\"", &self.unit);
    }

    fn bars(&self, svg: &mut String, top: f64) {
        let slot = (WIDTH - LEFT - RIGHT) / self.groups.len().max(1) as f64;
        let width = slot * 0.86 / self.series.len().max(1) as f64;
        let colours = self.colours();
        for (index, group) in self.groups.iter().enumerate() {
            let left = LEFT + index as f64 * slot + slot * 0.07;
            for (place, value) in group.values.iter().enumerate() {
                let x = left + place as f64 * width;
                let middle = x + width / 2.0;
                let Some(value) = value else {
                    let style = "class=\"soft\" text-anchor=\"middle\" font-size=\"9\"";
                    text(svg, (middle, BOTTOM - 3.0), style, "–");
                    continue;
                };
                let height = value / top * (BOTTOM - TOP);
                let y = BOTTOM - height;
                let colour = colours.get(place).copied().unwrap_or("#000");
                let drawn = width * 0.9;
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{drawn:.1}\" height=\"{height:.1}\" \
                     fill=\"{colour}\"/>"
                );
                let style = "class=\"soft\" text-anchor=\"middle\" font-size=\"9\"";
                text(svg, (middle, y - 3.0), style, &number(*value));
            }
            let middle = LEFT + (index as f64 + 0.5) * slot;
            text(
                svg,
                (middle, BOTTOM + 20.0),
                "text-anchor=\"middle\"",
                &group.name,
            );
        }
    }
}

fn text(svg: &mut String, (x, y): (f64, f64), style: &str, content: &str) {
    let content = escaped(content);
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{content}</text>"
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Three digits, or what is before the point.
fn number(value: f64) -> String {
    if value == 0.0 {
        "0".to_owned()
    } else if value < 0.1 {
        format!("{value:.3}")
    } else if value < 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

/// The next round number of which a quarter is round, too: the lines across stand there.
fn nice_ceiling(value: f64) -> f64 {
    if value <= 0.0 || !value.is_finite() {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0];
    let factor = steps.into_iter().find(|step| step * power >= value);
    factor.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart() -> Chart {
        let series = |name: &str, rival| Series {
            name: name.into(),
            rival,
        };
        Chart {
            title: "Bytes of <many> ways & \"more\"".into(),
            unit: "MB".into(),
            series: vec![series("QEMU", true), series("ours", false)],
            groups: vec![
                Group {
                    name: "idle".into(),
                    values: vec![Some(30.0), Some(7.5)],
                },
                Group {
                    name: "busy".into(),
                    values: vec![None, Some(0.05)],
                },
            ],
        }
    }

    /// Every element is closed in order and attributes are quoted; text has no bare `&` or `<`.
    fn check(svg: &str) {
        let mut open = Vec::new();
        let mut rest = svg;
        while let Some(at) = rest.find('<') {
            let (text, tag) = rest.split_at(at);
            for (index, _) in text.match_indices('&') {
                let entity = text[index..].split(';').next().unwrap();
                assert!(
                    ["&amp", "&lt", "&gt", "&quot"].contains(&entity),
                    "{entity}"
                );
            }
            let end = tag.find('>').expect("a tag that ends");
            let inside = &tag[1..end];
            assert_eq!(inside.matches('"').count() % 2, 0, "{inside}");
            if let Some(name) = inside.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !inside.ends_with('/') {
                open.push(inside.split_whitespace().next().unwrap());
            }
            rest = &tag[end + 1..];
        }
        assert_eq!(open, Vec::<&str>::new());
        assert_eq!(rest.trim(), "");
    }

    #[test]
    fn the_picture_is_well_formed_and_its_text_is_text() {
        let svg = chart().svg();
        check(&svg);
        for text in ["ours", "busy", "MB", "7.5", "&lt;many&gt;"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(svg.contains("prefers-color-scheme:dark"));
        // The background, two bars in the legend, three in the chart.
        assert_eq!(svg.matches("<rect").count(), 6);
    }

    #[test]
    fn nothing_to_draw_is_no_fault() {
        let mut chart = chart();
        chart.groups.clear();
        check(&chart.svg());
        chart.series.clear();
        check(&chart.svg());
    }

    #[test]
    fn the_axis_ends_at_a_round_number() {
        for (value, end) in [
            (0.0, 1.0),
            (0.9, 1.0),
            (30.0, 32.0),
            (401.0, 600.0),
            (1000.0, 1000.0),
        ] {
            assert!((nice_ceiling(value) - end).abs() < 1e-9, "{value}");
        }
    }
}
