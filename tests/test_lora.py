"""LoRA: the base stays as it is and is the reference; what is saved, merged, resumed, refused."""

import dataclasses
import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from fastalign import losses, ops
from fastalign.data.packing import pack
from fastalign.data.tokenizer import train_tokenizer
from fastalign.errors import UserError
from fastalign.models import Policy, RewardEnsemble, lora
from fastalign.models.lora import LoRAConfig, add_adapter, fingerprint
from fastalign.models.recompute import recompute_activations
from fastalign.models.reward import EnsembleConfig
from fastalign.testing import assert_no_worse
from fastalign.train import sft
from fastalign.train.optim import OptimConfig
from fastalign.train.run import Interrupted, Run
from fastalign.train.setup import load_policy

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PACK = pack([[5, 9, 3, 250], [7, 8], list(range(1, 12)), [20, 19, 18, 17, 16]], [2, 1, 4, 3])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words", "to make a tokenizer of"], 300)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A folder with a tiny model; its matrices are peaked, as after training."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("base")
    Policy.load("scratch:1m", tokenizer, max_length=256).save(folder, tokenizer)
    return str(folder)


def adapted(base, tokenizer, trained=True, **options):
    """A policy with an adapter; `trained` moves it away from its start, at which it does nothing"""
    torch.manual_seed(2)
    config = OptimConfig(lora=LoRAConfig(**({"rank": 4} | options)))
    policy = load_policy(config, base, tokenizer, device=CPU, value_head=True)
    if trained:
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return policy.eval()


def logits(policy, packed=PACK):
    return torch.nn.functional.linear(policy.hidden(packed), policy.head_weight)


def trained_names(policy):
    return {n for n, p in policy.named_parameters() if p.requires_grad}


def test_only_adapters_and_value_head_are_trained(base, tokenizer):
    policy = adapted(base, tokenizer, trained=False)
    names = trained_names(policy)
    matrices = 2 * 7  # q, k, v, o, gate, up, down of 2 layers
    assert sum("lora_A" in n for n in names) == sum("lora_B" in n for n in names) == matrices
    assert {n for n in names if "lora_" not in n} == {
        f"value_head.{part}.{what}" for part in ("up", "down") for what in ("weight", "bias")
    }
    adapters = sum(p.numel() for n, p in policy.named_parameters() if "lora_" in n)
    assert adapters == 2 * 4 * (4 * (192 + 192) + 3 * (192 + 512))
    plain = Policy.load(base, tokenizer)
    assert torch.equal(policy.hidden(PACK), plain.eval().hidden(PACK))
    some = adapted(base, tokenizer, trained=False, target_modules="q_proj,v_proj")
    assert sum("lora_A" in n for n in trained_names(some)) == 4


@pytest.mark.parametrize("alpha", [8.0, 32.0])
def test_the_adapter_adds_alpha_over_rank_times_b_a(base, tokenizer, alpha):
    policy = adapted(base, tokenizer, alpha=alpha)
    name = "model.layers.1.mlp.down_proj"
    layer = policy.model.get_submodule(name)
    a, b = (getattr(layer, f"lora_{x}")["default"].weight.detach() for x in "AB")
    merged = lora.merged_weights(policy.model)
    plain = Policy.load(base, tokenizer).model.state_dict()
    assert merged.keys() == plain.keys()
    expected = plain[f"{name}.weight"].double() + alpha / 4 * (b.double() @ a.double())
    eager = plain[f"{name}.weight"] + alpha / 4 * (b @ a)
    assert_no_worse(merged[f"{name}.weight"], eager, expected, torch.float32)
    assert (merged[f"{name}.weight"] - plain[f"{name}.weight"]).abs().max() > 0.01
    for same in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(merged[same], plain[same])


# --- the reference -------------------------------------------------------------------------------


