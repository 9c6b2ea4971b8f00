"""An expert's output bias: a number for each of some of the base's tokens, read from and written to a file.

The file is safetensors with two tensors: `token_ids`, `[n]` int64, of the base's vocabulary, and `values`,
`[n]` float32, which are added to the logits of these tokens (`logits/steer.py`). All other tokens have 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from proxytune.checkpoints.headers import read_safetensors_header
from proxytune.checkpoints.references import file_beside
from proxytune.checkpoints.untrusted import read_regular
from proxytune.errors import CorruptModel, InvalidRequest, VocabularyMismatch
from proxytune.files import replacing
from proxytune.text.vocab import NUM_EXAMPLES, Vocabulary

MAX_TOKENS = 1 << 20
"""Maximum number of tokens with a value; the largest vocabularies have 262,144."""

MAX_VALUE = 1e4
"""Largest size of a value. A bias of 100 already decides every token, and products must stay finite."""

_FILE_BYTES = 2 * MAX_TOKENS * (8 + 4)
_TENSORS = {"token_ids": "int64", "values": "float32"}
_HINT = "write it with proxytune.checkpoints.output_bias.write_output_bias"


@dataclass(frozen=True, eq=False)
class OutputBias:
    """What is added to the logits of some tokens.

    Args:
        token_ids: `[n]` int64, distinct, of the base's vocabulary, on the CPU.
        values: `[n]` float32, finite, in logits.
        name: What errors call it: the reference as the recipe has it.

    Raises:
        InvalidRequest: The two are not such tensors.
    """

    token_ids: Tensor
    values: Tensor
    name: str = "the output bias"
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        why = _fault(self.token_ids, self.values)
        if why is not None:
            raise InvalidRequest(f"{self.name} cannot be used: {why}.\nhint: {_HINT}")

    def __len__(self) -> int:
        """Number of tokens that have a value."""
        return len(self.token_ids)

    def dense(self, width: int, device: torch.device) -> Tensor:
        """Return what is added to each token's logit, `[width]` float32, on a device."""
        if device not in self._moved:
            self._moved[device] = (self.token_ids.to(device), self.values.to(device))
        token_ids, values = self._moved[device]
        return torch.zeros(width, device=device).index_copy_(0, token_ids, values)

    def value_of(self, token_id: int) -> float:
        """Return what is added to one token's logit."""
        return self._by_id.get(token_id, 0.0)

    @cached_property
    def _by_id(self) -> Mapping[int, float]:
        return dict(zip(self.token_ids.tolist(), self.values.tolist(), strict=True))

    def check_tokens(self, vocabulary: Vocabulary) -> None:
        """Check that the base has all tokens that have a value.

        Raises:
            VocabularyMismatch: It lacks some.
        """
        has_token = torch.ones(vocabulary.width, dtype=torch.bool)
        has_token[vocabulary.padding_ids] = False
        is_inside = self.token_ids < vocabulary.width
        is_known = is_inside & has_token[self.token_ids.where(is_inside, 0)]
        if bool(is_known.all()):
            return
        unknown = self.token_ids[~is_known]
        shown = ", ".join(map(str, unknown[:NUM_EXAMPLES].tolist()))
        more = f" and {len(unknown) - NUM_EXAMPLES:,} more" if len(unknown) > NUM_EXAMPLES else ""
        raise VocabularyMismatch(
            f"{self.name} has values for token ids that {vocabulary.name} has no token for: {shown}{more}.\n"
            "hint: an output bias belongs to the base that it was fitted for, whose token ids it has"
        )


def find_output_bias(reference: str, *, root: Path) -> Path:
    """Return the file of an output bias; see `file_beside` for what it takes and raises."""
    hint = f"it is a local file, and relative paths start from {root}"
    return file_beside(reference, root=root, what="output bias", hint=hint)


def read_output_bias(reference: str, *, root: Path) -> OutputBias:
    """Return the output bias in a file, which is small and read whole.

    Args:
        reference: As for `find_output_bias`.
        root: As there.

    Raises:
        ModelNotFound: Nothing is there.
        CorruptModel: It is not such a file.
    """
    path = find_output_bias(reference, root=root)
    header = read_safetensors_header(path)
    found = {name: tensor.dtype for name, tensor in header.items()}
    if found != _TENSORS:
        raise CorruptModel(
            f"{path} has the tensors {_listed(found)}, and an output bias has {_listed(_TENSORS)}.\n"
            f"hint: {_HINT}"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(read_regular(path, at_most=_FILE_BYTES))
        return OutputBias(tensors["token_ids"], tensors["values"], reference)
    except (SafetensorError, KeyError) as error:  # it was replaced in between
        raise CorruptModel(f"{path} cannot be read as safetensors: {error}") from error
    except InvalidRequest as error:
        raise CorruptModel(f"{path}: {error}") from error


def write_output_bias(path: Path, bias: OutputBias) -> None:
    """Write an output bias where a recipe can name it.

    Raises:
        OutputFileError: It cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {
        "token_ids": bias.token_ids.contiguous(),
        "values": bias.values.detach().contiguous(),
    }
    with replacing(path) as part:
        save_file(tensors, part)


def _fault(token_ids: Tensor, values: Tensor) -> str | None:
    """Return why two tensors are no output bias; None if they are one."""
    shapes = list(token_ids.shape), list(values.shape)
    if (token_ids.dtype, values.dtype) != (torch.int64, torch.float32):
        return f"token_ids are {token_ids.dtype} and values {values.dtype}, not int64 and float32"
    if token_ids.dim() != 1 or shapes[0] != shapes[1]:
        return f"token_ids have the shape {shapes[0]} and values {shapes[1]}, and both must be [n]"
    if not 0 < len(token_ids) <= MAX_TOKENS:
        return f"it has values for {len(token_ids):,} tokens, and must have 1 to {MAX_TOKENS:,}"
    if int(token_ids.min()) < 0:
        return f"its token ids begin at {int(token_ids.min())}, below 0"
    ordered = token_ids.sort().values
    is_double = ordered[1:] == ordered[:-1]
    if bool(is_double.any()):
        return f"it has two values for token id {int(ordered[1:][is_double][0])}"
    is_usable = values.isfinite() & (values.abs() <= MAX_VALUE)
    if not bool(is_usable.all()):
        which = int((~is_usable).nonzero()[0])
        return (
            f"its value for token id {int(token_ids[which])} is {float(values[which])}, and must be a finite "
            f"number between -{MAX_VALUE:g} and {MAX_VALUE:g}"
        )
    return None


def _listed(dtypes: Mapping[str, str]) -> str:
    parts = [f"{name[:40]} ({dtype[:20]})" for name, dtype in sorted(dtypes.items())]
    return ", ".join(parts[:NUM_EXAMPLES]) or "none"
