//! The answers under way, by id, so that a client can end one from another connection.
//!
//! An answer belongs to the key that it was asked for with; for everyone else it does not exist. Ending one is
//! a word to its [`Generation`](crate::generation::Generation), which lets go of its sequences itself: nothing
//! here touches the engine.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::auth::Caller;

/// All answers under way.
#[derive(Debug, Default)]
pub(crate) struct Running {
    by_id: Mutex<HashMap<String, Entry>>,
}

#[derive(Debug)]
struct Entry {
    owner: Caller,
    cancel: Arc<Notify>,
}

impl Running {
    /// Lists an answer until the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>, id: &str, owner: Caller) -> RunningAnswer {
        let cancel = Arc::new(Notify::new());
        self.entries().insert(id.to_owned(), Entry { owner, cancel: Arc::clone(&cancel) });
        RunningAnswer { running: Arc::clone(self), id: id.to_owned(), cancel }
    }

    /// Whether `caller` has an answer of that id.
    pub(crate) fn has(&self, id: &str, caller: Caller) -> bool {
        self.entries().get(id).is_some_and(|entry| entry.owner == caller)
    }

    /// Tells an answer to end; whether `caller` has one of that id.
    pub(crate) fn cancel(&self, id: &str, caller: Caller) -> bool {
        let entries = self.entries();
        let entry = entries.get(id).filter(|entry| entry.owner == caller);
        entry.inspect(|entry| entry.cancel.notify_one()).is_some()
    }

    /// The map is whole whatever its users do, so a panic of one of them is no reason to give it up.
    fn entries(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One answer under way.
#[derive(Debug)]
pub(crate) struct RunningAnswer {
    running: Arc<Running>,
    id: String,
    cancel: Arc<Notify>,
}

impl RunningAnswer {
    /// Waits until the answer is told to end.
    pub(crate) async fn cancelled(&self) {
        self.cancel.notified().await;
    }
}

impl Drop for RunningAnswer {
    fn drop(&mut self) {
        self.running.entries().remove(&self.id);
    }
}
