"""What the comparison has to know about a server: how to install, start, ask and read it."""

import base64
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness.requests import LABELS

TEMPLATE = "a photo of a {}."
APPS = Path(__file__).parent / "apps"


class PeerError(Exception):
    """A peer could not be installed, started or asked. The message is the reason."""


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint in the transformers format, and the defense bundle learned for it."""

    name: str
    directory: Path
    bundle: Path


class Peer(ABC):
    """A server that classifies a picture with the labels of `benchmarks.harness.requests`.

    Attributes:
        name: of the peer on the command line.
        title: of the peer in tables.
        requirements: what pip installs for it; empty if it runs in this environment.
        packages: the installed packages whose versions are reported.
        path: where requests are posted to.
        defended: whether its answers are defended, so that its labels may differ.
    """

    name: str
    title: str
    requirements: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    path = "/classify"
    defended = False

    @abstractmethod
    def command(self, python: Path, model: Model, port: int) -> list[str]:
        """The command that serves the model at 127.0.0.1:`port`."""

    def body(self, file: bytes) -> dict[str, Any]:
        """The JSON body that asks for the labels of a picture."""
        return {
            "image": base64.b64encode(file).decode(),
            "candidate_labels": LABELS,
            "hypothesis_template": TEMPLATE,
        }

    @abstractmethod
    def label(self, answer: Any, http: httpx.Client) -> str:
        """The best label of a parsed answer; `http` is a client of the server that gave it."""

    def precision(self, http: httpx.Client) -> str:
        """The dtype that the server computes in: that of the checkpoint, unless it chooses."""
        return "float32"
