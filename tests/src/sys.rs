//! The few system calls that std does not offer, each behind a safe function.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Whether this process may make network namespaces and TUN devices.
#[must_use]
pub fn is_root() -> bool {
    #[expect(unsafe_code, reason = "geteuid")]
    // SAFETY: geteuid takes nothing and cannot fail.
    let uid = unsafe { libc::geteuid() };
    uid == 0
}

/// Clock ticks per second of `/proc/PID/stat`.
pub(crate) fn clock_ticks_per_sec() -> u64 {
    #[expect(unsafe_code, reason = "sysconf")]
    // SAFETY: sysconf reads a constant of the system.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).unwrap_or(100)
}

/// Sends `signal` to one process. The caller owns the child, so the pid is not reused.
pub(crate) fn kill(pid: u32, signal: libc::c_int) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    #[expect(unsafe_code, reason = "kill")]
    // SAFETY: no memory is involved.
    check(unsafe { libc::kill(pid, signal) })?;
    Ok(())
}

/// Moves the calling thread into a network namespace of its own.
pub(crate) fn unshare_network() -> io::Result<()> {
    #[expect(unsafe_code, reason = "unshare")]
    // SAFETY: CLONE_NEWNET affects the calling thread alone.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    Ok(())
}

/// Moves the calling thread into the network namespace `fd`.
pub(crate) fn enter_network(fd: RawFd) -> io::Result<()> {
    #[expect(unsafe_code, reason = "setns")]
    // SAFETY: a wrong descriptor gives an error; CLONE_NEWNET affects the calling thread alone.
    check(unsafe { libc::setns(fd, libc::CLONE_NEWNET) })?;
    Ok(())
}

/// What a child does between fork and exec.
#[derive(Debug, Clone, Default)]
pub(crate) struct ChildSetup {
    /// Network namespace to enter.
    pub(crate) network: Option<RawFd>,
    /// Descriptors that stay open across exec, under the same numbers.
    pub(crate) inherit: Vec<RawFd>,
}

/// Applies `setup` in the child; the child also gets SIGKILL when the thread that made it dies.
pub(crate) fn prepare_child(command: &mut Command, setup: ChildSetup) {
    #[expect(unsafe_code, reason = "pre_exec")]
    // SAFETY: the closure only makes system calls; it does not allocate or take locks.
    unsafe {
        command.pre_exec(move || {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            if let Some(fd) = setup.network {
                check(libc::setns(fd, libc::CLONE_NEWNET))?;
            }
            for fd in &setup.inherit {
                check(libc::fcntl(*fd, libc::F_SETFD, 0))?;
            }
            Ok(())
        });
    }
}

/// An `ifreq` that names `device`.
fn interface_request(device: &CStr) -> io::Result<libc::ifreq> {
    #[expect(unsafe_code, reason = "zeroed ifreq")]
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = device.to_bytes();
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::other("device name too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = libc::c_char::from_le_bytes([*from]);
    }
    Ok(request)
}

fn interface_ioctl(
    fd: RawFd,
    operation: libc::c_ulong,
    request: &mut libc::ifreq,
) -> io::Result<()> {
    #[expect(unsafe_code, reason = "interface ioctl")]
    // SAFETY: every operation used in this file reads or writes one ifreq.
    check(unsafe { libc::ioctl(fd, operation as _, std::ptr::from_mut(request)) })?;
    Ok(())
}

/// Makes the TUN device `name` in the calling thread's network namespace. The descriptor works from
/// any namespace; the device goes when it is closed. Packets are bare IP; as neither checksum nor
/// segmentation offload is on, each read gives one packet as it would be on a wire.
pub(crate) fn open_tun(name: &CStr) -> io::Result<File> {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    interface_ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &mut request)?;
    set_nonblocking(tun.as_raw_fd())?;
    Ok(tun)
}

fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    #[expect(unsafe_code, reason = "fcntl")]
    // SAFETY: only flags of the descriptor change.
    unsafe {
        let flags = check(libc::fcntl(fd, libc::F_GETFL))?;
        check(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK))?;
    }
    Ok(())
}

