"""Decoder processes: limits, what becomes of an image that exceeds them, and of the others."""

import asyncio
import contextlib
import io
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.fuzz import seeds
from models.images.decode import FORMATS
from models.images.preprocess import BICUBIC, Preprocessing
from service.errors import (
    BadRequest,
    ImageTooCostly,
    NotReady,
    QueueFull,
    ServiceError,
    TooLarge,
)
from service.intake import decoder_process
from service.intake import decoders as module
from service.intake.decode import decode
from service.intake.decoder import DESCRIPTORS, REPLY, Status
from service.intake.decoders import Decoders
from service.malloc import TRIM_BYTES
from service.settings import Settings
from service.telemetry.metrics import Metrics

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux"),
]

PIXELS = 40_000_000
PREPROCESSING = Preprocessing(64, 70, None, BICUBIC, (0.5,) * 3, (0.5,) * 3)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


SMALL = encode(Image.new("RGB", (64, 48), (1, 2, 3)), "PNG")
LARGE = encode(Image.new("RGB", (6200, 6200), (1, 2, 3)), "PNG")
"""Takes about 0.3 s and 310 MB."""


class Pool:
    """Running decoders and what a test wants to know of them."""

    def __init__(self, **knobs: Any) -> None:
        self.metrics = Metrics()
        self.decoders = Decoders(Settings(**knobs), self.metrics)
        self.decode = self.decoders.decode
        self._others = decoder_pids()  # of servers that other tests share

    def pids(self) -> set[int]:
        """Those of the processes that are warm or starting."""
        return decoder_pids() - self._others

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"tapt_{name}", labels) or 0.0

    def kills(self, reason: str) -> float:
        return self.count("decoder_kills_total", reason=reason)

    async def restarted(self) -> None:
        """Wait for the process in place of one that was killed: it takes longer to start than an
        image may wait in these tests."""
        await self.until(lambda: self.count("decoder_restarts_total") == 1)
        await self.until(lambda: self.count("decoders_up") == 1)

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not true():
                await asyncio.sleep(0.01)


def decoder_pids() -> set[int]:
    """Decoder processes that this process has started."""
    threads = Path("/proc/self/task").glob("*/children")
    pids = {int(pid) for thread in threads for pid in thread.read_text().split()}
    return {pid for pid in pids if b"service.intake.decoder" in command(pid)}


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def run(test: Callable[[Pool], Awaitable[None]], **knobs: Any) -> None:
    """Run a test in an event loop, with a pool whose processes are all warm."""

    @asynccontextmanager
    async def pool() -> AsyncIterator[Pool]:
        pool = Pool(**knobs)
        await pool.decoders.start()
        try:
            await pool.until(lambda: pool.count("decoders_up") == knobs.get("decoders", 2))
            yield pool
        finally:
            await pool.decoders.stop()
            assert not pool.pids()

    async def main() -> None:
        async with pool() as running:
            await test(running)

    asyncio.run(main())


async def refusal(work: Awaitable[Any]) -> str:
    with pytest.raises(ImageTooCostly) as caught:
        await work
    assert (caught.value.status, caught.value.error_type) == (422, "image_too_costly")
    return caught.value.message


async def started(pool: Pool, file: bytes) -> "asyncio.Task[Any]":
    """A decode that is under way in the only process."""
    work = asyncio.create_task(pool.decode(file))
    (pid,) = pool.pids()
    ticks = processor_ticks(pid)
    await pool.until(lambda: processor_ticks(pid) > ticks + 2)
    return work


def processor_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[11])


def outcome(file: bytes) -> Any:
    try:
        return asdict(decode(file, PIXELS, preprocessing=PREPROCESSING))
    except ServiceError as error:
        return type(error).__name__, error.message


async def outcome_of(work: Awaitable[Any]) -> Any:
    try:
        return asdict(await work)
    except ServiceError as error:
        return type(error).__name__, error.message


