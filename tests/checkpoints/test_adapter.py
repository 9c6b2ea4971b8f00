"""What an adapter says of its layers: types and bounds, patterns that take forever, and PEFT's answers."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import pytest

from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.changes import Layout, PatternClock, read_changes
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.errors import AdapterMismatch, CorruptModel, UnsupportedModel
from proxytune.loading.doctor import examine
from proxytune.recipe.recipe import Recipe
from tests.support.tiny import tiny_adapter, tiny_model

BOMB = "(.+)+q_proj|(a|b|.)+(c|.)+(.|.)+X"
"""A pattern that Python's `re` matches for longer than anybody waits."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_model(root / "small")
    tiny_adapter(root / "small", root / "adapter")
    return root


@pytest.fixture(scope="module")
def small(models):
    return find_checkpoint("small", root=models)


@pytest.fixture
def changed(models, tmp_path):
    """Return a function that finds the adapter with other values in its config."""

    def find(**changes):
        directory = tmp_path / "adapter"
        shutil.copytree(models / "adapter", directory, dirs_exist_ok=True)
        config = json.loads((models / "adapter" / "adapter_config.json").read_text())
        text = json.dumps({**config, **changes})
        (directory / "adapter_config.json").write_text(text)
        return find_adapter("adapter", root=tmp_path)

    return find


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("r", ["x", 0, -1, 10**9, 2.0, True, None, [2], 10**290]),
        ("lora_alpha", ["x", None, True, 1e300, float("inf"), float("nan"), 10**290, [1]]),
        ("target_modules", [3, True, {"a": 1}, [1], ["a", None], [["a"]], "a" * 20_000]),
        ("exclude_modules", [3, [None], {"a": "b"}]),
        ("layers_to_transform", [-1, "0", 1.0, True, [-1], ["0"], [10**30], {"0": 1}]),
        ("layers_pattern", [3, [None], {"a": 1}]),
        ("rank_pattern", [3, [1], "x", {"a": 0}, {"a": "2"}, {"a": 10**9}, {"a": True}]),
        ("alpha_pattern", [3, [1], {"a": None}, {"a": "1"}, {"a": float("inf")}]),
        ("use_rslora", ["yes", 1, [True]]),
        ("fan_in_fan_out", ["no", 0]),
        ("lora_bias", ["no", 2]),
        ("use_dora", ["no", 2]),
        ("modules_to_save", ["lm_head", [1], {"a": 1}]),
        ("target_parameters", ["gate", [None]]),
        ("trainable_token_indices", [3, [-1], ["a"], [2.0], [10**9], {"embed_tokens": 3}]),
    ],
)
def test_a_value_of_a_wrong_type_or_size_is_refused_by_name(changed, key, values):
    """A rank of 10**9 took all memory, a rank that was text ended in a traceback."""
    for value in values:
        with pytest.raises(CorruptModel, match=rf"adapter_config\.json: {key} is .* and must be"):
            changed(**{key: value})


@pytest.mark.parametrize("kind", [None, 3, [], "x" * 100_000])
def test_another_kind_of_adapter_is_named_in_few_words(changed, kind):
    with pytest.raises(UnsupportedModel, match="only LORA") as caught:
        changed(peft_type=kind)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": BOMB},
        {"exclude_modules": BOMB},
        {"rank_pattern": {BOMB: 2}},
        {"alpha_pattern": {"first": 2, BOMB: 2}},
        {"alpha_pattern": {f"{BOMB}{number}": 2 for number in range(50)}},
        {"layers_to_transform": [0, 1], "layers_pattern": f"({BOMB})"},
        {"layers_to_transform": [0, 1], "layers_pattern": [f"({BOMB})"] * 50},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_a_pattern_that_takes_forever_is_refused_in_time(changed, small, changes):
    """`doctor` called such an adapter healthy, and loading it never ended."""
    adapter = changed(**changes)
    start = time.process_time()
    with pytest.raises(
        CorruptModel, match=r"the pattern .* takes too long to match(?s:.*)hint: list"
    ):
        adapter.check_fits(small)
    assert time.process_time() - start < 3


