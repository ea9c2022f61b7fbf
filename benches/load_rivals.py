"""Servers that bench_load.py compares with: plain FastAPI loops, as people write them.

    python benches/load_rivals.py FOLDER ARM

`padded-whole` and `padded` are the padded graphs of bench_rank.py: a request is one batch, its
texts are tokenized together, and the graph runs in FastAPI's thread pool. `ours-f32` is the same
loop around a `Reranker`: the graph without the server. `cross-encoder` is a CrossEncoder of
sentence-transformers, with random weights in the shape of the policy.
"""

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Score = Callable[[str, list[str]], list[float]]
_POSITIONS = 1024


def padded(folder: Path, arm: str) -> Score:
    """Score with a padded graph: every candidate with its prompt as a row of one batch."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "policy" / "tokenizer.json"))
    end = int(json.loads((folder / "policy" / "config.json").read_text())["eos_token_id"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(folder / f"{arm}.onnx"), options, providers=["CPUExecutionProvider"]
    )

    def score(query: str, documents: list[str]) -> list[float]:
        rows = [[*one.ids, end] for one in tokenizer.encode_batch([query + d for d in documents])]
        start, longest = len(tokenizer.encode(query).ids), max(map(len, rows))
        ids = np.zeros((len(rows), longest), np.int64)
        mask, counted = np.zeros_like(ids), np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
            counted[number, start : len(row)] = 1
        feed: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "completion_mask": counted,
        }
        if arm == "padded":
            feed["places"] = np.arange(start - 1, longest - 1)
        found: list[float] = session.run(None, feed)[0].tolist()
        return found

    return score


def ours(folder: Path, arm: str) -> Score:
    """Score with a bundle."""
    from logratio.serving import Reranker

    reranker = Reranker.load(folder / arm, threads=1)
    return lambda query, documents: [one.reward for one in reranker.score(query, documents)]


def cross_encoder(folder: Path, _arm: str) -> Score:
    """Score with a CrossEncoder; needs sentence-transformers."""
    import torch
    from sentence_transformers import CrossEncoder  # type: ignore[import-not-found]
    from transformers import AutoConfig, BertConfig, BertForSequenceClassification

    torch.set_num_threads(1)
    shape = AutoConfig.from_pretrained(folder / "policy")
    config: Any = BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=_POSITIONS,
        pad_token_id=0,
    )
    config.num_labels = 1
    made = folder / "cross-encoder"
    BertForSequenceClassification(config).save_pretrained(made)
    for file in (folder / "policy").glob("tokenizer*"):
        (made / file.name).write_bytes(file.read_bytes())
    model = CrossEncoder(str(made), device="cpu", max_length=_POSITIONS)
    if model.tokenizer.pad_token is None:
        model.tokenizer.pad_token = model.tokenizer.eos_token

    def score(query: str, documents: list[str]) -> list[float]:
        found: list[float] = model.predict([(query, d) for d in documents], batch_size=32).tolist()
        return found

    return score


def app_of(score: Score) -> Any:
    """Return the application: one route, one batch per request."""
    from fastapi import FastAPI
    from pydantic import BaseModel

    class Rerank(BaseModel):
        query: str
        documents: list[str]

    app = FastAPI()

    @app.post("/v1/rerank")
    def rerank(request: Rerank) -> dict[str, Any]:
        pairs = enumerate(score(request.query, request.documents))
        results = [{"index": index, "relevance_score": value} for index, value in pairs]
        return {"results": sorted(results, key=lambda one: -one["relevance_score"])}

    @app.get("/livez")
    def livez() -> dict[str, str]:
        return {"status": "live"}

    return app


def main() -> None:
    """Load an arm and serve it."""
    import uvicorn

    folder, arm = Path(sys.argv[1]), sys.argv[2]
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as logratio does
    loaders = {"ours-f32": ours, "cross-encoder": cross_encoder}
    score = loaders.get(arm, padded)(folder, arm)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as uvicorn's own
    print(f"http://127.0.0.1:{listener.getsockname()[1]} ", file=sys.stderr, flush=True)
    config = uvicorn.Config(app_of(score), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