def test_pixels_and_errors_are_those_of_decode() -> None:
    files = [file for kind in FORMATS for file in seeds(kind)]
    files += [SMALL, LARGE, SMALL[:40], b"", b"%PDF-1.7", encode(Image.new("F", (8, 8)), "TIFF")]
    for mode, options in (("I;16", {}), ("CMYK", {}), ("P", {"transparency": 0})):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        files.append(encode(Image.new(mode, (900, 700), 7), kind, **options))

    async def test(pool: Pool) -> None:
        for file in files:
            here, there = (
                outcome(file),
                await outcome_of(pool.decode(file, preprocessing=PREPROCESSING)),
            )
            np.testing.assert_equal(there, here)
            alone = await outcome_of(
                pool.decode(file, preprocessing=PREPROCESSING, keep_pixels=False)
            )
            if isinstance(here, dict):
                here = {"pixels": here["view"], "view": here["view"]}
            np.testing.assert_equal(alone, here)
        assert not pool.count("decoder_restarts_total")

    run(test, decoders=1, decode_timeout_ms=20_000)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGBA", {"compress_level": 1}),
        ("WEBP", "RGB", {"method": 0}),
        ("WEBP", "RGBA", {"lossless": True, "method": 0, "quality": 0}),
        ("AVIF", "RGB", {"speed": 10, "subsampling": "4:4:4"}),
        ("HEIF", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("TIFF", "I;16", {"compression": "tiff_lzw"}),
    ],
)
def test_the_largest_images_fit_into_the_memory(
    kind: str, mode: str, options: dict[str, object]
) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif", reason="NOT CHECKED: install the extra `heic`")
    file = encode(Image.new(mode, (8000, 5000)), kind, **options)

    async def test(pool: Pool) -> None:
        for _ in range(2):
            assert (await pool.decode(file)).pixels.shape == (512, 819, 3)

    run(test, decoders=1, decode_timeout_ms=20_000)


def test_an_image_that_takes_too_long_is_killed_and_the_others_do_not_notice() -> None:
    async def test(pool: Pool) -> None:
        before = pool.pids()
        slow = asyncio.create_task(pool.decode(LARGE))
        for _ in range(20):
            assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)
        assert "too long" in await refusal(slow)
        assert pool.kills("timeout") == 1
        await pool.until(lambda: pool.count("decoder_restarts_total") == 1)
        await pool.until(lambda: pool.count("decoders_up") == 2)
        assert len(pool.pids() & before) == 1
        assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)

    run(test, decoders=2, decode_timeout_ms=50)


def test_the_clock_ends_a_decoder_that_does_not_run() -> None:
    async def test(pool: Pool) -> None:
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        await refusal(pool.decode(SMALL))
        assert 0.3 <= time.monotonic() - began < 3
        assert pool.kills("timeout") == 1
        await pool.restarted()
        assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)

    run(test, decoders=1, decode_timeout_ms=200)


def test_waiting_for_a_decoder_counts_against_the_time() -> None:
    """However many expensive images come at once, each is answered within its own time."""

    async def test(pool: Pool) -> None:
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        errors = await asyncio.gather(
            *(pool.decode(file) for file in (SMALL, LARGE, SMALL, SMALL)), return_exceptions=True
        )
        assert 0.75 <= time.monotonic() - began < 2
        assert [type(error) for error in errors] == [ImageTooCostly, *[QueueFull] * 3]
        assert all(isinstance(error, QueueFull) and error.retry_after for error in errors[1:])
        assert pool.count("rejected_total", reason="decoders") == 3
        await pool.restarted()
        assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)

    run(test, decoders=1, decode_timeout_ms=500)


def test_an_image_that_waited_too_long_to_be_finished_is_told_to_come_back() -> None:
    async def test(pool: Pool) -> None:
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        first = asyncio.create_task(pool.decode(SMALL))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(pool.decode(LARGE))
        await asyncio.sleep(0.6)
        os.kill(pid, signal.SIGCONT)
        await first
        with pytest.raises(QueueFull):
            await second

    run(test, decoders=1, decode_timeout_ms=500)


def test_more_images_than_the_decoders_can_take_cost_no_decoder() -> None:
    """What is refused was not begun, or each of them would end a process that others wait for."""

    async def test(pool: Pool) -> None:
        file = encode(Image.new("RGB", (2500, 2500), (1, 2, 3)), "PNG")

        async def decode() -> bool:
            try:
                await pool.decode(file)
            except QueueFull:
                return False
            return True

        assert {*await asyncio.gather(*(decode() for _ in range(500)))} == {True, False}
        assert pool.count("decoder_restarts_total") == 0

    run(test, decoders=1, decode_timeout_ms=1000)


