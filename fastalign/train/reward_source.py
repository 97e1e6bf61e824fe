"""Where rewards come from: an ensemble's statistic, Python functions, or a weighted sum of them.

`--reward` is a list with commas, each entry with an optional weight:

    runs/reward/model                     the statistic of a reward ensemble
    my_rewards.py:brevity                 a function in a Python file
    runs/reward/model,0.5*my_rewards.py:brevity

A function takes all responses at once, as texts without special tokens, and gives a number each:

    def brevity(prompts: list[str], responses: list[str]) -> list[float]:
        return [-len(response) / 100 for response in responses]

A tuple, a 1-d NumPy array or a 1-d tensor will do as well; bools count as 0 and 1. The file is run
once, by its path: it does not become importable under its own name, and what it imports must be
importable from anywhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import numbers
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from fastalign.data.packing import pack, token_budget_batches
from fastalign.models import RewardEnsemble, load_tokenizer
from fastalign.models.reward import HEADS_FILE, EnsembleConfig, check_same_tokenizer
from fastalign.rollout import Rollout
from fastalign.train.run import RunError, Stopped, autocast

Function = Callable[[list[str], list[str]], Any]


class RewardOptions(Protocol):
    """What of a command's configuration is read here."""

    reward: str
    statistic: str | None
    coef: float | None
    policy: str
    micro_tokens: int
    dtype: str


@dataclass(frozen=True)
class Entry:
    """One entry of `--reward`."""

    weight: float
    path: str
    """Of the ensemble's folder, or of the Python file."""
    function: str | None
    """Its name in the file; None for an ensemble."""

    @property
    def name(self) -> str:
        """Of its metrics: ensemble, or FILE.FUNCTION."""
        return "ensemble" if self.function is None else f"{Path(self.path).stem}.{self.function}"


def parse_reward(text: str) -> list[Entry]:
    """The entries of `--reward`.

    Raises:
        RunError: an empty entry, a weight that is not a finite number, a Python file without a
            function's name, two ensembles, or the same function twice.
    """
    entries = []
    for part in [text] if Path(text).is_dir() else text.split(","):
        weight, star, path = part.strip().rpartition("*")
        try:
            number = float(weight) if star else 1.0
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise RunError(f"--reward {part.strip()}: expected a number before the *, got {weight}")
        path = path.strip()
        if not path:
            raise RunError(f"--reward {text!r}: expected a folder or FILE.py:FUNCTION, got nothing")
        found = re.fullmatch(r"(.+\.py):(\w+)", path)
        if found is None and path.endswith((".py", ".py:")):
            raise RunError(
                f"--reward {path}: expected the name of a function too, as in "
                f"{path.rstrip(':')}:reward"
            )
        entries.append(Entry(number, found[1], found[2]) if found else Entry(number, path, None))
    names = [entry.name for entry in entries]
    if names.count("ensemble") > 1:
        raise RunError(f"--reward {text}: expected at most one reward ensemble")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RunError(f"--reward {text}: {', '.join(twice)} is there more than once")
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
        UserError: an entry that makes no sense; no ensemble there, or one on another tokenizer; no
            such file or function, or a file that fails while it is read.
    """
    entries = parse_reward(config.reward)
    ensemble = None
    functions: dict[str, Function] = {}
    for entry in entries:
        if entry.function is None:
            ensemble = load_ensemble(config, entry.path, tokenizer).to(device)
        else:
            functions[entry.name] = load_function(entry.path, entry.function)
    return RewardSource(entries, ensemble, functions, config.micro_tokens, config.dtype)


def load_ensemble(config: RewardOptions, folder: str, tokenizer: Any) -> RewardEnsemble:
    """The ensemble with the statistic asked for, frozen, on the policy's tokenizer."""
    ensemble = RewardEnsemble.load(folder)
    check_same_tokenizer(tokenizer, load_tokenizer(folder), config.policy, folder)
    kept = asdict(ensemble.config)
    kept |= {"statistic": config.statistic or kept["statistic"]}
    kept |= {"coef": kept["coef"] if config.coef is None else config.coef}
    ensemble.config = EnsembleConfig(**kept)
    return ensemble.requires_grad_(False).eval()


