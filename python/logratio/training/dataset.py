"""Load the data of a run: tokenize it, and check it against the model and the loss."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from logratio._rust import Census, Store
from logratio.data.formats.settings import FormatSettings
from logratio.data.readers.inputs import Input, Inputs, as_inputs, names_stdin
from logratio.data.store.build import build_store
from logratio.data.store.load import datasets_of, is_store, load_store, rules_of
from logratio.data.store.mismatches import MISMATCHED, with_mismatches
from logratio.data.store.row_report import DataReport
from logratio.data.store.unpaired import are_pairs, without_pairs
from logratio.data.tokenization.groups import TokenizationRules
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.data.tokenization.tokenizer_files import read_tokenizer
from logratio.errors import ConfigError, LogratioError
from logratio.forecast import count
from logratio.progress import reading_progress, say
from logratio.training.config import PathLike, TrainConfig
from logratio.training.fingerprint import tensor_shapes
from logratio.training.methods.data_checks import check_data, formats_for
from logratio.training.methods.objective import Objective
from logratio.training.models import base_folder, quietly
from logratio.training.parallel.processes import Processes

STORE_FILE = "train.store"
"""Temporary file of a run's tokenized data, in its output folder."""


@dataclass(frozen=True)
class Dataset:
    """Tokenized records, a report on every input row, and the tokenizer."""

    store: Store
    report: DataReport
    tokenizer: PreferenceTokenizer


def load_dataset(
    model: PathLike,
    data: Inputs,
    rules: TokenizationRules,
    formats: FormatSettings | None = None,
    *,
    path: Path | None = None,
    refused: Path | None = None,
    max_bad_fraction: float = 0.0,
    show_progress: bool = True,
    recorded_date: Callable[[], str | None] | None = None,
) -> Dataset:
    """Tokenize `data` with the tokenizer in `model`, or open the sealed store that `data` names.

    If the chat template uses the current date and `rules` set none, the date is that of the store,
    else the result of `recorded_date`, else today's.

    Args:
        model: Folder of the model whose tokenizer is used.
        data: Inputs, or one sealed store.
        rules: How records are tokenized.
        formats: How rows are read as records; None: detected.
        path: File for the tokenized data; None: keep it in memory.
        refused: File for the refused rows; None: they are only counted.
        max_bad_fraction: Share of malformed rows above which the data is refused.
        show_progress: Draw a progress bar.
        recorded_date: Returns the date of earlier work that this call continues, or None.

    Raises:
        BadDataError: Rows are malformed; each is named by file:line and code.
        StoreMismatchError: The store was built with a different tokenizer or different rules.
        VocabularyError: The model has no embedding for some token ids, or transformers tokenizes
            differently.
        ConfigError: No records are left, or one is longer than the model's positions.
    """
    data = as_inputs(data)
    tokenizer = _tokenizer_for(data, model, rules, recorded_date)
    if is_store(data):
        store, report = load_store(data[0], tokenizer)
    else:
        with reading_progress(show=show_progress) as report_progress:
            store, report = build_store(
                data,
                tokenizer,
                path,
                formats=formats,
                max_bad_fraction=max_bad_fraction,
                progress=report_progress,
                refused=refused,
            )
    if refused and report.refused == 0:
        refused.unlink(missing_ok=True)
    if len(store) == 0:
        raise ConfigError("no usable records:\n" + report.to_text())
    _check_positions(model, store)
    check_embedding(model, tokenizer, store)
    return Dataset(store, report, tokenizer)


def _tokenizer_for(
    data: list[Input],
    model: PathLike,
    rules: TokenizationRules,
    recorded_date: Callable[[], str | None] | None,
) -> PreferenceTokenizer:
    """Load the tokenizer of a model, with the date of a sealed store or of earlier work."""
    tokenizer = PreferenceTokenizer.load(Path(model), rules)
    check_ids(model, tokenizer)
    if rules.date or not tokenizer.reads_date:
        return tokenizer
    if is_store(data):
        date = rules_of(Store.open(data[0])).date
    else:
        date = recorded_date() if recorded_date else None
    return PreferenceTokenizer(tokenizer.files, replace(rules, date=date))