def test_callers_take_turns() -> None:
    async def test(pool: Pool) -> None:
        order: list[str] = []

        async def watch(file: bytes, caller: str) -> None:
            await pool.decode(file, caller)
            order.append(caller)

        expensive = [asyncio.create_task(watch(LARGE, "expensive")) for _ in range(3)]
        await asyncio.sleep(0.05)
        await asyncio.gather(*(watch(SMALL, "cheap") for _ in range(5)))
        await asyncio.gather(*expensive)
        assert order == ["expensive", *["cheap"] * 5, "expensive", "expensive"]

    # So much memory that the large images need no turn of their own.
    run(test, decoders=1, decode_timeout_ms=20_000, decode_memory_bytes=8 * 480 * 2**20)


def test_an_image_that_takes_too_much_memory_is_refused() -> None:
    async def test(pool: Pool) -> None:
        assert "memory" in await refusal(pool.decode(LARGE))
        assert pool.kills("memory") == 1
        assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)

    run(test, decoders=1, decode_memory_bytes=64 * 2**20)


def test_a_frame_larger_than_its_header_is_refused() -> None:
    """libavif believes the frame; the memory of the process is the bound."""
    file = bytearray(encode(Image.new("L", (9000, 9000)), "AVIF", speed=10))
    at = file.index(b"ispe") + 8
    file[at : at + 8] = struct.pack(">II", 64, 64)

    async def test(pool: Pool) -> None:
        with pytest.raises((ImageTooCostly, BadRequest)):
            await pool.decode(bytes(file))
        assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)

    run(test, decoders=1, decode_memory_bytes=64 * 2**20)


def test_large_images_take_turns_and_small_ones_pass() -> None:
    async def test(pool: Pool) -> None:
        order: list[str] = []

        async def watch(name: str, file: bytes) -> None:
            await pool.decode(file)
            order.append(name)

        large = [asyncio.create_task(watch("large", LARGE)) for _ in range(3)]
        await asyncio.sleep(0.1)
        most = 0
        while not all(work.done() for work in large):
            await watch("small", SMALL)
            most = max(most, sum(map(resident, pool.pids())))
        assert order.index("small") < order.index("large")
        # One at a time, beside what the processes hold when they are idle.
        idle = sum(map(resident, pool.pids()))
        assert most - idle < 1.5 * (310 * 10**6)

    run(test, decoders=3, decode_timeout_ms=20_000)


def test_nothing_of_an_image_is_held_until_the_next() -> None:
    """Neither the file nor, behind an error, the pixels decoded so far."""
    size = 3600
    whole = encode(Image.new("RGB", (size, size)), "BMP")  # 39 MB
    damaged = whole[:-1000] + b"x" * 2_000_000

    async def test(pool: Pool) -> None:
        (pid,) = pool.pids()
        await pool.decode(SMALL)
        before = resident(pid)
        for file in (whole, damaged, whole[: len(whole) // 2]):
            with contextlib.suppress(BadRequest):
                await pool.decode(file)
            assert pool.pids() == {pid}
            assert resident(pid) - before < TRIM_BYTES + 8 * 2**20

    run(test, decoders=1)


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


@pytest.mark.parametrize(
    ("signum", "reason"),
    [(signal.SIGSEGV, "crash"), (signal.SIGABRT, "crash"), (signal.SIGKILL, "memory")],
)
def test_an_image_whose_decoder_dies_is_refused(signum: int, reason: str) -> None:
    async def test(pool: Pool) -> None:
        work = await started(pool, LARGE)
        (pid,) = pool.pids()
        os.kill(pid, signum)
        await refusal(work)
        assert pool.kills(reason) == 1
        assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)

    run(test, decoders=1, decode_timeout_ms=20_000)


def test_a_decoder_that_ends_before_it_has_read_the_file_costs_no_request() -> None:
    async def test(pool: Pool) -> None:
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        work = asyncio.create_task(pool.decode(SMALL))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        assert (await work).pixels.shape == (48, 64, 3)
        assert not any(map(pool.kills, ("memory", "crash", "timeout")))

    run(test, decoders=1)


def test_a_decoder_that_dies_idle_costs_no_request() -> None:
    async def test(pool: Pool) -> None:
        for pid in pool.pids():
            os.kill(pid, signal.SIGKILL)
        # Some may be gone by now, others only when they have been sent the file.
        for _ in range(4):
            assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)
        assert pool.decoders.ready
        assert not any(map(pool.kills, ("memory", "crash", "timeout")))

    run(test, decoders=2)


