"""Schemathesis on the served /openapi.json: no request that it draws, valid or not, gets a 5xx.

Cases are drawn from a seed; WINDROSE_NUM_SCHEMATHESIS says about how many, and a failure prints the smallest
request that shows it. Answers are held to a few tokens, or the time would go to the model. Whether an answer
has the described shape is not judged here: the server's own tests do that.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest
from windrose import Server

schemathesis = pytest.importorskip("schemathesis", reason="needs requirements-ecosystem.txt")
hypothesis = pytest.importorskip("hypothesis", reason="needs requirements-ecosystem.txt")

NUM_CASES = int(os.environ.get("WINDROSE_NUM_SCHEMATHESIS", "1000"))
SEED = 20
# What makes an answer long, and the most that is asked for.
LIMITS = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4, "n": 2, "best_of": 2}
# Where an answer without a limit is as long as the context.
DEFAULTS = {"/v1/chat/completions": {"max_tokens": 4}, "/v1/responses": {"max_output_tokens": 4}}


def bound(case: schemathesis.Case) -> None:
    """Lowers what is a number and asks for a long answer; leaves what is wrong as it was drawn."""
    if not isinstance(case.body, dict):
        return
    lowered = {
        name: min(case.body[name], limit)
        for name, limit in LIMITS.items()
        if type(case.body.get(name)) is int
    }
    case.body = DEFAULTS.get(case.operation.path, {}) | case.body | lowered


def draw(cases: object, num_cases: int, probe: Callable[[schemathesis.Case], None]) -> None:
    """Probes this many cases, then smaller ones if one failed."""
    settings = hypothesis.settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.seed(SEED)(settings(hypothesis.given(cases)(probe)))()


def test_nothing_that_the_description_allows_or_forbids_is_a_server_error(server: Server) -> None:
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    schema.config.update(base_url=server.url)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    statuses: Counter[str] = Counter()

    def probe(case: schemathesis.Case) -> None:
        bound(case)
        answer = case.call(timeout=60)
        statuses[f"{answer.status_code // 100}xx"] += 1
        assert answer.status_code < 500, f"{case.as_curl_command()}\n{answer.status_code} {answer.text}"

    # What has a body is worth drawing more than once in a while.
    weights = [10 if operation.body else 1 for operation in operations]
    failures = []
    for operation, weight in zip(operations, weights, strict=True):
        num_cases = max(2, NUM_CASES * weight // sum(weights))
        modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
        for mode in modes:
            try:
                draw(operation.as_strategy(generation_mode=mode), num_cases // 2, probe)
            except hypothesis.errors.Unsatisfiable:
                pass  # Without a body and parameters, nothing is wrong.
            except AssertionError as failure:
                failures.append(f"{operation.label}: {failure}")
    print(f"{sum(statuses.values())} cases of {len(operations)} operations: {dict(statuses)}")
    assert not failures, "\n\n".join(failures)
