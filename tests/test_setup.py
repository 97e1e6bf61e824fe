"""What the configuration does to a model before it is trained: activation checkpointing."""

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fastalign import losses, ops
from fastalign.data.packing import pack
from fastalign.data.tokenizer import train_tokenizer
from fastalign.errors import UserError
from fastalign.models import Policy, attention_kernels
from fastalign.models.recompute import recompute_activations
from fastalign.testing import assert_no_worse
from fastalign.train.optim import OptimConfig
from fastalign.train.setup import load_policy

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES = [[5, 9, 3, 250], [7, 8], list(range(1, 12)), [20, 19, 18, 17, 16]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words", "to make a tokenizer of"], 300)


def llama(layers=2, dropout=0.0):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


def gradients(policy, *packs):
    """Of a step of supervised fine-tuning over all the packs' targets, by name."""
    n = sum(p.kept.numel() for p in packs)
    for packed in packs:
        hidden, targets = policy.response_hidden(packed), packed.response_targets
        out = ops.linear_loss(hidden, policy.head_weight, targets, losses.MLE(), {}, normalizer=n)
        out.loss.backward()
    found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


@pytest.mark.parametrize("training", [True, False])
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(monkeypatch, training):
    """Also in eval mode, in which policies are trained; and what dropout drew is drawn again."""
    policy = Policy(llama(dropout=0.3)).train(training)
    packed = pack(SEQUENCES)
    torch.manual_seed(5)
    kept = gradients(policy, packed)
    calls = []
    norm = policy.model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *_: calls.append(1))
    recompute_activations(policy.model)
    torch.manual_seed(5)
    again = gradients(policy, packed)
    assert len(calls) == 2  # forward, and once more for the gradients
    assert kept.keys() == again.keys() and len(kept) > 10
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    monkeypatch.delattr("fastalign.models.recompute.checkpoint")
    with torch.no_grad():  # nothing to recompute, nothing to pay
        policy.hidden(packed)
    assert len(calls) == 3


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_several_packs_add_up_to_those_of_one(recompute):
    policy = Policy(llama())
    if recompute:
        recompute_activations(policy.model)
    one = gradients(policy, pack(SEQUENCES))
    several = gradients(policy, *(pack([s]) for s in SEQUENCES))
    truth = gradients(policy.double(), pack(SEQUENCES))
    largest = max(g.abs().max() for g in truth.values())
    assert one.keys() == several.keys() == truth.keys() and len(truth) > 10
    for name, true in truth.items():
        # Relative to the largest gradient of the model, so that tiny ones are not judged alone.
        ours, plain, exact = (
            torch.cat([g.flatten() / largest, torch.ones(1)])
            for g in (several[name], one[name], true)
        )
        assert_no_worse(ours, plain, exact, torch.float32, grad=True)


def saved_bytes(policy, packed):
    """What autograd keeps between forward and backward, weights not counted."""
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = policy.hidden(packed)
    del hidden
    return sum(kept.values())


def test_recomputed_activations_are_not_kept():
    """Of each layer only its input: 8 layers x 512 tokens x 32 floats, and a few for all."""
    policy = Policy(llama(layers=8))
    packed = pack([[i % 300 for i in range(128)]] * 4)
    before = saved_bytes(policy, packed)
    recompute_activations(policy.model)
    after = saved_bytes(policy, packed)
    inputs = 8 * 512 * 32 * 4
    assert inputs <= after < 2 * inputs
    assert before > 8 * after


def test_the_frozen_copy_of_a_recomputing_policy_runs_its_own_layers(tokenizer):
    policy = Policy(llama())
    recompute_activations(policy.model)
    twin = policy.frozen_copy()
    packed = pack(SEQUENCES)
    before = twin.hidden(packed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(2.0)
    with torch.enable_grad():
        assert torch.equal(twin.hidden(packed), before)
    assert not torch.equal(policy.hidden(packed), before)


def test_a_policy_is_loaded_as_the_configuration_says(tokenizer):
    for wanted in (False, True):
        config = OptimConfig(activation_checkpointing=wanted)
        torch.manual_seed(3)
        policy = load_policy(
            config, "scratch:1m", tokenizer, max_length=64, device=CPU, value_head=True
        )
        assert policy.max_length == 64 and policy.value_head is not None
        assert ("forward" in vars(policy.model.model.layers[0])) is wanted
        torch.manual_seed(3)
        plain = Policy.load("scratch:1m", tokenizer, max_length=64, value_head=True)
        assert all(
            torch.equal(a, b) for a, b in zip(policy.parameters(), plain.parameters(), strict=True)
        )


def test_the_attention_kernel_is_the_configurations(tokenizer):
    for name in ("sdpa", "auto"):
        load_policy(OptimConfig(attention=name), "scratch:1m", tokenizer, device=CPU)
        assert attention_kernels._asked == name


def test_a_model_without_layers_is_refused():
    with pytest.raises(UserError, match="Linear has no layers that could be checkpointed"):
        recompute_activations(torch.nn.Linear(2, 2))
    encoder = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    recompute_activations(encoder)
    assert "forward" in vars(encoder.encoder.layer[0])
