"""A data set that opens its store in a DataLoader's worker; spawn imports it by name."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from logratio._rust import Store
from logratio.data import Feed, FeedSettings


class FedDataset(IterableDataset[dict[str, Tensor]]):
    """Each worker's share of a store, as dictionaries of tensors."""

    def __init__(self, path: Path, settings: FeedSettings) -> None:
        self.path, self.settings = path, settings

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        feed = Feed(Store.open(self.path), self.settings)
        if info := get_worker_info():
            feed = feed.share(info.id, info.num_workers)
        for batch in feed:
            names = ("groups", "input_ids", "target_ids")
            yield {name: torch.from_numpy(getattr(batch.layout, name)) for name in names}
