"""Compares the next-token log-probabilities of two servers of one model, ours and llama.cpp's or any two.

    python3 tests/bench/same_logits.py http://127.0.0.1:8000 http://127.0.0.1:8080

Both get the same prompts as token ids, random ones of 1 to MAX_TOKENS tokens. Of each it takes the
first server's TOP likeliest next tokens and the root of the mean square by which the second one's
log-probabilities of them differ, and prints quantiles over all prompts, not a mean: wherever two of
a router's scores are close, a rounding decides which expert a token visits, and what follows differs.

It deliberately judges nothing. How much a format may cost shows when one server has a file in that
format and the other the file that it was made of.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections.abc import Iterable
from itertools import count
from urllib.error import HTTPError

from exact_answers import post

PROMPTS, MAX_TOKENS, TOP = 64, 200, 20
# Of every vocabulary: behind control tokens and bytes.
FIRST_TOKEN, TOKENS, START = 300, 2000, 1
VOCABULARY = 32_000

Scores = dict[int, float]


def main() -> None:
    urls = sys.argv[1:]
    generator = random.Random(1)
    differences, spreads, num_agreed = [], [], 0
    for index in range(PROMPTS):
        length = 1 + index * (MAX_TOKENS - 1) // (PROMPTS - 1)
        prompt = [START, *(generator.randrange(FIRST_TOKEN, FIRST_TOKEN + TOKENS) for _ in range(length))]
        first, second = (score(url, prompt) for url in urls)
        likeliest = sorted(first, key=first.get, reverse=True)[:TOP]
        differences.append(root_mean_square(second[token] - first[token] for token in likeliest))
        spreads.append(statistics.pstdev(second.values()))
        num_agreed += likeliest[0] == max(second, key=second.get)
    tenths = statistics.quantiles(differences, n=10)
    print(
        f"{PROMPTS} prompts differ by {statistics.median(differences):.4f} in the median, 1 in 10 by more "
        f"than {tenths[-1]:.4f}; {num_agreed} have the same likeliest token. All log-probabilities of the "
        f"second server spread by {statistics.fmean(spreads):.2f}."
    )


def root_mean_square(numbers: Iterable[float]) -> float:
    return math.sqrt(statistics.fmean(number**2 for number in numbers))


def score(url: str, prompt: list[int]) -> Scores:
    """Log-probabilities of the tokens that may follow, by id: all that the server tells."""
    try:
        return score_llama(url, prompt)
    except HTTPError as error:
        if error.code != 404:
            raise
    return score_windrose(url, prompt)


def score_llama(url: str, prompt: list[int]) -> Scores:
    """It tells nothing beside a token that ends the answer: then another is drawn."""
    body = {"prompt": prompt, "n_predict": 1, "n_probs": VOCABULARY, "cache_prompt": False}
    answers = (post(f"{url}/completion", {**body, "seed": seed}) for seed in count())
    position = next(filter(None, (answer.get("completion_probabilities") for answer in answers)))[0]
    return {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}


def score_windrose(url: str, prompt: list[int]) -> Scores:
    """What follows a prompt is scored where another token follows it, whichever."""
    body = {"prompt": [*prompt, START], "max_tokens": 1, "prompt_logprobs": TOP}
    [choice] = post(f"{url}/v1/completions", body)["choices"]
    scores = {int(token): entry["logprob"] for token, entry in choice["prompt_logprobs"][-1].items()}
    scores.pop(START)
    return scores


if __name__ == "__main__":
    main()
