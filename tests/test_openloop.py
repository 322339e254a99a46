"""The load generator: on time, one record a request, and it sees what should not happen."""

import asyncio

import pytest
from conftest import Server

from benchmarks.faults import Trial
from benchmarks.openloop import Record, drive, poisson, post, steady


def test_arrivals_are_fixed_beforehand() -> None:
    assert steady(4, 1) == [0, 0.25, 0.5, 0.75]
    times = poisson(1000, 2, seed=0)
    assert times == poisson(1000, 2, seed=0) == sorted(times)
    assert len(times) == pytest.approx(2000, rel=0.1)
    assert times[-1] < 2


def test_each_arrival_has_its_record(server: Server) -> None:
    requests = [post("/v1/classify", b"{"), post("/nope", b"")]
    records = asyncio.run(drive(server.url, steady(100, 0.2), requests))
    assert [record.status for record in records] == [400, 404] * 10
    assert all(record.answers == 1 for record in records)
    assert all(record.scheduled <= record.started <= record.ended for record in records)


@pytest.mark.parametrize(
    ("sent", "answers", "retry"),
    [
        (b"", 0, None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhal", 0, None),
        (2 * b"HTTP/1.1 429 No\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}", 2, 7.0),
    ],
    ids=["lost", "cut short", "twice"],
)
def test_lost_and_double_answers_are_seen(sent: bytes, answers: int, retry: float | None) -> None:
    async def scenario() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(sent)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            (record,) = await drive(f"http://127.0.0.1:{port}", [0.0], [post("/", b"")])
        assert (record.answers, record.retry_after) == (answers, retry)

    asyncio.run(scenario())


def trial(statuses: list[int | None], answers: int = 1, **facts: object) -> Trial:
    records = [Record(0, 0, 1, status, None, answers) for status in statuses]
    return Trial("fault", records, **({"unready": 0.5, "excused": False} | facts))


def test_a_fault_breaks_a_promise_where_somebody_is_lost_told_twice_or_told_else() -> None:
    assert trial([200, 429, 503]).broken == []
    assert trial([None], answers=0).broken == ["fault: 1 without an answer"]
    assert trial([None], answers=0, excused=True).broken == []
    assert trial([200], answers=2).broken == ["fault: 1 answered twice"]
    assert trial([500, 200]).broken == ["fault: 1 answered otherwise"]
    assert trial([200], unready=120.0).broken == ["fault: never ready again"]