/// Address, size and queue of an interface.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InterfaceSetup {
    /// IPv4 address and prefix length; `None` leaves the address as it is.
    pub(crate) address: Option<([u8; 4], u8)>,
    /// Largest packet in bytes; `None` leaves it.
    pub(crate) mtu: Option<i32>,
    /// Packets that may wait for the reader; `None` leaves it.
    pub(crate) queue_packets: Option<i32>,
}

fn ipv4_sockaddr(address: [u8; 4]) -> libc::sockaddr {
    let mut data = [0u8; 14];
    data[2..6].copy_from_slice(&address);
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data.map(|byte| libc::c_char::from_le_bytes([byte])),
    }
}

/// Sets up and turns on an interface of the calling thread's network namespace.
pub(crate) fn configure_interface(name: &CStr, setup: InterfaceSetup) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let fd = socket.as_raw_fd();
    if let Some((address, prefix)) = setup.address {
        let mut request = interface_request(name)?;
        request.ifr_ifru.ifru_addr = ipv4_sockaddr(address);
        interface_ioctl(fd, libc::SIOCSIFADDR as _, &mut request)?;
        let mask = u32::MAX
            .checked_shl(32 - u32::from(prefix))
            .unwrap_or(0)
            .to_be_bytes();
        request.ifr_ifru.ifru_netmask = ipv4_sockaddr(mask);
        interface_ioctl(fd, libc::SIOCSIFNETMASK as _, &mut request)?;
    }
    if let Some(mtu) = setup.mtu {
        let mut request = interface_request(name)?;
        request.ifr_ifru.ifru_mtu = mtu;
        interface_ioctl(fd, libc::SIOCSIFMTU as _, &mut request)?;
    }
    if let Some(packets) = setup.queue_packets {
        let mut request = interface_request(name)?;
        // The kernel reads ifr_qlen, an int at the same place as ifr_mtu.
        request.ifr_ifru.ifru_mtu = packets;
        interface_ioctl(fd, libc::SIOCSIFTXQLEN as _, &mut request)?;
    }
    let mut request = interface_request(name)?;
    interface_ioctl(fd, libc::SIOCGIFFLAGS as _, &mut request)?;
    #[expect(unsafe_code, reason = "union field")]
    // SAFETY: SIOCGIFFLAGS has just filled this field.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    interface_ioctl(fd, libc::SIOCSIFFLAGS as _, &mut request)
}

/// Waits until one of `fds` is readable or `timeout` has passed; `None` waits for ever.
pub(crate) fn wait_readable(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
    let mut polls: Vec<libc::pollfd> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let limit = timeout.map(|timeout| libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    #[expect(unsafe_code, reason = "ppoll")]
    // SAFETY: the array and the time live until the call returns; the length is the array's.
    let result = unsafe {
        libc::ppoll(
            polls.as_mut_ptr(),
            polls.len() as libc::nfds_t,
            limit,
            std::ptr::null(),
        )
    };
    match check(result) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// Makes the calling thread wake up on time: no timer slack, and, where allowed, a real-time
/// priority, as a link that pauses with the machine's load is no link.
pub(crate) fn become_timekeeper() {
    let parameters = libc::sched_param { sched_priority: 1 };
    #[expect(unsafe_code, reason = "scheduling of this thread")]
    // SAFETY: both calls concern the calling thread; a refusal changes nothing.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1usize);
        libc::sched_setscheduler(0, libc::SCHED_RR, &raw const parameters);
    }
}

/// Bytes that were written to a socket and have not left this machine, or were not acknowledged.
pub(crate) fn unsent(socket: &impl AsRawFd) -> io::Result<libc::c_int> {
    let mut waiting: libc::c_int = 0;
    #[expect(unsafe_code, reason = "ioctl TIOCOUTQ")]
    // SAFETY: asks an open socket, and writes one int.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut waiting) })?;
    Ok(waiting)
}
