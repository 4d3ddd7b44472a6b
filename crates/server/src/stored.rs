//! Responses that a client may come back to: kept in memory, bounded in number and in bytes, the oldest leaving
//! first. They are kept as the JSON text that they were, so that their bytes are their size.
//!
//! A response belongs to the key that it was asked for with. Nothing is written anywhere: a restart forgets all.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::auth::Caller;

/// One response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StoredResponse {
    pub(crate) owner: Caller,
    /// The response object.
    pub(crate) response: String,
    /// All items that it answered, those of earlier responses included: an array.
    pub(crate) input: String,
}

impl StoredResponse {
    fn num_bytes(&self) -> usize {
        self.response.len() + self.input.len()
    }
}

/// All responses that are kept.
#[derive(Debug)]
pub(crate) struct StoredResponses {
    max_count: usize,
    max_bytes: usize,
    shelf: Mutex<Shelf>,
}

#[derive(Debug, Default)]
struct Shelf {
    by_id: HashMap<String, (u64, Arc<StoredResponse>)>,
    /// Ids in the order of their arrival.
    arrivals: BTreeMap<u64, String>,
    next_arrival: u64,
    num_bytes: usize,
}

impl StoredResponses {
    pub(crate) fn new(max_count: usize, max_bytes: usize) -> Self {
        Self { max_count, max_bytes, shelf: Mutex::default() }
    }

    /// Keeps a response until newer ones need its place; one that is larger than all the room there is, not at
    /// all.
    pub(crate) fn put(&self, id: String, response: StoredResponse) {
        let mut shelf = self.shelf();
        shelf.remove(&id);
        shelf.num_bytes += response.num_bytes();
        let arrival = shelf.next_arrival;
        shelf.next_arrival += 1;
        shelf.arrivals.insert(arrival, id.clone());
        shelf.by_id.insert(id, (arrival, Arc::new(response)));
        while shelf.by_id.len() > self.max_count || shelf.num_bytes > self.max_bytes {
            let Some((_, oldest)) = shelf.arrivals.first_key_value() else { break };
            let oldest = oldest.clone();
            shelf.remove(&oldest);
        }
    }

    /// The caller's response of this id.
    pub(crate) fn get(&self, id: &str, caller: Caller) -> Option<Arc<StoredResponse>> {
        let shelf = self.shelf();
        shelf.by_id.get(id).map(|(_, response)| response).filter(|response| response.owner == caller).cloned()
    }

    /// Forgets the caller's response of this id; whether there was one.
    pub(crate) fn delete(&self, id: &str, caller: Caller) -> bool {
        let mut shelf = self.shelf();
        let is_theirs = shelf.by_id.get(id).is_some_and(|(_, response)| response.owner == caller);
        if is_theirs {
            shelf.remove(id);
        }
        is_theirs
    }

    /// A shelf is put in order before anything can panic.
    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    fn remove(&mut self, id: &str) {
        if let Some((arrival, response)) = self.by_id.remove(id) {
            self.arrivals.remove(&arrival);
            self.num_bytes -= response.num_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(num_bytes: usize) -> StoredResponse {
        StoredResponse { owner: Caller::default(), response: "x".repeat(num_bytes), input: String::new() }
    }

    #[track_caller]
    fn check(puts: &[(&str, usize)], kept: &[&str]) {
        let stored = StoredResponses::new(3, 100);
        puts.iter().for_each(|&(id, num_bytes)| stored.put(id.to_owned(), response(num_bytes)));
        let ids = ["a", "b", "c", "d", "e"].into_iter();
        let found: Vec<&str> = ids.filter(|id| stored.get(id, Caller::default()).is_some()).collect();
        assert_eq!(found, kept);
        let shelf = stored.shelf();
        let num_bytes: usize = shelf.by_id.values().map(|(_, response)| response.num_bytes()).sum();
        assert_eq!((shelf.num_bytes, shelf.arrivals.len()), (num_bytes, kept.len()));
    }

    #[test]
    fn the_oldest_leave_first_by_number_and_by_bytes() {
        check(&[("a", 1), ("b", 1), ("c", 1)], &["a", "b", "c"]);
        check(&[("a", 1), ("b", 1), ("c", 1), ("d", 1)], &["b", "c", "d"]);
        check(&[("a", 60), ("b", 40), ("c", 50)], &["b", "c"]);
        check(&[("a", 60), ("b", 101)], &[]);
        check(&[("a", 60), ("b", 1), ("a", 2)], &["a", "b"]);
    }

    #[test]
    fn a_deleted_response_is_gone() {
        let stored = StoredResponses::new(3, 100);
        stored.put("a".to_owned(), response(5));
        assert!(stored.delete("a", Caller::default()) && !stored.delete("a", Caller::default()));
        assert_eq!((stored.get("a", Caller::default()), stored.shelf().num_bytes), (None, 0));
    }
}
