"""What a checkpoint may be resumed with: other rates and lengths of a run, never other steps."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from fastalign.data.formats import Prompt
from fastalign.data.tokens import TokenizedCompletion, TokenizedPrompt
from fastalign.train import sft
from fastalign.train.folder import options_of
from fastalign.train.run import Interrupted, Run, RunError
from fastalign.train.same_run import FIXED, Inputs, changed_options, data_digest, weights_digest


def of(command="sft", **options):
    return {"command": command, "options": options}


def test_what_may_change_is_told_and_what_does_not_matter_is_not():
    saved = of(
        lr=1e-3, epochs=2, output="a", device="cpu", sampling={"temperature": 1.0, "k": (1,)}
    )
    now = {"lr": 1e-4, "epochs": 2, "output": "b", "device": "cuda"}
    now |= {"sampling": {"temperature": 0.5, "k": [1]}, "added": 3}
    assert changed_options("sft", now, saved) == [
        ("lr", 1e-3, 1e-4),
        ("sampling.temperature", 1.0, 0.5),
        ("added", None, 3),
    ]
    assert changed_options("sft", saved["options"], saved) == []


@pytest.mark.parametrize("name", FIXED)
def test_other_steps_are_refused(name):
    with pytest.raises(RunError, match=f"of a run with {name} 1, this one has 2"):
        changed_options("sft", {name: 2}, of(**{name: 1}))


def test_another_method_is_refused():
    with pytest.raises(RunError, match="of a run of sft, this is one of apa"):
        changed_options("apa", {}, of("sft"))


def examples(*rows):
    return [TokenizedCompletion(list(p), list(c), reward) for p, c, reward in rows]


def test_data_are_known_by_their_contents():
    base = examples(([1, 2], [3], None), ([4], [5, 6], 0.5))
    others = [
        base[:1],
        base[::-1],
        examples(([1], [2, 3], None), ([4], [5, 6], 0.5)),  # the border moved
        examples(([1, 2], [3], None), ([4], [5, 6], 0.25)),
        examples(([1, 2], [3], None), ([4], [5, 7], 0.5)),
    ]
    digests = [data_digest(e) for e in (base, *others)]
    assert len(set(digests)) == len(digests)
    assert data_digest([dataclasses.replace(e) for e in base]) == digests[0]
    assert digests[0].startswith("2 examples, ")
    prompts = [TokenizedPrompt([1], text, Prompt("a", "file.jsonl:1")) for text in ("a", "b")]
    assert data_digest(prompts[:1]) != data_digest(prompts[1:])


def test_weights_are_known_by_their_bits():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    before = weights_digest(layer)
    assert weights_digest(layer) == before
    with torch.no_grad():
        layer.weight[[0, 1]] = layer.weight[[1, 0]].clone()  # the same sum, other places
    changed = weights_digest(layer)
    layer.weight.data[0, 0] = torch.nextafter(layer.weight.data[0, 0], torch.tensor(9.0))
    assert len({before, changed, weights_digest(layer)}) == 3
    layer.bfloat16()
    assert weights_digest(layer) not in (before, changed)


def test_other_inputs_are_refused_by_name():
    first = torch.nn.Linear(2, 2)
    saved = Inputs(data=examples(([1], [2], None)), reference=first).state_dict()
    Inputs(data=examples(([1], [2], None)), reference=first).load_state_dict(saved)
    with pytest.raises(RunError, match="of a run with another data .1 examples, .* 0 examples"):
        Inputs(data=[], reference=first).load_state_dict(saved)
    with pytest.raises(RunError, match="of a run with another reference"):
        Inputs(data=examples(([1], [2], None)), reference=torch.nn.Linear(2, 2)).load_state_dict(
            saved
        )


# --- through a run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """An SFT run that was stopped after its first step."""
    folder = tmp_path_factory.mktemp("stopped")
    config = sft.SFTConfig(
        output=str(folder / "run"),
        model="scratch:1m",
        vocab_size=300,
        limit=12,
        batch_tokens=512,
        eval_limit=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        plain = Run.end_step

        def end_step(self, step):
            self._signal = 2
            plain(self, step)

        patch.setattr(Run, "end_step", end_step)
        with pytest.raises(Interrupted):
            sft.train(config)
    return dataclasses.replace(config, resume="auto")


def test_other_data_and_seeds_are_refused(stopped):
    with pytest.raises(RunError, match="with another data .12 examples, .* 10 examples"):
        sft.train(dataclasses.replace(stopped, limit=10))
    with pytest.raises(RunError, match="with seed 0, this one has 1"):
        sft.train(dataclasses.replace(stopped, seed=1))


def test_another_rate_is_told(stopped, tmp_path, caplog):
    (saved,) = Path(stopped.output, "checkpoints").glob("step-*")
    caplog.set_level(logging.WARNING, logger="fastalign")
    sft.train(dataclasses.replace(stopped, lr=5e-4, resume=str(saved), output=str(tmp_path / "on")))
    told = [line for line in caplog.messages if line.startswith("resumed with")]
    assert told == ["resumed with lr 0.0005; the checkpoint's run had 0.001"]
    assert (tmp_path / "on" / "model" / "model.safetensors").exists()


def test_options_of_one_start_are_none_of_the_runs(stopped):
    held = options_of(stopped)
    assert "resume" not in held and "overwrite" not in held and held["limit"] == 12
