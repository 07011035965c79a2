//! An emulated WAN: delay, rate, a queue with tail drop, random loss, cuts; never a reordering.
//!
//! [`model`] is the link itself, without packets' I/O; [`tun`] puts it between two network
//! namespaces (any protocol; needs root), [`relay`] between UDP sockets (QUIC only; needs nothing).
//! Both are steered and read through [`LinkControl`] while they run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub mod model;
pub mod netns;
pub mod relay;
pub mod tun;

pub use model::{Counters, Shape};

use model::Direction;

/// Which way a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From side A (where the source lives, mostly) to side B.
    AToB,
    /// From side B to side A.
    BToA,
}

impl Way {
    const fn index(self) -> usize {
        match self {
            Self::AToB => 0,
            Self::BToA => 1,
        }
    }
}

/// Steers a running link and reads its counters; clones share the link.
#[derive(Debug, Clone)]
pub struct LinkControl {
    settings: Arc<[Mutex<Settings>; 2]>,
}

#[derive(Debug)]
struct Settings {
    shape: Shape,
    cut_until: Option<CutUntil>,
    counters: Counters,
}

#[derive(Debug, Clone, Copy)]
enum CutUntil {
    Told,
    Time(Instant),
}

impl LinkControl {
    /// A link of the same shape both ways; nothing runs yet.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        let settings = || {
            Mutex::new(Settings {
                shape,
                cut_until: None,
                counters: Counters::default(),
            })
        };
        Self {
            settings: Arc::new([settings(), settings()]),
        }
    }

    fn settings(&self, way: Way) -> MutexGuard<'_, Settings> {
        self.settings[way.index()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the shape both ways, from the next packet on.
    pub fn set_shape(&self, shape: Shape) {
        self.set_shape_of(Way::AToB, shape);
        self.set_shape_of(Way::BToA, shape);
    }

    /// Changes the shape of one direction, from the next packet on.
    pub fn set_shape_of(&self, way: Way, shape: Shape) {
        self.settings(way).shape = shape;
    }

    /// Cuts the link (what is under way is lost, too) until [`Self::mend`].
    pub fn cut(&self) {
        for way in [Way::AToB, Way::BToA] {
            self.settings(way).cut_until = Some(CutUntil::Told);
        }
    }

    /// Cuts the link for `time` from now.
    pub fn cut_for(&self, time: Duration) {
        let end = Instant::now() + time;
        for way in [Way::AToB, Way::BToA] {
            self.settings(way).cut_until = Some(CutUntil::Time(end));
        }
    }

    /// Ends a cut.
    pub fn mend(&self) {
        for way in [Way::AToB, Way::BToA] {
            self.settings(way).cut_until = None;
        }
    }

    /// What one direction has carried and dropped since the start.
    #[must_use]
    pub fn counters(&self, way: Way) -> Counters {
        self.settings(way).counters
    }

    /// Bytes that the link has carried, both directions together: every overhead and what was lost at
    /// random included, what did not fit into the queue left out.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        self.counters(Way::AToB).carried_bytes + self.counters(Way::BToA).carried_bytes
    }

    /// Brings a direction up to date with what was set, and publishes its counters.
    fn synchronise<T>(&self, way: Way, direction: &mut Direction<T>, now: Instant) {
        let mut settings = self.settings(way);
        if matches!(settings.cut_until, Some(CutUntil::Time(end)) if now >= end) {
            settings.cut_until = None;
        }
        direction.set_shape(settings.shape);
        direction.set_cut(settings.cut_until.is_some());
        settings.counters = direction.counters();
    }
}