def test_the_adapters_of_a_recipe_share_the_time_for_their_patterns(changed, models, tmp_path):
    """A thousand experts with such an adapter would have taken a thousand times as long."""
    changed(target_modules=BOMB)
    shutil.copytree(models / "small", tmp_path / "small")
    experts = [
        {"name": f"e{number}", "anti_expert": {"model": "small"}, "expert": {"adapter": "adapter"}}
        for number in range(30)
    ]
    recipe = Recipe.from_dict(
        {"model_type": "proxytune", "base": {"model": "small"}, "experts": experts},
        directory=tmp_path,
    )
    start = time.process_time()
    problems = examine(recipe).problems
    assert time.process_time() - start < 5
    assert len(problems) == 30
    assert all("takes too long to match" in str(problem.error) for problem in problems)


def test_adapters_with_usual_patterns_share_the_time_with_many_others(changed, small):
    clock = PatternClock()
    adapter = changed(
        target_modules=r"(?:.*?(?:language|text|model).*?)?(?:.*?layers\.\d+\..*?)?(q|v)_proj",
        alpha_pattern={rf"layers\.{number}\..*": 4 for number in range(12)},
    )
    for _ in range(300):
        replace(adapter, clock=clock).check_fits(small)
    assert clock.left > 0.5


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "cannot be used"),
        ("(?R)", "cannot be used"),
        ("(?P<a>.)(?P<a>.)", "cannot be used"),
        ("(" * 5000, "cannot be used"),
        ("a{1000000}" * 900, "more than 999 times"),
        ("(a{99999}){99999}", "more than 999 times"),
    ],
)
def test_a_pattern_that_is_none_is_refused(changed, small, pattern, why):
    start = time.process_time()
    for changes in ({"target_modules": pattern}, {"rank_pattern": {pattern: 2}}):
        with pytest.raises(CorruptModel, match=why):
            changed(**changes).check_fits(small)
    assert time.process_time() - start < 2


def test_a_rank_that_is_not_that_of_the_factors_is_refused(changed, small):
    for changes in ({"r": 3}, {"rank_pattern": {"v_proj": 3}}, {"r": 100_000}):
        with pytest.raises(CorruptModel, match=r"the rank \d+, and its factors have 2 and 2"):
            changed(**changes).check_fits(small)


def test_layers_that_the_config_names_and_the_file_lacks_are_a_mismatch(changed, small):
    for targets in (["q_proj", "k_proj"], r".*\.(q|k)_proj", ["lm_head"]):
        with pytest.raises(AdapterMismatch, match="it lacks weights for that"):
            changed(target_modules=targets).check_fits(small)


def test_ten_thousand_names_and_layers_are_looked_up_quickly(changed, small):
    names = [f"name_{number}" for number in range(10_000)]
    adapter = changed(
        target_modules=[*names, "q_proj", "v_proj"],
        exclude_modules=names,
        layers_to_transform=list(range(10_000)),
        alpha_pattern={name: 3 for name in names},
    )
    start = time.process_time()
    adapter.check_fits(small)
    assert time.process_time() - start < 2


MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in range(12)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.3.up_proj", "mlp.up_proj")
]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["mlp.up_proj"], "layers_to_transform": 1},
        {"target_modules": ["up_proj"], "layers_to_transform": [1, 3, 11]},
        {"target_modules": ["up_proj"], "layers_to_transform": []},
        {"target_modules": ["up_proj"], "layers_to_transform": [3], "layers_pattern": "layers"},
        {"target_modules": ["up_proj"], "layers_to_transform": [3], "layers_pattern": ["experts"]},
        {
            "target_modules": ["up_proj"],
            "layers_to_transform": [3],
            "layers_pattern": ["a|b", "layers"],
        },
        {"target_modules": ["model.layers.2.mlp.up_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*layers\.(1|2)\..*_proj"},
        {"target_modules": r".*_proj", "exclude_modules": ["q_proj", "experts.3.up_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.1?1\..*"},
    ],
    ids=str,
)
def test_the_layers_of_a_config_are_those_that_peft_takes(config):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    peft_config = LoraConfig(**config)
    expected = set()
    for module in MODULES:
        found = check_target_module_exists(peft_config, module)
        if found and not isinstance(found, _ExcludedModule):
            expected.add(module)
    assert expected
    # With weights for none of them, the first that the config names is what is lacking.
    lacking = set()
    for module in MODULES:
        shapes = {f"other.lora_{side}.weight": (8, 8) for side in "AB"}
        try:
            read_changes("a", config, shapes, Layout({module: {}}))
        except AdapterMismatch:
            lacking.add(module)
    assert lacking == expected


