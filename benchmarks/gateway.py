"""Two replicas behind the gateway against one: requests a second and how long each took.

python -m benchmarks.gateway --replicas 1,2 --seconds 20 [--write docs/deploy.md]

The gateway is docker/gateway under Debian's nginx, the replicas are `tapt-serve serve` with one
thread of torch each; clients, gateway and replicas share this machine.
"""

import argparse
import base64
import io
import os
import re
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from PIL import Image

from benchmarks.sections import write_section
from models.evaluation.table import tabulate

CONFIGURATION = Path(__file__).parent.parent / "docker" / "gateway"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
LABELS = ["fog", "sunset", "keyboard", "cat", "dog", "bus", "lemon", "volleyball"]
PATIENCE = 30.0  # seconds


def _draw() -> str:
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


BODY = {"image": _draw(), "candidate_labels": LABELS}


class Gateway:
    """nginx with docker/gateway's configuration on a free port; `rate` replaces its 50r/s.

    Everything it reads and writes lies below `directory`, the access log as `access.log`. `http`
    is a client of its own.
    """

    def __init__(self, directory: Path, replicas: Sequence[int], rate: str = "50r/s") -> None:
        assert NGINX, "nginx is not installed"
        self.directory = directory
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        text = (CONFIGURATION / "nginx.conf").read_text()
        for name, value in {
            "listen 8443 ssl": f"listen 127.0.0.1:{self.port} ssl",
            "rate=50r/s": f"rate={rate}",
            "access_log /dev/stdout": "access_log access.log",
            "worker_processes auto": "worker_processes 1",
        }.items():
            assert text.count(name) == 1, f"{name} stands {text.count(name)} times"
            text = text.replace(name, value)
        (directory / "nginx.conf").write_text(text)
        shutil.copy(CONFIGURATION / "error.conf", directory)
        (directory / "replicas.conf").write_text(_list(replicas))
        self._tls = certify(directory / "tls")
        user = " user root;" if os.geteuid() == 0 else ""  # may enter a private directory
        self._command = [NGINX, "-e", "stderr", "-p", f"{directory}/"]
        self._command += ["-c", str(directory / "nginx.conf")]
        with (directory / "error.log").open("w") as log:
            self._process = subprocess.Popen(
                [*self._command, "-g", f"daemon off;{user}"], stderr=log
            )
        wait_for_port(self.port, self._process)
        self.http = self.client()

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self._tls, timeout=120)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
    """A certificate for 127.0.0.1 that signs itself, and a context that trusts it alone."""
    directory.mkdir(exist_ok=True)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=gateway", "-addext"]
    command += ["subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return ssl.create_default_context(cafile=directory / "cert.pem")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, "it ended before it listened"
            assert time.monotonic() < limit, "it does not listen"
            time.sleep(0.05)


class Load:
    """Clients that ask one after the other, each as soon as it was answered, until `stop`."""

    def __init__(self, gateway: Gateway, clients: int) -> None:
        self.answers: list[tuple[int, float, str]] = []  # status, seconds, body
        self._gateway = gateway
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with self._gateway.client() as http:
            while not self._stopping.is_set():
                began = time.monotonic()
                try:
                    answer = http.post("/v1/classify", json=BODY)
                    status, text = answer.status_code, answer.text
                except httpx.HTTPError as error:
                    status, text = 0, repr(error)
                self.answers.append((status, time.monotonic() - began, text))

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


def measure(count: int, seconds: float, clients: int, method: str) -> tuple[str, ...]:
    """A row: replicas, requests a second, median and 95th percentile in ms, errors."""
    command = [sys.executable, "-m", "service.cli", "serve", "--method", method, "--port"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    ports = [free_port() for _ in range(count)]
    replicas = [
        subprocess.Popen(
            [*command, str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
        )
        for port in ports
    ]
    try:
        for replica in replicas:
            if not replica.stdout or not replica.stdout.readline():
                raise SystemExit("a replica did not start")
        with (
            tempfile.TemporaryDirectory() as directory,
            Gateway(Path(directory), ports, rate="10000r/s") as gateway,
        ):
            load = Load(gateway, clients)
            time.sleep(2)  # until all of them are under way
            load.answers.clear()
            time.sleep(seconds)
            taken = list(load.answers)
            load.stop()
    finally:
        for replica in replicas:
            replica.terminate()
        for replica in replicas:
            replica.communicate()
    good = [1000 * answer[1] for answer in taken if answer[0] == 200]
    if len(good) < 2:
        raise SystemExit(f"{len(good)} good answers in {seconds:g} s; the run was too short")
    tail = statistics.quantiles(good, n=20)[-1]
    rate = f"{len(good) / seconds:.1f}"
    errors = len(taken) - len(good)
    return str(count), rate, f"{statistics.median(good):.0f}", f"{tail:.0f}", str(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", default="1,2", help="how many, comma-separated")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--method", default="tapt", help="the replicas' default defense")
    parser.add_argument("--write", type=Path, help="a page with marks for the table `gateway`")
    options = parser.parse_args()
    counts = [int(count) for count in options.replicas.split(",")]
    busy = os.getloadavg()[0]
    rows = [measure(n, options.seconds, options.clients, options.method) for n in counts]
    heads = ("replicas", "requests/s", "p50 ms", "p95 ms", "errors")
    text = (
        f"{tabulate(heads, rows)}\n\n"
        f"Embedded model, `{options.method}`, {len(LABELS)} labels, {options.clients} clients, "
        f"{options.seconds:g} s each; clients, gateway and replicas share {os.cpu_count()} cores; "
        f"load average before the run {busy:.1f}. Made by `python -m benchmarks.gateway --replicas "
        f"{options.replicas} --seconds {options.seconds:g} --clients {options.clients} "
        f"--method {options.method}`."
    )
    print(text)
    if options.write:
        write_section("gateway", text, options.write)


if __name__ == "__main__":
    main()
