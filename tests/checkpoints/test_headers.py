"""Headers of safetensors and GGUF files that say what cannot be."""

from __future__ import annotations

import json
import struct
import time

import pytest

from proxytune.checkpoints.headers import read_gguf_header, read_safetensors_header
from proxytune.errors import CorruptModel, UnsupportedModel

# Safetensors


def safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, "begins at byte 0, and the one before"),
        ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, "begins at byte 4, and the one before"),
        ({"a": entry([1], 4, 8)}, "begins at byte 4, and the one before it ends at 0"),
        ({"a": entry([-1], 0, 4)}, "whole numbers"),
        ({"a": entry([True], 0, 4)}, "whole numbers"),
        ({"a": entry([1.0], 0, 4)}, "whole numbers"),
        ({"a": entry(["1"], 0, 4)}, "whole numbers"),
        ({"a": entry([None], 0, 4)}, "whole numbers"),
        ({"a": entry([2**62], 0, 4)}, "whole numbers"),
        ({"a": entry([2**61, 2**61], 0, 4)}, "shape .* is impossible"),
        ({"a": entry([2**61, 2**61], 0, 4, "NEW")}, "shape .* is impossible"),
        ({"a": entry([1] * 65, 0, 4)}, "not that of a tensor"),
        ({"a": entry([1], 4, 0)}, "impossible"),
        ({"a": entry([1], -4, 0)}, "whole numbers"),
        ({"a": entry([1], 0, 2**63)}, "whole numbers"),
        ({"a": entry([1], 0, 4, ["F32"])}, "does not list tensors"),
        ({"a": entry([1], 0, 4, 3)}, "does not list tensors"),
        ({"a": {**entry([1], 0, 4), "data_offsets": [0, 4, 8]}}, "does not list tensors"),
        ({"a": {**entry([1], 0, 4), "shape": "1"}}, "not that of a tensor"),
        ({"a": {**entry([1], 0, 4), "shape": {"1": 1}}}, "not that of a tensor"),
        ({"a": 3}, "does not list tensors"),
        ({"a": []}, "does not list tensors"),
        ({"a": entry([1], 0, 4), "__metadata__": []}, "__metadata__"),
        ({"a": entry([1], 0, 4), "__metadata__": {"a": 1}}, "__metadata__"),
        (b'{"a": 1, "a": 2}', "given twice"),
        (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,0]}}', "Infinity"),
        (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,0]}}', "1e999"),
        (b' {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "does not list tensors"),
        (b"\xef\xbb\xbf{}", "does not list tensors"),
        (b"[" * 5000, "JSON"),
    ],
)
def test_a_safetensors_header_that_says_what_cannot_be_is_corrupt(tmp_path, header, why):
    path = safetensors(tmp_path / "x", header, bytes(8))
    with pytest.raises(CorruptModel, match=rf"x cannot be read as safetensors: .*{why}"):
        read_safetensors_header(path)


def test_a_safetensors_header_of_huge_numbers_is_refused_at_once(tmp_path):
    """Python took minutes to build 20,000 numbers of 4,200 digits."""
    digits = b",".join([b"9" * 4200] * 15_000)
    header = b'{"a":{"dtype":"F32","shape":[' + digits + b'],"data_offsets":[0,0]}}'
    start = time.process_time()
    with pytest.raises(CorruptModel, match="4200 digits"):
        read_safetensors_header(safetensors(tmp_path / "x", header))
    assert time.process_time() - start < 2


def test_a_safetensors_header_of_more_than_64_mb_is_not_parsed(tmp_path):
    header = b"{" + b" " * (64 << 20) + b"}"
    with pytest.raises(CorruptModel, match="67,108,866 bytes, and may take 67,108,864"):
        read_safetensors_header(safetensors(tmp_path / "x", header))


def test_ten_thousand_tensors_are_read(tmp_path):
    header = {f"layer.{n}": entry([2, 3], 24 * n, 24 * n + 24) for n in range(10_000)}
    found = read_safetensors_header(safetensors(tmp_path / "x", header, bytes(240_000)))
    assert found["layer.9999"].shape == (2, 3)


# GGUF

TOKENS, KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


def text(content):
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def number(value):
    return struct.pack("<II", 4, value)


def array(kind, items, count=None):
    count = len(items) if count is None else count
    return struct.pack("<IIQ", 9, kind, count) + b"".join(items)


def tensor(name, shape, kind=0, offset=0):
    axes = b"".join(struct.pack("<Q", length) for length in shape)
    return text(name) + struct.pack("<I", len(shape)) + axes + struct.pack("<IQ", kind, offset)