def test_the_reference_is_the_base_bit_for_bit_and_shares_its_memory(base, tokenizer):
    policy = adapted(base, tokenizer)
    reference = policy.frozen_copy()
    plain = Policy.load(base, tokenizer).eval()
    assert torch.equal(logits(reference), logits(plain))
    assert (logits(policy) - logits(plain)).abs().max() > 0.5
    own = {p.data_ptr() for p in policy.parameters()} | {b.data_ptr() for b in policy.buffers()}
    theirs = [*reference.parameters(), *reference.buffers()]
    assert len(theirs) > 10 and all(t.data_ptr() in own for t in theirs)
    assert not any(p.requires_grad for p in reference.parameters())
    assert reference.value_head is None and not lora.has_adapter(reference.model)
    assert reference.state_dict().keys() == plain.state_dict().keys()  # not a checkpoint's share


@pytest.mark.parametrize("recompute", [False, True])
def test_the_reference_leaves_the_policys_gradients_and_mode_alone(base, tokenizer, recompute):
    """Run between forward and backward, in training mode with dropout."""
    policy = adapted(base, tokenizer, dropout=0.5)
    if recompute:
        recompute_activations(policy.model)
    reference = policy.frozen_copy()
    expected = logits(reference)

    def gradients(between):
        policy.train()
        torch.manual_seed(7)
        hidden = policy.response_hidden(PACK)
        out = ops.linear_loss(hidden, policy.head_weight, PACK.response_targets, losses.MLE(), {})
        if between:
            assert torch.equal(logits(reference), expected)  # no adapter, no dropout
        out.loss.backward()
        found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
        policy.zero_grad()
        return found

    alone, with_reference = gradients(False), gradients(True)
    assert not torch.equal(policy.hidden(PACK), policy.hidden(PACK))  # dropout
    assert policy.training and not reference.training
    assert (
        alone.keys()
        == with_reference.keys()
        == trained_names(policy)
        - {f"value_head.{part}.{what}" for part in ("up", "down") for what in ("weight", "bias")}
    )
    assert all(torch.equal(alone[n], with_reference[n]) for n in alone)
    assert max(g.abs().max() for g in alone.values()) > 1e-3


def test_policy_and_reference_run_at_the_same_time(base, tokenizer):
    policy = adapted(base, tokenizer)
    reference = policy.frozen_copy()
    with torch.no_grad():
        expected = logits(policy), logits(reference)
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(logits, (policy, reference)[i % 2]) for i in range(40)]
        for i, future in enumerate(futures):
            with torch.no_grad():
                assert torch.equal(future.result().detach(), expected[i % 2])


