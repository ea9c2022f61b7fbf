"""What Triton and KServe read: the model repository fits the graph, the YAML file the server.

Triton itself is not run. Its configuration is parsed with the fields of its `model_config.proto`,
and ONNX Runtime, which Triton would run, gets the tensors that a client would send.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from repository import ROOT
from starlette.testclient import TestClient
from tiny_bundle import copy_bundle, tiny_bundle
from typer.testing import CliRunner

from logratio.bundle import GRAPH, BundleError, check_graph_file, read_manifest
from logratio.bundle.triton import CONFIG, triton_config, write_triton_repository
from logratio.cli.app import app as commands
from logratio.errors import ConfigError, InputError
from logratio.export import ExportConfig, export_bundle
from logratio.serving import GraphTensors, NoCandidateError, Reranker
from logratio.serving.config import ServeConfig
from logratio.serving.keys import VARIABLE
from logratio.serving.server import create_app

PROMPT = "the cat sits"
CANDIDATES = ["on the mat happy", "sad", "", "sad", "under a tree loud loud loud"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory) / "bundle"


@pytest.fixture(scope="module")
def repository(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository that the command line has written."""
    output = tmp_path_factory.mktemp("triton")
    command = ["bundle", "triton", str(folder), "--output", str(output), "--name", "reward"]
    done = CliRunner().invoke(commands, command)
    assert (done.exit_code, done.stdout.strip()) == (0, str(output / "reward"))
    return output


def add(file: Any, message: str, *fields: tuple[str, int, int, int, str]) -> None:
    """Add a message with fields: name, number, label, type, name of the type."""
    described = file.message_type.add(name=message)
    for name, number, label, kind, of in fields:
        described.field.add(name=name, number=number, label=label, type=kind)
        if of:
            described.field[-1].type_name = of


def model_config() -> Any:
    """An empty ModelConfig with the part of Triton's `model_config.proto` that is used here."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference")
    file.syntax = "proto3"
    kinds = file.enum_type.add(name="DataType")
    # As in Triton's file; the other types are left out.
    for name, number in (("TYPE_INVALID", 0), ("TYPE_INT64", 9), ("TYPE_FP32", 11)):
        kinds.value.add(name=name, number=number)
    one, many, number, text, enum, message = 1, 3, 3, 9, 14, 11
    fields = (
        ("name", 1, one, text, ""),
        ("data_type", 2, one, enum, ".inference.DataType"),
    )
    add(file, "ModelInput", *fields, ("dims", 4, many, number, ""))
    add(file, "ModelOutput", *fields, ("dims", 3, many, number, ""))
    add(file, "ModelParameter", ("string_value", 1, one, text, ""))
    add(
        file, "ModelConfig",
        ("name", 1, one, text, ""),
        ("max_batch_size", 4, one, 5, ""),
        ("input", 5, many, message, ".inference.ModelInput"),
        ("output", 6, many, message, ".inference.ModelOutput"),
        ("default_model_filename", 8, one, text, ""),
        ("parameters", 14, many, message, ".inference.ModelConfig.ParametersEntry"),
        ("backend", 17, one, text, ""),
    )  # fmt: skip
    entry = file.message_type[-1].nested_type.add(name="ParametersEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=one, type=text)
    entry.field.add(
        name="value", number=2, label=one, type=message, type_name=".inference.ModelParameter"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()


def parsed(path: Path) -> Any:
    return text_format.Parse(path.read_text(), model_config())


def test_the_repository_has_the_graph_and_a_configuration(repository: Path, folder: Path) -> None:
    files = {path.relative_to(repository).as_posix() for path in repository.rglob("*.*")}
    assert files == {f"reward/{CONFIG}", f"reward/1/{GRAPH}"}
    assert (repository / "reward" / "1" / GRAPH).read_bytes() == (folder / GRAPH).read_bytes()
    config = parsed(repository / "reward" / CONFIG)
    assert (config.name, config.backend, config.max_batch_size) == ("reward", "onnxruntime", 0)
    assert config.default_model_filename == GRAPH
    digest = config.parameters["logratio.digest"].string_value
    assert digest == Reranker.load(folder).digest


def test_the_configuration_has_the_inputs_and_outputs_of_the_graph(repository: Path) -> None:
    config = parsed(repository / "reward" / CONFIG)
    session = onnxruntime.InferenceSession(repository / "reward" / "1" / GRAPH)
    types = {"tensor(int64)": 9, "tensor(float)": 11}

    def of_graph(values: Any) -> dict[str, tuple[int, list[int]]]:
        return {
            value.name: (
                types[value.type],
                [size if isinstance(size, int) else -1 for size in value.shape],
            )
            for value in values
        }

    def of_config(values: Any) -> dict[str, tuple[int, list[int]]]:
        return {value.name: (value.data_type, [*value.dims]) for value in values}

    assert of_config(config.input) == of_graph(session.get_inputs())
    assert of_config(config.output) == of_graph(session.get_outputs())
    assert len(config.input) == 7 and len(config.output) == 4


def scores_of_graph(
    path: Path, tensors: GraphTensors, *given: Any
) -> tuple[dict[int, float], dict[int, str]]:
    """Run the graph as Triton's backend does, and return rewards and errors by candidate."""
    inputs = tensors(*given)
    session = onnxruntime.InferenceSession(path)
    (rewards,) = session.run(["reward"], inputs.tensors)
    return dict(zip(inputs.indexes, rewards.tolist(), strict=True)), inputs.errors


