"""Between the local vocabulary and a server's: token ids, the names a server gives them, and text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from proxytune.backends.api.answers import TokenName
from proxytune.errors import InvalidRequest
from proxytune.text.prompts import Tokenizer
from proxytune.text.vocab import Vocabulary, token_bytes

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class ApiTokens:
    """The local vocabulary, in which a server's tokens are looked up.

    Args:
        tokenizer: The tokenizer that stands for the server's.
        vocabulary: Its vocabulary.
        name: What errors call the server.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary, *, name: str) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self.width = vocabulary.width
        self.bytes_of = token_bytes(vocabulary)
        """The bytes of each token, by id."""
        self._id_of = ids_by_bytes(vocabulary, self.bytes_of)

    def match(self, name: TokenName) -> int | None:
        """Return the local id of a token that the server names, or None if there is none.

        A token that ends within a character has no id unless it is named by one: where text is sent, nothing
        could be asked about what follows it.
        """
        if isinstance(name, int):
            return name if name in self.bytes_of else None
        content = name_bytes(name)
        try:
            content.decode()
        except UnicodeDecodeError:
            return None
        return self._id_of.get(content)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens that the tokenizer adds."""
        return list(self._tokenizer.encode(text, add_special_tokens=True))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return a row as text, without the beginning-of-sequence token: servers add it themselves.

        Raises:
            InvalidRequest: The row ends within a character.
        """
        bos = self._tokenizer.bos_token
        ids = list(token_ids)
        if bos is not None and ids and ids[0] == self._vocabulary.token_to_id.get(bos):
            with_start = self._tokenizer.encode("a", add_special_tokens=True)
            if with_start[:1] == ids[:1]:
                ids = ids[1:]
        text = self.decode(ids)
        if text.endswith(_REPLACEMENT):
            raise InvalidRequest(
                f"the prompt ends within a character, and {self.name} takes text only.\n"
                "hint: end the prompt after a whole character"
            )
        return text


def name_bytes(name: bytes | str | int) -> bytes:
    """Return the bytes of a token that a server names by bytes or text."""
    return name if isinstance(name, bytes) else str(name).encode("utf-8", "surrogatepass")


def ids_by_bytes(vocabulary: Vocabulary, bytes_of: Mapping[int, bytes]) -> dict[bytes, int]:
    """Map the bytes of each token to its id, leaving out bytes that several tokens share.

    A lone byte of SentencePiece (`<0x41>`) is only produced where no token is that text. What stands for half
    a character, or for nothing, may be one of many tokens, and is left out too.
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
        if len(several) == 1 and content and _REPLACEMENT.encode() not in content
    }
