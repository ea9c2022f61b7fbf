"""The bundle format: the folder that `logratio.export` writes and `logratio.serving` reads.

    scorer.onnx             the graph, with its weights
    scorer.onnx.data        the weights, if graph and weights together exceed 2 GB
    adapter.onnx_adapter    instead of both: the policy, for the graph in another bundle
    tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja
    bundle.json             the manifest
    bundle.json.sig         optional: the manifest's signature

Uses only the standard library, so that a server can verify a bundle before any other library
reads it.
"""

from logratio.bundle.files import (
    ADAPTER,
    FILE_NAMES,
    GRAPH,
    MANIFEST,
    SIGNATURE,
    TOKENIZER_FILES,
    WEIGHTS,
    BundleError,
    FileEntry,
    describe_file,
    verify_files,
)
from logratio.bundle.graph_file import GraphFile, check_graph_file
from logratio.bundle.graph_info import (
    CACHED_REFERENCE,
    CHUNK,
    INPUTS,
    OUTPUTS,
    PADDED,
    REFERENCE_FREE,
    REFERENCE_INPUT,
    REWARD_MODEL,
    SHARED_BASE,
    SHARED_PROMPT,
    TOKEN_LOGPS,
    TOKEN_LOGRATIOS,
    Agreement,
    GraphInfo,
    Precision,
)
from logratio.bundle.manifest import (
    FLOAT16_REPLAY,
    FORMAT_VERSION,
    GOLDEN_GROUPS,
    LONG,
    PARITY,
    REPLAY,
    TOKENIZATION,
    GoldenDigest,
    GoldenGroup,
    Manifest,
    adapter_tie,
    check_digest,
    digest_of,
    golden_digest,
    graph_properties,
    manifest_bytes,
    parse_manifest,
    read_manifest,
    tokenization_digest,
    tolerance,
)
from logratio.bundle.signature import check_signature
from logratio.bundle.triton import write_triton_repository

__all__ = [
    "ADAPTER",
    "CACHED_REFERENCE",
    "CHUNK",
    "FILE_NAMES",
    "FLOAT16_REPLAY",
    "FORMAT_VERSION",
    "GOLDEN_GROUPS",
    "GRAPH",
    "INPUTS",
    "LONG",
    "MANIFEST",
    "OUTPUTS",
    "PADDED",
    "PARITY",
    "REFERENCE_FREE",
    "REFERENCE_INPUT",
    "REPLAY",
    "REWARD_MODEL",
    "SHARED_BASE",
    "SHARED_PROMPT",
    "SIGNATURE",
    "TOKENIZATION",
    "TOKENIZER_FILES",
    "TOKEN_LOGPS",
    "TOKEN_LOGRATIOS",
    "WEIGHTS",
    "Agreement",
    "BundleError",
    "FileEntry",
    "GoldenDigest",
    "GoldenGroup",
    "GraphFile",
    "GraphInfo",
    "Manifest",
    "Precision",
    "adapter_tie",
    "check_digest",
    "check_graph_file",
    "check_signature",
    "describe_file",
    "digest_of",
    "golden_digest",
    "graph_properties",
    "manifest_bytes",
    "parse_manifest",
    "read_manifest",
    "tokenization_digest",
    "tolerance",
    "verify_files",
    "write_triton_repository",
]
