"""One tuning run, from rows to a recipe that is ready to generate.

    result = tune(TuneSettings(output="my-recipe", data="rows.jsonl", anti_expert="small", base="large"))

The output directory is a recipe; what the run itself leaves is below `training/`:

    config.json, README.md       the recipe and its model card
    adapters/NAME or NAME/       the expert: a LoRA adapter, or full weights
    training/settings.json       what was asked for, and digests of the data
    training/log.jsonl           a row per logged step
    training/loss.png            the same as a picture
    training/result.json         what was measured

While a run is under way its checkpoints and offsets stand there too; they go when it is done. A run is
resumed from its last whole checkpoint, if the settings and the data are those it began with.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from proxytune.checkpoints.references import local_reference
from proxytune.data.passages import prompt_and_answer
from proxytune.data.rows import Rows, read_rows, split_rows
from proxytune.errors import (
    AdapterMismatch,
    BackendError,
    InputFileError,
    InvalidRequest,
    OutputFileError,
    ProxytuneError,
    UserError,
    missing_extra,
)
from proxytune.files import write_json
from proxytune.machine import peak_memory, versions
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.tune.encode import (
    IGNORED,
    Encoded,
    Example,
    PreferenceExample,
    encode,
)
from proxytune.tune.settings import (
    Display,
    Interrupted,
    TuneResult,
    TuneSettings,
    default_learning_rate,
    expert_path,
)
from proxytune.tune.training import load_frozen

if TYPE_CHECKING:
    from proxytune.checkpoints.checkpoint import Checkpoint
    from proxytune.measure.score import ScoreReport
    from proxytune.model import ProxyTuned
    from proxytune.request import Prompt
    from proxytune.tune.trainer import FrozenEnsemble

ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 16))
"""Strengths that are tried on the validation rows."""
MOST_VALID_ROWS = 500
"""A share of the rows becomes validation rows, but no more than so many: each evaluation reads them all."""
CHARACTERS_PER_TOKEN = 4
"""Of English, about; how much text is measured need not be exact."""
SCORE_WINDOW = 512


def tune(
    settings: TuneSettings, *, resume: bool = False, display: Display | None = None
) -> TuneResult:
    """Train an expert and write its recipe.

    Args:
        settings: What is asked for.
        resume: Go on with the run in the output directory.
        display: Told of progress.

    Raises:
        InputFileError: The data cannot be read or used; names the line.
        OutputFileError: The output directory holds something else, or cannot be written.
        UserError: A model is missing, unsafe, does not match, or does not fit; see `errors.py`.
        Interrupted: Ctrl-C; the state is saved.
        BackendError: Training failed, as by a loss that is not a number.
    """
    display = display or Display()
    for library in ("trl", "datasets", "matplotlib"):
        if importlib.util.find_spec(library) is None:
            raise missing_extra(
                f"tuning needs the library {library}, which is not installed", "tune"
            )
    from proxytune.backends.transformers.weights import quietly

    run = _Run(settings, display)
    try:
        with quietly():
            return run.result(resume=resume)
    finally:
        display.close()


class _Run:
    """The stages of one run, in order."""

    def __init__(self, settings: TuneSettings, display: Display) -> None:
        self._settings = settings
        self._display = display

    def result(self, *, resume: bool) -> TuneResult:
        settings, display = self._settings, self._display
        self._check_directory(resume=resume)
        small, base = self._check_models()
        train, valid, test = self._read_rows()
        prompt = settings.prompt or ("chat" if _is_conversation(train) else "plain")
        data = {
            name: {
                "source": rows.source,
                "kind": rows.kind,
                "rows": len(rows),
                "digest": rows.digest,
            }
            for name, rows in (("train", train), ("valid", valid), ("test", test))
            if rows is not None
        }
        max_length = self._max_length(small, base)
        encoded = {
            name: encode(
                rows, small.tokenizer, prompt_format=prompt, max_length=max_length, name=small.name
            )
            for name, rows in (("train", train), ("valid", valid))
            if rows is not None
        }
        if self._claim(resume=resume, data=data):
            display.say("this run is finished; nothing is left to do")
            return _read_result(settings.training / "result.json")
        limits = {"train": settings.max_tokens, "valid": settings.max_valid_tokens}
        encoded = {k: _limited(part, limits[k], settings.seed) for k, part in encoded.items()}
        for name, part in encoded.items():
            data[name] |= _counts(part)
            display.say(f"{name}: {_shown_counts(data[name], max_length)}")
        outcome = self._train(small, base, encoded)
        self._display.say("writing the recipe")
        recipe = self._recipe(small, base, prompt)
        result = TuneResult(
            directory=settings.output,
            expert=settings.expert_name,
            alpha=recipe.experts[0].alpha,
            data=data,
            environment={
                "torch": torch.__version__,
                "num_threads": torch.get_num_threads(),
                **versions("proxytune", "transformers", "peft", "trl"),
            },
            **outcome,
        )
        self._publish(recipe, result, prompt)
        result = self._measured(recipe, result, valid, test)
        recipe = _with_alpha(recipe, result.alpha)
        self._publish(recipe, result, prompt)
        write_json(settings.training / "result.json", result.to_dict())
        for leftover in ("checkpoints", "offsets"):
            shutil.rmtree(settings.training / leftover, ignore_errors=True)
        return result

    # Before training ---------------------------------------------------------------------------

    def _check_directory(self, *, resume: bool) -> None:
        directory, training = self._settings.directory, self._settings.training
        there = (training / "settings.json").exists()
        if resume and not there:
            raise OutputFileError(
                f"{directory} holds no run to resume.\nhint: leave --resume out to begin one"
            )
        if there and not resume:
            raise OutputFileError(
                f"{directory} holds another run, which would be lost.\n"
                "hint: continue it with --resume, or name another directory"
            )
        if (
            not there
            and directory.exists()
            and (not directory.is_dir() or any(directory.iterdir()))
        ):
            raise OutputFileError(
                f"{directory} is there already and is not a tuning run.\nhint: name a new directory"
            )

    def _check_models(self) -> tuple[Checkpoint, Checkpoint | None]:
        """Find the models, and check as `proxytune doctor` does that they will make a recipe."""
        from proxytune.checkpoints.checkpoint import find_checkpoint
        from proxytune.loading.doctor import examine

        settings = self._settings
        small = find_checkpoint(settings.small, root=Path.cwd())
        self._check_targets(small)
        if settings.anti_expert is None or settings.base is None:
            return small, None
        whole = ModelSpec(model=settings.anti_expert)
        examine(
            Recipe(
                base=ModelSpec(model=settings.base),
                experts=(ExpertSpec(settings.expert_name, whole, whole),),
            ).with_settings(device=settings.device)
        ).raise_first()
        return small, find_checkpoint(settings.base, root=Path.cwd())

    def _check_targets(self, small: Checkpoint) -> None:
        known = {name.rpartition(".")[2] for name in small.linear_shapes}
        for target in self._settings.lora_targets:
            if target not in known:
                raise AdapterMismatch(
                    f"{small.name} has no linear layer {target!r}, so no adapter can sit on it; it has "
                    f"{', '.join(sorted(known))}.\nhint: leave --lora-targets out for all of them"
                )

    def _read_rows(self) -> tuple[Rows, Rows | None, Rows | None]:
        settings = self._settings
        train = read_rows(settings.data, split=settings.split)
        valid: Rows | None
        if settings.valid_data is not None:
            valid = read_rows(settings.valid_data, split=settings.split)
        else:
            share = settings.valid_share
            if len(train) > 1:
                share = min(share, MOST_VALID_ROWS / len(train))
            train, valid = split_rows(train, share, settings.seed)
        test = None if settings.test_data is None else read_rows(settings.test_data)
        for other in (valid, test):
            if other is not None and other.kind != train.kind:
                raise InputFileError(
                    f"{other.source} has rows of the format {other.kind}, and {train.source} of the format "
                    f"{train.kind}.\nhint: bring both into one format"
                )
        if (train.kind == "preference") != (settings.method == "dpo"):
            wanted = (
                "preference pairs" if settings.method == "dpo" else "text, completions or messages"
            )
            raise InputFileError(
                f"method {settings.method} trains on {wanted}, and {train.source} has rows of the format "
                f"{train.kind}.\nhint: give another file, or "
                f"--method {'sft' if settings.method == 'dpo' else 'dpo'}"
            )
        return train, valid, test

    def _claim(self, *, resume: bool, data: Mapping[str, Any]) -> bool:
        """Enter the run into its directory, or check that it is the one there; return whether it is done."""
        settings = self._settings
        path = settings.training / "settings.json"
        # Where files stand does not change a run; the data are compared by what they hold.
        asked = {
            key: value
            for key, value in json.loads(json.dumps(asdict(settings))).items()
            if key not in ("output", "device", "offsets_dir", "data", "valid_data", "test_data")
        }
        content = {"settings": asked, "data": {name: part["digest"] for name, part in data.items()}}
        if not resume:
            write_json(path, content)
            return False
        there = json.loads(path.read_text("utf-8"))
        for key, value in asked.items():
            if there["settings"].get(key) != value:
                raise OutputFileError(
                    f"the run in {settings.directory} was begun with {key} "
                    f"{there['settings'].get(key)!r}, and is now given {value!r}.\n"
                    "hint: resume with the settings it was begun with"
                )
        if there["data"] != content["data"]:
            raise OutputFileError(
                f"the run in {settings.directory} was begun with other data than these files hold now.\n"
                "hint: bring the old files back, or begin a new run in another directory"
            )
        return (settings.training / "result.json").exists()

    def _max_length(self, small: Checkpoint, base: Checkpoint | None) -> int:
        contexts = [c.max_context for c in (small, base) if c is not None]
        limit = min((n for n in contexts if n is not None), default=None)
        asked = self._settings.max_length
        if asked is not None and limit is not None and asked > limit:
            raise InvalidRequest(
                f"max_length is {asked}, and the smallest context is {limit} tokens.\n"
                f"hint: --max-length {limit}"
            )
        return asked or min(1024, limit or 1024)

    # Training ----------------------------------------------------------------------------------

    def _train(
        self, small: Checkpoint, base: Checkpoint | None, encoded: Mapping[str, Encoded]
    ) -> dict[str, Any]:
        """Train, leave the best state in the recipe's directory, and return what the result says of it."""
        import transformers

        from proxytune.checkpoints.placement import running_device

        settings = self._settings
        device = running_device(settings.device)
        on_cpu = device == "cpu"
        dtype = settings.dtype or ("float32" if on_cpu else "bfloat16")
        transformers.set_seed(settings.seed)
        # On a GPU a frozen model is kept in half precision; what is trained is always kept in float32.
        stored = "float32" if on_cpu or settings.full else dtype
        model = load_frozen(settings.small, device=device, dtype=stored)
        width = model.config.get_text_config(decoder=True).hidden_size
        rate = settings.learning_rate or default_learning_rate(
            settings.method, full=settings.full, width=width
        )
        started = time.perf_counter()
        ensemble = None
        if settings.method == "cpt":
            assert base is not None
            ensemble = self._ensemble(small, base, model, encoded, device=device, dtype=dtype)
        offsets_s = time.perf_counter() - started
        model = self._trainable(model, small)
        trainer, journal = self._trainer(
            model, small, encoded, ensemble, rate=rate, on_cpu=on_cpu, dtype=dtype
        )
        self._fit(trainer)
        self._load_adapter(trainer, trainer.state.best_model_checkpoint)
        self._save_expert(trainer.model, small)
        rows = journal()
        losses = [r["valid_loss"] for r in rows if r.get("valid_loss") is not None]
        return {
            "num_steps": trainer.state.global_step,
            "num_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "train_s": max((r["elapsed_s"] for r in rows), default=0.0),
            "offsets_s": round(offsets_s, 2),
            "peak_memory_bytes": peak_memory(device),
            "valid_loss": min(losses, default=None),
            "first_valid_loss": losses[0] if losses else None,
            "learning_rate": rate,
        }

    def _ensemble(
        self,
        small: Checkpoint,
        base: Checkpoint,
        anti_expert: Any,
        encoded: Mapping[str, Encoded],
        *,
        device: str,
        dtype: str,
    ) -> FrozenEnsemble:
        """Run the frozen models over all rows, or take what an earlier run left of it."""
        from proxytune.text.vocab import align
        from proxytune.tune.heads import (
            FrozenHeads,
            align_base_head,
            check_head,
            form_coefficients,
            head_of,
        )
        from proxytune.tune.offsets import Offsets, offsets_key
        from proxytune.tune.trainer import FrozenEnsemble

        settings = self._settings
        alignment = align(base.vocabulary, small.vocabulary)
        folder = Path(settings.offsets_dir or settings.training / "offsets")
        big = load_frozen(settings.base or "", device=device, dtype=dtype)
        for model in (big, anti_expert):
            check_head(model, head_of(model))
        factors = form_coefficients(settings.cpt_form, settings.alpha or 1.0)
        own = head_of(anti_expert)
        # The small head stays what the expert's is: where they are one, their logits are one product.
        heads = FrozenHeads.of(
            align_base_head(head_of(big), alignment, small.vocabulary).to(
                device, torch.bfloat16 if dtype == "bfloat16" else None
            ),
            own.copy() if settings.full else own,
            base_factor=factors.base,
            anti_expert_factor=factors.anti_expert,
        )
        parts = {}
        for name, part in encoded.items():
            examples = [e for e in part.examples if isinstance(e, Example)]
            key = offsets_key(examples, base.name, small.name, dtype)
            there = Offsets.open(folder / name, key)

            def advance(done: int, total: int, name: str = name) -> None:
                self._display.stage(f"base over {name} rows", done, total)

            parts[name] = there or Offsets.build(
                folder / name,
                examples,
                base=big,
                anti_expert=anti_expert,
                alignment=alignment,
                base_name=base.name,
                key=key,
                on_progress=advance,
            )
        del big
        gc.collect()
        return FrozenEnsemble(heads, factors.expert, parts["train"], parts.get("valid"))

    def _trainable(self, model: Any, small: Checkpoint) -> Any:
        """Return the model with what is trained: all weights, or a LoRA adapter."""
        from peft import LoraConfig, get_peft_model

        settings = self._settings
        if settings.full:
            return model.requires_grad_(True)
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            lora_dropout=settings.lora_dropout,
            target_modules=list(settings.lora_targets) or "all-linear",
            task_type="CAUSAL_LM",
        )
        peft_model = get_peft_model(model, config)
        reference = local_reference(settings.small, settings.directory)
        peft_model.peft_config["default"].base_model_name_or_path = reference
        return peft_model

    def _trainer(
        self,
        model: Any,
        small: Checkpoint,
        encoded: Mapping[str, Encoded],
        ensemble: FrozenEnsemble | None,
        *,
        rate: float,
        on_cpu: bool,
        dtype: str,
    ) -> tuple[Any, Callable[[], list[dict[str, Any]]]]:
        """Return TRL's trainer with everything in place, and what reads its journal."""
        from proxytune.tune import trainer as trainers

        settings, display = self._settings, self._display
        train, valid = encoded["train"].examples, encoded.get("valid")
        per_epoch = math.ceil(math.ceil(len(train) / settings.batch_size) / settings.accumulate)
        num_steps = settings.max_steps or max(1, math.ceil(per_epoch * settings.epochs))
        checkpoints = settings.training / "checkpoints"
        checkpoint = trainers.last_checkpoint(checkpoints)
        shared: dict[str, Any] = {
            "output_dir": checkpoints,
            "seed": settings.seed,
            "learning_rate": rate,
            "num_steps": num_steps,
            "batch_size": settings.batch_size,
            "accumulate": settings.accumulate,
            "eval_every": settings.eval_every or max(1, min(100, num_steps // 10)),
            "evaluates": valid is not None,
            "is_resumed": checkpoint is not None,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "on_cpu": on_cpu,
            "max_length": self._max_length(small, None),
        }
        latest: dict[str, float | None] = {}

        def on_row(row: Mapping[str, Any]) -> None:
            latest.update({k: row[k] for k in ("loss", "valid_loss") if k in row})

        def on_step(step: int, total: int) -> None:
            display.stage("training", step, total, **latest)

        path = settings.training / "log.jsonl"
        callbacks: list[Any] = [
            trainers.FiniteGradients(),
            trainers.LastEvaluation(),
            trainers.Journal(path, on_row, on_step),
        ]
        if settings.patience and valid is not None:
            callbacks.append(trainers.EarlyStop(settings.patience))
        self._stopper = trainers.StopOnSignal(
            lambda: display.say("stopping after this step; again to stop at once")
        )
        callbacks.append(self._stopper)
        common: dict[str, Any] = {
            "model": model,
            "processing_class": small.tokenizer,
            "callbacks": callbacks,
        }
        trainer: Any
        if settings.method == "dpo":
            trainer = trainers.PreferenceTrainer(
                args=trainers.dpo_config(beta=settings.beta, bf16=dtype == "bfloat16", **shared),
                train_dataset=trainers.preference_dataset(train),  # type: ignore[arg-type]
                eval_dataset=None if valid is None else trainers.preference_dataset(valid.examples),  # type: ignore[arg-type]
                ref_model=load_frozen(
                    settings.small, device="cpu" if on_cpu else None, dtype="float32"
                )
                if settings.full
                else None,
                **common,
            )
        else:
            trainer = trainers.ExpertTrainer(
                args=trainers.sft_config(**shared),
                train_dataset=trainers.example_dataset(train),  # type: ignore[arg-type]
                eval_dataset=None if valid is None else trainers.example_dataset(valid.examples),  # type: ignore[arg-type]
                data_collator=trainers.Padded(small.tokenizer.pad_token_id or 0),
                ensemble=ensemble,
                autocast=torch.bfloat16 if dtype == "bfloat16" else None,
                **common,
            )
        self._checkpoint = checkpoint
        display.say(
            f"{num_steps:,} steps of {settings.batch_size * settings.accumulate} rows, learning rate {rate:g}"
            + (f", resumed after step {trainers.checkpoint_step(checkpoint)}" if checkpoint else "")
        )
        return trainer, lambda: trainers.read_journal(path)

    def _fit(self, trainer: Any) -> None:
        from transformers import PrinterCallback, ProgressCallback

        from proxytune.tune import trainer as trainers

        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        checkpoints = Path(trainer.args.output_dir)
        self._load_adapter(trainer, self._checkpoint)
        try:
            with self._stopper.listening():
                trainer.train(
                    resume_from_checkpoint=str(self._checkpoint) if self._checkpoint else None
                )
        except trainers.NonFiniteLoss as error:
            kept = trainers.last_checkpoint(checkpoints)
            where = (
                f"the state after step {trainers.checkpoint_step(kept)} is in {kept}"
                if kept
                else ("no checkpoint had been written yet")
            )
            raise BackendError(
                f"{error}, so training stopped before it reached the weights; {where}.\n"
                "hint: begin a new run with a lower --learning-rate"
            ) from error
        except ProxytuneError:
            raise
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"memory ran out while training: {str(error).splitlines()[0]}\n"
                "hint: a smaller --batch-size with more --accumulate, or --gradient-checkpointing"
            ) from error
        if self._stopper.was_asked:
            raise Interrupted(
                f"stopped after step {trainer.state.global_step}; the state is saved.\n"
                "hint: the same command with --resume goes on"
            )

    def _load_adapter(self, trainer: Any, checkpoint: str | Path | None) -> None:
        """Load the adapter of a checkpoint.

        transformers 5.19 leaves it out where a model has several, as DPO's has with its reference.
        """
        if checkpoint is not None and not self._settings.full:
            trainer.model.load_adapter(str(checkpoint), "default", is_trainable=True)

    def _save_expert(self, model: Any, small: Checkpoint) -> None:
        settings = self._settings
        target = settings.directory / expert_path(settings)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # DPO keeps a reference adapter beside the expert's.
            chosen = {} if settings.full else {"selected_adapters": ["default"]}
            model.save_pretrained(target, **chosen)
            # A card that PEFT writes unasked; the recipe has one.
            (target / "README.md").unlink(missing_ok=True)
            if settings.full:
                from proxytune.checkpoints.checkpoint import find_checkpoint

                find_checkpoint(settings.small, root=Path.cwd()).tokenizer.save_pretrained(target)
        except OSError as error:
            raise OutputFileError(
                f"the expert cannot be written to {target}: {error.strerror or error}.\n"
                "hint: make room on the disk, then continue with --resume"
            ) from error

    # After training ----------------------------------------------------------------------------

    def _recipe(self, small: Checkpoint, base: Checkpoint | None, prompt: str) -> Recipe:
        settings = self._settings
        directory = settings.directory
        reference = local_reference(settings.small, directory)
        path = expert_path(settings)
        if settings.full:
            expert = ModelSpec(model=path, prompt=prompt)
        else:
            expert = ModelSpec(model=reference, adapter=path, prompt=prompt)
        anti_expert = ModelSpec(model=reference, prompt=prompt)
        if base is None:
            # The tuned model alone: small + 1 * (tuned - small).
            return Recipe(
                base=ModelSpec(model=reference, prompt=prompt),
                experts=(
                    ExpertSpec(
                        settings.expert_name,
                        expert,
                        ModelSpec(same_as="base"),
                        settings.alpha or 1.0,
                    ),
                ),
                directory=directory,
            )
        base_prompt = settings.base_prompt or prompt
        if settings.base_prompt is None and prompt == "chat":
            template = small.tokenizer.chat_template
            if isinstance(template, str) and base.tokenizer.chat_template != template:
                base_prompt = template  # so that base and expert see the same text
        return Recipe(
            base=ModelSpec(
                model=local_reference(settings.base or "", directory), prompt=base_prompt
            ),
            experts=(ExpertSpec(settings.expert_name, expert, anti_expert, settings.alpha or 1.0),),
            directory=directory,
        )

    def _measured(
        self, recipe: Recipe, result: TuneResult, valid: Rows | None, test: Rows | None
    ) -> TuneResult:
        """Measure base, expert and steered base; choose the strength where none was given."""
        from proxytune.model import ProxyTuned

        settings = self._settings
        if (valid is None and test is None) or settings.measure_tokens == 0:
            return result
        try:
            model = ProxyTuned.load(recipe, device=settings.device)
        except UserError as error:
            self._display.say(f"not measured: {error}")
            return result
        alpha = result.alpha
        steers = recipe.experts[0].anti_expert.same_as is None
        if valid is not None:
            # With one strength given there is nothing to choose.
            alphas = list(ALPHAS) if steers and settings.alpha is None else [alpha]
            report = self._score(model, valid, alphas, "measuring on validation rows")
            if settings.alpha is None and steers and settings.method != "dpo":
                rows = [row for row in report.rows if row.name == "steered"]
                alpha = float(min(rows, key=lambda row: row.nats).alpha or alpha)
            result = replace(result, alpha=alpha, valid=report.to_dict())
        if test is not None:
            report = self._score(model, test, sorted({alpha, 1.0}), "measuring on test rows")
            result = replace(result, test=report.to_dict())
        return result

    def _score(
        self, model: ProxyTuned, rows: Rows, alphas: Sequence[float], name: str
    ) -> ScoreReport:
        def advance(done: int, total: int) -> None:
            self._display.stage(name, done, total)

        num_characters = CHARACTERS_PER_TOKEN * self._settings.measure_tokens
        if rows.kind == "text":
            text = "\n\n".join(row["text"].strip() for row in rows.rows)[:num_characters]
            contexts = [m.backend.capabilities.max_context for m in model.ensemble.members]
            window = min([SCORE_WINDOW, *(c for c in contexts if c is not None)])
            return model.score(text, alphas, window=window, on_progress=advance)
        pairs: list[tuple[Prompt, str]] = []
        size = 0
        for prompt, answer in map(prompt_and_answer, rows.rows):
            if size > num_characters:
                break
            pairs.append((prompt, answer))
            size += len(answer) + len(str(prompt))
        return model.score_completions(pairs, alphas, on_progress=advance)

    def _publish(self, recipe: Recipe, result: TuneResult, prompt: str) -> None:
        from proxytune.tune.card import loss_plot, model_card
        from proxytune.tune.trainer import read_journal

        settings = self._settings
        journal = read_journal(settings.training / "log.jsonl")
        recipe.write(
            settings.directory,
            overwrite=True,
            card=model_card(recipe, settings, result, prompt),
        )
        loss_plot(journal, settings.training / "loss.png", result.first_valid_loss)


def _with_alpha(recipe: Recipe, alpha: float) -> Recipe:
    return replace(recipe, experts=(replace(recipe.experts[0], alpha=alpha),))


def _is_conversation(rows: Rows) -> bool:
    return rows.kind == "messages" or isinstance(rows.rows[0].get("prompt"), list)


def _limited(part: Encoded, max_tokens: int | None, seed: int) -> Encoded:
    """Return examples drawn at random that have so many tokens together, in their order; at least one."""
    if max_tokens is None or part.num_tokens <= max_tokens:
        return part
    sizes = [_size(example) for example in part.examples]
    kept: set[int] = set()
    size = 0
    for index in random.Random(seed).sample(range(len(sizes)), len(sizes)):
        if kept and size + sizes[index] > max_tokens:
            break
        kept.add(index)
        size += sizes[index]
    examples: Any = [example for i, example in enumerate(part.examples) if i in kept]
    return replace(
        part,
        examples=examples,
        num_tokens=size,
        num_trained=sum(map(_trained, examples)),
    )


def _size(example: Example | PreferenceExample) -> int:
    if isinstance(example, Example):
        return len(example.token_ids)
    return 2 * len(example.prompt_ids) + len(example.chosen_ids) + len(example.rejected_ids)


def _trained(example: Example | PreferenceExample) -> int:
    if isinstance(example, Example):
        return sum(label != IGNORED for label in example.labels[1:])
    return len(example.chosen_ids) + len(example.rejected_ids)


def _counts(part: Encoded) -> dict[str, int]:
    return {
        f.name: getattr(part, f.name)
        for f in fields(part)
        if f.name.startswith("num_") and f.name != "num_rows"
    } | {"num_examples": len(part.examples)}


def _shown_counts(part: Mapping[str, Any], max_length: int) -> str:
    text = (
        f"{part['rows']:,} rows of {part['source']} ({part['kind']}), {part['num_tokens']:,} tokens, "
        f"{part['num_trained']:,} trained on"
    )
    if part["num_truncated"]:
        text += f"; {part['num_truncated']:,} rows cut to {max_length} tokens"
    if part["num_dropped"]:
        text += f"; {part['num_dropped']:,} left out, whose prompt alone is longer"
    return text


def _read_result(path: Path) -> TuneResult:
    with suppress(OSError, ValueError, TypeError):
        return TuneResult(**json.loads(path.read_text("utf-8")))
    raise OutputFileError(
        f"{path} cannot be read, so the finished run has no result.\n"
        "hint: begin a new run in another directory"
    )
