"""A step of reward-model training with several heads on the encoder, beside one head.

    python -m benchmarks.bench_reward_step [--size 0.6b] [--device cuda] [--out FILE.json]

Forward and backward pass, gradient norm and AdamW on the same pairs, the encoder trained, by the
trainer's own ensemble and loss. `bench_train` has whole runs and their memory, and a few per cent
between two of those are noise; here steps are taken in turn.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import train_task
from benchmarks.timing import Run, arguments, report, share, timings
from fastalign.data.packing import Packed
from fastalign.models import RewardEnsemble, load_tokenizer
from fastalign.models.reward import EnsembleConfig
from fastalign.train.reward import RewardConfig, load_data
from fastalign.train.reward_evaluation import packed
from fastalign.train.reward_loss import pair_loss

HEADS = {"one head": 1, "5 heads": 5, "16 heads": 16}


def step(ensemble: RewardEnsemble, optimizer: torch.optim.Optimizer, pairs: Packed) -> None:
    """One step on all pairs."""
    scores = ensemble(pairs)
    chosen, rejected = scores[0::2], scores[1::2]
    weights = torch.ones(chosen.shape, dtype=torch.int64, device=chosen.device)
    pair_loss(chosen, rejected, weights, weights.sum(0)).backward()
    torch.nn.utils.clip_grad_norm_(ensemble.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def bench(size: train_task.Size, options: Any) -> list[dict[str, Any]]:
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train_task.write(folder, size, steps=1)
        model = str(folder / "model")
        tokenizer = load_tokenizer(model)
        data = str(folder / "preferences.jsonl")
        config = RewardConfig(model=model, data=data, max_length=size.max_length)
        pairs, _ = load_data(config, tokenizer)
        runs: dict[str, Run] = {}
        for name, heads in HEADS.items():
            ensemble = RewardEnsemble.create(
                model, tokenizer, EnsembleConfig(heads), max_length=size.max_length
            ).to(options.device, dtype)
            optimizer = torch.optim.AdamW(ensemble.parameters(), lr=1e-5, fused=True)
            batch = packed(pairs, ensemble.shares_prompts).to(options.device)
            runs[name] = partial(step, ensemble, optimizer, batch)
    for run in runs.values():
        run()
    taken = timings(runs, options.device, options.repeats, share(options, 1))
    first = taken["one head"].median
    return [
        {
            "what": name,
            "ms": 1e3 * timing.median,
            "time / one head's": timing.median / first,
            "q1 / one head's": timing.low / first,
            "q3 / one head's": timing.high / first,
            "rounds": timing.rounds,
        }
        for name, timing in taken.items()
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", default="25m", choices=list(train_task.SIZES))
    options = parser.parse_args()
    rows = bench(train_task.SIZES[options.size], options)
    report(rows, options, {"dtype": options.dtype, "size": options.size})


if __name__ == "__main__":
    main()
