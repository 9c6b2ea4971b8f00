"""One cut, from a model to the directory of a smaller one.

    result = make_proxy("large-model", CutSettings(output="cut", keep="3+3"))

The directory is an ordinary model: config, tokenizer, weights, and a model card. With `bridge_only` it holds
the bridge's weights and the card alone, for recipes of `{"cut_of": "base"}`.
"""

from __future__ import annotations

import copy
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.backends.transformers.cut import bridge_of, cut_model, put_bridge
from proxytune.backends.transformers.weights import load_model, quietly
from proxytune.checkpoints.bridge_file import Bridge, write_bridge
from proxytune.checkpoints.checkpoint import Checkpoint, find_checkpoint
from proxytune.checkpoints.cut import Keep, check_can_cut, cut_config
from proxytune.checkpoints.hub import SMALL_FILES
from proxytune.checkpoints.placement import DTYPES
from proxytune.checkpoints.references import is_url
from proxytune.cut.bridge import Streams, check_activation, fit_bridge, read_streams
from proxytune.cut.card import model_card
from proxytune.cut.heal import heal
from proxytune.cut.settings import BRIDGE_FILE, CutResult, CutSettings
from proxytune.cut.texts import Windows, read_windows, sample_windows
from proxytune.errors import InvalidRequest, OutputFileError
from proxytune.files import building
from proxytune.grants import NOTHING, Grants
from proxytune.machine import versions
from proxytune.recipe.spec import ModelSpec

_NUM_TIMED = 12
"""Number of tokens decoded by each model to compare their speed."""


def make_proxy(
    base: str,
    settings: CutSettings,
    *,
    grants: Grants = NOTHING,
    say: Callable[[str], None] = lambda text: None,
) -> CutResult:
    """Cut a small model out of a large one, and write it.

    Args:
        base: A model's directory, GGUF file, `package:NAME/PATH` or Hub id.
        settings: What to keep, on which text, and where to write it.
        grants: What the caller allows.
        say: Shows a message.

    Raises:
        UnsupportedModel: The model's layers are of another kind, or differ from each other.
        InvalidRequest: It is behind an API, or has too few layers.
        InputFileError: The text cannot be read, or is too short.
        OutputFileError: The directory is there already, or cannot be written.
        UserError: The model is missing, unsafe, corrupt or does not fit; see `errors.py`.
    """
    started = time.perf_counter()
    keep, target = Keep.parse(settings.keep), settings.directory
    if target.exists():
        raise OutputFileError(f"{target} is there already.\nhint: name a new directory")
    checkpoint = _find(base, keep, grants)
    num_tokens, seed = max(settings.tokens, settings.heal), settings.seed
    windows = None
    if settings.data is not None:
        windows = read_windows(
            settings.data, checkpoint.tokenizer, num_tokens=num_tokens, seed=seed
        )
    with quietly():
        say(f"loading {base}")
        model = load_model(checkpoint, ModelSpec(model=base, device=settings.device))
        model.requires_grad_(False).eval()
        check_activation(model.model.layers[0].mlp.act_fn, model.config)
        if windows is None:
            windows = sample_windows(model, num_tokens=num_tokens, seed=seed, say=say)
        work = _Work(model, keep, settings, windows, say)
        work.run()
        with building(target) as part:
            work.write(part, checkpoint, base)
            result = CutResult(
                directory=settings.output,
                base=base,
                keep=(keep.first, keep.last),
                total_s=round(time.perf_counter() - started, 1),
                **work.numbers,
            )
            (part / "README.md").write_text(model_card(settings, result), "utf-8")
    return result


def _find(base: str, keep: Keep, grants: Grants) -> Checkpoint:
    """Return the files of the model to cut, checked."""
    if is_url(base):
        raise InvalidRequest(
            f"{base} is the address of an API, and cutting needs a model's weights.\n"
            "hint: name its weights: a directory, a .gguf file or a Hub id"
        )
    checkpoint = find_checkpoint(
        base,
        root=Path.cwd(),
        trust_remote_code=grants.trust_remote_code,
        allow_pickle=grants.allow_pickle,
    )
    check_can_cut(checkpoint.config, keep, base)
    return checkpoint


