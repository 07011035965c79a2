//! Every way in which a configuration is refused: the error names the key and says what would be right.

#![allow(
    clippy::unwrap_used,
    reason = "clippy exempts test functions, not their helpers"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use skyferry::config::{Config, Congestion, First, MAX_PEERS};
use skyferry::pki;
use tempfile::TempDir;

const GOOD: &str = r#"
[gateway]
name = "edge-a"
[wan]
listen = "0.0.0.0:7700"
congestion = "auto"
[tls]
ca = "ca.pem"
cert = "edge-a.pem"
key = "edge-a.key"
[[peer]]
name = "edge-b"
address = "198.51.100.7:7700"
[[ingress]]
listen = "127.0.0.1:4444"
peer = "edge-b"
target = "10.0.0.5:4444"
[[egress]]
peer = "edge-b"
allow = ["10.0.0.5:4444", "10.0.0.0/24:49152-49215"]
[admin]
listen = "127.0.0.1:9700"
"#;

/// A folder with a CA and a certificate for `edge-a`.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    pki::init(dir.path(), None, pki::CA_DAYS).unwrap();
    pki::issue(dir.path(), "edge-a", &[], pki::LEAF_DAYS).unwrap();
    dir
}

fn path(dir: &TempDir) -> PathBuf {
    dir.path().join("gateway.toml")
}

/// The lines of the refusal of `text`.
fn refusal(dir: &TempDir, text: &str) -> String {
    match Config::parse(&path(dir), text) {
        Ok(_) => panic!("this was taken:\n{text}"),
        Err(errors) => errors.to_string(),
    }
}

/// What is not as it should be when `text` is refused with one error, on `key`, whose message holds
/// `message`.
fn complaint(dir: &TempDir, text: &str, key: &str, message: &str) -> Option<String> {
    let shown = refusal(dir, text);
    let expected = format!("{}: {key}", path(dir).display());
    let good =
        shown.lines().count() == 1 && shown.starts_with(&expected) && shown.contains(message);
    (!good).then(|| format!("expected one error on {key} with {message:?}, got:\n{shown}\n"))
}

fn assert_refused(dir: &TempDir, text: &str, key: &str, message: &str) {
    if let Some(complaint) = complaint(dir, text, key, message) {
        panic!("{complaint}for\n{text}");
    }
}

#[test]
fn the_shape_of_the_manual_is_taken() {
    let dir = folder();
    fs::write(path(&dir), GOOD).unwrap();
    let config = Config::load(&path(&dir)).unwrap();
    assert_eq!(config.gateway.name, "edge-a");
    assert_eq!(config.wan.congestion, Congestion::Auto);
    assert_eq!(config.wan.delay_budget.as_millis(), 100);
    assert_eq!(config.ingress[0].listen.to_string(), "127.0.0.1:4444");
    assert_eq!(config.ingress[0].first, First::Client);
    assert_eq!(config.ingress[0].tenant, "default");
    assert!(config.tenant("default").unwrap().secret.is_none());
    assert!(
        config
            .egress_for("edge-b")
            .unwrap()
            .allows(&"10.0.0.77:49200".parse().unwrap())
    );
    assert!(
        !config
            .egress_for("edge-b")
            .unwrap()
            .allows(&"10.0.0.77:22".parse().unwrap())
    );
    assert_eq!(config.store.memory_bytes, 512 << 20);
    assert_eq!(config.limits.channels_per_migration, 300);
    assert_eq!(config.warnings, Vec::<String>::new());
    assert_eq!(config.tls.ca.len(), 1);
    assert!(config.tls.expires_at > 1_700_000_000);
}

