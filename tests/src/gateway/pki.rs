//! Certificates of gateways.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use tempfile::TempDir;

use super::{Side, binary};
use crate::process::run;

/// A certificate authority made with `skyferry pki`, and the gateways' certificates.
#[derive(Debug)]
pub struct Pki {
    dir: TempDir,
}

impl Pki {
    /// A new authority with certificates for both sides.
    ///
    /// # Errors
    /// When `skyferry pki` fails.
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("skyferry-pki-").tempdir()?;
        run(Command::new(binary()?)
            .args(["pki", "init", "--dir"])
            .arg(dir.path()))?;
        let pki = Self { dir };
        pki.issue(Side::A.name())?;
        pki.issue(Side::B.name())?;
        Ok(pki)
    }

    /// Issues one more certificate.
    ///
    /// # Errors
    /// When `skyferry pki` fails.
    pub fn issue(&self, name: &str) -> Result<()> {
        let mut command = Command::new(binary()?);
        command
            .args(["pki", "issue", "--name", name, "--dir"])
            .arg(self.dir.path());
        run(&mut command).map(|_| ())
    }

    /// The folder with `ca.pem`, `edge-a.pem`, `edge-a.key`, …
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}
