//! What `windrose bench` measures, from its arguments.

use clap::builder::RangedU64ValueParser;
use clap::{Arg, ArgAction, ArgMatches};

use crate::settings::Settings;

/// Above every sensible count, below every overflow of their products.
const MAX_COUNT: u64 = 1 << 20;

/// Contexts × numbers of sequences, each so many times.
#[derive(Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) prompt_lens: Vec<usize>,
    /// Tokens that each sequence decodes per repetition.
    pub(super) output_len: usize,
    pub(super) num_seqs: Vec<usize>,
    pub(super) repetitions: usize,
    pub(super) seed: u64,
    /// Where JSON goes: a file, or - for standard output.
    pub(super) json: Option<String>,
}

impl Plan {
    /// The arguments beside the settings.
    pub(super) fn args() -> [Arg; 6] {
        let counts = |name: &'static str, default: &'static str, help: &'static str| {
            let parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_COUNT);
            let arg = Arg::new(name).long(name.replace('_', "-")).help(help).action(ArgAction::Set);
            arg.value_name("N").default_value(default).value_parser(parser)
        };
        [
            counts("prompt_len", "512", "Tokens of a prompt, and of the context that decoding starts from")
                .value_name("N[,N...]")
                .value_delimiter(','),
            counts("output_len", "32", "Tokens that every sequence decodes per repetition"),
            counts("num_seqs", "1,8", "Sequences that decode together")
                .value_name("N[,N...]")
                .value_delimiter(','),
            counts("repetitions", "3", "Repetitions, of which the median is printed with the extremes"),
            Arg::new("seed")
                .long("seed")
                .value_name("SEED")
                .default_value("0")
                .value_parser(clap::value_parser!(u64))
                .help("Seed of the tokens"),
            json_arg(),
        ]
    }

    /// Reads them.
    pub(super) fn new(arguments: &ArgMatches) -> Self {
        let counts = |name: &str| arguments.get_many(name).expect("it has a default").copied().collect();
        let count = |name: &str| *arguments.get_one(name).expect("it has a default");
        Self {
            prompt_lens: counts("prompt_len"),
            output_len: count("output_len"),
            num_seqs: counts("num_seqs"),
            repetitions: count("repetitions"),
            seed: *arguments.get_one("seed").expect("it has a default"),
            json: arguments.get_one("json").cloned(),
        }
    }

    /// The settings with room for exactly what is measured.
    pub(super) fn fit(&self, settings: &Settings) -> Settings {
        Settings {
            max_model_len: self.max_len(),
            max_num_seqs: self.max_num_seqs(),
            max_num_batched_tokens: match settings.max_num_batched_tokens {
                0 => 0,
                tokens => tokens.max(self.max_num_seqs()),
            },
            ..settings.clone()
        }
    }

    /// Most sequences together.
    pub(super) fn max_num_seqs(&self) -> usize {
        self.num_seqs.iter().copied().max().unwrap_or(0)
    }

    /// Tokens of the longest sequence at its end.
    pub(super) fn max_len(&self) -> usize {
        self.prompt_lens.iter().copied().max().unwrap_or(0) + self.output_len
    }
}

/// `--json`, alike for both benches.
pub(super) fn json_arg() -> Arg {
    let help = "Also writes JSON there; with - to standard output, and the table to standard error";
    Arg::new("json").long("json").value_name("FILE").help(help)
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<Plan, clap::Error> {
        let command = Command::new("bench").args(Plan::args());
        command.try_get_matches_from(["bench"].iter().chain(arguments)).map(|matches| Plan::new(&matches))
    }

    #[test]
    fn lists_are_separated_by_commas() {
        let plan = parse(&["--prompt-len", "64,128", "--num-seqs", "4", "--json", "-"]).unwrap();
        let expected = Plan {
            prompt_lens: vec![64, 128],
            output_len: 32,
            num_seqs: vec![4],
            repetitions: 3,
            seed: 0,
            json: Some("-".into()),
        };
        assert_eq!(plan, expected);
        assert_eq!((plan.max_num_seqs(), plan.max_len()), (4, 160));
    }

    #[test]
    fn nonsense_is_refused() {
        for arguments in [["--num-seqs", "1,0"], ["--prompt-len", "many"], ["--repetitions", "0"]] {
            parse(&arguments).expect_err("must be refused");
        }
    }
}
