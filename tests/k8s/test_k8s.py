"""The manifests: rendered by kubectl, strictly valid, and true to the application.

`kubectl` renders, `kubernetes-validate` knows Kubernetes' own kinds, and Node runs the schemas of
the others; what is missing is skipped aloud.
"""

import copy
import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from models.formats import FORMATS
from models.shipped import DEFAULT_MODEL, SHIPPED
from service.engine.engine import GRACE
from service.server import SHUTDOWN_TIMEOUT
from service.settings import Settings, unknown_variables
from service.worker.process import EXIT_TIMEOUT
from tests.conftest import Server
from tests.exposed_series import exposed
from tests.registries import fetch

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = ("cpu", "gpu")
VARIANTS = tuple(f"{overlay}-{scaler}" for overlay in OVERLAYS for scaler in ("hpa", "keda"))
RELEASES = ("1.36", "1.37")
Resource = dict[str, Any]

# Where @kubernetes-models keeps the schema of each custom resource that is used here.
PACKAGES = ("gateway-api@2.0.0", "prometheus-operator@6.0.0", "keda@2.0.0")
_OPERATOR = "ComGithubPrometheusOperatorPrometheusOperatorPkgApisMonitoringV1"
SCHEMAS = {
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): (
        "gateway-api/_schemas/IoK8sSigsGatewayApiApisV1HTTPRoute"
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): (
        f"prometheus-operator/_schemas/{_OPERATOR}PodMonitor"
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): (
        f"prometheus-operator/_schemas/{_OPERATOR}PrometheusRule"
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): (
        "keda/_schemas/ComGithubKedacoreKedaV2ApisKedaV1alpha1ScaledObject"
    ),
}


# Rendering.


