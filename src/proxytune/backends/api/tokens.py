"""Tokens by text or id."""

from __future__ import annotations

import re
from collections.abc import Mapping

from proxytune.text.vocab import Vocabulary

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def ids_by_bytes(vocabulary: Vocabulary, bytes_of: Mapping[int, bytes]) -> dict[bytes, int]:
    """Return the token of each text, without those that a text does not tell from others.

    A lone byte of SentencePiece (`<0x41>`) is only produced where no token is that text. What stands for half
    a character, or for nothing, may be one of many tokens.
    """
    is_byte = {
        token_id: bool(re.fullmatch(r"<0x[0-9A-F]{2}>", token))
        for token, token_id in vocabulary.token_to_id.items()
    }
    ids: dict[bytes, list[int]] = {}
    for token_id, content in sorted(bytes_of.items(), key=lambda item: is_byte[item[0]]):
        if not is_byte[token_id] or content not in ids:
            ids.setdefault(content, []).append(token_id)
    return {
        content: several[0]
        for content, several in ids.items()
        if len(several) == 1 and content and _REPLACEMENT not in content
    }
