//! The socket of a gateway that takes pages: a file in the folder of its store.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Name of the socket in the store's folder.
pub const SOCKET: &str = "seed.sock";
/// Its name until it is ready.
const NEW_SOCKET: &str = "seed.sock.new";

/// Longest path that an address of a unix socket holds.
const MAX_ADDRESS: usize = 107;

/// Makes the socket, which only this user (and root) may connect to. The folder's lock is held: what a dead
/// gateway left is replaced.
///
/// # Errors
/// Those of the file system.
pub fn bind(folder: &Path) -> io::Result<UnixListener> {
    let new = folder.join(NEW_SOCKET);
    remove(&new)?;
    let listener = at_path(folder, NEW_SOCKET, |path| UnixListener::bind(path))?;
    // Under its final name it never had other rights.
    std::fs::set_permissions(&new, PermissionsExt::from_mode(0o600))?;
    std::fs::rename(&new, folder.join(SOCKET))?;
    Ok(listener)
}

/// Removes the socket.
///
/// # Errors
/// Those of the file system, except that there is none.
pub fn unbind(folder: &Path) -> io::Result<()> {
    remove(&folder.join(SOCKET))
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Connects to the gateway that has the store open; `None` if no gateway listens.
///
/// # Errors
/// When there is one that this user may not connect to.
pub fn connect(folder: &Path) -> io::Result<Option<UnixStream>> {
    let connected = at_path(folder, SOCKET, |path| UnixStream::connect(path));
    match connected {
        Ok(stream) => Ok(Some(stream)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Does something with a socket's path, which is made short enough for an address.
fn at_path<T>(
    folder: &Path,
    name: &str,
    act: impl FnOnce(&Path) -> io::Result<T>,
) -> io::Result<T> {
    let path = folder.join(name);
    if path.as_os_str().as_bytes().len() <= MAX_ADDRESS {
        return act(&path);
    }
    let folder = File::open(folder)?;
    let short = format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
    act(&PathBuf::from(short))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn check(folder: &Path) {
        assert!(connect(folder).unwrap().is_none());
        let listener = bind(folder).unwrap();
        let mode = folder.join(SOCKET).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut client = connect(folder).unwrap().unwrap();
        client.write_all(b"x").unwrap();
        let mut byte = [0];
        listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
        // One that is dead is as none, and is replaced.
        drop(listener);
        assert!(connect(folder).unwrap().is_none());
        let _listener = bind(folder).unwrap();
        assert!(connect(folder).unwrap().is_some());
        unbind(folder).unwrap();
        unbind(folder).unwrap();
        assert!(connect(folder).unwrap().is_none());
        assert_eq!(folder.read_dir().unwrap().count(), 0);
    }

    #[test]
    fn a_socket_is_found_and_replaced() {
        check(tempfile::tempdir().unwrap().path());
    }

    #[test]
    fn a_folder_may_have_a_long_name() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("long".repeat(40));
        std::fs::create_dir(&long).unwrap();
        check(&long);
    }
}
