"""The OpenAPI description against the running server: schemathesis makes requests that fit it and
requests that do not; no answer may be a fault of ours, or one that is not described."""

from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode, openapi
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from tests.conftest import Server

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]


@pytest.mark.parametrize("mode", GenerationMode)
def test_answers_are_as_described(server: Server, mode: GenerationMode) -> None:
    described = openapi.from_url(f"{server.url}/openapi.json")
    results = list(described.get_all_operations())
    operations = [result.ok() for result in results if isinstance(result, Ok)]
    assert len(operations) == len(results)
    assert {operation.path for operation in operations} >= {"/", "/v1/classify", "/info", "/livez"}
    for operation in operations:
        has_body = operation.method.lower() == "post"
        if mode is GenerationMode.NEGATIVE and not has_body:
            continue  # nothing in them could be wrong

        @hypothesis.settings(
            max_examples=40 if has_body else 3,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(mode))
        def ask(case: Any) -> None:
            case.call_and_validate(base_url=server.url, checks=CHECKS)

        ask()
    assert server.http.get("/readyz").status_code == 200
