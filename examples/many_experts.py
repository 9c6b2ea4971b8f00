"""One base, many experts: each request of a batch chooses its own.

    python examples/many_experts.py

The base runs once a step for the whole batch, and all experts on one small model are rows of one forward.
"""

import time

from proxytune import ProxyTuned, Request, SamplingParams

RECIPE = "package:proxytune/smol"  # or a recipe of your own with several experts
PROMPT = "The owner of the house"

model = ProxyTuned.load(RECIPE)
sampling = SamplingParams(max_new_tokens=24)
names = [expert.name for expert in model.recipe.experts]
requests = [Request(PROMPT, sampling, alpha=0.0)]
requests += [Request(PROMPT, sampling, experts=name) for name in names]
if len(names) > 1:  # two at once, each at half its strength: their offsets are summed
    halves = {expert.name: expert.alpha / 2 for expert in model.recipe.experts[:2]}
    requests.append(Request(PROMPT, sampling, experts=halves))

started = time.perf_counter()
traces = model.generate_batch(requests)
seconds = time.perf_counter() - started
for trace in traces:
    steering = ", ".join(f"{name} {alpha:g}" for name, alpha in trace.alphas.items() if alpha)
    print(f"--- {steering or 'the base alone'}\n{PROMPT}{trace.text}")
num_tokens = sum(len(trace.token_ids) for trace in traces)
print(f"\n{len(traces)} texts, {num_tokens} tokens in {seconds:.1f} s")
