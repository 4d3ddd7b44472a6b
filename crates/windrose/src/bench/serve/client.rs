//! The HTTP client: one server, plain HTTP, connections that are kept, errors in the server's own words.

use std::error::Error;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use axum::body::{Body, Bytes, to_bytes};
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, Uri};
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// Most bytes of an answer that is not streamed: lists of models, tokens, errors.
const MAX_BODY_BYTES: usize = 1 << 22;
/// Seconds for an answer that takes no model.
const SHORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections on which a request is tried, as long as they are closed instead.
const ATTEMPTS: usize = 3;
/// Characters of an error that is not in OpenAI's shape.
const MAX_ERROR_CHARS: usize = 200;

/// A server as its clients see it.
pub(super) struct ApiClient {
    http: Client<HttpConnector, Full<Bytes>>,
    /// Without a slash or `/v1` at its end.
    base: String,
    authorization: Option<HeaderValue>,
}

impl ApiClient {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// If the address is not one of plain HTTP, or the key cannot stand in a header.
    pub(super) fn new(url: &str, api_key: Option<&str>) -> Result<Self> {
        let authorization = api_key.map(|key| HeaderValue::try_from(format!("Bearer {key}"))).transpose();
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Ok(Self {
            http: Client::builder(TokioExecutor::new()).build(connector),
            base: base(url)?,
            authorization: authorization.context("the API key has characters that a header cannot carry")?,
        })
    }

    /// Where the server is.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// Gets JSON.
    pub(super) async fn get(&self, path: &str) -> Result<Value> {
        self.short(Method::GET, path, Bytes::new()).await
    }

    /// Posts JSON and gets some back.
    pub(super) async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.short(Method::POST, path, body.to_string().into()).await
    }

    /// Posts JSON; the body that comes back, once its head says that it is an answer.
    ///
    /// # Errors
    /// With the status and the server's message, if it is not.
    pub(super) async fn stream(&self, path: &str, body: Bytes) -> Result<Body> {
        let response = self.send(Method::POST, path, body).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let body = to_bytes(response.into_body(), MAX_BODY_BYTES).await.unwrap_or_default();
        bail!("{status}: {}", error_message(&body));
    }

    async fn short(&self, method: Method, path: &str, body: Bytes) -> Result<Value> {
        let answer = async {
            let response = self.send(method, path, body).await?;
            let status = response.status();
            let body = to_bytes(response.into_body(), MAX_BODY_BYTES).await?;
            ensure!(status.is_success(), "{status}: {}", error_message(&body));
            serde_json::from_slice(&body).with_context(|| format!("{path} did not answer with JSON"))
        };
        tokio::time::timeout(SHORT_TIMEOUT, answer).await.with_context(|| format!("no answer from {path}"))?
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Body>> {
        let mut attempts_left = ATTEMPTS;
        loop {
            let mut request = Request::builder().method(method.clone()).uri(format!("{}{path}", self.base));
            request = request.header(CONTENT_TYPE, "application/json");
            if let Some(authorization) = &self.authorization {
                request = request.header(AUTHORIZATION, authorization);
            }
            attempts_left -= 1;
            match self.http.request(request.body(Full::new(body.clone()))?).await {
                Err(error) if attempts_left > 0 && was_closed(&error) => {}
                answer => return Ok(answer?.map(Body::new)),
            }
        }
    }
}

/// Whether the server closed the connection instead of answering, as one does that ends kept connections unannounced,
/// just when they are used again.
fn was_closed(error: &hyper_util::client::legacy::Error) -> bool {
    let source = error.source().and_then(|source| source.downcast_ref::<hyper::Error>());
    source.is_some_and(hyper::Error::is_incomplete_message)
}

/// The address that paths are put behind.
fn base(url: &str) -> Result<String> {
    let uri: Uri = url.parse().with_context(|| format!("\"{url}\" is not an address"))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => bail!(
            "this client speaks plain HTTP only: let a local proxy speak TLS to {url}, and give the proxy's \
             http:// address"
        ),
        _ => bail!("\"{url}\" is not an address such as http://127.0.0.1:8000"),
    }
    let base = url.trim_end_matches('/');
    Ok(base.strip_suffix("/v1").unwrap_or(base).to_owned())
}

/// What a server says in OpenAI's shape, or the beginning of whatever else it says.
fn error_message(body: &[u8]) -> String {
    let parsed: Value = serde_json::from_slice(body).unwrap_or_default();
    if let Some(message) = message_of(&parsed) {
        return message;
    }
    let text = String::from_utf8_lossy(body);
    text.trim().chars().take(MAX_ERROR_CHARS).collect()
}

/// The message of an error in OpenAI's shape, or in one of those of other servers.
pub(super) fn message_of(value: &Value) -> Option<String> {
    let candidates = [&value["error"]["message"], &value["error"], &value["message"], &value["detail"]];
    candidates.into_iter().find_map(Value::as_str).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    /// Answers the first request of every connection, and closes it when the second comes. The number of connections.
    fn close_on_reuse(listener: &TcpListener, num_answers: usize) -> usize {
        let mut buffer = [0; 4096];
        let (mut num_connections, mut num_answered) = (0, 0);
        while num_answered < num_answers {
            let (mut connection, _) = listener.accept().unwrap();
            num_connections += 1;
            if connection.read(&mut buffer).unwrap() > 0 {
                connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").unwrap();
                num_answered += 1;
            }
            if num_answered < num_answers {
                let _ = connection.read(&mut buffer).unwrap();
            }
        }
        num_connections
    }

    #[tokio::test]
    async fn a_connection_that_is_closed_when_used_again_is_no_failure() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = ApiClient::new(&format!("http://{}", listener.local_addr().unwrap()), None).unwrap();
        let server = std::thread::spawn(move || close_on_reuse(&listener, 3));
        for _ in 0..3 {
            assert_eq!(client.get("/").await.unwrap(), serde_json::json!({}));
        }
        assert_eq!(server.join().unwrap(), 3);
    }

    #[test]
    fn a_base_has_no_version_at_its_end() {
        for url in ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"] {
            assert_eq!(base(url).unwrap(), "http://h:1");
        }
        assert_eq!(base("http://h/proxied/v1").unwrap(), "http://h/proxied");
    }

    #[track_caller]
    fn check_refused(url: &str, words: &str) {
        let error = base(url).expect_err("must be refused").to_string();
        assert!(error.contains(words), "{url}: {error}");
    }

    #[test]
    fn other_addresses_are_refused_with_advice() {
        check_refused("https://api.openai.com/v1", "local proxy");
        check_refused("127.0.0.1:8000", "such as http://");
        check_refused("ftp://h", "such as http://");
    }

    #[test]
    fn errors_are_in_the_servers_words() {
        assert_eq!(error_message(br#"{"error": {"message": "queue full"}}"#), "queue full");
        assert_eq!(error_message(br#"{"error": "busy"}"#), "busy");
        assert_eq!(error_message(br#"{"detail": "Not Found"}"#), "Not Found");
        assert_eq!(error_message(b"  upstream is gone\n"), "upstream is gone");
    }
}