class Products(TorchDispatchMode):
    """Counts matrix products with the head's V rows in them."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.count = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            shapes = [t.shape for t in args if isinstance(t, torch.Tensor)]
            self.count += any(self.vocab in shape for shape in shapes)
        return func(*args, **(kwargs or {}))


def test_a_frozen_head_costs_two_products(base, tokenizer):
    vocab = len(tokenizer)
    found = {}
    for name, policy in (
        ("all", Policy.load(base, tokenizer)),
        ("adapter", adapted(base, tokenizer)),
    ):
        hidden = policy.response_hidden(PACK).detach().requires_grad_()
        with Products(vocab) as products:
            ops.linear_loss(
                hidden, policy.head_weight, PACK.response_targets, losses.MLE(), {}
            ).loss.backward()
        found[name] = products.count
        assert hidden.grad is not None and hidden.grad.abs().max() > 1e-3
        assert (policy.head_weight.grad is None) is (name == "adapter")
    assert found == {"all": 3, "adapter": 2}


# --- what is saved -------------------------------------------------------------------------------


def test_saved_merged_it_is_a_plain_model_with_the_adapter_beside_it(
    base, tokenizer, tmp_path, monkeypatch
):
    policy = adapted(base, tokenizer)
    policy.save(tmp_path, tokenizer)
    alone = sorted(p.name for p in (tmp_path / "adapter").iterdir())
    assert alone == ["adapter_config.json", "adapter_model.safetensors"]
    # By peft itself, from the base: the same function.
    peft_model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    ).eval()
    ids = torch.tensor([[5, 9, 3, 250]])
    packed = pack([[5, 9, 3, 250]])
    ours, by_peft = logits(policy, packed), peft_model(input_ids=ids).logits[0]
    # Without peft: to the rounding of W + B A.
    monkeypatch.setitem(sys.modules, "peft", None)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    merged = plain(input_ids=ids).logits[0]
    monkeypatch.undo()
    truth = logits(policy.double(), packed)
    assert_no_worse(by_peft, ours, truth, torch.float32)
    assert_no_worse(merged, ours, truth, torch.float32)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))


def test_saved_as_an_adapter_it_loads_as_a_policy_and_carries_another(base, tokenizer, tmp_path):
    policy = adapted(base, tokenizer, save="adapter")
    policy.save(tmp_path / "one", tokenizer)
    assert not (tmp_path / "one" / "model.safetensors").exists()
    again = Policy.load(str(tmp_path / "one"), tokenizer, value_head=True).eval()
    expected = logits(policy)
    truth = logits(policy.double())
    assert_no_worse(logits(again), expected, truth, torch.float32)
    assert trained_names(again) == {n for n, _ in again.named_parameters()}  # a model like others
    assert not lora.has_adapter(again.model)
    # An adapter on top of it has it as its base, not the base's base.
    second = adapted(str(tmp_path / "one"), tokenizer, save="adapter", rank=2)
    second.save(tmp_path / "two", tokenizer)
    named = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(tmp_path / "one")
    third = Policy.load(str(tmp_path / "two"), tokenizer).eval()
    expected = logits(second)
    assert_no_worse(logits(third), expected, logits(second.double()), torch.float32)


def test_a_packed_model_with_its_adapter_is_checked_like_another(base, tokenizer):
    """A pack is its sequences one by one with a trained adapter, and with one that is not seen."""
    policy = adapted(base, tokenizer)
    policy._check_head()
    layer = policy.model.get_submodule("model.layers.0.mlp.down_proj")
    layer.register_forward_hook(lambda m, x, out: out.roll(1, dims=-2))
    with pytest.raises(UserError, match="a pack does not give"):
        policy._check_head()


def test_a_reward_ensembles_encoder_takes_an_adapter(base, tokenizer, tmp_path):
    torch.manual_seed(3)
    ensemble = RewardEnsemble.create(base, tokenizer, EnsembleConfig(n_heads=2))
    add_adapter(ensemble.encoder, LoRAConfig(rank=2))
    for name, parameter in ensemble.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    kept = ensemble.state_dict()
    assert {k for k in kept if "lora_" not in k} == {
        *("weight", "bias", "center", "scale", "encoder.base_fingerprint")
    }
    scores = ensemble.eval()(PACK)
    ensemble.save(tmp_path, tokenizer)
    again = RewardEnsemble.load(str(tmp_path)).eval()(PACK)
    assert_no_worse(again, scores, ensemble.double()(PACK), torch.float32)


# --- checkpoints ---------------------------------------------------------------------------------


def config_of(base, output, **changes):
    return sft.SFTConfig(
        **{
            "output": str(output),
            "model": base,
            "limit": 12,
            "max_length": 256,
            "batch_tokens": 512,
            "eval_limit": 4,
            "eval_every": 2,
            "checkpoint_every": 2,
            "lr": 1e-2,
            "lora": LoRAConfig(rank=4, dropout=0.1),
        }
        | changes
    )


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["phase"], line["loss"]) for line in lines]


def test_a_resumed_run_is_bit_for_bit_the_same_and_checkpoints_hold_no_base(
    base, tmp_path, monkeypatch
):
    sft.train(config_of(base, tmp_path / "whole"))
    whole = losses_of(tmp_path / "whole")
    assert whole[-1][0] >= 4
    plain = Run.log

    def log(self, at, phase, metrics):
        plain(self, at, phase, metrics)
        if at == 3 and phase == "train":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as stopping:
        stopping.setattr(Run, "log", log)
        with pytest.raises(Interrupted):
            sft.train(config_of(base, tmp_path / "parts"))
    torch.rand(7)
    sft.train(dataclasses.replace(config_of(base, tmp_path / "parts"), resume="auto"))
    assert losses_of(tmp_path / "parts") == whole
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "model" / name) for run in ("whole", "parts"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    newest = max((tmp_path / "whole" / "checkpoints").iterdir())
    held = load_file(newest / "shard-00001.safetensors")
    assert all("lora_" in n for n in held if n != "policy.model.base_fingerprint")
    moved = [t.abs().max() for n, t in held.items() if "lora_B" in n and n.startswith("policy.")]
    assert len(moved) == 14 and all(m > 1e-3 for m in moved)
    # With other base weights the adapter would mean something else; without LoRA there is none.
    other = tmp_path / "other"
    policy = Policy.load(base, sft.load_tokenizer(base))
    with torch.no_grad():
        policy.model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] += 1e-3
    policy.save(other, sft.load_tokenizer(base))
    with pytest.raises(UserError, match="belongs to other base weights than"):
        sft.train(config_of(str(other), tmp_path / "new", resume=str(newest)))
    with pytest.raises(UserError, match="the checkpoint is of another architecture"):
        sft.train(config_of(base, tmp_path / "full", resume=str(newest), lora=LoRAConfig()))


def test_a_fingerprint_tells_one_bit_and_every_dtype():
    tensors = [torch.randn(5, 3).to(t) for t in (torch.float32, torch.bfloat16, torch.float64)]
    first = fingerprint(tensors)
    assert first.dtype == torch.int64 and first.shape == (3,)
    assert torch.equal(first, fingerprint([t.clone() for t in tensors]))
    for i, (tensor, whole) in enumerate(
        zip(tensors, (torch.int32, torch.int16, torch.int64), strict=True)
    ):
        tensor.view(whole)[2, 1] ^= 1
        assert (fingerprint(tensors) != first).tolist() == [j <= i for j in range(3)]


# --- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_adapted_is_refused(base, tokenizer, monkeypatch, tmp_path):
    for options in ({"rank": -1}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(UserError, match="LoRA: expected rank >= 0, alpha > 0 and 0 <="):
            LoRAConfig(**options)
    with pytest.raises(UserError, match="expected save of merged, adapter, got 'both'"):
        LoRAConfig(save="both")
    config = OptimConfig(lora=LoRAConfig(rank=2))
    with pytest.raises(UserError, match="expected a folder or hub id, got scratch:"):
        load_policy(config, "scratch:1m", tokenizer, device=CPU)
    with pytest.raises(UserError, match="LoRA: .* has no module 'query'; its matrices are "):
        adapted(base, tokenizer, target_modules="query")
    for whole in ("lm_head", "q_proj,embed_tokens"):
        with pytest.raises(UserError, match=f"LoRA: {whole} holds embeddings or head"):
            adapted(base, tokenizer, target_modules=whole)
    frozen = Policy.load(base, tokenizer).requires_grad_(False)
    with pytest.raises(UserError, match="the model is frozen"):
        add_adapter(frozen.model, LoRAConfig(rank=2))
    adapted(base, tokenizer, save="adapter").save(tmp_path, tokenizer)
    saved = tmp_path / "adapter_config.json"
    written = json.loads(saved.read_text())
    saved.write_text(json.dumps(written | {"base_model_name_or_path": f"{tmp_path}/gone"}))
    with pytest.raises(UserError, match=r"the base of the adapter .*: no model folder at .*gone"):
        Policy.load(str(tmp_path), tokenizer)
    saved.write_text(json.dumps(written | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not name its base model"):
        Policy.load(str(tmp_path), tokenizer)
    saved.write_text(json.dumps(written))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\\0" * 9)
    with pytest.raises(UserError, match="the adapter at .* does not load"):
        Policy.load(str(tmp_path), tokenizer)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="LoRA needs peft: pip install"):
        adapted(base, tokenizer)
