"""A recipe in transformers' `generate`: what differs from one model's.

Options that need the inside of one model, or a cache of another kind, are refused before anything runs. A
call's `alpha` and `experts` hold in all that it does: for classifier-free guidance, transformers runs the
model without them, and it gives them to assistant models, which do not know them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from proxytune.errors import InvalidRequest, PromptTooLong, UnsupportedModel
from proxytune.integrations.ensemble_cache import CACHE_OPTION, ProxyTunedCache, own_cache

_INSIDE = "which belong to one model, and a recipe runs several"
_DRAFTS = "assistant_model and prompt_lookup_num_tokens draft for recipes too"
_LEAVE_OUT = "leave it out"
_REFUSED = {
    "assistant_early_exit": (f"it drafts with first layers, {_INSIDE}", _DRAFTS),
    "use_mtp": (f"it drafts with layers for several tokens, {_INSIDE}", _DRAFTS),
    "speculation_type": (f"it drafts from hidden states, {_INSIDE}", _DRAFTS),
    "dola_layers": (f"it compares layers, {_INSIDE}", _LEAVE_OUT),
    "penalty_alpha": (
        f"contrastive search compares hidden states, {_INSIDE}",
        "leave it out, and use repetition_penalty or no_repeat_ngram_size against repetition",
    ),
    "output_attentions": (f"it asks for attention weights, {_INSIDE}", _LEAVE_OUT),
    "output_hidden_states": (f"it asks for hidden states, {_INSIDE}", _LEAVE_OUT),
    "inputs_embeds": (f"it holds embeddings, {_INSIDE}", "give input_ids"),
    "token_healing": (
        "transformers heals a prompt without the alpha and experts of the call",
        "leave it out, and end the prompt where a word ends",
    ),
}
"""Options of `generate` that a recipe cannot honour, each with the reason and a hint."""

_NO_BATCHING = (
    "continuous batching keeps its keys and values in pages of one model, and a recipe runs several.\n"
    "hint: give `generate` a padded batch, or run `proxytune serve`, which batches requests as they come"
)
_STEERING = ("alpha", "experts")


class SteeredGenerationMixin(GenerationMixin):
    """`generate` for a model that steers.

    transformers looks for `GenerationMixin` in the name of a class to know that its models can generate.
    """

    _ensemble: (
        Any  # transformers evaluates annotations, so no name can be here that is for type checkers
    )
    generation_config: GenerationConfig

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Generate token ids as transformers does, steered.

        Args:
            inputs: `[batch, num_tokens]`, of the base's vocabulary; or `input_ids`.
            generation_config: As in transformers.
            *arguments: As in transformers.
            **options: As in transformers; and `alpha` and `experts`, as in `forward`, which may stand in a
                generation config too. With `stop_strings`, `tokenizer` is the recipe's own unless given.

        Raises:
            InvalidRequest: An option cannot be honoured, or the inputs are not token ids.
            PromptTooLong: Prompt and new tokens exceed a model's context.
            UnknownExpert: The recipe has no expert of that name.
            BackendError: A model failed.
            ValueError: transformers refuses an option.
        """
        settings = {
            key: _setting(key, options, generation_config, self.generation_config)
            for key in (*_REFUSED, "cache_implementation", "num_beams", "stop_strings")
        }
        _refuse(settings)
        if options.get("assistant_model") is not None and (settings["num_beams"] or 1) > 1:
            raise InvalidRequest(
                f"assistant_model was given, and num_beams is {settings['num_beams']}, but drafts continue "
                "one sequence.\nhint: leave one of the two out"
            )
        _check_inputs(inputs if inputs is not None else options.get("input_ids"), options)
        if settings["stop_strings"] is not None and options.get("tokenizer") is None:
            options["tokenizer"] = self._ensemble.tokenizer
        return super().generate(inputs, generation_config, *arguments, **options)

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        """Return the settings and what `forward` gets, with steering that stands among the settings."""
        parent: Any = super()
        config, model_kwargs = parent._prepare_generation_config(*args, **kwargs)
        for key in _STEERING:
            value = getattr(config, key, None)
            if value is not None:
                model_kwargs.setdefault(key, value)
        return config, model_kwargs

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return what `forward` gets; transformers adds the tokenizers of a call, which concern its text."""
        for key in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(key, None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return inputs

    def heal_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: transformers would choose tokens without a call's alpha and experts.

        Raises:
            InvalidRequest: Always.
        """
        _refuse({"token_healing": True})

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the cache of continuous batching belongs to one model.

        Raises:
            UnsupportedModel: Always.
        """
        raise UnsupportedModel(_NO_BATCHING)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, as `init_continuous_batching` does.

        Raises:
            UnsupportedModel: Always.
        """
        raise UnsupportedModel(_NO_BATCHING)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give `generate` an empty cache of all members, or check the one it was given."""
        self._check_length(generation_config, model_kwargs)
        given = model_kwargs.get(CACHE_OPTION)
        if given is None and generation_config.use_cache is False:
            return
        cache = own_cache(given)
        num_rows = batch_size * max(
            generation_config.num_beams, generation_config.num_return_sequences
        )
        if cache.num_slots and cache.num_rows != num_rows:
            raise InvalidRequest(
                f"the cache holds {cache.num_rows} row(s), and {num_rows} are to be generated.\nhint: give "
                "one that was made for as many rows, or repeat its rows with cache.batch_repeat_interleave"
            )
        if given is not None:
            cache._is_user_defined = True  # type: ignore[attr-defined]
        model_kwargs[CACHE_OPTION] = cache

    def _check_length(
        self, generation_config: GenerationConfig, model_kwargs: Mapping[str, Any]
    ) -> None:
        """Refuse before the first token what would exceed a model's context later."""
        mask, longest = model_kwargs.get("attention_mask"), int(generation_config.max_length)
        if mask is not None:
            longest -= mask.shape[1] - int(mask.sum(-1).max())  # padding takes no position
        for member in self._members_that_run(*(model_kwargs.get(key) for key in _STEERING)):
            limit = member.backend.capabilities.max_context
            if limit is not None and longest > limit:
                raise PromptTooLong(
                    f"prompt and new tokens may come to {longest} tokens, and {member.name} has a context of "
                    f"{limit}.\nhint: shorten the prompt, or ask for {longest - limit} fewer new tokens with "
                    "max_new_tokens"
                )

    if TYPE_CHECKING:  # of the model class

        def _members_that_run(self, alpha: Any, experts: Any) -> Sequence[Any]: ...

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Return the logits processors; the one for classifier-free guidance steers as the call does."""
        parent: Any = super()
        processors = parent._get_logits_processor(*args, **kwargs)
        steering = _steering_of(kwargs.get("model_kwargs"))
        for processor in processors:
            is_guidance = isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
            if is_guidance and processor.model is self:
                processor.model = partial(self, **steering)
        return processors

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Return what drafts; another model than this one does not know `alpha` and `experts`."""
        model_kwargs = kwargs.get("model_kwargs")
        if kwargs.get("assistant_model") is not self and model_kwargs:
            kwargs["model_kwargs"] = {k: v for k, v in model_kwargs.items() if k not in _STEERING}
        parent: Any = super()
        return parent._get_candidate_generator(*args, **kwargs)


