"""The load generator: on time, one record a request, and it sees what should not happen; and what
the benchmarks of load, endurance and faults make of its records."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.faults import Effect, Trial, slow_uploads
from benchmarks.harness.load import Record, drive, drive_closed, poisson, steady
from benchmarks.harness.requests import post
from benchmarks.load import Phase, report_load, report_slope, report_soak
from tests.conftest import Server


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


def test_clients_of_a_closed_loop_wait_for_their_answers() -> None:
    open_now, most, seen = 0, 0, []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        seen.append((await reader.readuntil(b"\r\n\r\n")).split()[1])
        await asyncio.sleep(0.02)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        open_now -= 1
        writer.close()

    async def scenario() -> list[Record]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            return await drive_closed(url, [post("/a", b""), post("/b", b"")], 3, 0.2)

    records = asyncio.run(scenario())
    assert most == 3
    assert len(records) == len(seen) <= 3 * 11
    assert abs(seen.count(b"/a") - seen.count(b"/b")) <= 1
    assert all(record.status == 200 and record.latency >= 0.02 for record in records)
    assert all(record.scheduled <= record.started and record.scheduled < 0.2 for record in records)


def phase(statuses: list[int], retry: float | None, back: int = 0, factor: float = 2.0) -> Phase:
    """Records with these statuses, the refused told to wait `retry`; `back` came back, let in."""
    records = [Record(0, 0, 1, code, retry if code == 429 else None, 1) for code in statuses]
    return Phase(factor, records, [Record(0, 0, 1, 200, None, 1)] * back)


UNPROVEN = "none of the refused came back, so Retry-After is not proven"


@pytest.mark.parametrize(
    ("phases", "broken"),
    [
        ([phase([200, 429], 9.0, back=1)], []),
        (
            [phase([200, 429, 429], None, back=1)],
            ["at 2x: 2 were refused and not told when to come back"],
        ),
        ([phase([200, 429], 1.0), phase([200, 429], 9.0, back=1)], [f"at 2x: {UNPROVEN}"]),
        ([phase([200, 429], 1.0, factor=1.0)], [f"at 1x: {UNPROVEN}"]),
        ([phase([200, 429], 1.0, factor=1.0), phase([200, 429], 9.0, back=1)], []),
    ],
    ids=["told", "untold", "told too soon", "alone", "proven by another load"],
)
def test_a_load_is_broken_where_the_refused_are_untold_or_never_return(
    phases: list[Phase], broken: list[str]
) -> None:
    assert report_load(phases, capacity=1.0, queue=64, batch=16)[1] == broken


def test_a_soak_counts_every_status_and_is_broken_by_other_ones_and_by_lost_processes() -> None:
    (line,), broken = report_soak(phase([200, 200, 429], 9.0), 30, same=True)
    assert "3 requests at 2x for 30 minutes: 2 answered 200, 1 429, 0 other" in line
    assert broken == []
    assert report_soak(phase([200, 503], 9.0), 30, same=True)[1] == [
        "1 requests met neither 200 nor 429"
    ]
    assert report_soak(phase([429], None), 30, same=True)[1] == [
        "1 were refused and not told when to come back"
    ]
    assert report_soak(phase([200], None), 30, same=False)[1] == [
        "the API process or a worker was lost"
    ]


def test_memory_grows_if_its_slope_stands_out_of_the_noise() -> None:
    hours, noise = np.linspace(0.1, 0.6, 6), np.array([1.0, -2.0, 1.0, 1.0, -2.0, 1.0])
    line, broken = report_slope("worker", hours, 300 + hours + noise)
    assert line.startswith("- worker: +1.0 ± ")
    assert not broken
    assert report_slope("worker", hours, 300 + 60 * hours + noise)[1] == [
        "the memory of the worker grows"
    ]
    assert not report_slope("worker", hours, 300 + 60 * hours + 30 * noise)[1]


def trial(
    statuses: list[int | None],
    answers: int = 1,
    unready: float = 0.5,
    retry: float | None = 2.0,
    effect: Effect | None = None,
) -> Trial:
    """Of requests from second 103 to second 104 by the clock of the effect."""
    records = [Record(3, 3, 4, status, retry, answers) for status in statuses]
    return Trial("fault", records, unready, effect or Effect(), began=100.0)


def test_a_fault_breaks_a_promise_where_somebody_is_lost_told_twice_or_told_else() -> None:
    assert trial([200, 429, 503]).broken == []
    assert trial([None], answers=0).broken == ["fault: 1 without an answer"]
    assert trial([200], answers=2).broken == ["fault: 1 answered twice"]
    assert trial([200], answers=3).broken == ["fault: 1 answered twice"]
    assert trial([500, 200]).broken == ["fault: 1 answered otherwise"]
    assert trial([200], unready=120.0).broken == ["fault: never ready again"]
    untold = trial([200, 429, 503], retry=None).broken
    assert untold == ["fault: 2 refused and not told when to come back"]


@pytest.mark.parametrize(
    ("outage", "excused"),
    [
        ((103.5, 107.0), True),
        ((101.0, 103.5), True),
        ((101.0, 102.5), False),
        ((104.5, 107.0), False),
    ],
    ids=["in flight", "while none listened", "afterwards", "before"],
)
def test_only_an_outage_that_a_request_met_excuses_its_loss(
    outage: tuple[float, float], excused: bool
) -> None:
    lost = trial([None], answers=0, effect=Effect(outage))
    assert lost.broken == ([] if excused else ["fault: 1 without an answer"])


def test_every_slow_upload_is_to_be_cut_off() -> None:
    assert trial([200], effect=Effect(slow=2, cut=[5.0, 5.1])).broken == []
    uncut = trial([200], effect=Effect(slow=2, cut=[5.0])).broken
    assert uncut == ["fault: 1 slow uploads not cut off"]


def test_slow_uploads_are_seen_to_be_cut_off(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine less would end uploads that have hardly begun, and more would meet the next
    # piece, which is sent after a second.
    monkeypatch.setattr("benchmarks.faults.UPLOAD_SECONDS", 0.7)
    request = post("/v1/classify", b"x" * 5000)

    async def scenario(server: Server) -> Effect:
        async with slow_uploads(server, request) as effect:  # type: ignore[arg-type]
            pass
        return effect

    effect = asyncio.run(scenario(start(upload_timeout_ms=700)))
    assert len(effect.cut) == effect.slow == 100
    assert min(effect.cut) >= 0.7

    monkeypatch.setattr("benchmarks.faults.LATE", 0.2)
    assert asyncio.run(scenario(start())).cut == []
