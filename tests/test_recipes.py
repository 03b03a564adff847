"""The recipes for clusters are what they say: parsed, and their commands held to the programs."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from ecp_scale.command_line import parse
from ecp_scale.errors import InputError
from tests.launching import ROOT

RECIPE = ROOT / "launch" / "kubernetes.yaml"
DOCKERFILE = ROOT / "launch" / "Dockerfile"


def options_of(words: list[str], run: Path) -> Any:
    """What ecp-pretrain makes of a recipe's words, with a config that is there and shards that are not asked for."""
    kept = [word for word in words if not word.startswith(("--config", "--training.output_dir"))]
    return parse([*kept, "--config=scaled-125m", f"--training.output_dir={run}"], "")


def test_the_recipe_for_kubernetes_holds_together(tmp_path: Path) -> None:
    job = yaml.safe_load(RECIPE.read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    launcher, *words = container["command"]
    place = words.index("-m")
    launch = get_args_parser().parse_args(words)
    assert (launcher, launch.training_script, launch.module) == ("torchrun", "ecp_scale.commands.pretrain", True)
    assert int(launch.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    request = options_of(words[place + 2 :], tmp_path)
    assert (request.resume, request.config.parallel.timeout_seconds) == (True, 300)
    with pytest.raises(InputError, match="timeout_second"):
        options_of([*words[place + 2 :], "--parallel.timeout_second=3"], tmp_path)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert "/dev/shm" in mounts.values()
    folders = [word.partition("=")[2] for word in words if word.startswith(("--config", "--training.output_dir"))]
    assert all(folder.startswith(mounts["run"] + "/") for folder in folders)


def test_the_container_installs_what_the_project_does_and_runs_as_who_the_recipe_says() -> None:
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {kind for kind, _ in lines} <= {"FROM", "RUN", "ENV", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    for kind, rest in lines:
        if kind == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
        if kind == "RUN" and "pip install" in rest:
            assert "--constraint /opt/source/constraints-gpu.txt" in rest or '"torch>=2.8,<2.14"' in rest
    bound = re.search(r'"(torch>=[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert bound is not None
    assert f'"{bound[1]}"' in text
    extras = re.search(r"/opt/source\[([\w,]+)\]", text)
    assert extras is not None
    known = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert all(f"\n{extra} = [" in known for extra in extras[1].split(","))
    pod = yaml.safe_load(RECIPE.read_text())["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (user,) = (rest for kind, rest in lines if kind == "USER")
    assert int(user) == pod["securityContext"]["runAsUser"] != 0
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version is not None
    assert pod["containers"][0]["image"] == f"ecp-scale:{version[1]}"
