"""Random streams: the same for the same names, another for any other, on every machine."""

import itertools

import torch

from fastalign.streams import stream


def test_same_names_same_numbers():
    one, two = (torch.rand(5, generator=stream(3, "order", 7)) for _ in range(2))
    assert torch.equal(one, two)
    torch.rand(9)  # the global state has no say in it, and is left alone
    before = torch.get_rng_state()
    assert torch.equal(one, torch.rand(5, generator=stream(3, "order", 7)))
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_are_pinned():
    """The first 63 bits of SHA-256 of "0/order/1" and "-5": a resumed run relies on them."""
    assert stream(0, "order", 1).initial_seed() == 4489457307835839548
    assert stream(-5).initial_seed() == 2005525047836557505


def test_no_two_uses_share_a_stream():
    uses = itertools.product(range(40), ("order", "head", "bootstrap"), range(40))
    seeds = {stream(*use).initial_seed() for use in uses}
    assert len(seeds) == 40 * 3 * 40
    assert stream(1, "head", 12).initial_seed() != stream(11, "head", 2).initial_seed()
