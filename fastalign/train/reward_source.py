"""Where rewards come from: an ensemble's statistic, Python functions, or a weighted sum of them.

`--reward` is a list with commas, each entry with an optional weight:

    runs/reward/model                     the statistic of a reward ensemble
    my_rewards.py:brevity                 a function in a Python file
    runs/reward/model,0.5*my_rewards.py:brevity
    runs/r0/model+runs/r1/model           the statistic over the heads of several reward models

What a function is given and may give stands in `reward_function`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastalign.data import source
from fastalign.data.packing import pack, same_prompts, token_budget_batches
from fastalign.models import RewardEnsemble, load_tokenizer
from fastalign.models.flops import forward_flops
from fastalign.models.full_ensemble import FullEnsemble
from fastalign.models.reward import HEADS_FILE, EnsembleConfig, check_same_tokenizer
from fastalign.rollout import Rollout
from fastalign.train.reward_function import Function, call, load_function, short
from fastalign.train.run import RunError, Stopped, autocast

Ensemble = RewardEnsemble | FullEnsemble
GOLD = "gold"
"""What `--gold` and, on given responses, `--reward` call the built-in task's gold reward."""


class ModelOptions(Protocol):
    """What of a command's configuration every reward needs."""

    policy: str
    micro_tokens: int
    dtype: str


class RewardOptions(ModelOptions, Protocol):
    """What is read of a configuration that learns from a reward."""

    reward: str
    statistic: str | None
    coef: float | None


class GoldOptions(ModelOptions, Protocol):
    """What is read of a configuration that measures a gold reward."""

    gold: str | None
    prompts: str


@dataclass(frozen=True)
class Entry:
    """One entry of `--reward`."""

    weight: float
    path: str
    """Of the ensemble's folder (several: joined by +), or of the Python file."""
    function: str | None
    """Its name in the file; None for an ensemble."""

    @property
    def name(self) -> str:
        """Of its metrics: ensemble, or FILE.FUNCTION."""
        return "ensemble" if self.function is None else f"{Path(self.path).stem}.{self.function}"

    @property
    def folders(self) -> list[str]:
        """Of the reward models; a folder with a + in its name is one when it is there."""
        return [self.path] if Path(self.path).is_dir() else self.path.split("+")