def load_function(path: str, name: str) -> Function:
    """A function in a Python file.

    Raises:
        RunError: no such file, it fails while it is read, or has no such function.
    """
    try:
        module = _module(Path(path))
    except OSError as error:
        raise RunError(f"--reward {path}:{name}: {path}: {error.strerror}") from error
    except Exception as error:
        raise RunError(f"--reward {path}:{name}: {path} fails: {_told(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        here = [n for n, f in vars(module).items() if callable(f) and not n.startswith("_")]
        raise RunError(
            f"--reward {path}:{name}: {path} has no function {name}; it has "
            f"{', '.join(here) or 'none'}"
        )
    return function


def _module(path: Path) -> ModuleType:
    """The file, run; known to `sys.modules` (dataclasses look there) by a name of its contents."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = importlib.util.spec_from_file_location(f"_fastalign_reward_{digest[:16]}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


class RewardSource:
    """Scores responses; made by `make_reward`."""

    def __init__(
        self,
        entries: list[Entry],
        ensemble: RewardEnsemble | None,
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
            described.append(facts | {"sha256": self.digests[entry.name]})
        return {"proxy": self.label, "reward": described}

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
                    f"{_short(response_texts[i])}, the answer to {_short(prompt_texts[i])}"
                )
            parts[entry.name] = part
            total += entry.weight * part.double()
        return Scored(total.float(), scores, parts)


def _digest(entry: Entry) -> str:
    """SHA-256 of a function's file, or of an ensemble's heads."""
    path = Path(entry.path)
    file = path / HEADS_FILE if entry.function is None else path
    return hashlib.sha256(file.read_bytes()).hexdigest()


@torch.no_grad()
def score_packed(
    ensemble: RewardEnsemble, rollouts: list[Rollout], micro_tokens: int, dtype: str
) -> Tensor:
    """fp32 [S, K]: every head on every response, read at its last token; on the CPU.

    Args:
        micro_tokens: tokens of one forward pass.
        dtype: of it, as in the configuration.
    """
    ensemble.eval()
    device = ensemble.weight.device
    found = torch.empty(len(rollouts), ensemble.config.n_heads)
    sequences = [r.prompt + r.completion for r in rollouts]
    for batch in token_budget_batches([len(s) for s in sequences], micro_tokens):
        with autocast(device, dtype):
            found[batch] = ensemble(pack([sequences[i] for i in batch]).to(device)).cpu()
    return found


def call(
    function: Function, who: str, path: str, prompts: list[str], responses: list[str]
) -> list[float]:
    """What a reward function says of S responses, as S numbers, NaN and infinity among them.

    Raises:
        Stopped: it raised (that exception is the cause), or gave anything else.
    """
    n = len(responses)
    try:
        came = function(list(prompts), list(responses))
    except Exception as error:
        raise Stopped(f"{who} raised {_told(error, path)}") from error
    if isinstance(came, Tensor):
        came = came.detach().cpu().tolist()  # of a 0-d tensor a number
    elif hasattr(came, "__array__"):
        came = came.tolist()
    if isinstance(came, str | bytes) or not isinstance(came, Sequence):
        raise Stopped(f"{who} returned {_kind(came)}; expected a list of {n} numbers")
    if len(came) != n:
        raise Stopped(f"{who} returned {len(came)} numbers for {n} responses")
    found = []
    for i, value in enumerate(came):
        one = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not isinstance(one, numbers.Real):
            raise Stopped(
                f"{who} returned {_kind(value)} for response {i + 1} of {n}, "
                f"{_short(responses[i])}; expected a number"
            )
        found.append(float(one))
    return found


def _kind(value: Any) -> str:
    """None, or `a str ('high')`."""
    return "None" if value is None else f"a {type(value).__name__} ({_short(value)})"


def _short(value: Any) -> str:
    """The beginning of what it looks like, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _told(error: Exception, path: str) -> str:
    """An exception in one line: its type, the line of the file, its message."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).absolute() == Path(path).absolute()
    ]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    place = f" in line {lines[-1]}" if lines and lines[-1] else ""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}{place}{f': {message}' if message else ''}"
