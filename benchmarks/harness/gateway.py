"""docker/gateway's nginx on this machine, in front of replicas."""

import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import httpx

from benchmarks.harness.report import ROOT
from benchmarks.harness.server import free_port

CONFIGURATION = ROOT / "docker" / "gateway"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
PATIENCE = 30.0  # seconds


class Gateway:
    """nginx with docker/gateway's configuration on a free port; `rate` replaces its 50r/s.

    Everything it reads and writes lies below `directory`, the access log as `access.log`. `http`
    is a client of it. As a context manager it stops on exit.
    """

    def __init__(self, directory: Path, replicas: Sequence[int], rate: str = "50r/s") -> None:
        assert NGINX, "nginx is not installed"
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        text = (CONFIGURATION / "nginx.conf").read_text()
        for name, value in {
            "listen 8443 ssl": f"listen 127.0.0.1:{self.port} ssl",
            "rate=50r/s": f"rate={rate}",
            "access_log /dev/stdout": "access_log access.log",
            "worker_processes auto": "worker_processes 1",
        }.items():
            assert text.count(name) == 1, f"{name} occurs {text.count(name)} times"
            text = text.replace(name, value)
        (directory / "nginx.conf").write_text(text)
        shutil.copy(CONFIGURATION / "error.conf", directory)
        (directory / "replicas.conf").write_text(_list(replicas))
        self._tls = certify(directory / "tls")
        user = " user root;" if os.geteuid() == 0 else ""  # may enter a private directory
        command = [
            NGINX,
            "-e",
            "stderr",
            "-p",
            f"{directory}/",
            "-c",
            str(directory / "nginx.conf"),
        ]
        with (directory / "error.log").open("w") as log:
            self._process = subprocess.Popen([*command, "-g", f"daemon off;{user}"], stderr=log)
        _wait_for_port(self.port, self._process)
        self.http = self.client()

    def client(self) -> httpx.Client:
        """A client that trusts its certificate."""
        return httpx.Client(base_url=self.url, verify=self._tls, timeout=120)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._process.terminate()
        self._process.wait(PATIENCE)


def _list(ports: Sequence[int]) -> str:
    """The shipped line of a replica, once for each port."""
    shipped = (CONFIGURATION / "replicas.conf").read_text()
    line = re.search(r"^server service-1:8000(.*)$", shipped, re.MULTILINE)
    assert line
    return "".join(f"server 127.0.0.1:{port}{line[1]}\n" for port in ports)


def certify(directory: Path) -> ssl.SSLContext:
    """A self-signed certificate for 127.0.0.1, and a context that trusts only this one."""
    directory.mkdir(exist_ok=True)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=gateway", "-addext"]
    command += ["subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return ssl.create_default_context(cafile=directory / "cert.pem")


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, "it ended before it listened"
            assert time.monotonic() < limit, "it does not listen"
            time.sleep(0.05)