def parse_reward(text: str, option: str = "--reward") -> list[Entry]:
    """The entries of `--reward`, or of the option of that name.

    Raises:
        RunError: an empty entry, a weight that is not a finite number, a Python file without a
            function's name, two ensembles, the same function or the same model twice.
    """
    entries = []
    for part in [text] if Path(text).is_dir() else text.split(","):
        weight, star, path = part.strip().rpartition("*")
        try:
            number = float(weight) if star else 1.0
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise RunError(f"{option} {part.strip()}: expected a number before the *, got {weight}")
        path = path.strip()
        if not path:
            raise RunError(f"{option} {text!r}: expected a folder or FILE.py:FUNCTION, got nothing")
        found = re.fullmatch(r"(.+\.py):(\w+)", path)
        if found is None and path.endswith((".py", ".py:")):
            raise RunError(
                f"{option} {path}: expected the name of a function too, as in "
                f"{path.rstrip(':')}:reward"
            )
        entries.append(Entry(number, found[1], found[2]) if found else Entry(number, path, None))
        folders = [] if found else [folder.strip() for folder in entries[-1].folders]
        if not all(folders) or len(set(folders)) < len(folders):
            raise RunError(f"{option} {path}: expected different folders with a + between them")
    names = [entry.name for entry in entries]
    if names.count("ensemble") > 1:
        raise RunError(
            f"{option} {text}: expected at most one reward ensemble; the heads of several models "
            "are one with a + between the folders, as in A+B"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RunError(f"{option} {text}: {', '.join(twice)} is there more than once")
    return entries


@dataclass(frozen=True)
class Scored:
    """The rewards of S responses, on the CPU."""

    total: Tensor  # fp32 [S], the weighted sum of the parts
    scores: Tensor | None  # fp32 [S, K], the ensemble's heads, where there is one
    parts: dict[str, Tensor]  # fp32 [S] each, by entry, not yet weighted


def make_reward(config: RewardOptions, tokenizer: Any, device: torch.device) -> RewardSource:
    """The reward that `config.reward` names, on `device`.

    Args:
        config: `reward`; `statistic` and `coef` of the ensemble, where they are not to be those it
            was saved with; the precision and size of its forward passes.
        tokenizer: the policy's.
        device: of the ensemble.

    Raises:
        UserError: an entry that makes no sense; a statistic or coefficient that nothing uses; no
            ensemble there, or one on another tokenizer; no such file or function, or a file that
            fails while it is read.
    """
    entries = parse_reward(config.reward)
    given = (config.statistic, config.coef) != (None, None)
    if given and all(entry.function is not None for entry in entries):
        raise RunError(
            f"--statistic and --coef are a reward ensemble's, and --reward {config.reward} has none"
        )
    return _made(entries, config, config.statistic, config.coef, tokenizer, device, "--reward")


def make_gold(config: GoldOptions, tokenizer: Any, device: torch.device) -> Gold | None:
    """What `config.gold` names: `gold`, the built-in task's (by default where the prompts are its),
    or anything that `--reward` may be, an ensemble with its own statistic.

    Raises:
        UserError: see `make_reward`; or gold for prompts that are not the built-in task's.
    """
    if config.gold not in (None, GOLD):
        entries = parse_reward(config.gold, "--gold")
        return _made(entries, config, None, None, tokenizer, device, "--gold")
    gold = source.gold_for(config.prompts)
    if gold is None and config.gold == GOLD:
        raise RunError(
            f"--gold gold is the built-in task's; the prompts {config.prompts} have none: expected "
            "the folder of a reward ensemble or FILE.py:FUNCTION"
        )
    return gold


def _made(
    entries: list[Entry],
    config: ModelOptions,
    statistic: str | None,
    coef: float | None,
    tokenizer: Any,
    device: torch.device,
    option: str,
) -> RewardSource:
    ensemble = None
    functions: dict[str, Function] = {}
    for entry in entries:
        if entry.function is None:
            ensemble = load_ensemble(entry.folders, statistic, coef, tokenizer, config.policy)
            ensemble.to(device)
        else:
            functions[entry.name] = load_function(entry.path, entry.function, option)
    return RewardSource(entries, ensemble, functions, config.micro_tokens, config.dtype)


def load_ensemble(
    folders: list[str], statistic: str | None, coef: float | None, tokenizer: Any, policy: str
) -> Ensemble:
    """The reward models with the statistic asked for, frozen, on the tokenizer of `policy`."""
    models = []
    for folder in folders:
        models.append(RewardEnsemble.load(folder))
        check_same_tokenizer(tokenizer, load_tokenizer(folder), policy, folder)
    if len(models) > 1:
        return FullEnsemble(models, statistic, coef).requires_grad_(False).eval()
    kept = asdict(models[0].config)
    kept |= {"statistic": statistic or kept["statistic"]}
    if coef is not None and kept["statistic"] not in ("lcb", "uwo"):
        raise RunError(f"--coef is for lcb and uwo; the statistic is {kept['statistic']}")
    kept |= {"coef": kept["coef"] if coef is None else coef}
    models[0].config = EnsembleConfig(**kept)
    return models[0].requires_grad_(False).eval()


class RewardSource:
    """Scores responses; made by `make_reward`."""

    def __init__(
        self,
        entries: list[Entry],
        ensemble: Ensemble | None,
        functions: dict[str, Function],
        micro_tokens: int,
        dtype: str,
    ) -> None:
        self.entries, self.ensemble, self.functions = entries, ensemble, functions
        self.micro_tokens, self.dtype = micro_tokens, dtype
        # Of the files as they are now: a function's may be edited while the run goes on.
        self.digests = {entry.name: _digest(entry) for entry in entries}

    @property
    def max_length(self) -> int:
        """Tokens of prompt and response that it can read."""
        return 1 << 30 if self.ensemble is None else self.ensemble.max_length

    @property
    def label(self) -> str:
        """In a word or two: "mean", "mean + 0.5 my_rewards.brevity"."""
        words = []
        for entry in self.entries:
            name = entry.name
            if entry.function is None and self.ensemble is not None:
                name = self.ensemble.config.statistic
            words.append(name if entry.weight == 1 else f"{entry.weight:g} {name}")
        return " + ".join(words)

    def describe(self) -> dict[str, Any]:
        """For the report of a run: `proxy`, the label, and `reward`, for every entry what it is and
        the SHA-256 of its file (of an ensemble: of its heads)."""
        described = []
        for entry in self.entries:
            facts: dict[str, Any] = {"name": entry.name, "weight": entry.weight, "path": entry.path}
            if entry.function is None and self.ensemble is not None:
                kept = asdict(self.ensemble.config)
                facts |= {name: kept[name] for name in ("statistic", "coef", "n_heads")}
                facts["n_models"] = len(entry.folders)
                facts["n_parameters"] = sum(p.numel() for p in self.ensemble.parameters())
            described.append(facts | {"sha256": self.digests[entry.name]})
        return {"proxy": self.label, "reward": described}

    @property
    def shares_prompts(self) -> bool:
        """Whether its ensemble takes packs in which several responses share a prompt."""
        return self.ensemble is not None and self.ensemble.shares_prompts

    def flops(self, lengths: list[int], before: Sequence[int] = ()) -> float:
        """Model FLOPs of scoring sequences; arguments as `models.flops.forward_flops`."""
        if self.ensemble is None:
            return 0.0
        models = (
            self.ensemble.members if isinstance(self.ensemble, FullEnsemble) else [self.ensemble]
        )
        return sum(forward_flops(model, lengths, len(lengths), before) for model in models)

    def score(
        self, rollouts: list[Rollout], prompt_texts: list[str], response_texts: list[str]
    ) -> Scored:
        """Rewards of S responses; `prompt_texts` and `response_texts` are theirs, S each.

        Raises:
            ValueError: not S texts.
            Stopped: a function raised or gave anything but S finite numbers, or the ensemble's
                reward is not finite; names the function and the response.
        """
        n = len(rollouts)
        if not n == len(prompt_texts) == len(response_texts):
            raise ValueError(
                f"RewardSource.score: expected {n} prompts and responses, one of each for every "
                f"rollout, got {len(prompt_texts)} and {len(response_texts)}"
            )
        scores, parts = None, {}
        total = torch.zeros(n, dtype=torch.float64)
        for entry in self.entries:
            if entry.function is None and self.ensemble is not None:
                scores = score_packed(self.ensemble, rollouts, self.micro_tokens, self.dtype)
                part, came = self.ensemble.reduce(scores), None
                who = f"the reward ensemble {entry.path}"
            else:
                who = f"the reward function {entry.path}:{entry.function}"
                came = call(
                    self.functions[entry.name], who, entry.path, prompt_texts, response_texts
                )
                part = torch.tensor(came).float()
            wrong = (~part.isfinite()).nonzero().flatten().tolist()
            if wrong:
                i = wrong[0]
                value = part[i].item() if came is None else came[i]
                raise Stopped(
                    f"{who} gave {value} for response {i + 1} of {n}: "
                    f"{short(response_texts[i])}, the answer to {short(prompt_texts[i])}"
                )
            parts[entry.name] = part
            total += entry.weight * part.double()
        return Scored(total.float(), scores, parts)


Gold = RewardSource | Callable[[str, str], float]
"""A reward to measure, never to learn from: a source, or a function of a prompt and a response."""


def measure_gold(gold: Gold, rollouts: list[Rollout], asked: list[str], told: list[str]) -> Tensor:
    """fp64 [S]: gold rewards of S responses. Whatever the gold reward draws from torch's random
    stream, sampling goes on as if it had not been measured.

    Raises:
        Stopped, ValueError: see `RewardSource.score`.
    """
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cuda):
        if isinstance(gold, RewardSource):
            return gold.score(rollouts, asked, told).total.double()
        pairs = zip(asked, told, strict=True)
        return torch.tensor([gold(*pair) for pair in pairs], dtype=torch.float64)


