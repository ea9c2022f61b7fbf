"""Tiny bundles whose tokenizer splits characters into bytes, exported once a session."""

from pathlib import Path

import pytest
from shared_traces import shared_traces
from tiny_models import GROUPED, tiny
from tokenizers_for_tests import byte_level, save
from transformers import LlamaConfig

from logratio.export import ExportConfig, export_bundle

BETA = 0.25
_folder: list[Path] = []


def byte_bundle(factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundle`, `free` (without reference), and the Llamas `policy`, `reference`."""
    if not _folder:
        folder = factory.mktemp("bytes")
        for seed, name in enumerate(("policy", "reference")):
            config = LlamaConfig(**{**GROUPED, "vocab_size": 400}, pad_token_id=3)
            tiny(config, seed, scale=2.0).save_pretrained(folder / name)
            save(folder / name, byte_level())
        for name, reference in (("bundle", folder / "reference"), ("free", "none")):
            plan = ExportConfig(folder / "policy", reference, folder / name, BETA)
            with shared_traces():
                export_bundle(plan, show_progress=False)
        _folder.append(folder)
    return _folder[0]
