"""Texts that show how a tokenizer cuts, and tokens that depend on every cut."""

from __future__ import annotations

import json
from functools import cache

TEXTS = (
    "In 1987 about 12.5% of 86-1234",
    "   12   34 \n 5  x",
    "12345678901 1,234,567.89 ½ ²³ ٣٤ Ⅷ",
    "it's I'll DON'T we've I'M they'RE o'clock",
    "a  b   c\t\td    \n\n  x \r\n y\n",
    "  lead and trail  ",
    "\n\n\n",
    "def f(x):\n    return x**2  # ok\n",
    "école éTé naïve Ångström Ünder Привет мир αβγ",
    "Éa ÉCOLE L'ÉTÉ МИР ΑΒΓ",
    "中文字符123和。日本語カタカナ、ひらがな\uff01한국어",
    "🙂👍🏽🇩🇪 x🙂y",
    "foo_bar-baz/qux\\n <b>a</b> $x=`y`~|^+",
    "e\u0301 a\u0308o हिन्दी ภาษาไทย عربي",
    "\u00a0nbsp\u2003em\u3000ideo\u200bzw",
    "(a) [b] {c} \"d\" 'e' …。\uff0c",
    "A1b2C3 x86_64 v2.0.1 CamelCaseWord HTTPServer iPhone's",
    "abc123def 7th 1st\u0007\u0000x\u0085y",
)
"""Digits, spaces, line ends, contractions, other scripts, emoji, signs, separate accents."""


@cache
def crossing_bpe() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Return tokens and merges learned from `TEXTS` uncut, so that a cut in another place shows in them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], tuple((left, right) for left, right in model["merges"])
