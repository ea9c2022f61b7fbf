"""Calls of other projects' clients, as a program for the environment in which they are installed.

``python client_calls.py NAME`` reads addresses, a key, a prompt and its documents as JSON, sends
them with one client to each address, and prints what the client returned: indexes and scores.
It imports only the packages of that client.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

Ranking = list[tuple[int, float]]


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        host: Host and port of the server.
        key: The API key.
        model: Name of the bundle.
        query: The prompt.
        documents: The candidates.
    """

    host: str
    key: str
    model: str
    query: str
    documents: list[str]

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def texts(self) -> dict[str, Any]:
        """The arguments that most clients have in common."""
        return {"model": self.model, "query": self.query, "documents": self.documents}


def attributes(answer: Any) -> Ranking:
    """What clients with objects return."""
    return [(one.index, one.relevance_score) for one in answer.results]


def items(answer: Sequence[Any]) -> Ranking:
    """What clients with dictionaries return."""
    return [(one["index"], one["relevance_score"]) for one in answer]


def cohere_v1(asked: Asked) -> Ranking:
    import cohere

    client = cohere.Client(asked.key, base_url=asked.url)
    return attributes(client.rerank(**asked.texts, return_documents=True))


def cohere_v2(asked: Asked) -> Ranking:
    import cohere

    client = cohere.ClientV2(asked.key, base_url=asked.url)
    return attributes(client.rerank(**asked.texts, top_n=len(asked.documents)))


def cohere_v1_async(asked: Asked) -> Ranking:
    import cohere

    client = cohere.AsyncClient(asked.key, base_url=asked.url)
    return attributes(_awaited(client.rerank(**asked.texts)))


def cohere_v2_async(asked: Asked) -> Ranking:
    import cohere

    client = cohere.AsyncClientV2(asked.key, base_url=asked.url)
    return attributes(_awaited(client.rerank(**asked.texts)))


def langchain_cohere(asked: Asked) -> Ranking:
    from langchain_cohere import CohereRerank
    from pydantic import SecretStr

    compressor = CohereRerank(
        cohere_api_key=SecretStr(asked.key), base_url=asked.url, model=asked.model
    )
    return items(compressor.rerank(asked.documents, asked.query, top_n=None))


def langchain_jina(asked: Asked) -> Ranking:
    from langchain_community.document_compressors import jina_rerank

    jina_rerank.JINA_API_URL = f"{asked.url}/v1/rerank"
    compressor = jina_rerank.JinaRerank(jina_api_key=asked.key, model=asked.model)
    return items(compressor.rerank(asked.documents, asked.query, top_n=None))


def langchain_infinity(asked: Asked) -> Ranking:
    from infinity_client import Client
    from langchain_community.document_compressors.infinity_rerank import InfinityRerank

    client = Client(base_url=asked.url, headers=asked.bearer)
    compressor = InfinityRerank(client=client, model=asked.model)
    return items(compressor.rerank(asked.documents, asked.query, top_n=None))


def infinity_client(asked: Asked) -> Ranking:
    from infinity_client import Client
    from infinity_client.api.default import rerank
    from infinity_client.models import RerankInput

    client = Client(base_url=f"{asked.url}/infinity", headers=asked.bearer)
    answer = rerank.sync(client=client, body=RerankInput(**asked.texts, return_documents=True))
    texts = [one.document for one in answer.results]
    assert texts == [asked.documents[one.index] for one in answer.results]
    return attributes(answer)


def llama_index_cohere(asked: Asked) -> Ranking:
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    return _nodes(
        asked,
        CohereRerank(
            top_n=len(asked.documents), model=asked.model, api_key=asked.key, base_url=asked.url
        ),
    )


def llama_index_jina(asked: Asked) -> Ranking:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    return _nodes(
        asked,
        JinaRerank(
            top_n=len(asked.documents),
            model=asked.model,
            api_key=asked.key,
            base_url=f"{asked.url}/v1",
        ),
    )


def llama_index_tei(asked: Asked) -> Ranking:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    token = asked.bearer["Authorization"]
    return _nodes(asked, TextEmbeddingInference(base_url=asked.url, auth_token=token))


