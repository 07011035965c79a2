//! One HTTP GET to an admin endpoint: all that `skyferry status` needs of HTTP.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Largest answer that is read, in bytes: a status with thousands of migrations is below 4 MiB.
const MAX_ANSWER_BYTES: u64 = 16 << 20;

/// How long connecting and answering may take together.
const TIMEOUT: Duration = Duration::from_secs(5);

/// An admin endpoint's address, as in a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AdminUrl {
    /// `HOST:PORT`, an IPv6 address in brackets.
    authority: String,
}

impl AdminUrl {
    /// Reads `http://HOST:PORT`, with or without a slash at the end, or `HOST:PORT` alone.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let authority = text.strip_prefix("http://").unwrap_or(text);
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let good = authority.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
        if good && !authority.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control()) {
            Ok(Self {
                authority: authority.to_owned(),
            })
        } else {
            Err(format!(
                "\"{text}\" is no admin endpoint; write http://127.0.0.1:9700"
            ))
        }
    }

    /// The body of the answer to `GET path`.
    ///
    /// # Errors
    /// A message for the operator that names the endpoint.
    pub(super) async fn get(&self, path: &str) -> Result<Vec<u8>, String> {
        let answer = tokio::time::timeout(TIMEOUT, self.exchange(path)).await;
        let answer = answer
            .map_err(|_| format!("no answer within {} s", TIMEOUT.as_secs()))
            .and_then(|result| result);
        answer.and_then(|answer| body(&answer).map(<[u8]>::to_vec)).map_err(|reason| {
            format!(
                "the gateway's admin endpoint http://{} cannot be reached: {reason}\n\
                 Is the gateway running, and is this the [admin] listen address of its configuration?",
                self.authority
            )
        })
    }

    async fn exchange(&self, path: &str) -> Result<Vec<u8>, String> {
        let mut stream = TcpStream::connect(&self.authority)
            .await
            .map_err(|error| error.to_string())?;
        // With HTTP/1.0 the answer is neither chunked nor kept open: its end is the end of the stream.
        let request = format!(
            "GET {path} HTTP/1.0\r\nHost: {}\r\nAccept: application/json\r\n\r\n",
            self.authority
        );
        stream
            .write_all(request.as_bytes())
            .await
            .map_err(|error| error.to_string())?;
        let mut answer = Vec::new();
        let read = stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer).await;
        match read {
            Ok(length) if length as u64 == MAX_ANSWER_BYTES => Err("the answer is too long".into()),
            Ok(_) => Ok(answer),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Splits off the head and insists on status 200 and, where it is given, on the whole length.
fn body(answer: &[u8]) -> Result<&[u8], String> {
    const END: &[u8] = b"\r\n\r\n";
    let not_http = || "it does not speak HTTP".to_owned();
    let end = answer
        .windows(END.len())
        .position(|window| window == END)
        .ok_or_else(not_http)?;
    let head = str::from_utf8(&answer[..end]).map_err(|_| not_http())?;
    let body = &answer[end + END.len()..];
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    let code = status
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1));
    match code {
        Some("200") => {}
        Some(code) => return Err(format!("it answers with status {code}")),
        None => return Err(not_http()),
    }
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find_map(|(name, value)| {
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.trim().parse::<usize>())
        });
    match length {
        Some(Ok(length)) if length != body.len() => Err("the answer was cut off".into()),
        Some(Err(_)) => Err(not_http()),
        _ => Ok(body),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_in_both_forms() {
        let plain = AdminUrl::parse("127.0.0.1:9700").unwrap();
        assert_eq!(AdminUrl::parse("http://127.0.0.1:9700/").unwrap(), plain);
        assert!(AdminUrl::parse("http://[::1]:9700").is_ok());
        for text in [
            "",
            "127.0.0.1",
            "https://a:1",
            "http://a:0",
            "http://a:1/x",
            "a b:1",
            "a:b",
        ] {
            assert!(AdminUrl::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_a_whole_good_answer_counts() {
        let good = b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}";
        assert_eq!(body(good).unwrap(), b"{}");
        for cut in 0..good.len() {
            assert!(body(&good[..cut]).is_err(), "taken when cut at {cut}");
        }
        assert!(
            body(b"HTTP/1.1 503 Busy\r\n\r\nno")
                .unwrap_err()
                .contains("503")
        );
        assert!(body(b"SSH-2.0-OpenSSH\r\n\r\n").is_err());
    }
}
