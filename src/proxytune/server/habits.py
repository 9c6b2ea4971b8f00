"""What clients send by habit: fields of other servers, with the values that change nothing here.

A value equal to what happens anyway is accepted, and so is every value of a field that cannot change an
answer. Any other value is refused with the reason: ignoring it would look like success. The fields that do
something are in `schema.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema

UNUSED = "Accepted; changes nothing here"
"""The description of a field that nothing depends on."""


@dataclass(frozen=True, slots=True)
class Habit:
    """A field that is accepted with some values.

    Args:
        kind: Its type in JSON Schema.
        neutral: The values that change nothing; None for every value of that type.
        why: Why other values are refused, to follow `and`.
    """

    kind: str
    neutral: tuple[Any, ...] | None = None
    why: str = ""

    def check(self, value: Any) -> Any:
        """Return a value that changes nothing.

        Raises:
            NotHonoured: It is another one.
        """
        if self.neutral is None:
            if not _is_of(self.kind, value):
                raise NotHonoured(f"must be {_WORDS[self.kind]}")
        elif not any(_same(value, each) for each in self.neutral):
            raise NotHonoured(self.why)
        return value

    @property
    def type(self) -> Any:
        """The type of a field that takes these values."""
        schema: dict[str, Any] = {"type": self.kind}
        if self.kind == "array":
            schema["items"] = {}
        if self.neutral is not None:
            schema = schema | {"enum": [*self.neutral]} if self.neutral else {"type": "null"}
        return Annotated[Any, AfterValidator(self.check), WithJsonSchema(schema)]

    def as_field(self) -> tuple[Any, Any]:
        """Return the type and the field of a request."""
        has_others = self.neutral is not None
        note = "Accepted with the values that change nothing" if has_others else UNUSED
        return self.type, Field(None, description=note)


class NotHonoured(ValueError):
    """A value that cannot be honoured; the reason follows `NAME is VALUE, and`."""


def _same(value: Any, other: Any) -> bool:
    # True == 1 in Python, and not in JSON.
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _is_of(kind: str, value: Any) -> bool:
    return isinstance(value, _TYPES[kind]) and isinstance(value, bool) == (kind == "boolean")


_TYPES: dict[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}
_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "an object",
}

_TOOLS = "tools cannot be called here: every answer is text"
_FORMAT = (
    "an answer cannot be held to a grammar or a schema here: it is the text that the model writes"
)
_SAMPLER = (
    "there is no such sampler here; those are temperature, top_k, top_p, min_p, repetition_penalty, "
    "presence_penalty and frequency_penalty"
)
_TEXT_ONLY = "the models here read and write text alone"
_TEMPLATE = "chats are rendered with the recipe's chat template"
_REPORT = "answers here have no such field"
_PROMPT = "a prompt is taken as it is; one that is too long is refused"

HABITS: dict[str, Habit] = {
    # The OpenAI API's.
    "store": Habit("boolean"),
    "safety_identifier": Habit("string"),
    "prompt_cache_key": Habit("string"),
    "prompt_cache_retention": Habit("string"),
    "service_tier": Habit(
        "string",
        ("auto", "default", "flex", "scale", "priority"),
        "must be one of auto, default, flex, scale, priority",
    ),
    "prediction": Habit("object"),
    "parallel_tool_calls": Habit("boolean"),
    "tools": Habit("array", ([],), _TOOLS),
    "tool_choice": Habit("string", ("none", "auto"), _TOOLS),
    "functions": Habit("array", ([],), _TOOLS),
    "function_call": Habit("string", ("none", "auto"), _TOOLS),
    "modalities": Habit("array", (["text"], []), _TEXT_ONLY),
    "audio": Habit("object", ({},), _TEXT_ONLY),
    "web_search_options": Habit("object", ({},), "there is no search of the web here"),
    "response_format": Habit("object", ({"type": "text"},), _FORMAT),
    "verbosity": Habit(
        "string", ("medium",), "the models here take no wish for longer or shorter answers"
    ),
    # vLLM's.
    "use_beam_search": Habit("boolean", (False,), "there is no beam search here"),
    "length_penalty": Habit("number", (1,), "there is no beam search here, which it is for"),
    "early_stopping": Habit("boolean", (False,), "there is no beam search here, which it is for"),
    "skip_special_tokens": Habit("boolean", (True,), "special tokens are no part of the text here"),
    "spaces_between_special_tokens": Habit("boolean"),
    "include_stop_str_in_output": Habit(
        "boolean", (False,), "the text ends before a stop string here"
    ),
    "detokenize": Habit("boolean", (True,), "answers are text here"),
    "truncate_prompt_tokens": Habit("integer", (-1,), _PROMPT),
    "truncation_side": Habit("string"),
    "allowed_token_ids": Habit("array", ([],), "tokens can be favoured here, by logit_bias alone"),
    "bad_words": Habit("array", ([],), "words cannot be forbidden here; logit_bias is for tokens"),
    "logits_processors": Habit("array", ([],), "there is no such code on this server"),
    "logprob_token_ids": Habit(
        "array", ([],), "logprobs are listed of the chosen and the likeliest tokens"
    ),
    "structured_outputs": Habit("object", ({},), _FORMAT),
    "guided_json": Habit("object", (), _FORMAT),
    "guided_regex": Habit("string", (), _FORMAT),
    "guided_choice": Habit("array", (), _FORMAT),
    "guided_grammar": Habit("string", (), _FORMAT),
    "guided_decoding_backend": Habit("string"),
    "guided_whitespace_pattern": Habit("string"),
    "priority": Habit("integer", (0,), "requests take turns here, whatever they say of themselves"),
    "request_id": Habit("string"),
    "session_id": Habit("string"),
    "cache_salt": Habit("string"),
    "watermarking": Habit("boolean", (False,), "there is no watermark here"),
    "repetition_detection": Habit("object", (), "there is no such end of a text here"),
    "thinking_token_budget": Habit("integer", (-1,), "reasoning is not counted apart here"),
    "stream_interval": Habit("integer", (1,), "each token has its own piece of a stream here"),
    "return_token_offsets": Habit("boolean", (False,), _REPORT),
    "return_prompt_text": Habit("boolean", (False,), _REPORT),
    "documents": Habit("array", ([],), "documents go into the messages here"),
    "chat_template": Habit("string", (), _TEMPLATE),
    "mm_processor_kwargs": Habit("object", ({},), _TEXT_ONLY),
    "media_io_kwargs": Habit("object", ({},), _TEXT_ONLY),
    "mm_payload": Habit("string"),
    "kv_transfer_params": Habit("object", ({},), "caches stay on this server"),
    "ec_transfer_params": Habit("object", ({},), "caches stay on this server"),
    "routed_experts_prompt_start": Habit("integer", (0,), _REPORT),
    # llama.cpp's.
    "cache_prompt": Habit("boolean"),
    "id_slot": Habit("integer"),
    "slot_id": Habit("integer"),
    "n_keep": Habit("integer"),
    "n_discard": Habit("integer"),
    "n_cache_reuse": Habit("integer"),
    "backend_sampling": Habit("boolean"),
    "mirostat": Habit("integer", (0,), _SAMPLER),
    "mirostat_mode": Habit("integer", (0,), _SAMPLER),
    "mirostat_tau": Habit("number"),
    "mirostat_eta": Habit("number"),
    "typical_p": Habit("number", (1,), _SAMPLER),
    "tfs_z": Habit("number", (1,), _SAMPLER),
    "top_a": Habit("number", (0,), _SAMPLER),
    "top_n_sigma": Habit("number", (-1, 0), _SAMPLER),
    "dynatemp_range": Habit("number", (0,), _SAMPLER),
    "dynatemp_exponent": Habit("number"),
    "xtc_probability": Habit("number", (0,), _SAMPLER),
    "xtc_threshold": Habit("number"),
    "dry_multiplier": Habit("number", (0,), _SAMPLER),
    "dry_base": Habit("number"),
    "dry_allowed_length": Habit("integer"),
    "dry_penalty_last_n": Habit("integer"),
    "dry_sequence_breakers": Habit("array"),
    "adaptive_target": Habit("number", (-1,), _SAMPLER),
    "adaptive_decay": Habit("number"),
    "samplers": Habit("array", ([],), "the order of the samplers is fixed here"),
    "min_keep": Habit("integer", (0, 1), "filters keep one token at least here"),
    "penalize_nl": Habit("boolean", (True,), "penalties count every token here, line breaks too"),
    "grammar": Habit("string", ("",), _FORMAT),
    "grammar_lazy": Habit("boolean", (False,), _FORMAT),
    "json_schema": Habit("object", (), _FORMAT),
    "n_indent": Habit("integer", (0,), "lines end where the model ends them here"),
    "t_max_prompt_ms": Habit("integer", (-1, 0), "the time for a request is the server's setting"),
    "t_max_predict_ms": Habit("integer", (-1, 0), "the time for a request is the server's setting"),
    "n_probs": Habit("integer", (0,), "logprobs are asked for with logprobs here"),
    "post_sampling_probs": Habit("boolean", (False,), "logprobs are those before sampling here"),
    "return_tokens": Habit("boolean", (False,), _REPORT),
    "return_progress": Habit("boolean", (False,), _REPORT),
    "timings_per_token": Habit("boolean", (False,), _REPORT),
    "response_fields": Habit("array", ([],), "answers have all their fields here"),
    "lora": Habit("array", ([],), "proxytune.experts is for that here"),
    "image_data": Habit("array", ([],), _TEXT_ONLY),
}
"""Each field of requests that is accepted with the values that change nothing."""
