"""A backend of your own: counts of which token follows which steer a real base, without any training.

python examples/own_backend.py
"""

from collections import Counter
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise

import torch

from proxytune import ProxyTuned, SamplingParams
from proxytune.backends.base import Backend, Capabilities, Prefilled
from proxytune.decode.ensemble import Member, Pair

RECIPE = "package:proxytune/smol"


class PairCounts(Backend[list[int]]):
    """Predicts a token from the one before it. A state is the number of tokens that each row has read."""

    capabilities = Capabilities(max_context=None)

    def __init__(self, name, token_ids, vocab_size):
        self.name, self.vocab_size = name, vocab_size
        self.counts = Counter(pairwise(token_ids))

    def logits(self, last_ids):
        answer = torch.zeros(
            len(last_ids), self.vocab_size
        )  # a pair that was never seen has a count of 1
        for (first, second), count in self.counts.items():
            answer[[first == last for last in last_ids], second] = torch.tensor(1.0 + count).log()
        return answer

    def prefill(self, prompts, *, adapters=None):
        return Prefilled([len(p) for p in prompts], self.logits([p[-1] for p in prompts]))

    def extend(self, state, token_ids):
        state[:] = [read + token_ids.shape[1] for read in state]
        return torch.stack([self.logits(row) for row in token_ids.tolist()])

    def rewind(self, state, num_tokens):
        state[:] = [read - count for read, count in zip(state, num_tokens, strict=True)]

    def select(self, state, rows):
        return [state[row] for row in rows]


model = ProxyTuned.load(RECIPE, experts=["tinyshakespeare"])
base = model.ensemble.members[0]
text = (files("proxytune") / "smol/heldout/tinyshakespeare.txt").read_text("utf-8")
expert = PairCounts("pairs in Shakespeare", model.tokenizer.encode(text), base.backend.vocab_size)
nothing = PairCounts("no pairs", [], base.backend.vocab_size)
members = (base, Member("expert", expert, base.alignment), Member("anti", nothing, base.alignment))
ensemble = replace(model.ensemble, members=members, pairs=(Pair("tinyshakespeare", 1, 2),))
steered = ProxyTuned(ensemble, [model.formats[0]] * 3, model.recipe)
for alpha in (0, 1, 2):
    trace = steered.generate("Good morrow,", SamplingParams(max_new_tokens=24), alpha=alpha)
    print(f"--- alpha {alpha}\n{trace.text.strip()}")
