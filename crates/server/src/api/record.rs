//! Which fields handlers take, and with what ranges: noted in tests only, where the reference is compared with
//! them. Elsewhere nothing of this is left.

pub(crate) use hook::*;

/// What a field is taken as.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) enum Kind {
    Any,
    Boolean,
    Integer(i64, i64),
    Number(f64, f64),
    String,
    Object,
    /// With its most items.
    List(usize),
}

#[cfg(not(test))]
mod hook {
    pub(crate) fn note(_path: impl FnOnce() -> String, _kind: super::Kind) {}

    pub(crate) fn close() {}
}

#[cfg(test)]
mod hook {
    use std::cell::RefCell;

    use super::Kind;

    thread_local! {
        static NOTES: RefCell<Option<Vec<(String, Kind)>>> = const { RefCell::new(None) };
        static TAKEN: RefCell<Vec<(String, Kind)>> = const { RefCell::new(Vec::new()) };
    }

    pub(crate) fn open() {
        NOTES.with_borrow_mut(|notes| *notes = Some(Vec::new()));
    }

    pub(crate) fn note(path: impl FnOnce() -> String, kind: Kind) {
        NOTES.with_borrow_mut(|notes| {
            if let Some(notes) = notes {
                notes.push((path(), kind));
            }
        });
    }

    /// What follows is not about the client's own fields.
    pub(crate) fn close() {
        let notes = NOTES.with_borrow_mut(Option::take);
        TAKEN.with_borrow_mut(|taken| taken.extend(notes.into_iter().flatten()));
    }

    /// All that was noted since [`open`].
    pub(crate) fn taken() -> Vec<(String, Kind)> {
        close();
        TAKEN.with_borrow_mut(std::mem::take)
    }
}
