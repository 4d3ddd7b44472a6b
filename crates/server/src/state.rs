//! What all requests share.

use std::ops::Deref;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use engine::{Clock, EngineHandle};
use tokio::sync::Semaphore;

use crate::config::ServerConfig;
use crate::constraint::Compiler;
use crate::error::ApiError;
use crate::lifecycle::Lifecycle;
use crate::metrics::Metrics;
use crate::running::Running;
use crate::stored::StoredResponses;
use crate::text::model::{TextError, TextModel};

/// One served model: its words, its engine, and how it is served. Clones share it.
#[derive(Clone)]
pub struct AppState(Arc<Shared>);

/// The contents of an [`AppState`].
pub struct Shared {
    pub(crate) config: ServerConfig,
    pub(crate) text: TextModel,
    pub(crate) engine: EngineHandle,
    pub(crate) clock: Clock,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) running: Arc<Running>,
    pub(crate) responses: StoredResponses,
    pub(crate) started_at_unix: u64,
    pub(crate) grammars: Compiler,
    encodes: Semaphore,
}

impl Deref for AppState {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl AppState {
    /// Puts a server together; `clock` must be the engine's own.
    ///
    /// # Errors
    /// If the model's name cannot be a label of Prometheus.
    pub fn new(
        config: ServerConfig,
        text: TextModel,
        engine: EngineHandle,
        clock: Clock,
    ) -> Result<Self, prometheus::Error> {
        let metrics = Arc::new(Metrics::new(&config.model_name, &engine)?);
        let grammars = Compiler::new(&text, engine.limits().vocab_size);
        let encodes = Semaphore::new(config.max_concurrent_encodes.max(1));
        let responses = StoredResponses::new(config.max_stored_responses, config.max_stored_response_bytes);
        let (lifecycle, started_at_unix) = (Lifecycle::new(), unix_now());
        Ok(Self(Arc::new(Shared {
            config,
            text,
            engine,
            clock,
            metrics,
            lifecycle,
            running: Arc::default(),
            responses,
            started_at_unix,
            grammars,
            encodes,
        })))
    }

    /// Runs the model's text code on a thread of its own, so that no prompt, however long, holds up the
    /// async threads; `param` is the field that its errors speak of.
    pub(crate) async fn with_text<T: Send + 'static>(
        &self,
        param: &'static str,
        run: impl FnOnce(&TextModel) -> Result<T, TextError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let state = self.clone();
        let _permit = self.encodes.acquire().await.map_err(|_| ApiError::internal())?;
        let done = tokio::task::spawn_blocking(move || run(&state.text)).await;
        let done = done.map_err(|error| {
            tracing::error!(%error, "the model's text code failed");
            ApiError::internal()
        })?;
        done.map_err(|error| ApiError::text(&error, param))
    }
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
