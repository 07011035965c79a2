//! What is wrong with a configuration, as its author needs to hear it.

use std::fmt;
use std::path::{Path, PathBuf};

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The key, such as `ingress[1].listen`; empty where the file as a whole is at fault.
    pub key: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// All that is wrong with one configuration file; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors {
    path: PathBuf,
    errors: Vec<ConfigError>,
}

impl ConfigErrors {
    /// One error about the file as a whole.
    pub(super) fn whole_file(path: &Path, message: impl Into<String>) -> Self {
        let error = ConfigError {
            key: String::new(),
            message: message.into(),
        };
        Self {
            path: path.to_owned(),
            errors: vec![error],
        }
    }

    /// `None` when there is nothing to report.
    pub(super) fn from_list(path: &Path, errors: Vec<ConfigError>) -> Option<Self> {
        (!errors.is_empty()).then(|| Self {
            path: path.to_owned(),
            errors,
        })
    }

    /// The errors, in the order in which they were found.
    pub fn errors(&self) -> &[ConfigError] {
        &self.errors
    }
}

/// One line per error: file, key, message.
impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.errors.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{}: ", self.path.display())?;
            if !error.key.is_empty() {
                write!(f, "{}: ", error.key)?;
            }
            f.write_str(&error.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
