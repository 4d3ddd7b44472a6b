//! `windrose bench`: how fast this machine runs a model, without a server around it; and `windrose bench serve`: what
//! the clients of a server feel. Both print a table for people and, with `--json`, the same for programs.
//!
//! ```text
//! plan ──► sequences ──► report        Seam A: batches by hand, no engine
//!   limits ───┘ └─── cost              what the machine could do, and what a step asks of it
//! ```

mod cost;
mod limits;
mod output;
mod plan;
mod report;
mod sequences;
mod serve;
mod statistics;

use std::thread::available_parallelism;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{ArgMatches, Command};
use cpu::{Cpu, CpuOptions};
use cuda::Cuda;
use model::ModelSummary;

use crate::bench::cost::Cost;
use crate::bench::limits::Machine;
use crate::bench::plan::Plan;
use crate::bench::report::{Measurement, Memory, Phase, Report, Row};
use crate::bench::sequences::Sequences;
use crate::device::{self, Device};
use crate::load::{Loaded, Model};
use crate::memory;
use crate::progress::Progress;
use crate::settings::Settings;

const ABOUT: &str = "Measures how fast this machine runs a model, or with `serve` how fast a server answers";
const AFTER_HELP: &str = "Prompts and first tokens are seeded and random, so every sequence is routed in its \
    own way, and what is sampled is fed back. GB/s are of weights alone: attention, the output projection, and \
    those experts that a step did route tokens to. The limits are measured before and after, and shares are of \
    the better; above 100% the weights stay in a cache. The settings max_model_len and max_num_seqs follow from \
    what is measured.";

/// The subcommand and its own.
pub(crate) fn command() -> Command {
    Command::new("bench")
        .about(ABOUT)
        .after_help(AFTER_HELP)
        .args(Plan::args())
        .args_conflicts_with_subcommands(true)
        .subcommand(serve::command())
}

/// Measures the model, or the server that `serve` names.
pub(crate) fn run(settings: &Settings, arguments: &ArgMatches) -> Result<()> {
    if let Some((_, arguments)) = arguments.subcommand() {
        return serve::run(arguments);
    }
    let plan = Plan::new(arguments);
    let report = measure(&plan, &plan.fit(settings))?;
    output::write(plan.json.as_deref(), &report.table(), &report)
}

fn measure(plan: &Plan, settings: &Settings) -> Result<Report> {
    let model = Model::find(settings)?;
    let start = Instant::now();
    let Loaded { runner, weight_bits } = model
        .load(settings)
        .with_context(|| format!("cannot measure sequences of {} tokens", settings.max_model_len))?;
    let load_seconds = start.elapsed().as_secs_f64();
    let cost = Cost::new(&model.config, weight_bits, model.token_bytes());
    let mut sequences = Sequences::new(runner, cost, plan)?;
    let num_threads = match settings.threads {
        0 => available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let mut machine = match &model.device {
        Device::Cpu(formats) => {
            let options = device::cpu_options(settings, *formats);
            Machine::Cpu(Box::new(Cpu::new(CpuOptions { num_threads: Some(num_threads), ..options })))
        }
        Device::Cuda { info, formats } => {
            Machine::Gpu(Box::new(Cuda::new(info.clone(), device::cuda_options(settings, *formats))?))
        }
    };
    let limits_before = machine.limits()?;
    let measurements = measure_all(plan, &mut sequences)?;
    let limits_after = machine.limits()?;
    let limits = limits_before.max(limits_after);
    let memory = Memory {
        resident_bytes: memory::resident_bytes(),
        weight_bytes: ModelSummary::new(&model.config).weight_bytes(weight_bits),
        cache_bytes: sequences.cache_tokens() as u64 * model.token_bytes(),
    };
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        model: model.name.clone(),
        dummy_weights: settings.dummy_seed()?,
        kernels: model.device.kernels(),
        num_threads,
        output_len: plan.output_len,
        repetitions: plan.repetitions,
        seed: plan.seed,
        max_num_batched_tokens: model.runner_options(settings)?.max_num_batched_tokens,
        load_seconds,
        limits_before,
        limits_after,
        memory,
        results: measurements.iter().map(|measurement| Row::new(measurement, limits)).collect(),
    })
}

/// Prefills every context as often as asked for, or as sequences need it, and decodes from it.
fn measure_all(plan: &Plan, sequences: &mut Sequences) -> Result<Vec<Measurement>> {
    let num_prefills = plan.repetitions.max(plan.max_num_seqs());
    let num_decodes = plan.repetitions * plan.num_seqs.len();
    let mut progress = Progress::new("measuring", plan.prompt_lens.len() * (num_prefills + num_decodes));
    let mut num_done = 0;
    let mut advance = || {
        num_done += 1;
        progress.advance_to(num_done);
    };
    sequences.warm_up()?;
    let mut measurements = Vec::new();
    for &context_len in &plan.prompt_lens {
        let mut prefill = Measurement::new(Phase::Prefill, 1, context_len);
        for index in 0..num_prefills {
            prefill.samples.push(sequences.prefill(index % plan.max_num_seqs(), context_len)?);
            advance();
        }
        let decode = |&num_seqs| Measurement::new(Phase::Decode, num_seqs, context_len);
        let mut decodes: Vec<Measurement> = plan.num_seqs.iter().map(decode).collect();
        // In turns, so that a machine that slows down slows all of them.
        for _ in 0..plan.repetitions {
            for decode in &mut decodes {
                decode.samples.push(sequences.decode(decode.num_seqs, context_len, plan.output_len)?);
                advance();
            }
        }
        measurements.push(prefill);
        measurements.append(&mut decodes);
    }
    Ok(measurements)
}