def load_training_data(
    config: TrainConfig,
    *,
    refused: Path | None,
    show_progress: bool,
    recorded_date: Callable[[], str | None],
    folder: Path | None = None,
    processes: Processes | None = None,
) -> Dataset:
    """Tokenize the data of a run, and check that it suits the loss and the reference.

    With several processes, the leader of each host tokenizes, and the others open what it wrote.

    Args:
        config: Settings of the run.
        refused: File for the refused rows; None: they are only counted.
        show_progress: Draw a progress bar.
        recorded_date: As in `load_dataset`.
        folder: Folder for the tokenized data, as a temporary file; None: the system's.
        processes: The processes of the run; None: this one alone.

    Raises:
        BadDataError, StoreMismatchError, VocabularyError, ConfigError: See `load_dataset`,
            `check_data`, `check_mix` and `check_reference`.
    """
    objective, what = Objective.of(config), f"the loss {config.loss}"
    formats = formats_for(objective.data, config.formats)
    is_labelled = objective.data == "labelled answers"

    def load(data: Inputs, path: Path) -> Dataset:
        rows = path.with_suffix(".rows") if is_labelled else path
        dataset = load_dataset(
            config.model,
            data,
            config.rules,
            formats,
            path=rows,
            refused=refused,
            max_bad_fraction=config.max_bad_fraction,
            show_progress=show_progress,
            recorded_date=recorded_date,
        )
        if not is_labelled:
            return dataset
        dataset = answers_of(dataset, path.with_suffix(".answers"), show_progress=show_progress)
        if objective.needs_mismatches:
            check_data(dataset.store, objective, what)
            dataset = mismatched(dataset, path.with_suffix(".mismatched"))
        _keep_newest(path, [path.with_suffix(s) for s in (".rows", ".answers", ".mismatched")])
        return dataset

    dataset = once_per_host(load, config.data, folder, processes or Processes())
    check_data(dataset.store, objective, what)
    check_mix(config.mix, dataset.store)
    if config.reference:
        check_reference(config.reference, config.model, dataset.tokenizer, dataset.store)
    return dataset


def _keep_newest(path: Path, files: list[Path]) -> None:
    """Rename the last of the files that exist to `path`, and delete the others.

    A store that is open stays readable.
    """
    written = [file for file in files if file.exists()]
    for file in written[:-1]:
        file.unlink()
    for file in written[-1:]:
        file.replace(path)


def answers_of(dataset: Dataset, path: Path | None = None, *, show_progress: bool) -> Dataset:
    """Take pairs apart into good and bad answers, as TRL does for KTO; else return the dataset.

    Args:
        dataset: Pairs or single answers.
        path: File for the answers; None: in memory.
        show_progress: Print how many pairs were taken apart.

    Raises:
        ConfigError: A row of the data made several pairs.
    """
    if not (pairs := int(are_pairs(dataset.store).sum())):
        return dataset
    if show_progress:
        say(f"{count(pairs, 'pair')} taken apart: chosen answers are good, rejected ones are bad")
    return replace(dataset, store=without_pairs(dataset.store, path))


MISMATCH_SEED = 0
"""Seed of the answers to other prompts: one for all runs, so that all find them in a cache."""


def mismatched(dataset: Dataset, path: Path | None = None) -> Dataset:
    """Add the answer to another prompt to each group, as KTO needs, unless they have one.

    Args:
        dataset: Single answers.
        path: File for the groups; None: in memory.
    """
    store, longest = dataset.store, dataset.tokenizer.rules.max_length
    if MISMATCHED in store.roles():
        return dataset
    return replace(dataset, store=with_mismatches(store, MISMATCH_SEED, path, longest))


