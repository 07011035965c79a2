//! Medians over runs.

use super::results::{Cost, Outcome, Results, Role, Setting};
use super::way::Way;

/// The median; between two values their mean. `None` if there are none.
#[must_use]
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], upper)
    } else {
        upper
    })
}

/// All runs of a guest in a way.
#[derive(Debug, Clone, Default)]
pub struct Runs {
    done: Vec<Cost>,
    failures: Vec<String>,
    unavailable: bool,
    revisions: Vec<String>,
    sessions: Vec<u64>,
    load: Option<f64>,
}

impl Runs {
    /// What counts for a guest and a way.
    #[must_use]
    pub fn of(results: &Results, setting: &Setting, guest: &str, way: Way) -> Self {
        let mut runs = Self::default();
        for record in results.latest(setting, guest, way) {
            match &record.outcome {
                Outcome::Done(cost) => runs.done.push(cost.clone()),
                Outcome::Failed(reason) => runs.failures.push(reason.clone()),
                Outcome::Unavailable => {
                    runs.unavailable = true;
                    continue;
                }
            }
            runs.revisions.push(record.revision.clone());
            runs.sessions.push(record.session);
            runs.load = runs.load.into_iter().chain(record.load).reduce(f64::max);
        }
        runs
    }

    /// Runs that were tried, those that failed included.
    #[must_use]
    pub fn tried(&self) -> usize {
        self.done.len() + self.failures.len()
    }

    /// Runs that came to their end.
    #[must_use]
    pub fn done(&self) -> &[Cost] {
        &self.done
    }

    /// Why runs failed.
    #[must_use]
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// Whether the build could not do it.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        self.unavailable && self.tried() == 0
    }

    /// Revisions that were measured.
    #[must_use]
    pub fn revisions(&self) -> &[String] {
        &self.revisions
    }

    /// Starts of the benchmarks that the runs belong to.
    #[must_use]
    pub fn sessions(&self) -> &[u64] {
        &self.sessions
    }

    /// Largest load of the machine before one of them.
    #[must_use]
    pub fn load(&self) -> Option<f64> {
        self.load
    }

    /// Median of a figure over the runs that were done.
    #[must_use]
    pub fn median(&self, figure: impl Fn(&Cost) -> f64) -> Option<f64> {
        median(self.done.iter().map(figure))
    }

    /// Median of the CPU seconds of one side's processes that are (or are not) QEMU; `None` if it has
    /// none.
    #[must_use]
    pub fn cpu_secs(&self, role: Role, qemu: bool) -> Option<f64> {
        self.of_processes(role, qemu, |process| process.cpu_secs)
    }

    /// The same for the peak of the resident memory, in bytes.
    #[must_use]
    pub fn peak_rss_bytes(&self, role: Role, qemu: bool) -> Option<f64> {
        self.of_processes(role, qemu, |process| process.peak_rss_bytes as f64)
    }

    fn of_processes(
        &self,
        role: Role,
        qemu: bool,
        figure: impl Fn(&super::results::ProcessCost) -> f64,
    ) -> Option<f64> {
        let sums = self.done.iter().filter_map(|cost| {
            let matching = cost
                .processes
                .iter()
                .filter(|process| process.role == role && (process.program == "qemu") == qemu);
            matching.map(&figure).reduce(|a, b| a + b)
        });
        median(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::{cost, record, setting};
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0]), Some(3.0));
        assert_eq!(median([9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 100.0]), Some(3.0));
    }

    #[test]
    fn failures_count_as_tried_and_not_in_medians() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::open(&dir.path().join("results")).unwrap();
        let outcomes = [
            Outcome::Done(cost(2.0, 100)),
            Outcome::Failed("no".into()),
            Outcome::Done(cost(4.0, 300)),
        ];
        for (run, outcome) in (1..).zip(outcomes) {
            results
                .add(record("idle", Way::Cold, run, outcome))
                .unwrap();
        }
        let runs = Runs::of(&results, &setting(), "idle", Way::Cold);
        assert_eq!((runs.tried(), runs.done().len()), (3, 2));
        assert_eq!(runs.median(|cost| cost.total_secs), Some(3.0));
        assert_eq!(runs.cpu_secs(Role::Source, false), Some(1.5));
        assert_eq!(runs.cpu_secs(Role::Destination, false), None);
    }
}