class _Work:
    """The stages of one cut, in order; `numbers` are fields of `CutResult`."""

    def __init__(
        self,
        model: Any,
        keep: Keep,
        settings: CutSettings,
        windows: Windows,
        say: Callable[[str], None],
    ) -> None:
        self._base, self._keep, self._settings = model, keep, settings
        self._windows, self._say = windows, say
        self._cut: Any = cut_model(model, cut_config(model.config, keep), keep)
        self.numbers: dict[str, Any] = {}

    @property
    def _bridge(self) -> Any:
        return self._cut.model.layers[self._keep.bridge]

    def run(self) -> None:
        """Compute the bridge, train it if asked to, and measure."""
        self._solve()
        test = self._windows.test
        self._say("measuring")
        found = {"base": perplexity(self._base, test), "cut": perplexity(self._cut, test)}
        as_computed = copy.deepcopy(self._bridge.state_dict())
        self._heal()
        if self._settings.heal:
            found["healed"] = perplexity(self._cut, test)
            if not found["healed"] < found["cut"]:
                self._say("healing made the cut no better, so the bridge stays as computed")
                self._bridge.load_state_dict(as_computed)
        layers = self._keep.num_layers, len(self._base.model.layers)
        sizes = tuple(sum(p.numel() for p in m.parameters()) for m in (self._cut, self._base))
        self.numbers |= {
            "num_layers": layers,
            "num_parameters": sizes,
            "source": self._windows.source,
            "num_test_tokens": sum(len(ids) - 1 for ids in test),
            "perplexity": {name: round(value, 3) for name, value in found.items()},
            "token_ms": self._times(),
            "environment": {
                "device": str(self._base.device),
                "torch": torch.__version__,
                "num_threads": torch.get_num_threads(),
                **versions("proxytune", "transformers"),
            },
        }

    def _solve(self) -> None:
        started = time.perf_counter()
        texts = _first(self._windows.train, self._settings.tokens)
        num_tokens = sum(map(len, texts))
        self._say(f"reading {num_tokens:,} tokens of {self._windows.source}")
        parts = list(read_streams(self._base, texts, self._keep))
        streams = Streams(*(torch.cat(side) for side in zip(*parts, strict=True)))
        self._say("solving for the bridge")
        activation = self._base.model.layers[0].mlp.act_fn
        bridge, error = fit_bridge(streams, self._base.config, activation)
        put_bridge(self._bridge, bridge)
        seconds = round(time.perf_counter() - started, 1)
        self.numbers |= {"num_tokens": num_tokens, "error": error, "bridge_s": seconds}

    def _heal(self) -> None:
        wanted, num_tokens = self._settings.heal, 0
        started = time.perf_counter()
        if wanted:

            def progress(done: int, loss: float) -> None:
                self._say(f"healing: {done:,} of {wanted:,} tokens, {loss:.3f} nats from the base")

            num_tokens = heal(
                self._base,
                self._cut,
                self._bridge,
                self._windows.train,
                num_tokens=wanted,
                seed=self._settings.seed,
                progress=progress,
            )
        seconds = round(time.perf_counter() - started, 1) if wanted else 0.0
        self.numbers |= {"heal_tokens": num_tokens, "heal_s": seconds}

    def _times(self) -> dict[str, float]:
        """Return the milliseconds of one decoded token, of both models alternately."""
        prompt = (self._windows.test or self._windows.train)[0][:64]
        models = {"base": self._base, "cut": self._cut}
        states, times = {}, {name: [] for name in models}  # type: ignore[var-annotated]
        for name, model in models.items():
            backend = TransformersBackend(model, name=name)
            states[name] = backend, backend.prefill([prompt]).state
        token = torch.tensor([prompt[-1]], device=self._base.device)
        for _ in range(_NUM_TIMED):
            for name, (backend, state) in states.items():
                begun = time.perf_counter()
                float(backend.decode(state, token)[0, 0])  # waits for an accelerator
                times[name].append(1e3 * (time.perf_counter() - begun))
        return {name: round(statistics.median(own), 2) for name, own in times.items()}

    def write(self, directory: Path, checkpoint: Checkpoint, base: str) -> None:
        """Write the cut, or its bridge, into an empty directory."""
        keep, settings = self._keep, self._settings
        stored = checkpoint.stored_dtype
        dtype = settings.dtype or (stored if stored in DTYPES else "float32")
        if settings.bridge_only:
            rank = min(self._base.config.hidden_size, self._base.config.intermediate_size)
            parts = (part.to(getattr(torch, dtype)) for part in bridge_of(self._bridge, rank))
            about = {"base": base, "keep": str(keep)}
            write_bridge(Bridge(*parts), directory / BRIDGE_FILE, about)
            return
        cut = copy.deepcopy(self._cut).to(getattr(torch, dtype))
        details = {"base": base, "bridge": keep.bridge}
        cut.config = cut_config(checkpoint.config, keep, details)
        cut.config.dtype = dtype
        cut.save_pretrained(directory)
        for pattern in (*SMALL_FILES, "chat_template*"):
            for file in checkpoint.directory.glob(pattern):
                is_index = file.name.endswith(".index.json")
                if file.is_file() and not (directory / file.name).exists() and not is_index:
                    shutil.copyfile(file, directory / file.name)


def _first(windows: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """Return as many windows as have about `num_tokens` tokens."""
    taken: list[list[int]] = []
    total = 0
    for window in windows:
        if total >= num_tokens:
            break
        taken.append(window)
        total += len(window)
    return taken


@torch.no_grad()
def perplexity(model: Any, windows: Sequence[Sequence[int]]) -> float:
    """Return the perplexity of a model on windows of token ids; nan for none."""
    total, count = 0.0, 0
    for window in windows:
        token_ids = torch.tensor([list(window)], device=model.device)
        logprobs = model(token_ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        total -= float(logprobs.gather(-1, token_ids[0, 1:, None]).double().sum())
        count += len(window) - 1
    return math.exp(total / count) if count else math.nan
