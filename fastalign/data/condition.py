"""The reward written into the prompt as text, for return-conditioned models.

    "{input} <rm_score>: {reward} "      reward = (score - mean) / std of the training data,
                                         std with n - 1, in float64, two decimals

A training sample is prompt + answer + " " + EOS with the prompt so extended; to ask for a reward, a
prompt is extended by it in the same way. The tag stands at the end of the prompt as the model reads
it: after "Assistant:" in plain text, after the generation prompt of a chat template (the first
words of the assistant's turn). It is tokenized apart from what stands before it, so that it is the
same tokens in training and in use, and nothing that is cut to length can cut it: prompts never are.
The statistics lie beside the model, in `reward_condition.json`.

Source: Hu et al., "Aligning Language Models with Offline Learning from Human Feedback", arXiv
2308.12050, in the form of its first author's code, OpenRLHF.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastalign.data.tokens import TokenizedCompletion
from fastalign.errors import UserError

TEMPLATE = "{input} <rm_score>: {reward} "
AFTER = " "  # between an answer and its EOS
FILE = "reward_condition.json"


@dataclass(frozen=True)
class Condition:
    """What `reward_condition.json` holds."""

    mean: float
    """Of the rewards of the training data, before standardising."""
    std: float
    """Of the same, with n - 1."""
    lowest: float
    """Standardised reward of the worst training sample."""
    highest: float
    """Of the best: beyond it the model has seen nothing."""
    samples: int
    template: str = TEMPLATE
    decimals: int = 2
    reward: dict[str, Any] = field(default_factory=dict)
    """What gave the rewards."""

    @classmethod
    def of(cls, rewards: Tensor, reward: dict[str, Any]) -> Condition:
        """The statistics of float64 rewards [S]."""
        mean, std = rewards.double().mean().item(), rewards.double().std().item()
        low, high = ((r - mean) / std for r in (rewards.min().item(), rewards.max().item()))
        return cls(mean, std, low, high, len(rewards), reward=reward)

    @classmethod
    def load(cls, folder: str | Path) -> Condition:
        """Of a saved model.

        Raises:
            UserError: it has none: it was not trained with rewards in its prompts.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise UserError(f"the model at {str(folder)!r} is not conditioned: {FILE} is missing")
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not readable: {error}") from error

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def z(self, reward: float) -> float:
        """A reward standardised."""
        return (reward - self.mean) / self.std

    def text(self, prompt: str, z: float) -> str:
        """A prompt that asks for the standardised reward z."""
        return self.template.format(input=prompt, reward=f"{z:.{self.decimals}f}")


class Tagger:
    """Puts tags on token ids. `tokenizer` is the model's."""

    def __init__(self, condition: Condition, tokenizer: Any) -> None:
        self.condition, self.tokenizer = condition, tokenizer
        self.after = self._ids(AFTER)
        self.tags: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, ids: list[int], z: float) -> list[int]:
        """The prompt, asking for z."""
        tag = self.condition.text("", z)
        if tag not in self.tags:
            self.tags[tag] = self._ids(tag)
        return ids + self.tags[tag]

    def sample(
        self, example: TokenizedCompletion, z: float, max_length: int
    ) -> TokenizedCompletion | None:
        """The training sample; None where the prompt leaves no room for an answer. An answer that
        is cut to length ends in no EOS."""
        prompt = self.prompt(example.prompt, z)
        answer = example.completion
        if answer[-1] == self.tokenizer.eos_token_id:
            answer = [*answer[:-1], *self.after, answer[-1]]
        room = max_length - len(prompt)
        return TokenizedCompletion(prompt, answer[:room], example.reward) if room > 0 else None

    def answer(self, ids: list[int]) -> list[int]:
        """A sampled response without the space before its EOS: the answer alone."""
        n = len(self.after)
        if n and ids[-1:] == [self.tokenizer.eos_token_id] and ids[-1 - n : -1] == self.after:
            return [*ids[: -1 - n], ids[-1]]
        return ids


def condition(
    prompts: Sequence[list[int]],
    model_folder: str | Path,
    tokenizer: Any,
    *,
    reward: float,
    raw: bool = False,
) -> list[list[int]]:
    """Prompts that ask a return-conditioned model for a reward.

    Args:
        prompts: token ids as the model reads them, templates applied.
        model_folder: where the model and its `reward_condition.json` were saved.
        tokenizer: the model's.
        reward: in standard deviations above the mean of the training data. Beyond the highest that
            was trained on (`Condition.highest`) it asks for what the model has never seen.
        raw: `reward` is on the scale of the reward model instead.

    Returns:
        The prompts, each extended by the tag.

    Raises:
        UserError: the model is not conditioned.
    """
    found = Condition.load(model_folder)
    tagger = Tagger(found, tokenizer)
    return [tagger.prompt(list(p), found.z(reward) if raw else reward) for p in prompts]