/// One page that shows both sides' tables, as manuals do, is a good file for `edge-a`.
#[test]
fn an_egress_for_ourselves_is_taken_with_a_warning() {
    let egress = "[[egress]]\npeer = \"edge-b\"";
    let text = GOOD.replace(
        egress,
        "[[egress]]   # of the other side\npeer = \"edge-a\"",
    );
    assert_ne!(text, GOOD);
    let dir = folder();
    let config = Config::parse(&path(&dir), &text).unwrap();
    assert_eq!(config.ingress.len(), 1);
    // Nobody else gains anything by it.
    assert!(config.egress.is_empty());
    assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
    let warning = &config.warnings[0];
    assert!(
        warning.starts_with("egress[0].peer: \"edge-a\" is this gateway's own name"),
        "{warning}"
    );
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn each_bad_value_is_named() {
    let dir = folder();
    // (text in GOOD, what it becomes, key of the error, part of its message)
    let table = [
        (
            "name = \"edge-a\"\n",
            "",
            "gateway.name",
            "is missing; write name = \"edge-a\"",
        ),
        (
            "name = \"edge-a\"",
            "name = \"edge_a\"",
            "gateway.name",
            "is no host name",
        ),
        (
            "name = \"edge-a\"",
            "name = \"Edge-A\"",
            "gateway.name",
            "lower case: \"edge-a\"",
        ),
        (
            "name = \"edge-a\"",
            "name = 7",
            "gateway.name",
            "must be a string in quotes, not an integer",
        ),
        (
            "[wan]\n",
            "drain_timeout = 10\n[wan]\n",
            "gateway.drain_timeout",
            "\"100ms\"",
        ),
        (
            "[wan]\n",
            "drain_timeout = \"2d\"\n[wan]\n",
            "gateway.drain_timeout",
            "must be 1s to 24h, not 2d",
        ),
        (
            "[wan]\n",
            "drain_timeout = \"25h\"\n[wan]\n",
            "gateway.drain_timeout",
            "1s to 24h, not 25h",
        ),
        (
            "[wan]\n",
            "runtime_dir = \"nowhere\"\n[wan]\n",
            "gateway.runtime_dir",
            "needs a folder that exists",
        ),
        (
            "[wan]\n",
            "runtime_dir = \"/proc\"\n[wan]\n",
            "gateway.runtime_dir",
            "needs a folder in memory (tmpfs), such as one in /run: /proc is none",
        ),
        (
            "\"0.0.0.0:7700\"",
            "\"0.0.0.0\"",
            "wan.listen",
            "an IP address and a port",
        ),
        (
            "\"auto\"",
            "\"vegas\"",
            "wan.congestion",
            "\"auto\", \"bbr\", \"cubic\", \"new-reno\"",
        ),
        (
            "\"auto\"",
            "\"fixed\"",
            "wan.fixed_rate",
            "fixed_rate = \"900Mbit/s\"",
        ),
        (
            "\"auto\"",
            "\"auto\"\nfixed_rate = \"1Gbit/s\"",
            "wan.fixed_rate",
            "congestion = \"fixed\" only",
        ),
        (
            "\"auto\"",
            "\"auto\"\nmax_rate = \"100MB/s\"",
            "wan.max_rate",
            "\"900Mbit/s\"",
        ),
        (
            "\"auto\"",
            "\"auto\"\nkeep_alive = \"20s\"",
            "wan.keep_alive",
            "half of wan.idle_timeout",
        ),
        (
            "\"auto\"",
            "\"auto\"\nsocket_buffer = \"1KiB\"",
            "wan.socket_buffer",
            "64KiB to 1GiB",
        ),
        (
            "\"auto\"",
            "\"auto\"\nmax_udp_payload = 9000",
            "wan.max_udp_payload",
            "1200 to 6500, not 9000",
        ),
        (
            "\"auto\"",
            "\"auto\"\ncongestion_control = 1",
            "wan.congestion_control",
            "known here: listen, congestion",
        ),
        (
            "\"ca.pem\"",
            "\"no.pem\"",
            "tls.ca",
            "a relative path begins at the folder of the configuration file; skyferry pki makes",
        ),
        (
            "ca = \"ca.pem\"\n",
            "",
            "tls.ca",
            "is missing; write ca = \"ca.pem\"",
        ),
        (
            "\"ca.pem\"",
            "\"gateway.toml\"",
            "tls.ca",
            "gateway.toml: holds no certificate",
        ),
        (
            "\"edge-a.key\"",
            "\"ca.pem\"",
            "tls.key",
            "ca.pem: holds no private key",
        ),
        (
            "\"edge-a.key\"",
            "\"ca.key\"",
            "tls.key",
            "does not belong to the certificate",
        ),
        (
            "address = \"198.51.100.7:7700\"",
            "address = \"198.51.100.7\"",
            "peer[0].address",
            "HOST:PORT",
        ),
        (
            "address = \"198.51.100.7:7700\"\n",
            "",
            "ingress[0].peer",
            "\"edge-b\" has no address",
        ),
        (
            "\"127.0.0.1:4444\"",
            "\"localhost:4444\"",
            "ingress[0].listen",
            "needs a literal address",
        ),
        (
            "\"127.0.0.1:4444\"",
            "\"unix:vm.sock\"",
            "ingress[0].listen",
            "must be absolute",
        ),
        (
            "\"127.0.0.1:4444\"",
            "\"127.0.0.1:0\"",
            "ingress[0].listen",
            "a port is 1 to 65535",
        ),
        (
            "target = \"10.0.0.5:4444\"\n",
            "",
            "ingress[0].target",
            "is missing",
        ),
        (
            "target = \"10.0.0.5:4444\"",
            "target = \"10.0.0.5\"",
            "ingress[0].target",
            "HOST:PORT",
        ),
        (
            "[[egress]]",
            "first = \"both\"\n[[egress]]",
            "ingress[0].first",
            "\"client\" or \"server\"",
        ),
        (
            "[[egress]]",
            "tenant = \"blue\"\n[[egress]]",
            "ingress[0].tenant",
            "no [[tenant]] \"blue\"; known: default",
        ),
        (
            "[[egress]]",
            "allow_no_return_path = \"yes\"\n[[egress]]",
            "ingress[0].allow_no_return_path",
            "true or false",
        ),
        (
            "[[egress]]",
            "tagret = 1\n[[egress]]",
            "ingress[0].tagret",
            "known here: listen, peer, target",
        ),
        (
            "[[egress]]\npeer = \"edge-b\"",
            "[[egress]]\npeer = \"edge-c\"",
            "egress[0].peer",
            "no [[peer]] \"edge-c\"; known: edge-b",
        ),
        (
            "\"10.0.0.0/24:49152-49215\"",
            "\"10.0.0.5/24:1\"",
            "egress[0].allow[1]",
            "write 10.0.0.0/24 for the network",
        ),
        (
            "\"10.0.0.0/24:49152-49215\"",
            "\"10.0.0.0/24:9-8\"",
            "egress[0].allow[1]",
            "runs backwards",
        ),
        (
            "\"10.0.0.0/24:49152-49215\"",
            "\"unix:/run/../x\"",
            "egress[0].allow[1]",
            "must not hold \"..\"",
        ),
        (
            "\"10.0.0.0/24:49152-49215\"",
            "4",
            "egress[0].allow[1]",
            "must be a string",
        ),
        (
            "[\"10.0.0.5:4444\", \"10.0.0.0/24:49152-49215\"]",
            "[]",
            "egress[0].allow",
            "at least one rule",
        ),
        (
            "[admin]",
            "dial_timeout = \"1ms\"\n[admin]",
            "egress[0].dial_timeout",
            "100ms to 4s",
        ),
        (
            "\"127.0.0.1:9700\"",
            "\"127.0.0.1:4444\"",
            "admin.listen",
            "already taken by an [[ingress]]",
        ),
        (
            "\"127.0.0.1:9700\"",
            "\"127.0.0.1:0\"",
            "admin.listen",
            "other than 0",
        ),
        (
            "[admin]",
            "[store]\nmemory = \"0\"\n[admin]",
            "store.memory",
            "1MiB to 1TiB, not 0",
        ),
        (
            "[admin]",
            "[store]\nmemory = -5\n[admin]",
            "store.memory",
            "512MiB",
        ),
        (
            "[admin]",
            "[compression]\nlevel = 22\n[admin]",
            "compression.level",
            "1 to 19, not 22",
        ),
        (
            "[admin]",
            "[compression]\nlevel = \"best\"\n[admin]",
            "compression.level",
            "must be \"auto\" or 1 to 19, not \"best\"",
        ),
        (
            "[admin]",
            "[limits]\nmigrations = 0\n[admin]",
            "limits.migrations",
            "1 to 4096",
        ),
        (
            "[admin]",
            "[limits]\nin_flight = \"10\"\n[admin]",
            "limits.in_flight",
            "1MiB to 64GiB",
        ),
        (
            "[admin]",
            "[limit]\n[admin]",
            "limit",
            "known here: gateway, wan, tls",
        ),
        (
            "[admin]\nlisten = \"127.0.0.1:9700\"",
            "admin = 1",
            "egress[0].admin",
            "known here: peer, allow",
        ),
    ];
    fs::write(path(&dir), GOOD).unwrap();
    let mut complaints = String::new();
    for (from, to, key, message) in table {
        assert!(GOOD.contains(from), "{from:?} is not in the good text");
        complaints.extend(complaint(&dir, &GOOD.replacen(from, to, 1), key, message));
    }
    assert!(complaints.is_empty(), "{complaints}");
}

#[test]
fn duplicates_are_refused() {
    let dir = folder();
    let twice = |extra: &str| GOOD.replace("[admin]", &format!("{extra}\n[admin]"));
    let ingress = "[[ingress]]\nlisten = \"127.0.0.1:4444\"\npeer = \"edge-b\"\ntarget = \"a:1\"";
    assert_refused(
        &dir,
        &twice(ingress),
        "ingress[1].listen",
        "already taken by another [[ingress]]",
    );
    assert_refused(
        &dir,
        &twice("[[peer]]\nname = \"edge-b\""),
        "peer[1].name",
        "already a [[peer]]",
    );
    assert_refused(
        &dir,
        &twice("[[peer]]\nname = \"edge-a\""),
        "peer[1].name",
        "own name",
    );
    let egress = "[[egress]]\npeer = \"edge-b\"\nallow = [\"a:1\"]";
    assert_refused(
        &dir,
        &twice(egress),
        "egress[1].peer",
        "into one allow list",
    );
    let tenants = "[[tenant]]\nname = \"blue\"\n[[tenant]]\nname = \"blue\"";
    assert_refused(
        &dir,
        &twice(tenants),
        "tenant[1].name",
        "already a [[tenant]]",
    );
    let crowd: String = (0..=MAX_PEERS)
        .map(|n| format!("[[peer]]\nname = \"p{n}\"\n"))
        .collect();
    assert!(refusal(&dir, &twice(&crowd)).contains("at most 256 are allowed"));
}

#[test]
fn all_errors_come_at_once() {
    let dir = folder();
    let text = GOOD
        .replace("\"auto\"", "\"vegas\"")
        .replace("\"ca.pem\"", "\"no.pem\"")
        .replace("[[egress]]", "colour = 1\n[[egress]]");
    let shown = refusal(&dir, &text);
    for key in ["wan.congestion", "tls.ca", "ingress[0].colour"] {
        assert!(
            shown.contains(&format!("gateway.toml: {key}: ")),
            "{key} is not in\n{shown}"
        );
    }
    assert_eq!(shown.lines().count(), 3, "{shown}");
}

#[test]
fn what_is_no_toml_is_placed() {
    let dir = folder();
    assert_refused(&dir, "[gateway]\nname = edge-a\n", "line 2, column 8: ", "");
    assert_refused(&dir, "[gateway]\n[gateway]\n", "line 2, ", "duplicate");
    let missing = Config::load(Path::new("/nonexistent/gateway.toml")).unwrap_err();
    assert!(
        missing
            .to_string()
            .starts_with("/nonexistent/gateway.toml: cannot be read")
    );
    let empty = refusal(&dir, "");
    for key in [
        "gateway.name",
        "wan.listen",
        "tls.ca",
        "tls.cert",
        "tls.key",
        "peer",
    ] {
        assert!(
            empty.contains(&format!(": {key}: is missing")),
            "{key} is not in\n{empty}"
        );
    }
}

#[test]
fn a_certificate_that_a_peer_would_refuse_is_refused() {
    let dir = folder();
    // Of another CA.
    let other = tempfile::tempdir().unwrap();
    pki::init(other.path(), None, pki::CA_DAYS).unwrap();
    let text = GOOD.replace(
        "\"ca.pem\"",
        &format!("\"{}/ca.pem\"", other.path().display()),
    );
    assert_refused(&dir, &text, "tls.cert", "was not issued by the CA in");
    // Of another name.
    pki::issue(dir.path(), "edge-z", &["extra.example".into()], 30).unwrap();
    let text = GOOD
        .replace("edge-a.pem", "edge-z.pem")
        .replace("edge-a.key", "edge-z.key");
    assert_refused(&dir, &text, "tls.cert", "does not carry the name edge-a");
    assert!(
        refusal(&dir, &text).contains("edge-z"),
        "the names it has are not shown"
    );
    // Expired, not valid yet, not for clients.
    let made = |change: &dyn Fn(&mut CertificateParams)| {
        let ca_key = KeyPair::from_pem(&fs::read_to_string(dir.path().join("ca.key")).unwrap());
        let ca_pem = fs::read_to_string(dir.path().join("ca.pem")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key.unwrap()).unwrap();
        let mut params = CertificateParams::new(["edge-a".to_owned()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        fs::write(dir.path().join("made.pem"), certificate.pem()).unwrap();
        fs::write(dir.path().join("made.key"), key.serialize_pem()).unwrap();
    };
    let text = GOOD
        .replace("edge-a.pem", "made.pem")
        .replace("edge-a.key", "made.key");
    made(&|params| params.not_after = rcgen::date_time_ymd(2020, 1, 1));
    assert_refused(
        &dir,
        &text,
        "tls.cert",
        "has expired; issue a new one: skyferry pki issue",
    );
    made(&|params| params.not_before = rcgen::date_time_ymd(2999, 1, 1));
    assert_refused(&dir, &text, "tls.cert", "not valid yet");
    made(&|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    assert_refused(&dir, &text, "tls.cert", "may not be used as a client");
    // Without extended key usages any use is allowed: foreign PKIs work.
    made(&|_| {});
    let config = Config::parse(&path(&dir), &text).unwrap();
    assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
    assert!(config.warnings[0].contains("chmod 600"));
}

#[test]
fn a_short_secret_is_refused_and_a_good_one_is_never_shown() {
    let dir = folder();
    let file = dir.path().join("blue.secret");
    fs::write(&file, "short").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let text = GOOD.replace(
        "[admin]",
        "[[tenant]]\nname = \"blue\"\nsecret_file = \"blue.secret\"\n[admin]",
    );
    assert_refused(
        &dir,
        &text,
        "tenant[0].secret_file",
        "holds 5 bytes; a secret has at least 32",
    );
    let secret = "0123456789abcdef0123456789abcdef";
    fs::write(&file, format!("{secret}\n")).unwrap();
    let config = Config::parse(&path(&dir), &text).unwrap();
    assert_eq!(config.warnings, Vec::<String>::new());
    let shown = format!("{:?}", config.tenant("blue").unwrap());
    assert!(shown.contains("TenantSecret(..)"), "{shown}");
    // White space at the end is not part of the secret, so editors do no harm.
    let key = *config
        .tenant("blue")
        .unwrap()
        .secret
        .as_ref()
        .unwrap()
        .as_bytes();
    fs::write(&file, secret).unwrap();
    let again = Config::parse(&path(&dir), &text).unwrap();
    assert_eq!(
        *again
            .tenant("blue")
            .unwrap()
            .secret
            .as_ref()
            .unwrap()
            .as_bytes(),
        key
    );
}

#[test]
fn what_deserves_a_look_is_a_warning() {
    let dir = folder();
    let text = GOOD.replace("127.0.0.1:9700", "0.0.0.0:9700");
    let config = Config::parse(&path(&dir), &text).unwrap();
    assert!(config.warnings[0].starts_with("admin.listen: 0.0.0.0:9700 is not a loopback address"));
    let short = tempfile::tempdir().unwrap();
    pki::init(short.path(), None, 5).unwrap();
    assert!(
        pki::issue(short.path(), "edge-a", &[], 30)
            .unwrap()
            .cut_to_ca
    );
    let config = Config::parse(&path(&short), GOOD).unwrap();
    assert_eq!(config.warnings.len(), 2, "{:?}", config.warnings);
    assert!(
        config.warnings[0].contains("edge-a.pem: expires in "),
        "{:?}",
        config.warnings
    );
}
