"""Stories drawn from a model, as text: what the rule judges and the reward ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from logratio.demo import task

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Candidates:
    """For each prompt, the texts drawn for it."""

    prompts: list[str]
    texts: list[list[str]]

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        return zip(self.prompts, self.texts, strict=True)

    def pairs(self) -> Iterator[dict[str, str]]:
        """Yield the rule's best and worst text of each prompt, where they differ."""
        for prompt, texts in self:
            ranked = sorted(texts, key=lambda text: task.rule(prompt, text))
            worst, best = ranked[0], ranked[-1]
            if task.rule(prompt, best) > task.rule(prompt, worst):
                yield {"prompt": prompt, "chosen": best, "rejected": worst}


def draw(model_folder: Path, prompts: list[str], count: int, seed: int) -> Candidates:
    """Draw `count` stories for each prompt from the model in `model_folder`."""
    from logratio.training import load_model
    from logratio.training.sampling import sample_completions

    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    drawn = sample_completions(
        load_model(model_folder),
        [one for one in ids for _ in range(count)],
        max_new_tokens=MAX_NEW_TOKENS,
        stop_ids=[task.EOS],
        seed=seed,
    )
    texts = [" " + text for text in tokenizer.decode_batch(drawn)]
    return Candidates(prompts, [texts[i : i + count] for i in range(0, len(texts), count)])