def once_per_host(
    load: Callable[[Inputs, Path], Dataset],
    data: Inputs,
    folder: Path | None,
    processes: Processes,
) -> Dataset:
    """Load data in the leader of each host, and what it has written in the other processes.

    Args:
        load: Loads inputs, and writes them to a file unless they are a sealed store.
        data: The inputs.
        folder: Folder for the file, which is deleted once all processes have it mapped; None: the
            system's folder for temporary files.
        processes: The processes; all call this together.

    Raises:
        ConfigError: Processes on several hosts cannot all read standard input.
    """
    if processes.hosts > 1 and any(map(names_stdin, as_inputs(data))):
        raise ConfigError(
            "standard input reaches one host only: give files, or a store of `data build`"
        )
    loaded = list[Dataset]()
    with nullcontext(folder) if folder else TemporaryDirectory() as chosen:
        path = Path(chosen) / (
            STORE_FILE if processes.count == 1 else f"{processes.host}-train.store"
        )

        def lead() -> list[str]:
            loaded.append(load(data, path))
            return [str(path)] if path.exists() else [str(one) for one in as_inputs(data)]

        written = processes.from_leader(lead)
        dataset = loaded[0] if loaded else load([*written], path)
        processes.wait()
        if processes.leads_host:
            # Memory maps keep the data readable; deleting the file now means no crash leaves it.
            path.unlink(missing_ok=True)
    return dataset


def check_mix(mix: tuple[float, ...] | None, store: Store) -> None:
    """Check that `mix` has one weight per input.

    Raises:
        ConfigError: The number of weights is wrong.
    """
    if mix is None:
        return
    inputs = max(datasets_of(store)) + 1
    if len(mix) != inputs:
        given = count(len(mix), "weight")
        raise ConfigError(f"--mix has {given} for {count(inputs, 'input')}: give one for each")


def _check_positions(model: PathLike, store: Store) -> None:
    """Refuse sequences longer than the model's number of positions."""
    positions = max_positions(model)
    groups = np.diff(store.completion_offsets())
    longest = int((np.repeat(store.prompt_lengths(), groups) + store.completion_lengths()).max())
    if positions and longest > positions:
        raise ConfigError(
            f"the longest sequence has {longest} tokens and the model {positions} positions: "
            f"set --max-length to {positions} or less"
        )


def max_positions(model: PathLike) -> int | None:
    """Return the number of positions of a model; None if its config names no limit."""
    config = json.loads((base_folder(model) / "config.json").read_text())
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return int(found) if found else None


_PROBES = (
    "The quick brown fox, isn't it?  Two  spaces;\ta tab\n\nand 12,345.67 lines\r\n",
    " leading and trailing ",
    "naïve e\u0301 漢字 カナ العربية हिन्दी 🙂👩‍👩‍👧 ﬁ Ⅳ \u00a0\u200b x",
    "def f(x):\n    return [x, {'a': 1}]  # done",
)


_MOST_TOKENS = 64
"""Number of added tokens that are compared, inside and between words."""


class VocabularyError(LogratioError, ValueError):
    """Token ids have no embedding in a model, or two tokenizers assign different ids."""


def embedding_rows(folder: PathLike) -> int | None:
    """Return the number of rows of a model's embedding, without loading its weights.

    Returns:
        The vocabulary size in the config, or the rows of an adapter's larger embedding; None if
        the config names none.
    """
    config = json.loads((base_folder(folder) / "config.json").read_text("utf-8"))
    text = config.get("text_config") or {}
    rows = config.get("vocab_size") or text.get("vocab_size")
    if not isinstance(rows, int):
        return None
    own = [shape[0] for name, shape in _adapter_shapes(Path(folder)) if "embed_tokens" in name]
    return max([rows, *own])


