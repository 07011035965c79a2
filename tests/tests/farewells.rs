//! Ends of connections of other protocols than QEMU's, one side of which leaves while the other still writes to
//! it: what was sent before counts all the same. Real gateways, plain sockets.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use skyferry_tests::fake_vm::{End, FakeEnd, FakeListener, LIMIT, noise};
use skyferry_tests::gateway::{GatewayPair, PairSetup, Route, Side};
use skyferry_tests::process::wait_for;
use skyferry_tests::wan::Shape;

/// Far more than the sockets on the way hold.
const SENT: usize = 3 << 20;
/// Reads all of it in three seconds.
const SLOWLY: u64 = 1 << 20;
/// For bytes to get through, and for a reader to take note that it is to read no more.
const A_WHILE: Duration = Duration::from_millis(300);
/// How often who stays writes a byte, whatever becomes of it.
const ECHO: Duration = Duration::from_millis(50);

fn pair(routes: Vec<Route>) -> Result<GatewayPair> {
    let setup = PairSetup {
        routes,
        store_mib: Some([16; 2]),
        // Notices in time that the link is away.
        wan: "idle_timeout = \"2s\"\nkeep_alive = \"200ms\"\n".into(),
        ..PairSetup::default()
    };
    GatewayPair::over_relay(Shape::wan(1000, 20), &setup)
}

/// Sends everything, leaves at once without a look at what comes back, and is heard to its last byte by the one
/// who stays, reads slowly and writes all the while.
fn leave(leaver: FakeEnd, stayer: &FakeEnd, meanwhile: impl FnOnce() -> Result<()>) -> Result<End> {
    let sent = noise(1, SENT);
    let before = stayer.received();
    stayer.read_at(SLOWLY);
    leaver.read_at(0);
    thread::sleep(A_WHILE);
    stayer.send(b"not read")?;
    thread::sleep(A_WHILE);
    let sending = leaver.send_in_background(sent.clone());
    sending.finish(LIMIT)?;
    // Over TCP the leaver's own kernel would throw away what has not left it.
    leaver.wait_sent(LIMIT)?;
    leaver.close()?;
    meanwhile()?;
    let end = loop {
        // Fails from some time on.
        let _ = stayer.send(b"a");
        if let Ok(end) = stayer.wait_end(ECHO) {
            break end;
        }
    };
    stayer.expect_received(&[before, sent].concat())?;
    Ok(end)
}

/// How [`leave`] is run.
#[derive(Debug, Clone, Copy)]
struct Case {
    unix: bool,
    client_leaves: bool,
    /// The link is away for some time right behind it.
    outage: bool,
}

/// Both ends of a connection: who leaves, and who stays.
fn connect(pair: &GatewayPair, route: usize, case: Case) -> Result<(FakeEnd, FakeEnd)> {
    let route = pair.route(route);
    let listener = FakeListener::bind(&route.target)?;
    let client = FakeEnd::connect(&route.listen)?;
    client.send(b"HELO")?;
    let server = listener.accept(LIMIT)?;
    server.wait_received(4, LIMIT)?;
    Ok(if case.client_leaves {
        (client, server)
    } else {
        (server, client)
    })
}

fn run(pair: &GatewayPair, route: usize, case: Case) -> Result<()> {
    let (leaver, stayer) = connect(pair, route, case)?;
    let end = leave(leaver, &stayer, || {
        if case.outage {
            pair.control().cut();
            wait_link(pair, false)?;
            pair.control().mend();
        }
        Ok(())
    })?;
    // With something left to read a close is a reset, as far as TCP knows.
    ensure!(case.unix || end == End::Reset, "{end:?}");
    Ok(())
}

/// Waits until both gateways see the link as it is.
fn wait_link(pair: &GatewayPair, up: bool) -> Result<()> {
    for side in [Side::A, Side::B] {
        let seen = || {
            let status = pair.gateway(side).status()?;
            Ok((status["links"][0]["up"] == up).then_some(()))
        };
        wait_for("the link's state", LIMIT, seen, || format!("up: {up}"))?;
    }
    Ok(())
}

fn cases(outage: bool) -> impl Iterator<Item = Case> {
    [(false, true), (false, false), (true, true), (true, false)]
        .into_iter()
        .map(move |(unix, client_leaves)| Case {
            unix,
            client_leaves,
            outage,
        })
}

/// Routes for [`cases`], in their order.
fn routes(dir: &Path) -> Result<Vec<Route>> {
    let unix = |name: String| format!("unix:{}", dir.join(name).display());
    let route = |(index, case): (usize, Case)| {
        if case.unix {
            let (listen, target) = (format!("ingress{index}"), format!("target{index}"));
            Ok(Route::between(Side::A, &unix(listen), &unix(target)))
        } else {
            Route::tcp(Side::A)
        }
    };
    cases(false).enumerate().map(route).collect()
}

#[test]
fn who_leaves_is_heard_to_the_last_byte() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pair = pair(routes(dir.path())?)?;
    thread::scope(|scope| {
        let pair = &pair;
        let running: Vec<_> = cases(false)
            .enumerate()
            .map(|(route, case)| (case, scope.spawn(move || run(pair, route, case))))
            .collect();
        for (case, running) in running {
            let outcome = running.join().expect("no panic");
            outcome.with_context(|| format!("{case:?} {}", pair.explain()))?;
        }
        Ok(())
    })
}

/// All has arrived, and the word on the end is lost with the connection: the gateway of who left has nothing more
/// to do and forgets, and the other one learns just that.
#[test]
fn an_end_in_an_outage_waits_for_who_reads_slowly() -> Result<()> {
    const SENT: usize = 1 << 20;
    const SLOWLY: u64 = 256 << 10;
    let dir = tempfile::tempdir()?;
    let pair = pair(routes(dir.path())?)?;
    for (index, case) in cases(true).enumerate() {
        let (leaver, stayer) = connect(&pair, index, case)?;
        let before = stayer.received();
        stayer.read_at(SLOWLY);
        // With something left to read the close is an early end.
        leaver.read_at(0);
        thread::sleep(A_WHILE);
        stayer.send(b"not read")?;
        let sent = noise(2, SENT);
        leaver.send_in_background(sent.clone()).finish(LIMIT)?;
        leaver.wait_sent(LIMIT)?;
        // Over the link, and in the kernel on the other side.
        thread::sleep(A_WHILE);
        pair.control().cut();
        leaver.close()?;
        wait_link(&pair, false)?;
        pair.control().mend();
        stayer.wait_end(LIMIT)?;
        let outcome = stayer.expect_received(&[before, sent].concat());
        outcome.with_context(|| format!("{case:?} {}", pair.explain()))?;
        wait_link(&pair, true)?;
    }
    Ok(())
}

/// The word on the end can be lost with the connection, and what was sent before it as well.
#[test]
fn an_outage_behind_the_end_loses_nothing_either() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pair = pair(routes(dir.path())?)?;
    for (route, case) in cases(true).enumerate() {
        run(&pair, route, case).with_context(|| format!("{case:?} {}", pair.explain()))?;
        wait_link(&pair, true)?;
    }
    Ok(())
}