@pytest.mark.parametrize(
    "reply",
    [
        REPLY.pack(Status.PIXELS, False, 12, 2**31, 2**31, 0),
        REPLY.pack(Status.PIXELS, False, 2**40, 4, 4, 0),
        REPLY.pack(Status.PIXELS, False, 3 * (4 * 4 + 8 * 8), 4, 4, 8),  # an unwanted view
        REPLY.pack(Status.PIXELS, False, 0, 0, 0, 0),
        REPLY.pack(Status.ERROR, False, 2**40, 0, 0, 0),
        REPLY.pack(Status.ERROR, False, 12, 0, 0, 0) + b"no_such_type",
        REPLY.pack(Status.ERROR, False, 2, 0, 0, 0) + b"\xff\xff",
    ],
)
def test_a_decoder_that_talks_nonsense_is_killed(
    reply: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    warm = REPLY.pack(Status.WARM, False, 0, 0, 0, 0)
    package = tmp_path / "nonsense.py"
    package.write_text(
        f"import socket, time\nconnection = socket.socket(fileno=0)\nconnection.send({warm!r})\n"
        f"connection.recv(1)\nconnection.send({reply!r})\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(decoder_process, "PROGRAM", (str(package),))

    async def test() -> None:
        pool = Pool(decoders=1)
        await pool.decoders.start()
        await refusal(pool.decode(SMALL))
        await pool.decoders.stop()
        assert pool.kills("crash") == 1

    asyncio.run(test())


def test_who_leaves_frees_the_decoder() -> None:
    async def test(pool: Pool) -> None:
        for _ in range(2):
            work = await started(pool, LARGE)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            began = time.monotonic()
            await pool.until(lambda: pool.count("decoders_up") == 0)
            assert time.monotonic() - began < 1.0
            assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)
        assert pool.kills("cancelled") == 2

    run(test, decoders=1, decode_timeout_ms=20_000)


def test_those_who_leave_early_cost_no_process() -> None:
    async def test(pool: Pool) -> None:
        for _ in range(20):
            work = asyncio.create_task(pool.decode(SMALL))
            await asyncio.sleep(0)
            work.cancel()
        assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)
        assert not pool.kills("cancelled")
        assert not pool.count("decoder_restarts_total")

    run(test, decoders=1)


def test_without_decoders_nothing_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF", 0.1)

    async def test(pool: Pool) -> None:
        monkeypatch.setattr(decoder_process, "PROGRAM", ("-c", "exit(1)"))
        for pid in pool.pids():
            os.kill(pid, signal.SIGKILL)
        await pool.until(lambda: not pool.decoders.ready)
        with pytest.raises(NotReady):
            await pool.decode(SMALL)
        assert pool.count("rejected_total", reason="no_decoder") == 1
        monkeypatch.undo()
        await pool.until(lambda: pool.decoders.ready)
        assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)

    run(test, decoders=2)


def test_a_shortage_of_threads_costs_no_decoder_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF", 0.1)

    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    async def test(pool: Pool) -> None:
        (pid,) = pool.pids()
        monkeypatch.setattr(decoder_process, "threading", SimpleNamespace(Thread=NoThread))
        os.kill(pid, signal.SIGKILL)
        await pool.until(lambda: not pool.decoders.ready)
        assert not pool.pids()  # what was started without its thread has been ended
        with pytest.raises(NotReady):
            await pool.decode(SMALL)
        monkeypatch.undo()
        await pool.until(lambda: pool.decoders.ready)
        assert (await pool.decode(SMALL)).pixels.shape == (48, 64, 3)

    run(test, decoders=1)


def test_who_waits_hears_when_no_decoder_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(decoder_process, "PROGRAM", ("-c", "exit(1)"))
        pool = Pool(decoders=2)
        await pool.decoders.start()
        async with asyncio.timeout(20):
            with pytest.raises(NotReady):
                await pool.decode(SMALL)
        assert pool.count("rejected_total", reason="no_decoder") == 1
        await pool.decoders.stop()

    asyncio.run(test())


