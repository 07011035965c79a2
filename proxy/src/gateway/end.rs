//! What a migration came to.

use crate::{metrics::MigrationResult, wire::control::ResetCode};

/// What is known when all channels of a migration are gone.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct End {
    /// What the destination said, 0 for success.
    pub(super) verdict: Option<u32>,
    /// The source may have seen its connection end instead.
    pub(super) verdict_lost: bool,
    /// Why the first channel that ended early did.
    pub(super) code: Option<ResetCode>,
    /// The destination may have been started.
    pub(super) committed: bool,
    /// The source closed its socket, and the destination had not said anything.
    pub(super) source_left: bool,
    /// The target was reached.
    pub(super) opened: bool,
    /// It had a main channel of QEMU's that was understood.
    pub(super) qemu: bool,
}

impl End {
    pub(super) fn result(&self) -> MigrationResult {
        match (self.verdict, self.code) {
            // The destination runs.
            (Some(0), _) if self.verdict_lost => MigrationResult::Unknown,
            (Some(0), _) => MigrationResult::Completed,
            // What a destination says of a stream that broke off.
            (Some(_), _) if self.source_left => MigrationResult::Cancelled,
            (Some(_), _) => MigrationResult::Failed,
            (None, Some(code)) => match code {
                ResetCode::TargetUnreachable | ResetCode::NotAllowed | ResetCode::Busy
                    if !self.opened =>
                {
                    MigrationResult::Refused
                }
                _ if self.committed => MigrationResult::Unknown,
                ResetCode::Endpoint if self.source_left => MigrationResult::Cancelled,
                _ => MigrationResult::Failed,
            },
            (None, None) if self.committed => MigrationResult::Unknown,
            // Connections of other protocols that came to their end in order.
            (None, None) if !self.qemu => MigrationResult::Completed,
            (None, None) if self.source_left => MigrationResult::Cancelled,
            (None, None) => MigrationResult::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use MigrationResult::{Cancelled, Completed, Failed, Refused, Unknown};

    use super::*;

    #[test]
    fn results_follow_the_verdict_and_what_was_released() {
        let after = |verdict, code, committed, verdict_lost| {
            let end = End {
                verdict,
                verdict_lost,
                code,
                committed,
                qemu: true,
                ..End::default()
            };
            end.result()
        };
        let unknown = Some(ResetCode::Unknown);
        assert_eq!(after(Some(0), None, true, false), Completed);
        assert_eq!(after(Some(1), None, true, false), Failed);
        // The verdict has been passed on, or its reader died before that.
        assert_eq!(after(Some(0), unknown, true, false), Completed);
        assert_eq!(after(Some(0), unknown, true, true), Unknown);
        assert_eq!(after(Some(1), unknown, true, true), Failed);
        // No verdict: only what was released can be unknown.
        assert_eq!(after(None, Some(ResetCode::Endpoint), true, false), Unknown);
        let mismatch = Some(ResetCode::DigestMismatch);
        assert_eq!(after(None, mismatch, false, false), Failed);
        assert_eq!(after(None, Some(ResetCode::Busy), false, false), Refused);
    }

    #[test]
    fn results_tell_who_left_first() {
        let after = |verdict, code, source_left, opened, qemu| {
            let end = End {
                verdict,
                code,
                source_left,
                opened,
                qemu,
                ..End::default()
            };
            end.result()
        };
        let endpoint = Some(ResetCode::Endpoint);
        // A destination says that it failed, on its own or because the stream broke off.
        assert_eq!(after(Some(1), None, false, true, true), Failed);
        assert_eq!(after(Some(1), None, true, true, true), Cancelled);
        assert_eq!(after(None, endpoint, true, true, true), Cancelled);
        assert_eq!(after(None, endpoint, false, true, true), Failed);
        // In order and without a word: nothing of a guest has arrived so.
        assert_eq!(after(None, None, false, true, true), Failed);
        assert_eq!(after(None, None, true, true, true), Cancelled);
        assert_eq!(after(None, None, true, true, false), Completed);
        // One connection of several.
        let down = Some(ResetCode::TargetUnreachable);
        assert_eq!(after(None, down, false, false, true), Refused);
        assert_eq!(after(None, down, false, true, false), Failed);
    }
}
