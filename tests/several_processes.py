"""What two processes do in test_distributed.py: `torchrun ... several_processes.py CHECK FOLDER`.

The main process writes what it found to FOLDER/CHECK-N.pt, N the number of processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastalign.errors import UserError

ROOT = Path(__file__).parent.parent


def torchrun(size: int, arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node SIZE ARGUMENTS` on this repository."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*launch, "--nproc-per-node", str(size), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        **options,
    )


def found(check: str, folder: Path, size: int) -> Any:
    """Runs a check in `size` processes; what its main process found."""
    script = str(Path(__file__).resolve())
    done = torchrun(size, [script, check, str(folder)], cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / f"{check}-{size}.pt", weights_only=True)


LENGTHS = (5, 9, 3, 17, 4, 2, 8)


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in LENGTHS]


def tiny_policy(tied: bool) -> Any:
    """Two layers, 97 tokens, and a value head that says something."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastalign.models import Policy

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )
    policy = Policy(model, value_head=True)
    torch.nn.init.normal_(policy.value_head.down.weight)  # type: ignore[union-attr, arg-type]
    return policy


def steps(tied: bool) -> dict[str, Any]:
    """Three steps of MLE and a value loss, with an evaluation before each; losses and weights."""
    from fastalign import losses, ops
    from fastalign.data.packing import pack
    from fastalign.train import distributed

    policy = tiny_policy(tied)
    distributed.shard(policy, "hidden")
    data = sequences()
    # Not AdamW: where a gradient is all but zero, it makes a step of what is rounding.
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1, momentum=0.9)
    history: list[list[float]] = []
    for step in range(3):
        batch = list(range(step, len(data)))
        n_targets = sum(LENGTHS[i] - 1 for i in batch)
        with torch.no_grad():
            before, _ = policy.logprobs(pack(data[:2]))
        loss = torch.zeros(())
        for micro in distributed.micros(policy, batch, LENGTHS, 12):
            packed = pack([data[i] for i in micro.rows])
            hidden = policy.response_hidden(packed)
            divisor = micro.divisor(n_targets)
            out = ops.linear_loss(
                hidden,
                policy.head_weight,
                packed.response_targets,
                losses.MLE(),
                {},
                ignore_index=None,
                normalizer=divisor,
            )
            part = out.loss + policy.values(hidden).square().sum() / divisor
            part.backward()
            loss += part.detach()
        distributed.total(loss)
        norm = distributed.whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        history.append([float(loss), float(norm), float(before.sum())])
    weights = {name: distributed.whole(p).clone() for name, p in policy.state_dict().items()}
    return {"history": history, "weights": weights}


def check_steps() -> Any:
    return {"tied": steps(True), "untied": steps(False)}


def check_words() -> Any:
    """Each of the small exchanges, with numbers that tell the processes apart."""
    from fastalign.data.packing import pack
    from fastalign.train import distributed
    from fastalign.train.experience import Collector

    here = distributed.world()
    summed = distributed.total(torch.tensor([1.0, 10.0 * here.rank]))
    lists = distributed.gather([here.rank, "a"])
    largest = distributed.largest(3 + here.rank)
    chosen = distributed.from_main({"rank": here.rank})
    policy = tiny_policy(True)
    weights = [p.detach().clone() for p in policy.parameters()]
    distributed.shard(policy, "hidden")
    part = distributed.local(policy.head_weight).shape[0]
    with torch.no_grad():
        policy.head_weight.mul_(2)
    weights[0] *= 2
    saved: Any = distributed.unsharded(policy)
    assert (saved is None) == (here.rank > 0)
    apart, tied = 0.0, True
    if saved is not None:
        saved.hidden(pack([[1, 2, 3]]))  # a plain policy again
        pairs = zip(saved.parameters(), weights, strict=True)
        apart = max((a - b).abs().max().item() for a, b in pairs)
        tied = saved.head_weight is saved.model.get_input_embeddings().weight
    done: list[int] = []

    def action(item: int) -> tuple[int, int]:
        done.append(item)
        return 10 * item, here.rank

    both = distributed.split(action, range(5))
    assert done == list(range(here.rank, 5, here.size))
    error = ""
    try:
        distributed.on_main(fail)
    except UserError as wrong:
        error = str(wrong)
    one_is_wrong = ""
    engine: Any = SimpleNamespace(sync=lambda: None)

    class Broken(Collector):
        def _collect(self, *args: Any) -> Any:
            if here.rank == 1:
                raise UserError("of the second process")

    try:
        Broken(*[engine] * 8).collect([[1], [2]], ["", ""], 1)
    except UserError as wrong:
        one_is_wrong = str(wrong)
    return {
        "summed": summed.tolist(),
        "lists": lists,
        "largest": largest,
        "chosen": chosen,
        "part": part,
        "tied": tied,
        "whole": apart,
        "split": [value for value, _ in both],
        "split by": [rank for _, rank in both],
        "error": error,
        "one is wrong": one_is_wrong,
    }


def trainee(tied: bool = True) -> Any:
    """A policy, sharded where there are several processes, with its AdamW; and what holds both."""
    from fastalign.train import distributed
    from fastalign.train.optim import OptimConfig, Optimizer
    from fastalign.train.run import Stateful

    policy = tiny_policy(tied)
    distributed.shard(policy, "hidden")
    optimizer = Optimizer(OptimConfig(), policy, 10)
    return policy, optimizer, Stateful({"policy": policy}, {"optimizer": optimizer})


