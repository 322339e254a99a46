"""The evaluation's Jobs: strictly valid, restricted, and with options that the command takes."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from models.evaluation.options import parse, read_protocol
from models.evaluation.sample import Shard
from models.shipped import DEFAULT_MODEL

ROOT = Path(__file__).parents[2]
RELEASES = ("1.36", "1.37")
Resource = dict[str, Any]


def read(name: str) -> list[Resource]:
    return list(yaml.safe_load_all((ROOT / "k8s" / "jobs" / name).read_text()))


CLAIM, EVALUATE = read("evaluate.yaml")
(MERGE,) = read("merge.yaml")
JOBS = pytest.mark.parametrize("job", [EVALUATE, MERGE], ids=["evaluate", "merge"])


def container(job: Resource) -> Resource:
    (found,) = job["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def arguments(job: Resource, index: int = 0) -> list[str]:
    """As the container with this index gets them."""
    assert container(job)["command"] == ["tapt-serve", "evaluate"]
    return [each.replace("$(JOB_COMPLETION_INDEX)", str(index)) for each in container(job)["args"]]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("resource", [CLAIM, EVALUATE, MERGE], ids=lambda r: r["metadata"]["name"])
def test_jobs_are_strictly_valid(resource: Resource, release: str) -> None:
    kubernetes_validate.validate(resource, release, strict=True)


@JOBS
def test_their_pods_are_restricted(job: Resource) -> None:
    spec = job["spec"]["template"]["spec"]
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "docker/Dockerfile").read_text(), re.M)
    assert user
    context = spec["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert context["runAsNonRoot"]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert container(job)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container(job)["resources"]["limits"]["memory"]


def test_each_index_is_a_shard_of_as_many_as_there_are() -> None:
    spec = EVALUATE["spec"]
    assert spec["completionMode"] == "Indexed"
    options = [parse(arguments(EVALUATE, index)) for index in range(spec["completions"])]
    count = len(options)
    assert [each.shard for each in options] == [Shard(index, count) for index in range(count)]
    assert len({each.json for each in options}) == count
    assert read_protocol(options[0]).answers > 1
    assert options[0].model == DEFAULT_MODEL


def test_the_shards_are_merged_from_the_volume_they_are_written_to() -> None:
    options, merged = parse(arguments(EVALUATE)), parse(arguments(MERGE))
    assert merged.merge == [options.json.parent]
    assert merged.json.parent != options.json.parent
    for job in (EVALUATE, MERGE):
        (volume,) = [
            each
            for each in job["spec"]["template"]["spec"]["volumes"]
            if "persistentVolumeClaim" in each
        ]
        assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
        mounts = {each["name"]: each["mountPath"] for each in container(job)["volumeMounts"]}
        assert options.json.is_relative_to(mounts[volume["name"]])
    assert Path(options.data).is_relative_to("/evaluation")
    assert not Path(options.data).is_relative_to(options.json.parent)