def gguf(values=(), tensors=(), *, num_values=None, num_tensors=None, data=bytes(64)):
    counts = struct.pack(
        "<IQQ",
        3,
        len(tensors) if num_tensors is None else num_tensors,
        len(values) if num_values is None else num_values,
    )
    body = b"".join(text(key) + value for key, value in values) + b"".join(tensors)
    padding = bytes(-(24 + len(body)) % 32)
    return b"GGUF" + counts + body + padding + data


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (gguf([(TOKENS, number(7))]), "tokens is no list of str"),
        (gguf([(TOKENS, struct.pack("<I", 8) + text("abc"))]), "tokens is no list of str"),
        (gguf([(TOKENS, array(4, [struct.pack("<I", 1)]))]), "tokens is no list of str"),
        (gguf([(KINDS, array(8, [text("a")]))]), "token_type is no list of int"),
        (gguf([(KINDS, array(7, [b"\1"]))]), "token_type is no list of int"),
        (gguf([(TOKENS, array(8, [text("a")])), (KINDS, number(1))]), "token_type is no list"),
        (gguf([("split.count", struct.pack("<I", 8) + text("abc"))]), "split.count is 'abc'"),
        (gguf([("split.count", struct.pack("<If", 6, 2.0))]), "split.count is 2.0"),
        (gguf([("split.count", struct.pack("<I?", 7, True))]), "split.count is True"),
        (gguf([("general.alignment", number(0))]), "alignment is 0"),
        (gguf([("general.alignment", struct.pack("<I?", 7, True))]), "alignment is True"),
        (gguf([("general.alignment", struct.pack("<IQ", 10, 2**63))]), "alignment is 9223"),
        (gguf([("general.alignment", struct.pack("<If", 6, 32.0))]), "alignment is 32.0"),
        (gguf(num_values=2**64 - 1, num_tensors=2**64 - 1), "claims 18,446,744,073,709,551,615"),
        (gguf(num_values=100_000), "claims 0 tensors and 100,000 values"),
        (gguf(num_values=60_000), "twice|cut off|unknown type"),
        (gguf([("a", array(4, [], 2**64 - 1))]), "18,446,744,073,709,551,615 items"),
        (gguf([("a", array(8, [], 2**21))]), "cut off inside its header"),
        (gguf([("a", array(0, [], 2**20))]), "cut off inside its header"),
        (gguf([(TOKENS, array(8, [], 2**21 + 1))]), "2,097,153 items"),
        (gguf([("a", array(9, [struct.pack("<IQ", 9, 1) * 5000], 1))]), "unknown type 9"),
        (gguf([("a", array(77, [], 1))]), "unknown type 77"),
        (gguf([("a", struct.pack("<I", 13) + bytes(8))]), "unknown type 13"),
        (gguf([("a", struct.pack("<IQ", 8, 2**64 - 1))]), "cut off inside its header"),
        (gguf([("a", number(1)), ("a", number(2))]), "'a' twice"),
        (gguf(tensors=[tensor("a", [4]), tensor("a", [4], 0, 32)]), "'a' twice"),
        (gguf(tensors=[tensor("a", [4]), tensor("b", [4], 0, 8)]), "b begins inside the tensor"),
        (gguf(tensors=[tensor("a", [2**32, 2**32])]), "a of type F32 has the shape"),
        (gguf(tensors=[tensor("a", [2**63, 2**63, 0])]), "a of type F32 has the shape"),
        (gguf(tensors=[tensor("a", [2**40])]), "a should end at byte"),
        (gguf(tensors=[tensor("a", [4], 0, 2**64 - 1)]), "a should end at byte"),
        (gguf(tensors=[tensor("a", [33], 2)]), "a of type Q4_0 has the shape"),
        (gguf(tensors=[tensor("a", [1] * 9)]), "9 axes"),
        (gguf(tensors=[text("a") + struct.pack("<I", 2**32 - 1)]), "4294967295 axes"),
    ],
)
def test_a_gguf_header_that_says_what_cannot_be_is_corrupt(tmp_path, content, why):
    (tmp_path / "x.gguf").write_bytes(content)
    start = time.process_time()
    with pytest.raises(CorruptModel, match=rf"x\.gguf cannot be read as GGUF: .*{why}"):
        read_gguf_header(tmp_path / "x.gguf")
    assert time.process_time() - start < 1


def test_a_gguf_tensor_of_a_type_from_the_future_is_not_supported(tmp_path):
    (tmp_path / "x.gguf").write_bytes(gguf(tensors=[tensor("a", [4], 4_000_000_000)]))
    with pytest.raises(UnsupportedModel, match="has type 4000000000"):
        read_gguf_header(tmp_path / "x.gguf")


def test_a_gguf_header_beyond_64_mb_is_refused(tmp_path):
    value = struct.pack("<I", 8) + text(b"a" * (64 << 20))
    (tmp_path / "x.gguf").write_bytes(gguf([("a", value)]))
    with pytest.raises(CorruptModel, match="header takes more than 67,108,864 bytes"):
        read_gguf_header(tmp_path / "x.gguf")


def test_a_proper_gguf_header_is_read(tmp_path):
    values = [
        ("general.alignment", number(64)),
        (TOKENS, array(8, [text("a"), text(b"\xff"), text("[PAD2]")])),
        (KINDS, array(5, [struct.pack("<i", kind) for kind in (1, 1, 5)])),
        ("scores", array(6, [struct.pack("<f", 0.5)] * 3)),
    ]
    content = gguf(values, [tensor("a", [2, 3])], data=bytes(256))
    (tmp_path / "x.gguf").write_bytes(content)
    header = read_gguf_header(tmp_path / "x.gguf")
    assert header.tensors["a"].shape == (3, 2)
    assert header.token_to_id() == {"a": 0, "�": 1}
    assert header.metadata == {"general.alignment": 64}
