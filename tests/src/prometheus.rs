//! A real Prometheus that scrapes gateways with the rules of `configs/prometheus`, and promtool.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::gateway::free_tcp_address;
use crate::process::{Process, Surroundings, run, wait_for};

/// Time for a start.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// Time for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How often targets are scraped and rules evaluated.
pub const INTERVAL: Duration = Duration::from_millis(200);
/// What is missing when neither program is there.
const MISSING: &str = "prometheus and promtool are needed: apt-get install prometheus";

/// The repository's folder of that name under `configs`.
#[must_use]
pub fn configs(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../configs")
        .join(folder)
}

/// A running Prometheus with a data folder of its own; both go on drop.
#[derive(Debug)]
pub struct Prometheus {
    process: Process,
    address: SocketAddr,
    _dir: TempDir,
}

/// One series of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Its labels, as a JSON object.
    pub labels: Value,
    /// Its value; NaN is a value, too.
    pub value: f64,
}

impl Prometheus {
    /// Starts one that scrapes two gateways every [`INTERVAL`], with the configuration and the rules
    /// that are shipped; ready, and both targets scraped once.
    ///
    /// # Errors
    /// When it is not installed, refuses the configuration or does not come up; the text has its log.
    pub fn start(targets: [SocketAddr; 2]) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("skyferry-prometheus-")
            .tempdir()?;
        let config = dir.path().join("prometheus.yml");
        fs::write(&config, configuration(targets)?)?;
        fs::copy(
            configs("prometheus").join("skyferry.rules.yml"),
            dir.path().join("skyferry.rules.yml"),
        )?;
        promtool(&["check", "config", "prometheus.yml"], dir.path(), None)?;
        let address = free_tcp_address()?;
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                dir.path().join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .current_dir(dir.path());
        let log = dir.path().join("log");
        let process = Process::start("prometheus", &mut command, &log, Surroundings::default())
            .context(MISSING)?;
        let mut prometheus = Self {
            process,
            address,
            _dir: dir,
        };
        prometheus.wait_ready()?;
        Ok(prometheus)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let Self {
            process, address, ..
        } = self;
        let log = process.log_path().to_owned();
        wait_for(
            "scrape of both targets",
            READY_LIMIT,
            || {
                if let Some(status) = process.exited() {
                    bail!("prometheus has ended: {status}\n{}", process.log_tail());
                }
                let up = query(*address, "sum(up)").unwrap_or_default();
                Ok(up.first().is_some_and(|s| s.value == 2.0).then_some(()))
            },
            || crate::process::log_tail("prometheus", &log),
        )
    }

    /// Evaluates a query now.
    ///
    /// # Errors
    /// When it is malformed, or nobody answers.
    pub fn query(&self, query: &str) -> Result<Vec<Series>> {
        self::query(self.address, query).with_context(|| query.to_owned())
    }

    /// The values that a label has among the series of a metric.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn label_values(&self, metric: &str, label: &str) -> Result<Vec<String>> {
        let path = format!("/api/v1/label/{label}/values?match[]={}", escaped(metric));
        let data = get(self.address, &path)?;
        Ok(serde_json::from_value(data)?)
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }
}

/// The shipped configuration with our targets and [`INTERVAL`].
fn configuration(targets: [SocketAddr; 2]) -> Result<String> {
    let mut text = fs::read_to_string(configs("prometheus").join("prometheus.yml"))?;
    let interval = format!("{}ms", INTERVAL.as_millis());
    let [a, b] = targets.map(|target| target.to_string());
    for (shipped, ours) in [
        ("15s", &interval),
        ("127.0.0.1:9700", &a),
        ("127.0.0.2:9700", &b),
    ] {
        ensure!(
            text.contains(shipped),
            "{shipped} is not in prometheus.yml any more"
        );
        text = text.replace(shipped, ours);
    }
    Ok(text)
}

fn query(address: SocketAddr, query: &str) -> Result<Vec<Series>> {
    let path = format!("/api/v1/query?query={}", escaped(query));
    let data = get(address, &path)?;
    let list = data["result"].as_array().context("no result")?;
    let series = |item: &Value| {
        let value = item["value"][1].as_str().context("no value")?;
        Ok(Series {
            labels: item["metric"].clone(),
            value: value.parse()?,
        })
    };
    list.iter().map(series).collect()
}

/// `data` of a successful answer of Prometheus's HTTP API.
fn get(address: SocketAddr, path: &str) -> Result<Value> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_LIMIT)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    // Version 1.0: the answer is not chunked, and ends with the connection.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("cut HTTP answer")?;
    let mut answer: Value = serde_json::from_str(body).with_context(|| body.to_owned())?;
    ensure!(answer["status"] == "success", "{}", answer["error"]);
    Ok(answer["data"].take())
}

fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() {
            out.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

/// Runs promtool in `dir`, with `input` on its standard input.
///
/// # Errors
/// When it is not installed or finds something wrong; the text has what it says.
pub fn promtool(arguments: &[&str], dir: &Path, input: Option<&str>) -> Result<String> {
    let mut command = Command::new("promtool");
    command.args(arguments).current_dir(dir);
    let Some(input) = input else {
        return run(&mut command).context(MISSING);
    };
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(input.as_bytes())?;
    command.stdin(File::open(file.path())?);
    run(&mut command).context(MISSING)
}
