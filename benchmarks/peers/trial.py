"""One peer under load: capacity, latencies, processor time and memory."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from skimage import data

from benchmarks.harness.load import LATE, Record, drive, drive_closed, poisson, summarize
from benchmarks.harness.requests import encode, post
from benchmarks.peers.environment import last_error
from benchmarks.peers.peer import Model, Peer, PeerError
from benchmarks.peers.process import PeerServer

CLIENTS = {"1 client": 1, "16 clients": 16}  # of the closed loops
OPEN = "open loop"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
SIZE = (640, 480)
SHARE = 0.8  # of the best closed loop, in the open loop
WARM_UP = 0.25  # of the seconds of a load


@dataclass(frozen=True, slots=True)
class Trial:
    """What one peer did in one run.

    Attributes:
        loads: the summary of each load, as of `benchmarks.harness.load.summarize`.
        open_rate: of the open loop, in requests/s.
        cpu_seconds: processor time of an answer to 16 clients, of all processes of the server.
        peak_bytes: memory of all processes of the server.
        start_seconds: until the first answer.
        labels: the best label of each picture.
        precision: the dtype that the server computes in.
    """

    loads: dict[str, dict[str, Any]]
    open_rate: float
    cpu_seconds: float
    peak_bytes: int
    start_seconds: float
    labels: list[str]
    precision: str


def run_trial(peer: Peer, python: Path, model: Model, seconds: float, seed: int) -> Trial:
    """Start the peer, put each load on it for `seconds`, and stop it.

    Raises:
        PeerError: it does not start, or does not answer all requests.
    """
    bodies = [peer.body(file) for file in photographs()]
    requests = [post(peer.path, json.dumps(body).encode()) for body in bodies]
    loads, cpu_seconds = {}, 0.0
    with PeerServer(peer, python, model) as server:
        labels, precision = _ask(peer, server.url, bodies)
        for load, clients in CLIENTS.items():
            asyncio.run(drive_closed(server.url, requests, clients, WARM_UP * seconds))
            before = server.cpu_seconds()
            records = asyncio.run(drive_closed(server.url, requests, clients, seconds))
            cpu_seconds = (server.cpu_seconds() - before) / len(records)
            loads[load] = _summarize(records)
        rate = SHARE * max(load["throughput"] for load in loads.values())
        arrivals = poisson(rate, seconds, seed) or [0.0]
        loads[OPEN] = _summarize(asyncio.run(drive(server.url, arrivals, requests)))
    memory, started = server.peak_bytes, server.start_seconds
    return Trial(loads, rate, cpu_seconds, memory, started, labels, precision)


def photographs() -> list[bytes]:
    """JPEG files of different photographs, each of the same size."""
    pictures = (Image.fromarray(getattr(data, name)()) for name in PHOTOGRAPHS)
    return [encode(np.asarray(picture.resize(SIZE)), "JPEG") for picture in pictures]


def _ask(peer: Peer, url: str, bodies: Sequence[dict[str, Any]]) -> tuple[list[str], str]:
    """The best label of each picture, and the precision."""
    try:
        with httpx.Client(base_url=url, timeout=LATE) as http:
            answers = [http.post(peer.path, json=body).raise_for_status() for body in bodies]
            labels = [peer.label(answer.json(), http) for answer in answers]
            return labels, peer.precision(http)
    except httpx.HTTPStatusError as error:
        answer = error.response
        raise PeerError(f"answers {answer.status_code}: {last_error(answer.text)}") from error
    except httpx.TransportError as error:
        raise PeerError(f"does not answer: {error!r}") from error


def _summarize(records: Sequence[Record]) -> dict[str, Any]:
    """The summary of records that are all answered.

    Raises:
        PeerError: some are not, so that a rate would be one of errors.
    """
    found = summarize(records)
    if found["answered"] < found["sent"]:
        lost = found["sent"] - found["answered"]
        raise PeerError(f"does not answer {lost} of {found['sent']} requests under load")
    return found
