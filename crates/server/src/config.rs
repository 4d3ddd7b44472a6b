//! What an operator chooses about serving, and every limit on what one request may ask for.

use std::time::Duration;

/// The server's share of `config.toml`.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Name under which the model is served.
    pub model_name: String,
    /// Version of the program, for `/version`.
    pub version: String,
    /// Names everything that decides outputs (weights, format, kernels), for `system_fingerprint`.
    pub system_fingerprint: String,
    /// Keys of which a client must present one as `Authorization: Bearer`; none: anyone may ask.
    pub api_keys: Vec<String>,
    /// Asks for a key at `/metrics` too, if there are keys.
    pub protect_metrics: bool,
    /// Origins whose pages may call the API from a browser; none: CORS is off. `*` is any origin.
    pub cors_allowed_origins: Vec<String>,
    /// Most bytes of a request body.
    pub max_body_bytes: usize,
    /// Most bytes of one prompt or rendered conversation, checked before it is tokenized.
    pub max_prompt_bytes: usize,
    /// Most choices per prompt (`n`, `best_of`).
    pub max_choices: u32,
    /// Most prompts in one completion request.
    pub max_prompts: usize,
    /// Most choices of all prompts of a request together.
    pub max_choices_per_request: usize,
    /// Most texts tokenized at the same time; others wait.
    pub max_concurrent_encodes: usize,
    /// Most responses kept for `previous_response_id`; the oldest leave first.
    pub max_stored_responses: usize,
    /// Most bytes of these together.
    pub max_stored_response_bytes: usize,
    /// Most connections; others wait in the listener's backlog.
    pub max_connections: usize,
    /// Most bytes of a request's head; above it the answer is 431.
    pub max_header_bytes: usize,
    /// Time in which a client must send the head of a request; also how long a connection may idle.
    pub header_read_timeout: Duration,
    /// Time in which a client must send the body.
    pub body_read_timeout: Duration,
    /// Time for which sent bytes may stay unacknowledged before a connection is given up (on Linux).
    pub write_timeout: Duration,
    /// Silence in a stream after which a comment is sent to keep it open; `None`: never.
    pub keep_alive_interval: Option<Duration>,
    /// Time without a step, although there is work, after which the server is no longer live.
    pub stall_timeout: Duration,
    /// Time for which requests are still accepted after the signal to shut down, while load balancers learn
    /// of it.
    pub drain_grace: Duration,
    /// Time that running requests then get to finish.
    pub shutdown_timeout: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            model_name: "windrose".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            system_fingerprint: "fp_windrose".into(),
            api_keys: Vec::new(),
            protect_metrics: false,
            cors_allowed_origins: Vec::new(),
            max_body_bytes: 8 << 20,
            max_prompt_bytes: 1 << 20,
            max_choices: 128,
            max_prompts: 1024,
            max_choices_per_request: 1024,
            max_concurrent_encodes: std::thread::available_parallelism().map_or(1, usize::from),
            max_stored_responses: 1024,
            max_stored_response_bytes: 64 << 20,
            max_connections: 4096,
            max_header_bytes: 64 << 10,
            header_read_timeout: Duration::from_secs(30),
            body_read_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            keep_alive_interval: Some(Duration::from_secs(10)),
            stall_timeout: Duration::from_secs(30),
            drain_grace: Duration::from_secs(5),
            shutdown_timeout: Duration::from_secs(30),
        }
    }
}

/// Limits of OpenAI's API, which clients know.
pub(crate) mod limits {
    use std::ops::RangeInclusive;

    /// Most stop strings.
    pub(crate) const MAX_STOPS: usize = 4;
    /// Most bytes of a stop string.
    pub(crate) const MAX_STOP_BYTES: usize = 1024;
    /// Most `stop_token_ids`.
    pub(crate) const MAX_STOP_TOKENS: usize = 128;
    /// Most `top_logprobs` of a chat.
    pub(crate) const MAX_CHAT_LOGPROBS: i64 = 20;
    /// Most `logprobs` of a completion.
    pub(crate) const MAX_COMPLETION_LOGPROBS: i64 = 5;
    /// Most messages of a conversation.
    pub(crate) const MAX_MESSAGES: usize = 8192;
    /// Most tools offered.
    pub(crate) const MAX_TOOLS: usize = 128;
    /// Most bytes of a schema, a regular expression or a grammar.
    pub(crate) const MAX_GRAMMAR_BYTES: usize = 128 << 10;
    /// Most strings of a `choice`.
    pub(crate) const MAX_CHOICE_STRINGS: usize = 1024;
    /// Most bytes of one of them.
    pub(crate) const MAX_CHOICE_BYTES: usize = 4096;
    /// Most bytes of a tool's or a schema's name.
    pub(crate) const MAX_NAME_BYTES: usize = 64;
    /// Most entries of `metadata`.
    pub(crate) const MAX_METADATA: usize = 16;
    /// Most bytes of a label: `user`, a metadata value, `cache_salt`.
    pub(crate) const MAX_LABEL_BYTES: usize = 512;
    /// Longest `deadline_ms`: a day.
    pub(crate) const MAX_DEADLINE_MS: i64 = 86_400_000;
    /// Longest `sse_ping_interval`: an hour.
    pub(crate) const MAX_PING_INTERVAL_S: i64 = 3600;
    /// Temperatures.
    pub(crate) const TEMPERATURE: RangeInclusive<f64> = 0.0..=2.0;
    /// Presence and frequency penalties.
    pub(crate) const PENALTY: RangeInclusive<f64> = -2.0..=2.0;
    /// Biases of single tokens.
    pub(crate) const LOGIT_BIAS: RangeInclusive<f64> = -100.0..=100.0;
    /// Seeds; a negative one is as good as any.
    pub(crate) const SEED: RangeInclusive<i64> = i64::MIN..=i64::MAX;
}
