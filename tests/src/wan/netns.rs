//! Network namespaces without names.
//!
//! A namespace lives as long as its descriptor and the processes in it, so nothing is left behind
//! however a test ends. To look inside while one runs: `nsenter --net=/proc/PID/fd/FD`.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::sys::{self, InterfaceSetup};

/// A network namespace with its loopback up. Needs root.
/// Clones are the same namespace.
#[derive(Debug, Clone)]
pub struct Netns {
    handle: Arc<File>,
}

impl Netns {
    /// A new, empty namespace.
    ///
    /// # Errors
    /// When the process may not make namespaces (it is not root).
    pub fn new() -> Result<Self> {
        let handle = thread::spawn(|| -> io::Result<File> {
            sys::unshare_network()?;
            let setup = InterfaceSetup {
                address: None,
                mtu: None,
                queue_packets: None,
            };
            sys::configure_interface(c"lo", setup)?;
            File::open("/proc/thread-self/ns/net")
        })
        .join()
        .map_err(|_| anyhow::anyhow!("the thread that makes a network namespace panicked"))?
        .context("make a network namespace (needs root)")?;
        Ok(Self {
            handle: Arc::new(handle),
        })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.handle.as_raw_fd()
    }

    /// Runs `action` inside; sockets made there stay there.
    ///
    /// # Errors
    /// Those of `action`, and when the namespace cannot be entered.
    pub fn run<T: Send>(&self, action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                sys::enter_network(self.fd()).context("enter a network namespace")?;
                action()
            });
            match inside.join() {
                Ok(result) => result,
                Err(_) => bail!("a thread inside a network namespace panicked"),
            }
        })
    }

    /// Sets how often TCP repeats inside what is not acknowledged before the connection is lost: `2`
    /// gives up after one or two seconds.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_tcp_retries(&self, count: u8) -> Result<()> {
        self.run(|| {
            fs::write("/proc/sys/net/ipv4/tcp_retries2", count.to_string())
                .context("set how often TCP repeats")
        })
    }

    /// Sets TCP's congestion control for connections made inside from now on.
    ///
    /// # Errors
    /// When the kernel does not have `name`.
    pub fn set_tcp_congestion_control(&self, name: &str) -> Result<()> {
        allow_tcp_congestion_control(name)?;
        self.run(|| {
            fs::write("/proc/sys/net/ipv4/tcp_congestion_control", name)
                .with_context(|| format!("set TCP congestion control {name}"))
        })
    }
}

/// A namespace takes only what the host's list of allowed algorithms has; bbr and cubic are often
/// missing there although the kernel has them.
fn allow_tcp_congestion_control(name: &str) -> Result<()> {
    let path = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
    let allowed = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    if !allowed.split_whitespace().any(|word| word == name) {
        fs::write(path, format!("{} {name}", allowed.trim()))
            .with_context(|| format!("allow TCP congestion control {name} (is it built in?)"))?;
    }
    Ok(())
}
