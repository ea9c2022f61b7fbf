"""The job files of the page on clusters, against documented flags, options and fields."""

import copy
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from accelerate.commands.launch import (  # type: ignore[import-untyped]
    launch_command_parser,
)
from documented import arguments, blocks, help_of
from repository import ROOT
from torch.distributed.run import get_args_parser

from logratio.training import LoraSettings, TrainConfig
from logratio.training.config import OptimizerName, Precision, Quantization
from logratio.training.methods.table import METHODS
from logratio.training.parallel.division import reason_against

PAGE = "python/docs/cluster.md"
JOBS = blocks("bash", [PAGE])
MANIFESTS: list[dict[str, Any]] = [
    found for block in blocks("yaml", [PAGE]) for found in yaml.safe_load_all(block)
]
HOSTS = 4
"""Number of hosts in every job file of several hosts."""

SBATCH = re.compile(
    "account|array|chdir|constraint|cpus-per-gpu|cpus-per-task|dependency|error|exclude|exclusive|"
    "export|gpus|gpus-per-node|gpus-per-task|gres|job-name|mail-type|mail-user|mem|mem-per-cpu|"
    "mem-per-gpu|nodelist|nodes|no-requeue|ntasks|ntasks-per-node|open-mode|output|partition|qos|"
    "requeue|reservation|signal|time"
)
"""Options of sbatch 22.05 that a job of this kind may need: slurm.schedmd.com/sbatch.html."""
EXPANDED = {
    **{"$(JOB_COMPLETION_INDEX)": "1", "$(RANK)": "1"},
    **{"$(MASTER_ADDR)": "dpo-master-0", "$(MASTER_PORT)": "23456"},
}
"""Variables that Kubernetes and the operator set for a pod, as Kubernetes expands them."""
FLAGS = {"exclusive", "requeue", "no-requeue"}
"""Options of sbatch that need no value."""


def some(**fields: Any) -> dict[str, Any]:
    """Return the schema of an object: a field that ends with an underscore is required."""
    required = [name.rstrip("_") for name in fields if name.endswith("_")]
    known = {name.rstrip("_"): schema for name, schema in fields.items()}
    return {
        **{"type": "object", "properties": known, "required": required},
        "additionalProperties": False,
    }


def some_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a list with at least one item."""
    return {"type": "array", "items": schema, "minItems": 1}


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
METADATA = some(name_=TEXT, namespace=TEXT, labels={"type": "object"})
VOLUME = some(
    name_=TEXT,
    persistentVolumeClaim=some(claimName_=TEXT, readOnly=FLAG),
    emptyDir=some(medium={"enum": ["", "Memory"]}, sizeLimit=TEXT),
)
CONTAINER = some(
    name_=TEXT,
    image_=TEXT,
    command=some_of(TEXT),
    args=some_of(TEXT),
    env=some_of(some(name_=TEXT, value_=TEXT)),
    resources=some(limits={"type": "object"}, requests={"type": "object"}),
    volumeMounts=some_of(some(name_=TEXT, mountPath_=TEXT, readOnly=FLAG)),
)
POD = some(
    spec_=some(
        containers_=some_of(CONTAINER),
        volumes=some_of(VOLUME),
        subdomain=TEXT,
        restartPolicy={"enum": ["Never", "OnFailure"]},  # a Job allows no other
        terminationGracePeriodSeconds=NUMBER,
    ),
    metadata=some(labels={"type": "object"}, annotations={"type": "object"}),
)
REPLICAS = some(
    replicas_=NUMBER,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template_=POD,
)
RUN_POLICY = some(
    cleanPodPolicy={"enum": ["Running", "All", "None"]},
    ttlSecondsAfterFinished=NUMBER,
    activeDeadlineSeconds=NUMBER,
    backoffLimit=NUMBER,
    suspend=FLAG,
)
SPECS: Mapping[tuple[str, str], dict[str, Any]] = {
    ("v1", "Service"): some(
        clusterIP=TEXT, selector_={"type": "object"}, publishNotReadyAddresses=FLAG
    ),
    ("batch/v1", "Job"): some(
        completionMode={"enum": ["Indexed", "NonIndexed"]},
        completions=NUMBER,
        parallelism=NUMBER,
        backoffLimit=NUMBER,
        template_=POD,
    ),
    ("kubeflow.org/v1", "PyTorchJob"): some(
        runPolicy=RUN_POLICY,
        nprocPerNode=TEXT,
        pytorchReplicaSpecs_=some(Master_=REPLICAS, Worker=REPLICAS),
    ),
}
"""The `spec` of each kind: kubernetes.io/docs/reference and the operator's pytorch_types.go."""


def check(manifest: Mapping[str, Any]) -> None:
    """Check a manifest against the schema of its kind."""
    kind = manifest["apiVersion"], manifest["kind"]
    schema = some(apiVersion_=TEXT, kind_=TEXT, metadata_=METADATA, spec_=SPECS[kind])
    jsonschema.Draft202012Validator(schema).validate(manifest)


def only(kind: str) -> dict[str, Any]:
    """Return the only manifest of a kind."""
    (found,) = [one for one in MANIFESTS if one["kind"] == kind]
    return found