def llama_index_xinference(asked: Asked) -> Ranking:
    from llama_index.postprocessor.xinference_rerank import XinferenceRerank

    return _nodes(asked, XinferenceRerank(base_url=asked.url, model=asked.model))


def _nodes(asked: Asked, postprocessor: Any) -> Ranking:
    """Order nodes of LlamaIndex."""
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [
        NodeWithScore(node=TextNode(text=text, id_=str(index)))
        for index, text in enumerate(asked.documents)
    ]
    found = postprocessor.postprocess_nodes(nodes, query_str=asked.query)
    return [(int(one.node.node_id), one.score) for one in found]


def _litellm(provider: str, path: str = "") -> Callable[[Asked], Ranking]:
    def call(asked: Asked) -> Ranking:
        import litellm

        answer = litellm.rerank(
            model=f"{provider}/{asked.model}",
            query=asked.query,
            documents=asked.documents,
            top_n=len(asked.documents),
            api_base=f"{asked.url}{path}",
            api_key=asked.key,
        )
        return items(answer.results)

    return call


def tritonclient(asked: Asked) -> Ranking:
    import numpy as np
    from tritonclient.http import InferenceServerClient, InferInput

    inputs = []
    for name, texts in (("prompt", [asked.query]), ("candidates", asked.documents)):
        inputs.append(InferInput(name, [len(texts)], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array(texts, dtype=np.object_))
    with InferenceServerClient(asked.host) as client:
        assert client.is_server_live(headers=asked.bearer)
        assert client.is_model_ready(asked.model, headers=asked.bearer)
        answer = client.infer(asked.model, inputs, headers=asked.bearer)
        return _ordered(answer.as_numpy("rewards").tolist())


def kserve(asked: Asked) -> Ranking:
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    inputs = [
        InferInput(name, [len(texts)], "BYTES", data=texts)
        for name, texts in (("prompt", [asked.query]), ("candidates", asked.documents))
    ]

    async def infer() -> Any:
        client = InferenceRESTClient(RESTConfig(protocol="v2"))
        request = InferRequest(asked.model, inputs)
        try:
            return await client.infer(
                asked.url, request, model_name=asked.model, headers=asked.bearer
            )
        finally:
            await client.close()

    (rewards,) = (one for one in _awaited(infer()).outputs if one.name == "rewards")
    return _ordered(rewards.as_numpy().ravel().tolist())


def _ordered(rewards: Sequence[float]) -> Ranking:
    """Order the rewards of clients that return them in the order of the request."""
    return sorted(enumerate(rewards), key=lambda one: -one[1])


def _awaited(call: Awaitable[Any]) -> Any:
    async def run() -> Any:
        return await call

    return asyncio.run(run())


CALLS: dict[str, Callable[[Asked], Ranking]] = {
    "cohere-v1": cohere_v1,
    "cohere-v2": cohere_v2,
    "cohere-v1-async": cohere_v1_async,
    "cohere-v2-async": cohere_v2_async,
    "langchain-cohere": langchain_cohere,
    "langchain-jina": langchain_jina,
    "langchain-infinity": langchain_infinity,
    "infinity_client": infinity_client,
    "llama-index-cohere": llama_index_cohere,
    "llama-index-jina": llama_index_jina,
    "llama-index-tei": llama_index_tei,
    "llama-index-xinference": llama_index_xinference,
    "litellm-cohere": _litellm("cohere", "/v1/rerank"),
    "litellm-jina_ai": _litellm("jina_ai"),
    "litellm-hosted_vllm": _litellm("hosted_vllm"),
    "litellm-huggingface": _litellm("huggingface"),
    "litellm-infinity": _litellm("infinity", "/infinity"),
    "tritonclient": tritonclient,
    "kserve": kserve,
}


def main(name: str) -> None:
    """Send the request of standard input to each address with a client."""
    given = json.load(sys.stdin)
    hosts = given.pop("hosts")
    json.dump([CALLS[name](Asked(host=host, **given)) for host in hosts], sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