def test_ranks_and_alphas_of_patterns_are_those_that_peft_takes():
    from peft.utils.other import get_pattern_key

    patterns = {
        "q_proj": 3,
        r"layers\.1\..*v_proj": 5,
        "^model.layers.2.mlp.up_proj$": 7,
        "model.layers.4.mlp.up_proj": 9,
        ".*experts.*": 2,
        "up": 4,
    }
    shapes = {}
    for module in MODULES:
        rank = patterns.get(get_pattern_key(list(patterns), module), 6)
        shapes[f"base_model.model.{module}.lora_A.weight"] = (rank, 16)
        shapes[f"base_model.model.{module}.lora_B.weight"] = (16, rank)
    alphas = {pattern: 10.5 * value for pattern, value in patterns.items()}
    config = {"r": 6, "lora_alpha": 63, "rank_pattern": patterns, "alpha_pattern": alphas}
    layers = {
        module: change.product for module, change in read_changes("a", config, shapes).items()
    }
    assert set(layers) == set(MODULES)
    for module, layer in layers.items():
        assert layer.rank == patterns.get(get_pattern_key(list(patterns), module), 6)
        assert layer.alpha == 10.5 * layer.rank
        assert layer.scale == 10.5


def test_rank_stabilised_lora_divides_by_the_root_of_the_rank():
    shapes = {"q.lora_A.weight": (4, 16), "q.lora_B.weight": (16, 4)}
    changes = read_changes("a", {"r": 4, "lora_alpha": 6, "use_rslora": True}, shapes)
    assert changes["q"].product.scale == 3


@pytest.mark.parametrize(
    ("shapes", "error", "why"),
    [
        ({"q.lora_A.weight": (2, 4)}, CorruptModel, "only one of the two factors of q"),
        (
            {"q.lora_A.weight": (2,), "q.lora_B.weight": (4, 2)},
            UnsupportedModel,
            r"the shape \[2\]",
        ),
        ({"q.lora_A.weight": (2, 4), "q.lora_B.weight": (4, 3)}, CorruptModel, "have 2 and 3"),
        ({"q.lora_embedding_A": (2, 4)}, CorruptModel, "only one of the two factors of q"),
        ({"q.lora_magnitude_vector": (4,)}, CorruptModel, "no factors of q"),
        ({"q.lora_diag": (2,)}, UnsupportedModel, "more than LoRA: it holds q.lora_diag"),
        (
            {"q.lora_A.weight": (2, 4), "q.lora_B.weight": (4, 2), "q.lora_magnitude_vector": (4,)},
            CorruptModel,
            "use_dora None, and its weights of q say otherwise",
        ),
        (
            {"e.token_adapter.trainable_tokens_delta": (2, 4)},
            CorruptModel,
            "names 0 tokens of e, and it has weights for 2",
        ),
    ],
)
def test_factors_that_form_no_layer_are_refused(shapes, error, why):
    with pytest.raises(error, match=why):
        read_changes("a", {"r": 2}, shapes)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (True, None),
        (False, "which does not get a batch's rows one by one"),
        (None, "it is unknown whether that gets a batch's rows one by one"),
    ],
)
def test_why_it_is_merged_is_only_claimed_where_it_is_known(models, known, expected):
    small, adapter = (
        find_checkpoint("small", root=models),
        find_adapter("adapter", root=models),
    )
    changed = next(iter(adapter.changes(small)))
    others = {name: True for name in small.gets_rows if name != changed}
    small.gets_rows = others if known is None else {**others, changed: known}
    why = adapter.why_merged(small)
    assert why is None if expected is None else f"it changes {changed}, " in why and expected in why
    small.gets_rows = {}
    assert "it is unknown which layers of LlamaForCausalLM" in adapter.why_merged(small)
