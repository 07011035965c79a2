//! What the frames of migrations consist of, and what they save, by peer.

use prometheus::{IntCounter, IntCounterVec, Opts, Registry};
use skyferry_dedup::{Carried, Effort, FrameStats, Saved};

use super::registered;
use crate::status::Direction;

/// Values of the label `cause`, in the order of [`causes`].
const CAUSES: [&str; 5] = ["same", "reference", "delta", "similar", "compression"];

fn causes(saved: Saved) -> [u64; CAUSES.len()] {
    let Saved {
        same,
        reference,
        delta,
        similar,
        compression,
    } = saved;
    [same, reference, delta, similar, compression]
}

/// Values of the label `outcome` of bytes that are sent, in the order of [`contents`].
const CONTENTS: [&str; 6] = [
    "reference",
    "delta",
    "similar",
    "batch",
    "opaque",
    "structure",
];

fn contents(carried: Carried) -> [u64; CONTENTS.len()] {
    let Carried {
        reference,
        delta,
        similar,
        batch,
        opaque,
        structure,
    } = carried;
    [reference, delta, similar, batch, opaque, structure]
}

/// Values of the label `effort`: the rungs, and that of a level that was configured.
const EFFORTS: usize = Effort::COUNT + 1;

fn effort_label(index: usize) -> String {
    if index < Effort::COUNT {
        index.to_string()
    } else {
        "fixed".to_owned()
    }
}

/// Vectors by `peer`, `direction` and one more.
#[derive(Debug, Clone)]
pub(super) struct SentMetrics {
    saved: IntCounterVec,
    frame_bytes: IntCounterVec,
    effort_bytes: IntCounterVec,
}

impl SentMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub(super) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter_by = |name: &str, help: &str, extra: &str| {
            let labels = ["peer", "direction", extra];
            registered(
                registry,
                IntCounterVec::new(Opts::new(name, help), &labels)?,
            )
        };
        Ok(Self {
            saved: counter_by(
                "skyferry_saved_bytes_total",
                "Guest bytes that did not have to be sent, by cause (out).",
                "cause",
            )?,
            frame_bytes: counter_by(
                "skyferry_frame_bytes_total",
                "Bytes of migration frames by what they carry (out): references, deltas, deltas from \
                 similar pages, batches of new pages, opaque bytes, or the structure around all that. \
                 What was compressed together is divided by its sizes before.",
                "outcome",
            )?,
            effort_bytes: counter_by(
                "skyferry_effort_bytes_total",
                "Bytes given to compression, by rung of the ladder or \"fixed\", as configured (out).",
                "effort",
            )?,
        })
    }

    /// The handles for one peer and direction. Asking again gives the same counters.
    pub(super) fn for_peer(&self, peer: &str, direction: Direction) -> PeerSent {
        let with = |vector: &IntCounterVec, last: &str| {
            vector.with_label_values(&[peer, direction.as_str(), last])
        };
        PeerSent {
            saved: CAUSES.map(|cause| with(&self.saved, cause)),
            frame_bytes: CONTENTS.map(|outcome| with(&self.frame_bytes, outcome)),
            effort_bytes: std::array::from_fn(|index| {
                with(&self.effort_bytes, &effort_label(index))
            }),
        }
    }
}

/// Handles for one peer and direction.
#[derive(Debug, Clone)]
pub struct PeerSent {
    saved: [IntCounter; CAUSES.len()],
    frame_bytes: [IntCounter; CONTENTS.len()],
    effort_bytes: [IntCounter; EFFORTS],
}

impl PeerSent {
    /// Counts what a frame of so many bytes carries, and what need not be sent thanks to it.
    pub fn frame(&self, stats: &FrameStats, payload: u64) {
        for (counter, bytes) in self.saved.iter().zip(causes(stats.saved())) {
            counter.inc_by(bytes);
        }
        for (counter, bytes) in self
            .frame_bytes
            .iter()
            .zip(contents(stats.carried(payload)))
        {
            counter.inc_by(bytes);
        }
    }

    /// Counts bytes that were given to compression; `None`: at a level that was configured.
    pub fn compressed(&self, effort: Option<Effort>, bytes: u64) {
        let index = effort.map_or(Effort::COUNT, Effort::number);
        self.effort_bytes[index].inc_by(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_frame_is_made_of_is_counted_under_its_own_label() {
        let registry = Registry::new();
        let metrics = SentMetrics::register(&registry).unwrap();
        let peer = metrics.for_peer("edge-b", Direction::Out);
        let stats = FrameStats {
            same_pages: 1,
            ref_pages: 2,
            id_bytes: 32,
            delta_pages: 1,
            delta_bytes: 100,
            similar_pages: 1,
            similar_bytes: 200,
            batch_pages: 1,
            literal_bytes: 4096 + 404,
            compressed_bytes: 2250,
            ..FrameStats::default()
        };
        peer.frame(&stats, 2482);
        peer.compressed(None, 7);
        peer.compressed(Some(Effort::MOST), 9);
        let text = super::super::render(&registry).unwrap();
        for (name, label, value, count) in [
            ("saved", "cause", "same", 4096),
            ("saved", "cause", "reference", 2 * 4080),
            ("saved", "cause", "delta", 3996),
            ("saved", "cause", "similar", 3896),
            ("saved", "cause", "compression", 2250),
            ("frame", "outcome", "reference", 32),
            ("frame", "outcome", "delta", 50),
            ("frame", "outcome", "similar", 100),
            ("frame", "outcome", "batch", 2048),
            ("frame", "outcome", "opaque", 52),
            ("frame", "outcome", "structure", 200),
            ("effort", "effort", "fixed", 7),
            ("effort", "effort", "9", 9),
        ] {
            let mut labels = [
                "direction=\"out\"".to_owned(),
                "peer=\"edge-b\"".to_owned(),
                format!("{label}=\"{value}\""),
            ];
            labels.sort();
            let line = format!(
                "skyferry_{name}_bytes_total{{{}}} {count}",
                labels.join(",")
            );
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
    }
}
