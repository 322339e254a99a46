"""The load generator: on time, one record a request, and it sees what should not happen."""

import asyncio

import pytest
from conftest import Server

from benchmarks.openloop import drive, poisson, post, steady


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
