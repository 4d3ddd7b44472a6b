//! One streamed answer, with the times at which its pieces came.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use axum::body::Bytes;
use http_body_util::BodyExt;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::Instant;

use super::client::{ApiClient, message_of};
use super::sse::SseParser;

/// What a client sees of an answer. All times are since the request was sent.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// When each chunk with text came; a chunk may have several tokens.
    pub(super) text_at: Vec<Duration>,
    /// When the stream ended.
    pub(super) ended_at: Duration,
    pub(super) usage: Option<Usage>,
    is_done: bool,
}

/// The server's own count of tokens.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u64,
    #[serde(default)]
    pub(super) completion_tokens: u64,
}

/// The parts of a chunk that matter here, in chat and in completions.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    /// What models that think before they answer say meanwhile, under either name that servers give it.
    #[serde(alias = "reasoning")]
    reasoning_content: Option<String>,
}

/// Asks, and reads the answer to its end.
///
/// # Errors
/// If there is none, or not all of one: a refusal, an error in the stream, a stream cut short, or one with neither text
/// nor tokens. (Some tokens have no text, and an answer may have no others.)
pub(super) async fn ask(client: &ApiClient, path: &str, body: Bytes) -> Result<Answer> {
    let sent_at = Instant::now();
    let mut body = client.stream(path, body).await?;
    let (mut parser, mut answer) = (SseParser::default(), Answer::default());
    while let Some(frame) = body.frame().await {
        let arrived_at = sent_at.elapsed();
        let Ok(data) = frame.context("the stream broke off")?.into_data() else { continue };
        for event in parser.push(&data)? {
            answer.take(&event, arrived_at)?;
        }
    }
    ensure!(answer.is_done, "the stream ended without [DONE]");
    ensure!(answer.num_output_tokens() > 0, "the answer has no text");
    Ok(answer)
}

impl Answer {
    fn take(&mut self, event: &[u8], arrived_at: Duration) -> Result<()> {
        if event == b"[DONE]" {
            self.is_done = true;
            self.ended_at = arrived_at;
            return Ok(());
        }
        let value: Value = serde_json::from_slice(event).context("an event of the stream is not JSON")?;
        if value.get("error").is_some() {
            let message = message_of(&value).unwrap_or_else(|| value.to_string());
            bail!("error in the stream: {message}");
        }
        let chunk: Chunk = serde_json::from_value(value).context("an event of the stream is not a chunk")?;
        self.usage = chunk.usage.or(self.usage);
        if chunk.choices.iter().any(Choice::has_text) {
            self.text_at.push(arrived_at);
        }
        Ok(())
    }

    /// Tokens of the answer; its chunks are counted where the server does not tell.
    pub(super) fn num_output_tokens(&self) -> u64 {
        self.usage.map_or(self.text_at.len() as u64, |usage| usage.completion_tokens)
    }

    pub(super) fn num_prompt_tokens(&self) -> u64 {
        self.usage.map_or(0, |usage| usage.prompt_tokens)
    }

    /// The time to the first text.
    pub(super) fn ttft(&self) -> Option<Duration> {
        self.text_at.first().copied()
    }

    /// The times between two chunks of text.
    pub(super) fn itls(&self) -> impl Iterator<Item = Duration> {
        self.text_at.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// The mean time of a token after the first; `None` if there is no other.
    pub(super) fn tpot(&self) -> Option<Duration> {
        let (first, last) = (self.text_at.first()?, self.text_at.last()?);
        let num_later = u32::try_from(self.num_output_tokens()).ok()?.checked_sub(1)?;
        (*last - *first).checked_div(num_later)
    }
}

impl Choice {
    fn has_text(&self) -> bool {
        let delta = self.delta.as_ref();
        let texts = [
            self.text.as_ref(),
            delta.and_then(|delta| delta.content.as_ref()),
            delta.and_then(|delta| delta.reasoning_content.as_ref()),
        ];
        texts.into_iter().flatten().any(|text| !text.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn only_chunks_with_text_are_timed() {
        let mut answer = Answer::default();
        let events = [
            r#"{"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": null}"#,
            r#"{"choices": [{"delta": {"content": "a"}}]}"#,
            r#"{"choices": [{"index": 0, "text": "b c"}]}"#,
            r#"{"choices": [{"delta": {"reasoning": "d"}}]}"#,
            r#"{"choices": [{"delta": {}, "finish_reason": "stop"}]}"#,
            r#"{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}}"#,
            "[DONE]",
        ];
        for (event, ms) in events.iter().zip(1..) {
            answer.take(event.as_bytes(), ms * MS).unwrap();
        }
        assert_eq!(answer.text_at, [2 * MS, 3 * MS, 4 * MS]);
        assert_eq!((answer.num_prompt_tokens(), answer.num_output_tokens()), (7, 5));
        assert_eq!((answer.ttft(), answer.tpot(), answer.ended_at), (Some(2 * MS), Some(MS / 2), 7 * MS));
        assert_eq!(answer.itls().collect::<Vec<_>>(), [MS, MS]);
    }

    #[test]
    fn an_error_in_the_stream_fails_the_request() {
        let event = br#"{"error": {"message": "the engine stopped"}}"#;
        let error = Answer::default().take(event, MS).unwrap_err();
        assert_eq!(error.to_string(), "error in the stream: the engine stopped");
    }
}