def _digest(entry: Entry) -> str:
    """SHA-256 of a function's file, or of the heads of the reward models, one after the other."""
    paths = [Path(entry.path)]
    if entry.function is None:
        paths = [Path(folder) / HEADS_FILE for folder in entry.folders]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


@torch.no_grad()
def score_packed(
    ensemble: Ensemble, rollouts: list[Rollout], micro_tokens: int, dtype: str
) -> Tensor:
    """fp32 [S, K]: every head on every response, read at its last token; on the CPU.

    Args:
        micro_tokens: tokens of one forward pass.
        dtype: of it, as in the configuration.
    """
    ensemble.eval()
    device = next(ensemble.parameters()).device
    found = torch.empty(len(rollouts), ensemble.config.n_heads)
    sequences = [r.prompt + r.completion for r in rollouts]
    share, lengths = ensemble.shares_prompts, [len(s) for s in sequences]
    prompts = same_prompts(r.prompt for r in rollouts) if share else None
    for batch in token_budget_batches(lengths, micro_tokens, prompts=prompts):
        asked = [len(rollouts[i].prompt) for i in batch]
        packed = pack([sequences[i] for i in batch], asked, share=share)
        with autocast(device, dtype):
            found[batch] = ensemble(packed.to(device)).cpu()
    return found
