//! Figures and the bounds that they are held against.

use std::fmt;

/// A figure with its bound.
#[derive(Debug, Clone)]
pub struct Bar {
    name: String,
    figure: f64,
    bound: f64,
    /// Whether the bound is the largest good value; else the smallest.
    at_most: bool,
    unit: &'static str,
}

impl Bar {
    /// Whether the bound is kept. A figure that could not be had (not a number) is a miss.
    #[must_use]
    pub fn is_met(&self) -> bool {
        if self.at_most {
            self.figure <= self.bound
        } else {
            self.figure >= self.bound
        }
    }
}

/// One line: verdict, name, figure, bound, unit.
impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.is_met() { "ok" } else { "MISS" };
        let sign = if self.at_most { "<=" } else { ">=" };
        let Self {
            name,
            figure,
            bound,
            unit,
            ..
        } = self;
        write!(
            f,
            "{verdict:4} {name:58} {figure:8.2} {sign} {bound:.2} {unit}"
        )
    }
}

/// The bars of a benchmark.
#[derive(Debug, Clone, Default)]
pub struct Bars(Vec<Bar>);

impl Bars {
    /// `figure` has to be `bound` or less.
    pub fn at_most(&mut self, name: &str, figure: f64, bound: f64, unit: &'static str) {
        self.0.push(Bar {
            name: name.to_owned(),
            figure,
            bound,
            at_most: true,
            unit,
        });
    }

    /// `figure` has to be `bound` or more.
    pub fn at_least(&mut self, name: &str, figure: f64, bound: f64, unit: &'static str) {
        self.0.push(Bar {
            name: name.to_owned(),
            figure,
            bound,
            at_most: false,
            unit,
        });
    }

    /// Those that are missed.
    pub fn missed(&self) -> impl Iterator<Item = &Bar> {
        self.0.iter().filter(|bar| !bar.is_met())
    }

    /// Prints a line for each; returns whether all are met.
    #[must_use]
    pub fn print(&self) -> bool {
        println!();
        for bar in &self.0 {
            println!("{bar}");
        }
        self.missed().next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_kept_or_missed_and_no_figure_is_a_miss() {
        let mut bars = Bars::default();
        bars.at_most("bytes", 1.0, 1.0, "x");
        bars.at_least("speed", 0.5, 0.5, "x");
        assert!(bars.print());
        bars.at_most("more bytes", 1.01, 1.0, "x");
        bars.at_least("no speed", f64::NAN, 0.5, "x");
        let missed: Vec<String> = bars.missed().map(Bar::to_string).collect();
        assert_eq!(missed.len(), 2);
        assert!(missed[0].starts_with("MISS more bytes") && missed[0].ends_with("1.01 <= 1.00 x"));
        assert!(missed[1].starts_with("MISS no speed"));
    }
}