def test_the_tensors_of_a_client_give_the_scores_of_the_reranker(
    repository: Path, folder: Path
) -> None:
    path = repository / "reward" / "1" / GRAPH
    found, errors = scores_of_graph(path, GraphTensors(folder), PROMPT, CANDIDATES)
    expected = Reranker.load(folder).score(PROMPT, CANDIDATES)
    assert errors == {2: "[R301] a completion is empty"}
    assert found == pytest.approx(
        {score.index: score.reward for score in expected if not score.error}, abs=1e-5
    )
    alone, _ = scores_of_graph(path, GraphTensors(folder), PROMPT, ["sad"])
    assert alone[0] == pytest.approx(expected[1].reward, abs=1e-5)


def test_the_tensors_have_the_types_and_sizes_of_the_configuration(
    repository: Path, folder: Path
) -> None:
    config = parsed(repository / "reward" / CONFIG)
    tensors = GraphTensors(folder)(PROMPT, CANDIDATES).tensors
    types = {9: np.int64, 11: np.float32}
    assert tensors.keys() == {value.name for value in config.input}
    for value in config.input:
        assert tensors[value.name].dtype == types[value.data_type]
        assert tensors[value.name].ndim == len(value.dims)


def test_a_bundle_without_its_reference_takes_the_log_probs(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    policy = tiny_bundle(tmp_path_factory) / "policy"
    half = tmp_path / "half"
    export_bundle(ExportConfig(policy, "cached", half, 0.5), show_progress=False)
    model = write_triton_repository(half, tmp_path / "repository")
    assert model.name == read_manifest(half).name
    config = parsed(model / CONFIG)
    assert config.input[7].name == "reference_logps" and config.input[7].data_type == 11
    assert [value.name for value in config.output] == ["reward", "policy_logps", "token_logps"]
    tensors, known = GraphTensors(half), [-9.0, -4.0, -1.0, -4.0, -20.0]
    found, _ = scores_of_graph(model / "1" / GRAPH, tensors, PROMPT, CANDIDATES, known)
    expected = Reranker.load(half).score(PROMPT, CANDIDATES, known)
    assert found == pytest.approx(
        {score.index: score.reward for score in expected if not score.error}, abs=1e-5
    )
    with pytest.raises(ConfigError, match="needs reference_logps"):
        tensors(PROMPT, CANDIDATES)


def test_what_has_no_tensors_is_refused(folder: Path) -> None:
    tensors = GraphTensors(folder)
    with pytest.raises(NoCandidateError, match="R301"):
        tensors(PROMPT, [""])
    with pytest.raises(NoCandidateError, match="the list is empty"):
        tensors(PROMPT, [])
    with pytest.raises(ConfigError, match="takes no reference_logps"):
        tensors(PROMPT, ["sad"], [1.0])
    with pytest.raises(BundleError, match="digest"):
        GraphTensors(folder, expect=f"sha256:{'0' * 64}")
    cut = GraphTensors(folder, truncate_completions=True)(PROMPT, ["sad " * 600])
    assert cut.indexes == [0]
    assert GraphTensors(folder)(PROMPT, ["sad " * 600, "sad"]).errors.keys() == {0}


def test_a_model_is_not_written_over_and_a_bundle_is_checked(
    folder: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="already exists"):
        write_triton_repository(folder, repository, "reward")
    write_triton_repository(folder, repository, "another")  # next to it
    for name in ("../up", "a/b", "", " "):
        if name:
            with pytest.raises(ConfigError, match="letters, digits"):
                write_triton_repository(folder, tmp_path / "out", name)
    with pytest.raises(BundleError, match="digest"):
        write_triton_repository(folder, tmp_path / "out", expect=f"sha256:{'0' * 64}")
    altered = copy_bundle(tmp_path_factory, tmp_path / "altered")
    graph = altered / GRAPH
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    command = ["bundle", "triton", str(altered), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(commands, command)
    assert (done.exit_code, "altered" in done.stdout) == (1, True)
    assert not (tmp_path / "out").exists()


def test_an_input_of_another_type_is_refused(folder: Path) -> None:
    manifest = read_manifest(folder)
    graph = check_graph_file(folder, manifest.files, manifest.graph.opset)
    assert graph.inputs["prompt_ids"].shape == (-1, -1)
    other = graph.inputs | {"prompt_ids": graph.inputs["group"].__class__("bool", (-1,))}
    with pytest.raises(BundleError, match="'prompt_ids' is no input or output of an export"):
        triton_config("reward", other, graph.outputs, "sha256:")


def test_the_inference_service_fits_the_server(folder: Path) -> None:
    service = yaml.safe_load((ROOT / "python/logratio-serve/inference-service.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    predictor = service["spec"]["predictor"]
    (container,) = predictor["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    settings = {f"LOGRATIO_{name.upper()}" for name in ServeConfig.__dataclass_fields__}
    assert variables.keys() <= settings | {"STORAGE_URI", VARIABLE}
    assert variables["LOGRATIO_BUNDLE"] == "/mnt/models"  # where KServe puts STORAGE_URI
    assert container["args"][0] == "--expect"
    port = int(str(variables["LOGRATIO_PORT"]))
    assert container["ports"][0]["containerPort"] == port
    with TestClient(create_app(Reranker.load(folder))) as client:
        for probe in ("livenessProbe", "readinessProbe"):
            place = container[probe]["httpGet"]
            assert place["port"] == port
            assert client.get(place["path"]).status_code == 200
    config = ServeConfig("bundle")
    assert predictor["terminationGracePeriodSeconds"] > config.shutdown_seconds + 5
