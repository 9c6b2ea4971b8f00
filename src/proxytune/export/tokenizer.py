"""A byte-level BPE tokenizer as the fields of a GGUF header.

How text is cut into words before tokens are merged is a rule in `tokenizer.json`; in GGUF it is the name of a
rule (`checkpoints/pre_tokenizers.py`). The name is found by comparing rules, and a rule without a name is
refused. Every row of the embedding has a token in GGUF. Rows without a token are called `[PAD7]`, by their
id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.checkpoints.pre_tokenizers import (
    BYTE_LEVEL,
    CUTTING_RULES,
    DIGIT,
    WORDS,
    CuttingRule,
    rule_name,
)
from proxytune.errors import UnsupportedModel
from proxytune.export.layout import CONVERTER

if TYPE_CHECKING:
    from gguf import GGUFWriter

_COMPOSING = ("qwen2", "qwen35")
"""Names of rules before which Qwen's tokenizers compose characters."""


@dataclass(frozen=True, slots=True)
class TokenizerFields:
    """What a GGUF header says about a tokenizer.

    Args:
        pre: llama.cpp's name for the rule that cuts text into words.
        tokens: The token of each id.
        types: The `TokenType` of each id.
        merges: Pairs to merge, in order, each as two tokens with a space between them.
        special_ids: Ids of special tokens, by GGUF's names.
        adds_bos: Whether the tokenizer puts its begin-of-sequence token before a text.
        adds_eos: Whether it puts its end-of-sequence token after a text.
        chat_template: One template, or several with names; None if there is none.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special_ids: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | list[dict[str, str]] | None

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the fields to a header."""
        writer.add_tokenizer_model(BYTE_LEVEL)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, token_id in self.special_ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def tokenizer_fields(model: Checkpoint, pre: str | None) -> TokenizerFields:
    """Return a model's tokenizer as the fields of a GGUF header.

    Args:
        model: The model.
        pre: llama.cpp's name for the rule that cuts text into words, used as given; None to find it.

    Raises:
        UnsupportedModel: llama.cpp would make other tokens of some texts, or the header cannot hold it.
    """
    from gguf import TokenType

    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(
            f"{model.name} has a tokenizer without tokenizer.json: its rules are code.\nhint: {CONVERTER}"
        )
    rules: dict[str, Any] = json.loads(backend.to_str())
    bpe = rules["model"]
    kind = bpe.get("type")
    affixes = [k for k in ("continuing_subword_prefix", "end_of_word_suffix") if bpe.get(k)]
    steps = _flat_steps(rules.get("pre_tokenizer"))
    is_byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    if kind != "BPE" or bpe.get("byte_fallback") or affixes or not is_byte_level:
        style = "as in SentencePiece" if bpe.get("byte_fallback") else "not byte-level"
        raise UnsupportedModel(
            f"{model.name} has a tokenizer of the kind {kind} ({style}), and only byte-level BPE can be "
            f"written as GGUF here.\nhint: {CONVERTER}"
        )
    added = tokenizer.added_tokens_decoder
    pre = pre or _pre_tokenizer(model.name, rules, added.values())
    vocabulary = tokenizer.get_vocab()
    beyond = sorted(token for token, token_id in vocabulary.items() if token_id >= model.width)
    if beyond:
        raise UnsupportedModel(
            f"{model.name} has {len(beyond)} tokens beyond the {model.width} rows of its embedding, such as "
            f"{beyond[0]!r}, and a GGUF file has one token for each row.\n"
            "hint: call resize_token_embeddings(len(tokenizer)), and save the model again"
        )
    tokens = [f"[PAD{token_id}]" for token_id in range(model.width)]
    types = [int(TokenType.UNUSED)] * model.width
    for token, token_id in vocabulary.items():
        tokens[token_id] = token
        types[token_id] = int(TokenType.NORMAL)
    for token_id, token in added.items():
        types[token_id] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    template = _chat_template(tokenizer.chat_template)
    return TokenizerFields(
        pre, tokens, types, merges, _special_ids(model), *_added_around(model), template
    )


