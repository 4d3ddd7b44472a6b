//! The demo model: a small Mixtral (8 experts per layer, top-2) that really answers, embedded in the binary so that
//! the server works before anything was downloaded.
//!
//! `train/` holds the recipe that made it and its scores, `eval/` the held-out prompts that every backend, format
//! and batch must keep answering. There is no code here but the list of files.
#![forbid(unsafe_code)]

/// Aligns a file's contents to a cache line, as a memory map would.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../model/model.safetensors"));

/// Name and contents of every file of the model, in Hugging Face layout.
pub fn files() -> &'static [(&'static str, &'static [u8])] {
    const CONFIG: &[u8] = include_bytes!("../model/config.json");
    const GENERATION_CONFIG: &[u8] = include_bytes!("../model/generation_config.json");
    const TOKENIZER: &[u8] = include_bytes!("../model/tokenizer.json");
    const TOKENIZER_CONFIG: &[u8] = include_bytes!("../model/tokenizer_config.json");
    static FILES: [(&str, &[u8]); 5] = [
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer.json", TOKENIZER),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("model.safetensors", &WEIGHTS.0),
    ];
    &FILES
}
