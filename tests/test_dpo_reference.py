"""`train dpo`: what the policy is compared with, kept log-probs of it or a live model."""

import logging
import math
import time

import pytest
import torch
from plain_logprobs import plain_logprobs
from preference_runs import (
    config,
    lines_of,
    make_model,
    records,
    texts_of,
    without_clocks,
)
from safetensors.torch import load_file, save_file

from fastalign.models import Policy, load_tokenizer
from fastalign.models.lora import LoRAConfig
from fastalign.testing import TOLERANCES
from fastalign.train import dpo

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(write):
    return write(*records())


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_precomputed_is_live(model, data, tmp_path, loss):
    for mode in ("precompute", "live"):
        dpo.train(config(tmp_path / mode, model, data, loss=loss, reference=mode, eval_data=data))
    stored, live = (without_clocks(lines_of(tmp_path / mode)) for mode in ("precompute", "live"))
    assert [(x["step"], x["phase"]) for x in stored] == [
        *((0, "eval"), (1, "train"), (2, "train"), (2, "eval"))
    ]
    for ours, theirs in zip(stored, live, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if isinstance(value, float) and not key.endswith(("accuracies", "ci95", "flops")):
                assert theirs[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    assert not (tmp_path / "live" / "reference").exists()


def test_what_a_live_reference_takes_is_its_phase_s(model, data, tmp_path, monkeypatch):
    plain = dpo.ref_logprobs

    def slow(*args):
        time.sleep(0.2)
        return plain(*args)

    monkeypatch.setattr(dpo, "ref_logprobs", slow)
    dpo.train(config(tmp_path / "run", model, data, reference="live"))
    assert all(line["time/reference"] > 0.2 for line in lines_of(tmp_path / "run", "train"))


def test_kept_log_probs_are_read_back_by_their_key(model, data, write, tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastalign")
    cache = tmp_path / "cache"

    def train(name, **changes):
        caplog.clear()
        dpo.train(
            config(tmp_path / name, model, data, reference_cache=str(cache), epochs=1, **changes)
        )
        return "read from" in caplog.text

    assert not train("first")
    (kept,) = cache.iterdir()
    assert train("second", lr=1e-4, loss="ipo")
    # What was read is what is used: rewards of a file that is off by one nat a token.
    values = load_file(kept)
    logps = plain_logprobs(model, texts_of(model))
    assert torch.cat(logps).float().sub(values["0"]).abs().max() < 100 * FLOAT32
    save_file({"0": values["0"] - 1.0}, kept)
    assert train("shifted")
    line = lines_of(tmp_path / "shifted", "train")[0]
    lengths = [len(logp) for logp in logps[0::2]]
    assert line["rewards/chosen"] == pytest.approx(0.1 * sum(lengths) / len(lengths), rel=1e-4)
    # Other tokens or weights are another key; a damaged file is written anew.
    assert not train("other", limit=5)
    other = make_other(model, tmp_path / "model")
    caplog.clear()
    dpo.train(config(tmp_path / "moved", other, data, reference_cache=str(cache), epochs=1))
    assert "read from" not in caplog.text and len(list(cache.iterdir())) == 3
    kept.write_bytes(b"half a file")
    assert not train("damaged") and "is damaged" in caplog.text
    assert torch.equal(load_file(kept)["0"], values["0"])


def make_other(model, folder):
    policy = Policy.load(model, load_tokenizer(model))
    with torch.no_grad():
        next(policy.parameters())[0, 0] += 0.25
    policy.save(folder, load_tokenizer(model))
    return str(folder)


def test_with_an_adapter_the_reference_is_the_base(model, data, tmp_path):
    """Kept and live, at the start and after the adapter has moved; another seed, the same key."""
    lora = LoRAConfig(rank=2)
    cache = str(tmp_path / "cache")
    for name, options in (("kept", {"reference_cache": cache}), ("live", {"reference": "live"})):
        dpo.train(config(tmp_path / name, model, data, lora=lora, lr=3e-2, **options))
    stored, live = (lines_of(tmp_path / name, "train") for name in ("kept", "live"))
    assert stored[0]["loss"] == pytest.approx(math.log(2), abs=100 * FLOAT32)
    assert abs(stored[1]["loss"] - math.log(2)) > 1e-3
    assert live[1]["loss"] == pytest.approx(stored[1]["loss"], rel=1e-3)
    dpo.train(config(tmp_path / "2", model, data, lora=lora, reference_cache=cache, seed=7))
    assert len(list((tmp_path / "cache").iterdir())) == 1