def _adapter_shapes(folder: Path) -> list[tuple[str, list[int]]]:
    """List the names and shapes of an adapter's tensors that replace tensors of the base."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        return []
    return [(name, shape) for name, shape in tensor_shapes(path) if "lora_" not in name]


def check_embedding(folder: PathLike, tokenizer: PreferenceTokenizer, store: Store) -> None:
    """Check that a model has an embedding for every token id in the data.

    An embedding may have more rows than the tokenizer has ids: models are often padded.

    Raises:
        VocabularyError: The data has an id beyond the embedding; the message decodes it.
    """
    rows = embedding_rows(folder)
    if rows is None or tokenizer.vocabulary_size <= rows:
        return
    used = np.flatnonzero(Census(store).uses)
    largest = int(used[-1]) if len(used) else -1
    if largest >= rows:
        raise VocabularyError(
            f"{folder}: the model's embedding has {rows:,} rows, and the data contains the id "
            f"{largest:,} ({tokenizer.decode([largest])!r}): the tokenizer has "
            f"{tokenizer.vocabulary_size:,} ids. Use the tokenizer that the model was trained "
            "with, or resize the model: model.resize_token_embeddings(len(tokenizer))"
        )


def check_reference(
    reference: PathLike, model: PathLike, tokenizer: PreferenceTokenizer, store: Store
) -> None:
    """Check that the data's token ids have the same meaning for the reference.

    Raises:
        VocabularyError: Its embedding is too small, or its tokenizer assigns different ids.
    """
    check_embedding(reference, tokenizer, store)
    check_same_ids(reference, model, tokenizer)


def check_same_ids(reference: PathLike, model: PathLike, tokenizer: PreferenceTokenizer) -> None:
    """Check that the reference's tokenizer, if its folder has one, gives tokens the same ids.

    Args:
        reference: The folder of the reference, or of its adapter.
        model: The folder of the policy, as messages name it.
        tokenizer: The tokenizer of the policy.

    Raises:
        VocabularyError: A token has another id; the message names the first one.
    """
    folder = Path(reference)
    own = next((f for f in (folder, base_folder(folder)) if (f / "tokenizer.json").exists()), None)
    if own is None or own.resolve() == Path(model).resolve():
        return
    theirs = read_tokenizer(own)
    if theirs.digest == tokenizer.digest:
        return
    ours, other = tokenizer.files.tokenizer.get_vocab(), theirs.tokenizer.get_vocab()
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if (elsewhere := other.get(token)) not in (number, None):
            raise VocabularyError(
                f"{own}: its tokenizer differs from that of {model}: {token!r} has the id "
                f"{elsewhere:,} there and {number:,} here, so log-probs of the same ids cannot be "
                "compared"
            )


def check_ids(folder: PathLike, tokenizer: PreferenceTokenizer) -> None:
    """Check that the installed transformers tokenizes like `tokenizer`, on sample texts.

    A folder that transformers cannot read is not compared.

    Raises:
        VocabularyError: The ids of a text differ; the message shows both.
    """
    try:
        with quietly():
            config = AutoConfig.from_pretrained(
                base_folder(folder), local_files_only=True, trust_remote_code=False
            )
            theirs = AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
    except Exception:  # transformers raises errors of many types for a folder that it cannot read
        return
    ours = tokenizer.files.tokenizer
    added = [token.content for token in ours.get_added_tokens_decoder().values()]
    texts = [*_PROBES, *(f"a {token}b {token} c" for token in added[-_MOST_TOKENS:])]
    for text, known in zip(texts, theirs(texts)["input_ids"], strict=True):
        ids = ours.encode(text).ids
        if ids != known:
            raise VocabularyError(
                f"{folder}: transformers tokenizes {text!r} to the ids {_shown(known)}, but "
                f"tokenizer.json gives {_shown(ids)}. Save the backend tokenizer of transformers: "
                "AutoTokenizer.from_pretrained(folder).backend_tokenizer.save('tokenizer.json'), "
                'with "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
            )


def _shown(ids: list[int]) -> str:
    return f"{ids[:12]}{' …' if len(ids) > 12 else ''}"