@cache
def kubectl() -> str:
    found = shutil.which("kubectl")
    if not found:
        pytest.skip("kubectl is not installed, so the overlays were not rendered")
    told = subprocess.run(
        [found, "version", "--client", "-o", "json"], capture_output=True, text=True, check=True
    )
    version = json.loads(told.stdout).get("kustomizeVersion", "v0")
    if int(re.findall(r"\d+", version)[0]) < 5:
        pytest.skip("this kubectl is older than 1.27 and does not know kustomize's components")
    return found


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Resource]]:
    """The resources of each variant. KEDA takes the HPA's place as an operator would let it: by
    one line of the overlay."""
    found = {}
    for variant in VARIANTS:
        overlay, scaler = variant.split("-")
        tree = tmp_path_factory.mktemp(variant) / "k8s"
        shutil.copytree(K8S, tree)
        file = tree / "overlays" / overlay / "kustomization.yaml"
        text = file.read_text()
        assert "- ../../components/hpa\n" in text
        file.write_text(text.replace("components/hpa", f"components/{scaler}"))
        done = subprocess.run(
            [kubectl(), "kustomize", str(file.parent)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr, "kustomize warns"
        found[variant] = list(yaml.safe_load_all(done.stdout))
    return found


@pytest.fixture(params=VARIANTS)
def resources(
    request: pytest.FixtureRequest, rendered: dict[str, list[Resource]]
) -> list[Resource]:
    return rendered[request.param]


def pick(resources: list[Resource], kind: str, prefix: str = "") -> Resource:
    """The one resource of a kind whose name begins so."""
    (found,) = [
        each
        for each in resources
        if each["kind"] == kind and each["metadata"]["name"].startswith(prefix)
    ]
    return found


def kinds(resources: list[Resource]) -> set[str]:
    return {each["kind"] for each in resources}


def pod(resources: list[Resource]) -> Resource:
    spec: Resource = pick(resources, "Deployment")["spec"]["template"]["spec"]
    return spec


def main_container(resources: list[Resource]) -> Resource:
    (container,) = pod(resources)["containers"]
    assert isinstance(container, dict)
    return container


def variables(resources: list[Resource]) -> dict[str, str]:
    """What the container's environment is set to, as far as it is not another's field."""
    container = main_container(resources)
    (source,) = container["envFrom"]
    data = pick(resources, "ConfigMap", source["configMapRef"]["name"])["data"]
    return {**data, **{each["name"]: each["value"] for each in container["env"] if "value" in each}}


@pytest.fixture
def settings(resources: list[Resource]) -> Settings:
    """The settings as the container would read them."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables(resources).items():
            environment.setenv(name, value)
        return Settings()


# Schemas.


def complaints(resource: Resource, release: str) -> str:
    """What strict validation finds wrong with one of Kubernetes' own kinds, empty if nothing."""
    try:
        kubernetes_validate.validate(resource, release, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return error.message or type(error).__name__
    return ""


def custom_complaints(resources: list[Resource]) -> list[list[str]]:
    """What the published schemas find wrong with each custom resource."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("node and npm are not installed, so custom resources were not validated")

    def install(folder: Path) -> list[str]:
        quiet = ["--silent", "--no-audit", "--no-fund", "--fetch-retries=0"]
        names = [f"@kubernetes-models/{package}" for package in PACKAGES]
        return [npm, "install", *quiet, "--prefix", str(folder), *names]

    folder = fetch("kubernetes-models-1", install)
    asked = [(SCHEMAS[each["apiVersion"], each["kind"]], each) for each in resources]
    done = subprocess.run(
        [node, str(Path(__file__).parents[1] / "crds.mjs"), str(folder)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answers: list[list[str]] = json.loads(done.stdout)
    return answers


def is_custom(resource: Resource) -> bool:
    """Any other kind has to be one of Kubernetes' own, or is unknown."""
    return (resource["apiVersion"], resource["kind"]) in SCHEMAS


def distinct(rendered: dict[str, list[Resource]]) -> list[Resource]:
    """Every resource of all variants, once."""
    return list({json.dumps(each): each for all in rendered.values() for each in all}.values())


@pytest.mark.parametrize("release", RELEASES)
def test_kubernetes_own_kinds_are_strictly_valid(
    rendered: dict[str, list[Resource]], release: str
) -> None:
    own = [each for each in distinct(rendered) if not is_custom(each)]
    assert kinds(own) >= {"Deployment", "NetworkPolicy", "HorizontalPodAutoscaler"}
    for each in own:
        assert complaints(each, release) == "", f"{each['kind']} {each['metadata']['name']}"


def test_custom_resources_fit_their_published_schemas(rendered: dict[str, list[Resource]]) -> None:
    custom = [each for each in distinct(rendered) if is_custom(each)]
    assert kinds(custom) == {kind for _, kind in SCHEMAS}
    assert custom_complaints(custom) == [[] for _ in custom]


def test_a_planted_typo_fails(rendered: dict[str, list[Resource]]) -> None:
    deployment = copy.deepcopy(pick(rendered["cpu-hpa"], "Deployment"))
    deployment["spec"]["template"]["spec"]["enableServiceLink"] = False
    assert "enableServiceLink" in complaints(deployment, RELEASES[0])
    unknown = pick(rendered["cpu-hpa"], "Deployment") | {"kind": "Deploymnet"}
    assert complaints(unknown, RELEASES[0])


def test_a_typo_planted_in_a_custom_resource_fails(rendered: dict[str, list[Resource]]) -> None:
    misspelt, wrong = (copy.deepcopy(pick(rendered["cpu-hpa"], "HTTPRoute")) for _ in range(2))
    misspelt["spec"]["rules"][0]["retry"]["attemps"] = 2
    wrong["spec"]["rules"][0]["retry"]["codes"] = [200]
    first, second = custom_complaints([misspelt, wrong])
    assert first == ["/spec/rules/0/retry/attemps: unknown"]
    assert any("/retry/codes/0" in each for each in second)
    with pytest.raises(KeyError):
        custom_complaints([misspelt | {"kind": "HTTPRoot"}])


# What no schema knows.


def test_overlays_hold_what_they_promise(resources: list[Resource]) -> None:
    names = {
        *("Namespace", "ServiceAccount", "Deployment", "Service", "PodDisruptionBudget"),
        *("NetworkPolicy", "ConfigMap", "HTTPRoute", "PodMonitor", "PrometheusRule"),
    }
    assert kinds(resources) - names in ({"HorizontalPodAutoscaler"}, {"ScaledObject"})
    assert kinds(resources) > names
    assert "replicas" not in pick(resources, "Deployment")["spec"]


def test_only_the_gpu_overlay_asks_for_a_gpu(rendered: dict[str, list[Resource]]) -> None:
    limits = {v: main_container(rendered[v])["resources"]["limits"] for v in ("cpu-hpa", "gpu-hpa")}
    assert "nvidia.com/gpu" not in limits["cpu-hpa"]
    assert limits["gpu-hpa"]["nvidia.com/gpu"] == "1"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod(
        rendered["gpu-hpa"]
    )["tolerations"]


def test_pods_are_restricted(resources: list[Resource]) -> None:
    labels = pick(resources, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    spec = pod(resources)
    context = spec["securityContext"]
    assert context["runAsNonRoot"]
    user = re.search(r"^USER (\d+):(\d+)$", (K8S.parent / "docker/Dockerfile").read_text(), re.M)
    assert user
    assert (context["runAsUser"], context["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    for container in spec["initContainers"] + spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"mountPath": "/tmp", "name": "tmp"} in container["volumeMounts"]
        assert "memory" in container["resources"]["limits"]
    assert {type for volume in spec["volumes"] for type in volume} == {"name", "emptyDir", "secret"}


def test_keys_come_by_reference_and_none_means_no_start(
    resources: list[Resource], settings: Settings
) -> None:
    assert "Secret" not in kinds(resources)
    assert not settings.api_keys
    folder, _, name = settings.api_keys_file.rpartition("/")
    mounts = {each["mountPath"]: each["name"] for each in main_container(resources)["volumeMounts"]}
    (volume,) = [each for each in pod(resources)["volumes"] if each["name"] == mounts[folder]]
    assert not volume["secret"].get("optional")
    assert f"--from-file={name}=" in (K8S / "base/deployment.yaml").read_text()


def test_every_variable_is_a_knob(resources: list[Resource], settings: Settings) -> None:
    environ = variables(resources)
    assert unknown_variables(environ) == []
    assert settings.model_fields_set >= {
        name.removeprefix("TAPT_").lower() for name in environ if name.startswith("TAPT_")
    }
    assert settings.host == "0.0.0.0"


def test_probes_and_ports_exist_in_the_application(
    resources: list[Resource], settings: Settings, server: Server
) -> None:
    container = main_container(resources)
    (port,) = container["ports"]
    assert port["containerPort"] == settings.port
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/startupz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    server.wait(lambda: server.app.state.intake.decoders.ready)
    for probe in probes.values():
        assert server.http.get(probe["httpGet"]["path"]).status_code == 200
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {port["name"]}
    (endpoint,) = pick(resources, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert "tapt_worker_up" in server.http.get(endpoint["path"]).text
    assert "metrics" in settings.open_routes
    ports = [
        endpoint["port"],
        *(each["targetPort"] for each in pick(resources, "Service")["spec"]["ports"]),
        *(
            each["port"]
            for each in pick(resources, "NetworkPolicy", "tapt-serve")["spec"]["ingress"][0][
                "ports"
            ]
        ),
    ]
    assert set(ports) == {port["name"]}


def test_selectors_and_references_lead_somewhere(resources: list[Resource]) -> None:
    deployment = pick(resources, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        pick(resources, "Service")["spec"]["selector"],
        pick(resources, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        pick(resources, "PodMonitor")["spec"]["selector"]["matchLabels"],
        *(
            each["labelSelector"]["matchLabels"]
            for each in pod(resources)["topologySpreadConstraints"]
        ),
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()
    for container in pod(resources)["initContainers"] + pod(resources)["containers"]:
        for source in container["envFrom"]:
            pick(resources, "ConfigMap", source["configMapRef"]["name"])
        assert ":" in container["image"], "an image without a version"
    service = pick(resources, "Service")
    ports = {each["port"] for each in service["spec"]["ports"]}
    for rule in pick(resources, "HTTPRoute")["spec"]["rules"]:
        for backend in rule["backendRefs"]:
            assert backend["name"] == service["metadata"]["name"]
            assert backend["port"] in ports
    scaler = next(each for each in resources if "scaleTargetRef" in each.get("spec", {}))
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    spaces = {
        each["metadata"].get("namespace") for each in resources if each["kind"] != "Namespace"
    }
    assert spaces == {pick(resources, "Namespace")["metadata"]["name"]}


def test_the_pod_has_time_to_drain(resources: list[Resource], settings: Settings) -> None:
    pause = main_container(resources)["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = pause + settings.drain_timeout_s + SHUTDOWN_TIMEOUT + EXIT_TIMEOUT
    assert pod(resources)["terminationGracePeriodSeconds"] > needed
    # Every request that was accepted ends by itself within the drain.
    assert settings.drain_timeout_s >= settings.request_timeout_ms / 1000 + GRACE
    readiness = main_container(resources)["readinessProbe"]
    assert pause > readiness["periodSeconds"] * readiness["failureThreshold"]


def seconds(duration: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|m)", duration).groups()  # type: ignore[union-attr]
    return int(number) * {"ms": 0.001, "s": 1, "m": 60}[unit]


def test_the_route_waits_for_the_service_and_retries_only_what_helps(
    resources: list[Resource], settings: Settings, server: Server
) -> None:
    rules = pick(resources, "HTTPRoute")["spec"]["rules"]
    routed = {match["path"]["value"] for rule in rules for match in rule["matches"]}
    for private in ("/metrics", "/livez", "/startupz", "/health"):
        assert not any(private.startswith(path) and path != "/" for path in routed)
    assert all(
        match["path"]["type"] == "Exact" or match["path"]["value"] != "/"
        for rule in rules
        for match in rule["matches"]
    )
    for path in routed:
        whole = "/playground/page.js" if path == "/playground" else path
        assert server.http.get(whole).status_code != 404, path
    # And so is what the pages load.
    folders = tuple(
        f"{match['path']['value']}/"
        for rule in rules
        for match in rule["matches"]
        if match["path"]["type"] == "PathPrefix"
    )
    for page in ("/", "/docs"):
        loaded = re.findall(r'(?:src|href)="([\w.-]+/[^"]+)"', server.http.get(page).text)
        assert loaded
        assert all(f"/{one}".startswith(folders) for one in loaded), loaded
    # And what the playground polls.
    polled = set(re.findall(r'fetch\("([a-z/]+)"', server.http.get("/playground/health.js").text))
    assert polled
    assert {f"/{path}" for path in polled} <= routed
    classify = next(rule for rule in rules if rule["matches"][0]["path"]["value"] == "/v1/classify")
    assert {match["path"]["value"] for match in classify["matches"]} == {"/v1/classify", "/"}
    assert classify["retry"]["codes"] == [503]
    wait = {name: seconds(value) for name, value in classify["timeouts"].items()}
    own = (settings.upload_timeout_ms + settings.request_timeout_ms) / 1000
    assert wait["backendRequest"] > own + GRACE
    assert wait["request"] >= 2 * wait["backendRequest"]


def test_a_full_queue_on_cpus_keeps_the_latency_objective(
    rendered: dict[str, list[Resource]],
) -> None:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables(rendered["cpu-hpa"]).items():
            environment.setenv(name, value)
        settings = Settings()
    measured = re.search(
        r"One replica answers at most ([\d.]+) requests/s",
        (K8S.parent / "docs/capacity.md").read_text(),
    )
    assert measured
    # One batch may wait behind the running one, whatever the size of the queue.
    admitted = max(settings.max_queue_size, 2 * settings.max_batch_size)
    assert admitted / float(measured[1]) < settings.latency_objective_ms / 1000


def test_the_patch_for_kube_prometheus_stack_labels_what_its_prometheus_selects(
    tmp_path: Path,
) -> None:
    tree = tmp_path / "k8s"
    shutil.copytree(K8S, tree)
    file = tree / "components/monitoring/kustomization.yaml"
    head, mark, tail = file.read_text().partition("# patches:\n")
    commented, _, rest = tail.partition("configMapGenerator:")
    file.write_text(
        head
        + "patches:\n"
        + re.sub(r"^#", "", commented, flags=re.M)
        + "configMapGenerator:"
        + rest
    )
    assert mark
    done = subprocess.run(
        [kubectl(), "kustomize", str(tree / "overlays/cpu")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    labeled = {
        each["kind"]
        for each in yaml.safe_load_all(done.stdout)
        if each["metadata"].get("labels", {}).get("release") == "kube-prometheus-stack"
    }
    assert labeled == {"PodMonitor", "PrometheusRule"}


def test_nothing_goes_in_or_out_unless_named(rendered: dict[str, list[Resource]]) -> None:
    for resources in rendered.values():
        spec = pick(resources, "NetworkPolicy", "default-deny")["spec"]
        assert spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        sources = pick(resources, "NetworkPolicy", "tapt-serve")["spec"]["ingress"][0]["from"]
        route = pick(resources, "HTTPRoute")["spec"]["parentRefs"][0]
        names = [
            source["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            for source in sources
        ]
        assert route["namespace"] in names
    policies = {
        variant: {each["metadata"]["name"] for each in of if each["kind"] == "NetworkPolicy"}
        for variant, of in rendered.items()
    }
    # Egress is open only where the init step has something to fetch.
    assert "hub" in policies["gpu-hpa"]
    assert "hub" not in policies["cpu-hpa"]


def test_what_every_cluster_names_otherwise_is_marked() -> None:
    """deploy.md tells its reader to look for `yours`."""
    foreign = re.compile(
        r"example\.com|monitoring\.svc|metadata\.name: (gateway|monitoring)|namespace: gateway"
        r"|query: .*namespace=|release: "
    )
    lines = [line for file in K8S.rglob("*.yaml") for line in file.read_text().splitlines()]
    found = [line for line in lines if foreign.search(line)]
    assert len(found) >= 10
    assert all("# yours" in line for line in found), found


# The init step.


def test_a_model_to_fetch_is_named_by_commit_and_hash(
    resources: list[Resource], settings: Settings
) -> None:
    source = pick(resources, "ConfigMap", "tapt-serve-model")["data"]
    if settings.model in SHIPPED:
        assert settings.model == DEFAULT_MODEL
        assert not source["MODEL_REPOSITORY"]
    else:
        assert source["MODEL_REPOSITORY"]
        assert re.fullmatch(r"[0-9a-f]{40}", source["MODEL_REVISION"])
        assert settings.model in step(resources)["args"][0]
        assert re.fullmatch(r"[0-9a-f]{64}", settings.model_sha256)


def step(resources: list[Resource]) -> Resource:
    (container,) = pod(resources)["initContainers"]
    assert isinstance(container, dict)
    return container


def run_step(container: Resource, path: str, repository: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": path, "MODEL_REPOSITORY": repository, "MODEL_REVISION": "abc"}
    return subprocess.run(
        [*container["command"], *container["args"]], env=environ, capture_output=True, text=True
    )


def test_the_init_step_fetches_what_it_is_told(
    rendered: dict[str, list[Resource]], tmp_path: Path
) -> None:
    container = step(rendered["cpu-hpa"])
    done = run_step(container, os.environ["PATH"], "")
    assert (done.returncode, done.stdout) == (0, "nothing to fetch\n")
    stub = tmp_path / "hf"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    done = run_step(container, f"{tmp_path}:{os.environ['PATH']}", "some/clip")
    arguments = done.stdout.splitlines()
    assert arguments[:4] == ["download", "some/clip", "--revision", "abc"]
    for known_format in FORMATS:
        assert known_format.WEIGHTS in arguments, "not fetched, or the shell spread the pattern"
    # The real command knows every flag.
    from huggingface_hub.cli.download import download

    known = {f"--{name.replace('_', '-')}" for name in download.__annotations__}
    assert {one for one in arguments if one.startswith("--")} <= known


# Metrics.


def test_autoscalers_look_at_metrics_that_exist(rendered: dict[str, list[Resource]]) -> None:
    adapter = yaml.safe_load((K8S / "components/hpa/adapter-values.yaml").read_text())
    offered = {rule["name"]["as"]: rule["seriesQuery"] for rule in adapter["rules"]["custom"]}
    assert set(offered.values()) <= exposed()
    # A number of requests would not tell how much work waits.
    assert "tapt_queue_seconds_expected" in offered
    assert "tapt_queue_depth" not in offered
    hpa = pick(rendered["cpu-hpa"], "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert {metric["pods"]["metric"]["name"] for metric in hpa} == set(offered)
    triggers = pick(rendered["cpu-keda"], "ScaledObject")["spec"]["triggers"]
    queries = " ".join(trigger["metadata"]["query"] for trigger in triggers)
    assert set(re.findall(r"tapt[_:][a-z0-9_:]+", queries)) == set(offered.values())
    # Both want the same: KEDA's number is per second, the HPA's in thousandths.
    wanted = [float(trigger["metadata"]["threshold"]) for trigger in triggers]
    given = [metric["pods"]["target"]["averageValue"] for metric in hpa]
    assert [float(n[:-1]) / 1000 if n.endswith("m") else float(n) for n in given] == wanted