def held(policy: Any, optimizer: Any) -> dict[str, Any]:
    """Whole weights and moments."""
    from fastalign.train import distributed

    found = dict(policy.state_dict()) | optimizer.tensors()
    return {name: distributed.whole(tensor).clone() for name, tensor in found.items()}


def check_checkpoint() -> Any:
    """What two processes write and read; one that has no room, and one file that is damaged."""
    import resource

    from fastalign.data.packing import pack
    from fastalign.train import checkpoint, distributed

    folder, here = Path(sys.argv[2]) / "checkpoints", distributed.world()
    policy, optimizer, stateful = trainee()
    # A pass without gradients leaves embeddings and head gathered: still, shards are written.
    for p in policy.parameters():
        p.grad = (7.0 + 1e3 * p.detach()).sin()
    optimizer.adam.step()
    with torch.no_grad():
        policy.hidden(pack([[1, 2, 3]]))
    path = checkpoint.save(folder, stateful.capture(1), keep=2)
    error = ""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not here.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        checkpoint.save(folder, stateful.capture(2), keep=2)
    except OSError as full:
        error = str(full.strerror)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again, its_optimizer, reader = trainee()
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    reader.restore(checkpoint.load(path))
    wrote, read = held(policy, optimizer), held(again, its_optimizer)
    saved = {p.name: p.stat().st_size for p in path.iterdir()}
    checkpoint.save(folder, stateful.capture(3), keep=2)
    distributed.barrier()
    if here.is_main:
        last = folder / "step-000003" / "shard-00002.safetensors"
        last.write_bytes(last.read_bytes()[:-9] + bytes(9))
    distributed.barrier()
    found, damaged = checkpoint.newest_intact(folder)
    return {
        "files": saved,
        "wrote": wrote,
        "equal": [wrote.keys() == read.keys()] + [bool((wrote[k] == read[k]).all()) for k in read],
        "errors": [one for (one,) in distributed.gather([error])],
        "folder": sorted(p.name for p in folder.iterdir()),
        "newest": [one for (one,) in distributed.gather([found.step])],
        "damaged": [one.split("/")[-1] for one in damaged],
    }


def fail() -> None:
    raise UserError("of the main process")


def scripted(config: Any, policy: Any, tokenizer: Any) -> Any:
    """What `engine.make_engine` gives, reading its answers from a script."""
    from fastalign.train import engine

    return reading(engine.make_engine(config, policy, tokenizer))


def reading(real: Any) -> Any:
    """An engine whose answers depend on nothing but the prompt, with the policy's log-probs."""
    from fastalign.data.packing import pack
    from fastalign.rollout import Rollout

    class Scripted:
        sync = staticmethod(real.sync)

        @torch.no_grad()
        def generate(self, prompts: Any, n_samples: int, sampling: Any) -> list[Rollout]:
            found = []
            for i, prompt in enumerate(prompts):
                for k in range(n_samples):
                    length = 2 + (sum(prompt) + k) % 5
                    answer = [(sum(prompt) * (k + 2) + 7 * t) % 250 + 5 for t in range(length)]
                    logp, _ = real.policy.logprobs(pack([prompt + answer], [len(prompt)]))
                    found.append(Rollout(i, prompt, answer, logp.tolist(), k % 2 == 0))
            return found

    return Scripted()


def check_online() -> Any:
    """Two rounds each of ppo with its value head and of grpo, their metrics and weights."""
    from fastalign.train import distributed, grpo, online, ppo

    online.make_engine = scripted
    folder, found = Path(sys.argv[2]), {}
    options: dict[str, Any] = dict(
        policy=str(folder / "model"),
        reward=f"{folder / 'reward.py'}:length",
        steps=2,
        prompts_per_step=6,
        samples_per_prompt=2,
        batch_tokens=250,
        micro_tokens=120,
        eval_limit=2,
        eval_samples=1,
        checkpoint_every=1,
        kl_coef=0.05,
        device="cpu",
    )
    size = distributed.launched().size
    for name, run in (
        ("ppo", lambda o: ppo.train(ppo.PPOConfig(output=o, **options))),
        ("grpo", lambda o: grpo.train(grpo.GRPOConfig(output=o, **options))),
    ):
        output = folder / f"{name}-{size}"
        run(str(output))
        if distributed.world().is_main:
            from safetensors.torch import load_file

            lines = (output / "metrics.jsonl").read_text().splitlines()
            found[name] = {
                "metrics": [json.loads(line) for line in lines],
                "weights": load_file(output / "model" / "model.safetensors"),
            }
    return found


def main() -> None:
    import methods_run

    from fastalign.train import distributed

    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    checks: dict[str, Callable[[], Any]] = {
        "steps": check_steps,
        "words": check_words,
        "online": check_online,
        "checkpoint": check_checkpoint,
        "methods": lambda: methods_run.check_methods(Path(sys.argv[2])),
    }
    result = checks[sys.argv[1]]()
    here = distributed.world()
    if here.is_main:
        torch.save(result, Path(sys.argv[2]) / f"{sys.argv[1]}-{here.size}.pt")
    distributed.finish()


if __name__ == "__main__":
    main()