def _steering_of(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (model_kwargs or {}).items() if key in _STEERING}


def _setting(key: str, options: Mapping[str, Any], *configs: GenerationConfig | None) -> Any:
    """Return what `generate` goes by: a call's option, or the first config's value that is not None."""
    values = [options.get(key), *(getattr(config, key, None) for config in configs)]
    return next((value for value in values if value is not None), None)


def _refuse(settings: Mapping[str, Any]) -> None:
    """Refuse settings of `generate` that a recipe cannot honour."""
    for key, (reason, hint) in _REFUSED.items():
        value = settings.get(key)
        if isinstance(value, Tensor) or value:
            shown = "was given" if isinstance(value, Tensor) else f"is {value!r}"
            raise InvalidRequest(f"{key} {shown}, but {reason}.\nhint: {hint}")
    cache = settings.get("cache_implementation")
    if cache == "paged":
        raise UnsupportedModel(f"cache_implementation is 'paged': {_NO_BATCHING}")
    if cache not in (None, "dynamic"):
        raise InvalidRequest(
            f"cache_implementation is {cache!r}, but each model of a recipe has a cache that grows.\n"
            "hint: leave cache_implementation out"
        )


def _check_inputs(inputs: Any, options: Mapping[str, Any]) -> None:
    """Refuse inputs that are no batch of token ids, end with padding, or are in the cache already."""
    if inputs is None:
        return
    if not isinstance(inputs, Tensor):
        is_encoding = isinstance(inputs, Mapping) or hasattr(inputs, "input_ids")
        hint = "model.generate(**inputs)" if is_encoding else "tokenizer(text, return_tensors='pt')"
        raise InvalidRequest(
            f"generate was given a {type(inputs).__name__}, but takes token ids as a tensor.\nhint: "
            + ("unpack it: " if is_encoding else "encode the text: ")
            + hint
        )
    if inputs.dim() != 2 or inputs.is_floating_point():
        raise InvalidRequest(
            f"generate was given a tensor of {inputs.dtype} with shape {list(inputs.shape)}, but takes token "
            "ids as [batch, num_tokens]"
        )
    cache = options.get("cache", options.get("past_key_values"))
    mask = options.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() and not mask[:, -1].all():
        raise InvalidRequest(
            "attention_mask ends with padding, after which a model would go on instead of after the text.\n"
            "hint: pad on the left: tokenizer.padding_side = 'left'"
        )
    num_slots = cache.num_slots if isinstance(cache, ProxyTunedCache) else 0
    if isinstance(mask, Tensor) and not num_slots and mask.shape != inputs.shape:
        raise InvalidRequest(
            f"attention_mask has shape {list(mask.shape)}, but input_ids has {list(inputs.shape)}"
        )
    is_whole = not isinstance(mask, Tensor) or mask.shape[-1] == inputs.shape[1]
    if num_slots and is_whole and inputs.shape[1] <= num_slots:
        raise InvalidRequest(
            f"the cache holds {num_slots} tokens and input_ids has {inputs.shape[1]}, so there is nothing to "
            "continue from.\nhint: give all tokens, those in the cache first, and at least one more"
        )