def test_the_knobs_count() -> None:
    async def test(pool: Pool) -> None:
        assert len(pool.pids()) == 3
        with pytest.raises(TooLarge, match="limit is 1000"):
            await pool.decode(SMALL)

    run(test, decoders=3, max_image_pixels=1000)


TRIES = """
import os, socket, sys, threading
from service.intake import decoder
decoder._warm_up()
space = decoder._AddressSpace()
decoder._drop_rights()
def tries(*acts):
    for act in acts:
        try:
            act()
        except (OSError, RuntimeError):
            continue
        os._exit(1)
tries(
    lambda: open(__file__ if "__file__" in globals() else "/etc/hostname"),
    socket.socket,
    os.pipe,
    *([] if decoder.HEIC else [os.fork, threading.Thread(target=print).start]),
    lambda: os.nice(-1),
    lambda: os.write(sys.stdout.fileno(), b"x" * 10),
)
os._exit(0 if space.used() > 2**20 else 2)
"""


def test_a_decoder_gives_up_its_rights(tmp_path: Path) -> None:
    """It opens nothing, writes into no file, even one that is open, and without HEIC, whose decoder
    needs a thread, it starts nothing."""
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run([sys.executable, "-c", TRIES], stdin=subprocess.DEVNULL, stdout=out)
    assert done.returncode == 0
    assert (tmp_path / "out").read_bytes() == b""


def test_a_decoder_is_bounded_and_deaf_to_the_group() -> None:
    async def test(pool: Pool) -> None:
        (pid,) = pool.pids()
        status = Path(f"/proc/{pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert "Threads:\t1\n" in status
        if os.geteuid() == 0:
            assert "Uid:\t65534" in status
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert f"Max open files            {DESCRIPTORS} " in limits
        assert os.getpgid(pid) != os.getpgid(0)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        await pool.decode(SMALL)
        assert pool.pids() == {pid}

    run(test, decoders=1)


def test_a_decoder_does_not_inherit_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "environment"
    code = f"import os; open({str(file)!r}, 'w').write(str(dict(os.environ)))"
    monkeypatch.setenv("TAPT_API_KEYS", "secret")
    monkeypatch.setattr(decoder_process, "PROGRAM", ("-c", code))

    async def test() -> None:
        pool = Pool(decoders=1)
        await pool.decoders.start()
        with pytest.raises(NotReady):
            await pool.decode(SMALL)
        await pool.decoders.stop()

    asyncio.run(test())
    assert "PYTHONPATH" in file.read_text()
    assert "secret" not in file.read_text()


def test_a_decoder_imports_little() -> None:
    code = "import sys, service.intake.decoder; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "fastapi", "pydantic", "uvicorn", "asyncio"} & set(loaded)


PARENT = """
import asyncio, os, sys
from service.intake.decoders import Decoders
from service.malloc import TRIM_BYTES
from service.settings import Settings
from service.telemetry.metrics import Metrics

async def main():
    decoders = Decoders(Settings(decoders=1, decode_timeout_ms=60_000), Metrics())
    await decoders.start()
    await decoders.decode(open(sys.argv[1], "rb").read())
    print("warm", flush=True)
    await asyncio.gather(*[decoders.decode(open(sys.argv[2], "rb").read()) for _ in range(50)])

asyncio.run(main())
"""


def test_a_decoder_ends_with_its_parent(tmp_path: Path) -> None:
    """Even in the middle of an image."""
    for name, file in (("small", SMALL), ("large", LARGE)):
        (tmp_path / name).write_bytes(file)
    command_line = [sys.executable, "-c", textwrap.dedent(PARENT)]
    files = [str(tmp_path / "small"), str(tmp_path / "large")]
    with subprocess.Popen([*command_line, *files], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"warm\n"
        tasks = Path(f"/proc/{parent.pid}/task").glob("*/children")
        (child,) = [int(pid) for task in tasks for pid in task.read_text().split()]
        time.sleep(0.1)
        parent.kill()
    until = time.monotonic() + 2
    while b"service.intake.decoder" in command(child):
        assert time.monotonic() < until
        time.sleep(0.01)
