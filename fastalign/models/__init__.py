"""Language models as fastalign trains them: packed, hidden states out, one loss head on top."""

from fastalign.models.policy import Policy
from fastalign.models.pretrained import load_tokenizer
from fastalign.models.reward import RewardEnsemble

__all__ = ["Policy", "RewardEnsemble", "load_tokenizer"]
