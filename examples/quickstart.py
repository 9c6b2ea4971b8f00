"""Steer a model, and see what steering changed.

python examples/quickstart.py
"""

import math

from proxytune import ProxyTuned, SamplingParams

# A recipe names a base, experts and their anti-experts. This one comes with the package; a directory that
# `proxytune new` wrote, or a recipe's id on the Hub, goes in its place.
RECIPE = "package:proxytune/smol"
PROMPT = "Good morrow,"

model = ProxyTuned.load(RECIPE)
sampling = SamplingParams(max_new_tokens=32, temperature=0.7, seed=1)
for alpha in (0.0, 1.0, 2.0):  # 0 is the base alone
    trace = model.generate(PROMPT, sampling, alpha=alpha)
    print(f"--- alpha {alpha:g}\n{PROMPT}{trace.text}")

# How likely each model found each token, in percent.
trace = model.generate(PROMPT, SamplingParams(max_new_tokens=6), alpha=1.0, explain=True)
views = [view for view in (step.views for step in trace.steps) if view is not None]
names = list(views[0])
print("\n" + f"{'token':<12}" + "".join(f"{name:>30}" for name in names))
for step, view in zip(trace.steps, views, strict=True):
    logprobs = [view[name].logprob for name in names]
    probs = [0.0 if logprob is None else 100 * math.exp(logprob) for logprob in logprobs]
    print(f"{step.text!r:<12}" + "".join(f"{prob:>30.2f}" for prob in probs))
