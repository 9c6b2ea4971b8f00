"""How byte-level BPE cuts text into words before it merges tokens, by the names that GGUF files use.

A GGUF file holds tokens and merges, but of the rule that cuts text only a name (`tokenizer.ggml.pre`). This
file knows the rule behind each name: regular expressions, one after the other, each on the pieces that the
one before left; what a match takes and what lies between two matches become pieces of their own.

Source: `llama-vocab.cpp` and `unicode.cpp` of llama.cpp (ggml-org). Where llama.cpp writes a rule in another
way than the model's own tokenizer.json, because its regular expressions know fewer classes of characters,
and notes the original, the original stands here: it is what the model was trained with. That matters at
capital letters outside ASCII (`tekken`, `gpt-4o` and names of the same rule); and for two DeepSeek names at
spaces outside ASCII, which llama.cpp replaces before it matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxytune.errors import UnsupportedModel

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's rule."""

DIGIT = r"\p{N}"

_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA_3 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}"
_QWEN_2 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}|{_SIGNS}"
_QWEN_35 = (
    rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}|{_CASED_SIGNS}"
)
_GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIXES}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIXES}?|\p{{N}}{{1,3}}|{_CASED_SIGNS}"
)
_JAIS_2 = (
    rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    + "".join(rf"|\s{{{length}}}(?!\S)" for length in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s{1}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED_CODER = rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_EXAONE_MOE = (
    rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_CHINESE_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+"
)
_DEEPSEEK_3 = (r"\p{N}{1,3}", _CHINESE_KANA, rf"{_DEEPSEEK_3_WORDS}[\r\n]*|{_SPACES}")


@dataclass(frozen=True, slots=True)
class CuttingRule:
    """How a tokenizer cuts text before it merges tokens.

    Args:
        patterns: Regular expressions, in order, in the syntax of the tokenizers library.
        ignore_merges: Whether a word that is a token is kept whole, whatever the merges say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False


_WORDS = CuttingRule((WORDS,))
_DIGITS_AND_WORDS = CuttingRule((DIGIT, WORDS))
_OF_LLAMA_3 = CuttingRule((_LLAMA_3,), ignore_merges=True)
_AS_LLAMA_3 = CuttingRule((_LLAMA_3,))
_OF_QWEN_2 = CuttingRule((_QWEN_2,))
_OF_GPT_4O = CuttingRule((_GPT_4O,))
_OF_DEEPSEEK_3 = CuttingRule(_DEEPSEEK_3)

# The first name of a rule is the one that is written into a file.
CUTTING_RULES: dict[str, CuttingRule] = {
    **dict.fromkeys(
        (
            "gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "exaone4",
            "gigachat", "a.x-4.0", "mellum", "modern-bert", "jina-es", "jina-de", "jina-v2-es",
            "jina-v2-de",
        ),
        _WORDS,
    ),
    **dict.fromkeys(
        (
            "smollm", "starcoder", "command-r", "refact", "codeshell", "exaone", "minerva-7b",
            "mellum2",
        ),
        _DIGITS_AND_WORDS,
    ),
    **dict.fromkeys(
        (
            "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
            "jina-v5-nano", "glm4", "glm5",
        ),
        _OF_LLAMA_3,
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), _AS_LLAMA_3),
    **dict.fromkeys(
        (
            "qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "hunyuan",
            "solar-open", "grok-2",
        ),
        _OF_QWEN_2,
    ),
    "qwen35": CuttingRule((_QWEN_35,)),
    "tekken": CuttingRule((_TEKKEN,), ignore_merges=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _OF_GPT_4O),
    "deepseek-llm": CuttingRule(
        (
            "[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", _DEEPSEEK_SIGNS, r"\s+$", _DEEPSEEK_HAN, r"\p{N}+",
        )
    ),
    "deepseek-coder": CuttingRule(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, DIGIT)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _OF_DEEPSEEK_3),
    "falcon": CuttingRule((_PUNCTUATION, WORDS, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), CuttingRule((_BLOOM,))),
    "viking": CuttingRule((_BLOOM, DIGIT)),
    "jais-2": CuttingRule((_JAIS_2,)),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), CuttingRule((_BAILING,))),
    "seed-coder": CuttingRule((_SEED_CODER,)),
    "ufakzeka": CuttingRule((rf"{_WORD}|\p{{N}}|{_SIGNS}",)),
    "laguna": CuttingRule(("[^\\n]+|[\\n]+", _QWEN_2)),
    "exaone-moe": CuttingRule((_EXAONE_MOE,)),
    "minicpm5": CuttingRule(
        (r"\p{N}{1,3}", rf"{_SUFFIXES}|{_WORD}|\p{{N}}+|{_SIGNS}"), ignore_merges=True
    ),
    # llama.cpp's own, for files that name no rule.
    "default": CuttingRule((r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
}  # fmt: skip
"""The rule of each name."""

BYTE_LEVEL = "gpt2"
"""What GGUF calls byte-level BPE with any rule (`tokenizer.ggml.model`)."""


def cuts_by_default(metadata: Mapping[str, Any]) -> bool:
    """Whether a GGUF file with byte-level BPE leaves the rule to llama.cpp's default."""
    name = metadata.get("tokenizer.ggml.pre") or "default"
    return metadata.get("tokenizer.ggml.model") == BYTE_LEVEL and name == "default"


def cutting_rule(name: Any, file: str) -> CuttingRule:
    """Return the rule that a GGUF file names; llama.cpp's default for a file that names none.

    Args:
        name: The file's `tokenizer.ggml.pre`.
        file: What errors call the file.

    Raises:
        UnsupportedModel: No rule with that name is known.
    """
    name = name or "default"
    if not isinstance(name, str) or name not in CUTTING_RULES:
        raise UnsupportedModel(
            f"{file} names the pre-tokenizer {name!r:.80} (tokenizer.ggml.pre), whose rule is not known "
            "here. Cut by another rule, the same text would become other tokens.\n"
            "hint: use the model's original safetensors with their tokenizer.json"
        )
    return CUTTING_RULES[name]


def cut_by(tokenizer: Any, rule: CuttingRule) -> None:
    """Make a tokenizer of the tokenizers library, byte-level BPE, cut text by a rule."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = []
    *others, last = rule.patterns
    for pattern in others if last == WORDS else rule.patterns:
        if pattern == DIGIT:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    # It also spells bytes, after which a pattern would no longer see the text.
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last == WORDS))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.model.ignore_merges = rule.ignore_merges


def rule_name(rule: CuttingRule) -> str | None:
    """Return the name of a rule in GGUF files; None if it has none."""
    return next((name for name, known in CUTTING_RULES.items() if known == rule), None)