def pods() -> list[dict[str, Any]]:
    """Return the pods of all manifests."""
    replicas = only("PyTorchJob")["spec"]["pytorchReplicaSpecs"].values()
    return [only("Job")["spec"]["template"], *(one["template"] for one in replicas)]


def launches(program: str) -> list[list[str]]:
    """Return the arguments of each call of a launcher on the page."""
    shell = "".join(blocks("sh", [PAGE]) + JOBS).replace("\\\n", " ").splitlines()
    lines = [shlex.split(line, comments=True) for line in shell]
    for pod in pods():
        (container,) = pod["spec"]["containers"]
        words = container["command"] + container["args"]
        lines.append(
            [re.sub(r"\$\(\w+\)", lambda found: EXPANDED[found[0]], word) for word in words]
        )
    return [line[line.index(program) + 1 :] for line in lines if program in line]


def _expanded(found: re.Match[str]) -> str:
    return EXPANDED[found[0]]


@pytest.mark.parametrize("job", JOBS)
def test_bash_accepts_the_job_files(job: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=job, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert job.startswith("#!/bin/bash\n")


@pytest.mark.parametrize("job", JOBS)
def test_sbatch_knows_the_options(job: str) -> None:
    before, _, after = job.partition("\nset -euo pipefail\n")
    assert "#SBATCH" not in after, "sbatch reads no options after the first command"
    lines = [line for line in before.splitlines()[1:] if line]
    for line in lines:
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
        assert found, line
        name, value = found.groups()
        assert SBATCH.fullmatch(name)
        assert value or name in FLAGS
    assert len(lines) > 3


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda one: str(one["kind"]))
def test_kubernetes_knows_the_fields(manifest: dict[str, Any]) -> None:
    check(manifest)
    for path, wrong in (("metadata", {}), ("spec", {"templates": {}}), ("kinds", "Job")):
        broken = copy.deepcopy(manifest)
        broken[path] = wrong
        with pytest.raises(jsonschema.ValidationError):
            check(broken)


def test_pods_mount_the_volumes_that_they_have() -> None:
    assert len(pods()) == 3
    for pod in pods():
        (container,) = pod["spec"]["containers"]
        mounted = [mount["name"] for mount in container["volumeMounts"]]
        assert mounted == [volume["name"] for volume in pod["spec"]["volumes"]]
        asked = next(word for word in container["args"] if word.startswith("--nproc-per-node="))
        assert asked.endswith(f"={container['resources']['limits']['nvidia.com/gpu']}")


def test_the_job_finds_its_first_pod_through_the_service() -> None:
    service, job = only("Service"), only("Job")
    name, spec = job["metadata"]["name"], job["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = spec["template"]["spec"]["containers"]
    assert f"--master-addr={name}-0.{service['metadata']['name']}" in container["args"]
    assert spec["completions"] == spec["parallelism"] == HOSTS


def test_the_operator_finds_its_container_and_all_pods() -> None:
    replicas = only("PyTorchJob")["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    assert sum(one["replicas"] for one in replicas.values()) == HOSTS
    for one in replicas.values():
        (container,) = one["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"


@pytest.mark.parametrize("words", launches("torchrun"), ids=" ".join)
def test_torchrun_knows_the_flags(words: list[str]) -> None:
    found = get_args_parser().parse_args(words)
    assert (found.module, found.training_script) == (True, "logratio")
    several = found.nnodes not in ("1", "1:1")
    assert several != found.standalone
    if several:
        assert found.nnodes in (str(HOSTS), "$SLURM_JOB_NUM_NODES")
        assert found.rdzv_endpoint or found.master_addr
    assert arguments(words, "logratio")


@pytest.mark.parametrize("words", launches("accelerate"), ids=" ".join)
def test_accelerate_knows_the_flags(words: list[str]) -> None:
    assert words[0] == "launch"
    found = launch_command_parser().parse_args(words[1:])
    assert (found.module, found.training_script) == (True, "logratio")


@pytest.mark.parametrize("words", launches("torchrun"), ids=" ".join)
def test_logratio_knows_the_flags(words: list[str]) -> None:
    command, *given = arguments(words, "logratio")
    shown = help_of(command)
    flags = [word.partition("=")[0] for word in given if word.startswith("--")]
    assert flags
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", shown)]


CHOICES: dict[str, dict[str, Any]] = {
    **{loss: {"loss": loss} for loss in METHODS},
    **{name: {"optimizer": name} for name in get_args(OptimizerName)},
    **{name: {"precision": name} for name in get_args(Precision)},
    **{n: {"quantization": n, "lora": LoraSettings()} for n in get_args(Quantization)},
}
"""Values of the settings that may not suit a way to divide a model."""


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_the_page_says_what_the_code_refuses(mode: Any, tiny_model: Path) -> None:
    config = TrainConfig(tiny_model, "data", "out", precision="bf16")
    refused = {name for name, n in CHOICES.items() if reason_against(replace(config, **n), mode)}
    table = (ROOT / PAGE).read_text().partition("## What is refused")[2].partition("\n\n## ")[0]
    rows = [line.split("|")[1:] for line in table.splitlines() if line.startswith("| ")]
    written = " ".join(setting for setting, ways, *_ in rows if f"`{mode}`" in ways)
    assert refused == set(re.findall(r"[\w-]+", written)) & CHOICES.keys()
    assert refused