def _flat_steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        parts = pre_tokenizer.get("pretokenizers", ())
        return [step for part in parts for step in _flat_steps(part)]
    return [pre_tokenizer]


def _pattern(step: Mapping[str, Any]) -> str:
    """Return the regular expression by which a step cuts text, or its JSON if it is not known as one."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space") and step.get("use_regex", True):
        return WORDS
    if kind == "Digits" and step.get("individual_digits"):
        return DIGIT
    pattern = step.get("pattern")
    is_isolating = step.get("behavior") == "Isolated" and not step.get("invert")
    if kind == "Split" and is_isolating and isinstance(pattern, Mapping) and "Regex" in pattern:
        return str(pattern["Regex"])
    return json.dumps(step, sort_keys=True)


def _cutting_rule(rules: Mapping[str, Any]) -> CuttingRule:
    """Return the rule by which a `tokenizer.json` cuts text."""
    steps = _flat_steps(rules.get("pre_tokenizer"))
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("use_regex", True):
        # It spells bytes and cuts nothing; before the last place, it would change what later steps see.
        steps = steps if last.get("add_prefix_space") else steps[:-1]
    return CuttingRule(tuple(map(_pattern, steps)), bool(rules["model"].get("ignore_merges")))


def _pre_tokenizer(name: str, rules: Mapping[str, Any], added: Any) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text; refuse one that llama.cpp has no name for."""
    rule = _cutting_rule(rules)
    found = rule_name(rule)
    normalizer = (rules.get("normalizer") or {}).get("type")
    # Qwen first composes characters (NFC). llama.cpp does not, for any Qwen model, and text is rarely written
    # with separate accents.
    is_prepared = normalizer is not None and not (normalizer == "NFC" and found in _COMPOSING)
    stripping = [t.content for t in added if t.lstrip or t.rstrip or t.single_word]
    if found is not None and not is_prepared and not stripping:
        return found
    if found is None:
        shown = " + ".join(rule.patterns) or "nothing"
        more = ", keeping words that are tokens whole" if rule.ignore_merges else ""
        why = f"cuts text by a rule without a known name in llama.cpp ({shown}{more})"
    elif stripping:
        why = f"swallows what is around the token {stripping[0]!r}"
    else:
        why = f"changes text before it cuts it ({normalizer})"
    raise UnsupportedModel(
        f"the tokenizer of {name} {why}, so llama.cpp would make other tokens of the same text.\n"
        "hint: if llama.cpp has a name for the rule, give it with --pre; the names known here are "
        f"{', '.join(sorted(CUTTING_RULES))}"
    )


def _added_around(model: Checkpoint) -> tuple[bool, bool]:
    """Return whether the tokenizer adds a begin-of-sequence token before a text, and an end one after it."""
    tokenizer = model.tokenizer
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for adds_bos, adds_eos in ((False, False), (True, False), (False, True), (True, True)):
        if whole == [bos] * adds_bos + bare + [eos] * adds_eos:
            return adds_bos, adds_eos
    raise UnsupportedModel(
        f"the tokenizer of {model.name} makes {whole} of a text whose tokens are {bare}, and a GGUF file can "
        "only say that the begin- or end-of-sequence token is added.\n"
        "hint: save a tokenizer without that post-processor"
    )


def _special_ids(model: Checkpoint) -> dict[str, int]:
    """Return ids of special tokens by GGUF's names; further tokens that end a text are `eot` and `eom`."""
    tokenizer = model.tokenizer
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    ends = list(model.eos_token_ids)
    if ids["eos"] is None and ends:
        ids["eos"] = ends[0]
    others = [token_id for token_id in ends if token_id != ids["eos"]]
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    return {name: int(token_id) for name, token_id in ids.items() if token_id is not None}


def _chat_template(template: Any) -> str | list[dict[str, str]] | None:
    if isinstance(template, Mapping):
        return [{"name": str(name), "template": str(text)} for name, text in template.items()]
    return str(template) if template else None
