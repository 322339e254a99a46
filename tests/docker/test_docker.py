"""What docker/ promises, as far as it can be seen without building; `make smoke` does the rest."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.shipped import DEFAULT_MODEL
from service.server import SHUTDOWN_TIMEOUT
from service.settings import PREFIX, Settings, unknown_variables
from service.worker.process import EXIT_TIMEOUT

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
IMAGE = (DOCKER / "Dockerfile").read_text()
HADOLINT = Path(sys.executable).with_name("hadolint")
PROMTOOL = shutil.which("promtool")


def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return read


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([\w.!+]+)", file.read_text(), re.MULTILINE)
    return {plain(name): version for name, version in found}


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint is not installed")
@pytest.mark.parametrize("name", ["Dockerfile", "gateway/Dockerfile"])
def test_hadolint_finds_nothing(name: str) -> None:
    command = [str(HADOLINT), "--no-color", str(DOCKER / name)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert not run.stdout


@pytest.mark.parametrize("name", [file.name for file in sorted(DOCKER.glob("requirements*.txt"))])
def test_every_requirement_of_the_images_is_one_version_with_hashes(name: str) -> None:
    text = re.sub(r"^#.*\n", "", (DOCKER / name).read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", "").splitlines()
    pin = re.compile(r"[\w.-]+==[\w.!+]+( +--hash=sha256:[0-9a-f]{64})+")
    assert not [line for line in lines if not pin.fullmatch(line)]
    assert len(lines) == len(pins(DOCKER / name)) > 0


def test_the_lock_is_the_constraints() -> None:
    """`make lock` was run after the last change: same versions, nothing missing."""
    locked, tested = pins(DOCKER / "requirements.txt"), pins(ROOT / "constraints.txt")
    tested["setuptools"] = locked["setuptools"]  # pip's own; freeze leaves it out
    assert locked.items() <= tested.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["otel"]
    names = {plain(re.split(r"[<>=\[; ]", line)[0]) for line in wanted}
    assert names - locked.keys() == {"torch"}  # comes with the target


def test_the_images_have_the_torch_that_was_tested() -> None:
    tested = pins(ROOT / "constraints.txt")["torch"]
    assert pins(DOCKER / "requirements-cpu.txt") == {"torch": f"{tested}+cpu"}
    cuda = pins(DOCKER / "requirements-cuda.txt")
    assert cuda["torch"] == tested  # PyPI's wheel, which has no local version
    libraries = ("nvidia-", "cuda-", "triton", "torch")
    assert not [name for name in cuda if not name.startswith(libraries)]
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton"} <= cuda.keys()
    assert not cuda.keys() & pins(DOCKER / "requirements.txt").keys()


def test_nothing_gets_into_an_image_without_a_hash() -> None:
    """Each stage installs one locked file, which it alone copies; no name comes from elsewhere."""
    stages = re.split(r"^FROM \S+ AS ", IMAGE, flags=re.MULTILINE)[1:]
    found = {}
    for stage in stages:
        commands = re.sub(r"\\\n\s*", "", stage)
        for line in re.findall(r"pip \S+ \S+ install (.*?)(?:&&|$)", commands, re.MULTILINE):
            if "/tmp/*.whl" not in line:  # our own, made in that stage
                assert "--require-hashes " in line
                (file,) = re.findall(r"--requirement (\S+)", line)
                assert re.findall(r"^COPY docker/(req\S+) \.$", stage, re.MULTILINE) == [file]
                rest = re.sub(r"--(require-hashes|no-deps|(requirement|index-url) \S+)", "", line)
                assert not rest.strip()
                found[stage.split()[0]] = file
    assert found == {
        "build": "requirements.txt",
        "build-cpu": "requirements-cpu.txt",
        "build-cuda": "requirements-cuda.txt",
    }


def test_the_image_is_hardened_and_watched() -> None:
    last = IMAGE[IMAGE.index("AS runtime") :]
    assert re.findall(r"^USER (\S+)$", last, re.MULTILINE) == ["10001:10001"]
    assert re.search(r"^HEALTHCHECK", last, re.MULTILINE)
    assert not re.search(r"^RUN .*(pip|apt-get)", last, re.MULTILINE)
    assert "/opt" not in IMAGE
    command = json.loads(re.findall(r"HEALTHCHECK[^\[]*(\[.*\])", IMAGE)[0])
    assert "/readyz" in command[-1]
    compile(command[-1], "healthcheck", "exec")


def test_what_the_build_copies_is_let_through_and_nothing_private_is() -> None:
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for file in (IMAGE, (DOCKER / "gateway/Dockerfile").read_text()):
        for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", file, re.MULTILINE):
            for source in sources.split():
                assert (ROOT / source).exists(), source
                assert any(Path(source).match(pattern) for pattern in allowed), source
    assert not any(Path("docker/gateway/tls/key.pem").match(pattern) for pattern in allowed)


def test_compose_names_knobs_files_and_replicas_that_exist() -> None:
    services = compose()["services"]
    replicas = {name: one for name, one in services.items() if name.startswith("service-")}
    for one in replicas.values():
        ours = {name: "" for name in one["environment"] if name.startswith(PREFIX)}
        assert ours
        assert not unknown_variables(ours)
        assert one["environment"]["TAPT_MODEL"] == f"${{TAPT_MODEL:-{DEFAULT_MODEL}}}"
        assert {"path": "knobs.env", "required": False} in one["env_file"]
        needed = Settings().drain_timeout_s + SHUTDOWN_TIMEOUT + EXIT_TIMEOUT
        assert int(one["stop_grace_period"].rstrip("s")) > needed

    gateway = (DOCKER / "gateway/replicas.conf").read_text()
    prometheus = (DOCKER / "prometheus/prometheus.yml").read_text()
    for name in replicas:
        assert f"server {name}:8000 " in gateway
        assert f'"{name}:8000"' in prometheus
    over = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())["services"]
    assert over.keys() == replicas.keys()

    made_later = {"./gateway/tls", "./models"}
    for one in services.values():
        for volume in one["volumes"]:
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            if source.startswith(".") and source not in made_later:
                assert (DOCKER / source).exists(), source


def test_every_container_of_compose_is_confined() -> None:
    services = compose()["services"]
    assert {"gateway", "prometheus", "grafana", "service-1", "service-2"} == services.keys()
    for name, one in services.items():
        assert one["read_only"], name
        assert one["cap_drop"] == ["ALL"], name
        assert one["security_opt"] == ["no-new-privileges:true"], name
        assert one["mem_limit"], name
        assert 0 < one["pids_limit"] <= 2048, name
        assert not {"privileged", "cap_add", "pid", "ipc", "network_mode"} & one.keys(), name
        # With a read-only root, what is written goes to a bounded tmpfs or to a named volume.
        assert all("size=" in mount for mount in one["tmpfs"]), name
        for volume in one["volumes"]:
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            assert volume.endswith(":ro") or source in compose()["volumes"], volume
        for port in one.get("ports", []):
            assert name == "gateway" or port.startswith("127.0.0.1:"), port


def test_compose_never_opens_the_service_by_an_oversight() -> None:
    for name, one in compose()["services"].items():
        if name.startswith("service-"):
            assert one["environment"]["TAPT_API_KEYS"].startswith("${TAPT_API_KEYS:?")
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"docker/.env", "docker/knobs.env"} <= set(ignored)


def test_the_page_names_what_compose_runs_and_asks_for() -> None:
    told = (ROOT / "docs/deploy.md").read_text()
    for one in compose()["services"].values():
        image = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", one["image"])
        assert image in told, image
    for name in re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()):
        assert f"`{name}`" in told or f"{name}=" in told, name


def test_grafana_finds_the_dashboard_that_is_provisioned() -> None:
    volumes = compose()["services"]["grafana"]["volumes"]
    board = "/var/lib/grafana/dashboards"
    assert f"./grafana/dashboards:{board}:ro" in volumes
    provider = yaml.safe_load(
        (DOCKER / "grafana/provisioning/dashboards/tapt-serve.yml").read_text()
    )
    assert provider["providers"][0]["options"]["path"] == board
    assert (DOCKER / "grafana/dashboards/tapt-serve.json").exists()


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (package prometheus)")
def test_prometheus_takes_its_configuration() -> None:
    command = [str(PROMTOOL), "check", "config", str(DOCKER / "prometheus/prometheus.yml")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
