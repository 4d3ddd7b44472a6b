//! Words and HTTP.
