"""Log-probs of response tokens by plain transformers: float64, one sequence at a time."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def plain_logprobs(source: Any, examples: list[Any]) -> list[Tensor]:
    """float64 [response tokens] of each example, under the model saved at `source`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(source), attn_implementation="eager").double()
    found = []
    for e in examples:
        ids = torch.tensor([e.prompt + e.completion])
        rows = model.eval()(input_ids=ids).logits[0, len(e.prompt) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(1, torch.tensor(e.completion)[:, None])[:, 0])
    return found
