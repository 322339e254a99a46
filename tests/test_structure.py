"""Imports point down, torch stays inside the worker, and nothing heavy hides in the API process."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# From the top of the house down; a module imports only from floors below its own.
SERVICE_FLOORS = [
    {"cli"},
    {"server", "shell"},
    {"app"},
    {"routes.classify", "routes.hf", "routes.demo", "routes.health", "routes.info", "routes.page"},
    {"routes.docs", "exposure"},
    {"door"},
    {"engine", "plan", "forms", "fetch"},
    {"fleet", "images"},
    {"bookings", "connections", "scheduler", "worker", "tally", "traces"},
    {"process", "containers", "runner", "slots", "journal", "keys", "limits", "similarity"},
    {"demonstration"},
    {"allocator", "errors", "logs", "metrics", "schemas", "settings", "work"},
]
LEAVES = SERVICE_FLOORS[-1]
TORCH = {"torch", "transformers", "safetensors", "tokenizers"}


def modules(package: str) -> dict[str, Path]:
    """Dotted names below a package, without the package's own."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        if parts[-1] != "__init__":
            found[".".join(parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Everything a module imports, anywhere in it, as dotted names of modules."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_service_imports_point_down() -> None:
    found = modules("service")
    floor = {name: level for level, names in enumerate(SERVICE_FLOORS) for name in names}
    assert floor.keys() == found.keys()
    for name, path in found.items():
        wanted = {other.removeprefix("service.") for other in imports(path)} & found.keys()
        up = {other for other in wanted if floor[other] <= floor[name]}
        # The terminal and the worker's child load what runs inside the worker lazily.
        assert not up - ({"runner"} if name == "shell" else set()), f"{name} imports {up}"


def test_leaves_import_nothing_of_ours() -> None:
    for name, path in modules("service").items():
        if name in LEAVES:
            ours = {
                other for other in imports(path) if other.split(".")[0] in ("service", "models")
            }
            assert not ours, f"{name} imports {ours}"


def test_models_know_nothing_of_the_service_http_or_the_environment() -> None:
    strangers = {"service", "fastapi", "starlette", "uvicorn", "prometheus_client", "os.environ"}
    for name, path in modules("models").items():
        for other in imports(path):
            assert other.split(".")[0] not in strangers, f"{name} imports {other}"
        assert "environ" not in path.read_text(), name


def test_models_import_without_cycles() -> None:
    found = modules("models")
    below = {
        name: {other.removeprefix("models.") for other in imports(path)} & found.keys()
        for name, path in found.items()
    }
    while below:
        free = {name for name, others in below.items() if not others & below.keys()}
        assert free, f"a cycle among {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in free}


def test_only_the_runner_imports_torch_or_models() -> None:
    for name, path in modules("service").items():
        if name != "runner":
            heavy = {o for o in imports(path) if o.split(".")[0] in TORCH | {"models"}}
            if name == "cli":  # commands that are no service; loaded only when they are called
                commands = "models.training.calibrate", "models.evaluation.command"
                heavy -= {*commands, *(f"{command}.main" for command in commands)}
            assert not heavy, f"{name} imports {heavy}"


def test_modules_stay_small() -> None:
    for package in ("service", "models"):
        for name, path in modules(package).items():
            lines = len(path.read_text().splitlines())
            assert lines <= 350, f"{package}.{name} has {lines} lines; does it hold one idea?"
