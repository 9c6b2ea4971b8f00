"""What transformers' `generate` and pipelines offer, on a recipe: the right result, or one clear sentence."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from proxytune.errors import InvalidRequest, PromptTooLong, UnknownExpert, UnsupportedModel
from proxytune.integrations.ensemble_cache import CACHE_OPTION, ProxyTunedCache
from proxytune.integrations.transformers import ProxyTunedForCausalLM
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import ChatOptions, Request, SamplingParams
from tests.support.tiny import tiny_adapter, tiny_model, tiny_tokenizer

TEXT = "the rain in Spain"
CHAT = [{"role": "user", "content": "the rain"}]
OTHER_CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
BEGUN = [*CHAT, {"role": "assistant", "content": "in Spa"}]
NEW: Any = {"max_new_tokens": 8, "do_sample": False}
EIGHT = SamplingParams(max_new_tokens=8)
THINKING = "{% if not enable_thinking | default(true) %}(at once) {% endif %}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    template = THINKING + str(tiny_tokenizer().chat_template)
    tokenizer = tiny_tokenizer(chat_template=template)
    tiny_model(directory / "base", seed=1, hidden_size=32, tokenizer=tokenizer)
    tiny_model(directory / "small", seed=2, tokenizer=tokenizer)
    tiny_model(directory / "tuned", seed=3, tokenizer=tokenizer)
    tiny_adapter(directory / "small", directory / "adapters" / "good", seed=4)
    small = ModelSpec(model="small")
    experts = (
        ExpertSpec("lora", ModelSpec(adapter="adapters/good"), small),
        ExpertSpec("full", ModelSpec(model="tuned"), small),
    )
    base = ModelSpec(model="base")
    Recipe(base, experts, directory=directory, default_expert="lora").write(directory)
    return directory


@pytest.fixture(scope="module")
def model(recipe: Path) -> ProxyTunedForCausalLM:
    return AutoModelForCausalLM.from_pretrained(recipe)


@pytest.fixture(scope="module")
def library(recipe: Path) -> ProxyTuned:
    return ProxyTuned.load(recipe)


@pytest.fixture(scope="module")
def tokenizer(recipe: Path) -> Any:
    return AutoTokenizer.from_pretrained(recipe, padding_side="left")


@pytest.fixture(scope="module")
def base(recipe: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(recipe / "base")


@pytest.fixture(scope="module")
def pipe(recipe: Path) -> Any:
    return pipeline("text-generation", model=str(recipe))


@pytest.fixture(scope="module")
def inputs(tokenizer: Any) -> Any:
    return tokenizer(TEXT, return_tensors="pt")


@pytest.fixture(scope="module")
def stop(model: ProxyTunedForCausalLM, tokenizer: Any, inputs: Any) -> str:
    """A character that stands early in the text."""
    text = tokenizer.decode(new_ids(model.generate(**inputs, **NEW), inputs)[:4])
    return next(character for character in text if character.isascii() and character.isprintable())


def new_ids(output: Any, inputs: Any) -> list[int]:
    ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


def test_steering_may_stand_in_a_generation_config(recipe, inputs):
    """It was kept in the config, as anything is there, and changed nothing."""
    model = AutoModelForCausalLM.from_pretrained(recipe)
    expected = {alpha: model.generate(**inputs, **NEW, alpha=alpha) for alpha in (0.0, 0.5, 1.0)}
    assert len({str(ids) for ids in expected.values()}) == 3
    config = GenerationConfig(alpha=0.0, experts="lora", **NEW)
    assert torch.equal(model.generate(**inputs, generation_config=config), expected[0.0])
    assert torch.equal(model.generate(**inputs, generation_config=config, alpha=1.0), expected[1.0])
    model.generation_config.alpha = 0.5
    assert torch.equal(model.generate(**inputs, **NEW), expected[0.5])


# Drafts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steering", [{}, {"alpha": 0.5}, {"experts": "full"}], ids=str)
def test_drafts_of_an_assistant_leave_the_steered_text_as_it_is(model, base, inputs, steering):
    """An assistant used to be handed `alpha` and `experts`, which it refused."""
    plain = model.generate(**inputs, **NEW, **steering)
    for assistant in (base, model):
        drafted = model.generate(**inputs, **NEW, **steering, assistant_model=assistant)
        assert torch.equal(drafted, plain)


@pytest.mark.parametrize("steering", [{}, {"alpha": 0.5}], ids=str)
def test_an_assistant_may_have_another_tokenizer(model, tokenizer, inputs, steering, tmp_path):
    other = tiny_tokenizer(shuffle_seed=3, extra_tokens=["xyz"])
    tiny_model(tmp_path, seed=7, tokenizer=other)
    drafted = model.generate(
        **inputs,
        **NEW,
        **steering,
        assistant_model=AutoModelForCausalLM.from_pretrained(tmp_path),
        tokenizer=tokenizer,
        assistant_tokenizer=other,
    )
    assert torch.equal(drafted, model.generate(**inputs, **NEW, **steering))


@pytest.mark.parametrize("is_loaded", [False, True], ids=["by name", "loaded"])
def test_a_pipeline_drafts_with_an_assistant(recipe, base, pipe, is_loaded):
    """The pipeline compares special tokens in the configs, and a recipe's had none."""
    assistant = base if is_loaded else str(recipe / "base")
    drafting = pipeline("text-generation", model=str(recipe), assistant_model=assistant)
    assert drafting.assistant_model is not None
    for steering in ({}, {"alpha": 0.5}):
        assert drafting(TEXT, **NEW, **steering) == pipe(TEXT, **NEW, **steering)


# Stopping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gives_tokenizer", [False, True])
def test_stop_strings_end_the_text_where_they_first_stand(
    model, tokenizer, inputs, stop, gives_tokenizer
):
    ids = model.generate(**inputs, **NEW)
    options = {"tokenizer": tokenizer} if gives_tokenizer else {}
    stopped = model.generate(**inputs, **NEW, stop_strings=[stop], **options)
    assert torch.equal(stopped, ids[:, : stopped.shape[1]])
    assert len(new_ids(stopped, inputs)) <= 4
    assert stop in tokenizer.decode(new_ids(stopped, inputs))
    assert stop not in tokenizer.decode(new_ids(stopped, inputs)[:-1])


@pytest.mark.parametrize("option", ["stop_strings", "stop_sequence"])
def test_a_pipeline_stops_at_a_string(model, tokenizer, inputs, pipe, stop, option):
    stopped = model.generate(**inputs, **NEW, stop_strings=[stop])
    (answer,) = pipe(TEXT, **NEW, **{option: [stop]}, return_full_text=False)
    assert answer["generated_text"] == tokenizer.decode(new_ids(stopped, inputs))
    assert answer["generated_text"].endswith(stop)


def test_stop_strings_may_stand_in_the_generation_config(model, inputs, stop):
    config = GenerationConfig(stop_strings=[stop], **NEW)
    stopped = model.generate(**inputs, generation_config=config)
    assert torch.equal(stopped, model.generate(**inputs, **NEW, stop_strings=[stop]))
    assert len(new_ids(stopped, inputs)) <= 4


# Guidance, scores, constraints ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "steering", [{}, {"alpha": 0.0}, {"alpha": 0.5, "experts": "full"}], ids=str
)
@pytest.mark.parametrize("has_negative", [False, True])
def test_guidance_steers_both_prompts_as_the_call_does(
    model, tokenizer, inputs, steering, has_negative
):
    """The negative prompt used to be steered with the recipe's own strength, whatever the call said."""
    ids = inputs["input_ids"]
    negative = tokenizer("no", return_tensors="pt")["input_ids"] if has_negative else ids[:, -1:]
    expected: list[int] = []
    for _ in range(6):
        new = torch.tensor([expected], dtype=torch.long)
        wanted, unwanted = (
            model(torch.cat([start, new], 1), **steering).logits[0, -1].log_softmax(-1)
            for start in (ids, negative)
        )
        expected.append(int((unwanted + 1.5 * (wanted - unwanted)).argmax()))
    given = {"negative_prompt_ids": negative} if has_negative else {}
    output = model.generate(
        **inputs, **given, **steering, guidance_scale=1.5, max_new_tokens=6, do_sample=False
    )
    assert new_ids(output, inputs) == expected[: len(new_ids(output, inputs))]


def test_a_callers_own_guidance_keeps_its_model(model, base, inputs):
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, base)
    model.generate(**inputs, **NEW, logits_processor=LogitsProcessorList([processor]))
    assert processor.model is base


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "drafts"])
def test_logits_and_scores_are_the_steered_ones(model, inputs, options):
    output = model.generate(
        **inputs, **NEW, **options,
        alpha=0.5, output_logits=True, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    num_prompt = inputs["input_ids"].shape[1]
    expected = model(output.sequences[:, :-1], alpha=0.5).logits[0, num_prompt - 1 :]
    for given in (output.logits, output.scores):
        torch.testing.assert_close(torch.cat(given), expected, atol=3e-5, rtol=1e-4)
    scores = model.compute_transition_scores(
        output.sequences, output.scores, normalize_logits=True
    )[0]
    chosen = expected.log_softmax(-1).gather(1, output.sequences[0, num_prompt:, None])[:, 0]
    torch.testing.assert_close(scores, chosen, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9, "min_p": 0.01},
        {"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 0.9},
        {"bad_words_ids": [[5]], "sequence_bias": [[[6], 2.0]], "suppress_tokens": [7]},
        {"logits_processor": LogitsProcessorList([NoBadWordsLogitsProcessor([[5]])])},
        {"prefix_allowed_tokens_fn": lambda _, ids: [5, 6, int(ids[-1])]},
        {"watermarking_config": WatermarkingConfig(bias=2.5)},
        {"forced_eos_token_id": 9, "exponential_decay_length_penalty": (2, 1.1)},
        {"prefill_chunk_size": 3},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {CACHE_OPTION: DynamicCache()},
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_generate_at_alpha_0_is_the_bases_whatever_its_options(model, base, inputs, options):
    outputs = []
    for each, steering in ((model, {"alpha": 0.0}), (base, {})):
        torch.manual_seed(0)
        given = dict(options)
        if isinstance(given.get(CACHE_OPTION), DynamicCache):
            given[CACHE_OPTION] = DynamicCache()
        outputs.append(each.generate(**inputs, **{**NEW, **given}, **steering))
    assert torch.equal(*outputs)


def test_a_streamer_gets_the_text(model, tokenizer, inputs):
    ids = new_ids(model.generate(**inputs, **NEW), inputs)
    printed = io.StringIO()
    with redirect_stdout(printed):
        model.generate(**inputs, **NEW, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert printed.getvalue().rstrip("\n") == tokenizer.decode(ids).rstrip("\n")
    parts = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, **NEW, streamer=parts)
    assert "".join(parts) == tokenizer.decode(ids)


def test_a_function_may_replace_the_decoding_loop(model, inputs):
    def loop(self, input_ids, *, generation_config, **kwargs):
        return self(input_ids, alpha=kwargs["alpha"]).logits.argmax(-1)[:, -1:]

    first = model.generate(**inputs, custom_generate=loop, alpha=0.5, max_new_tokens=1)
    assert first.tolist() == model.generate(**inputs, alpha=0.5, max_new_tokens=1)[:, -1:].tolist()


# Caches ---------------------------------------------------------------------------------------------


def begun(model: Any, inputs: Any, **options: Any) -> tuple[torch.Tensor, ProxyTunedCache]:
    """Return generated ids with two tokens of a next turn after them, and the cache without those."""
    output = model.generate(**inputs, **NEW, return_dict_in_generate=True, **options)
    return torch.cat([output.sequences, torch.tensor([[5, 6]])], dim=1), output[CACHE_OPTION]


def test_a_cache_goes_on_with_the_next_turn(model, inputs):
    """generate took a recipe's cache for one of linear layers, and read all tokens a second time."""
    ids, cache = begun(model, inputs, alpha=0.5)
    kept = cache.get_seq_length()
    assert (
        kept == ids.shape[1] - 3
    )  # neither the next turn nor the last token, which nothing followed
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, alpha=0.5, **NEW)
    output = model.generate(ids, attention_mask=mask, alpha=0.5, **NEW, **{CACHE_OPTION: cache})
    assert torch.equal(output, expected)
    assert cache.get_seq_length() == output.shape[1] - 1
    _, again = begun(model, inputs, alpha=0.5)
    only_new = model.generate(
        ids[:, kept:], attention_mask=mask, alpha=0.5, **NEW, **{CACHE_OPTION: again}
    )
    assert torch.equal(only_new, expected[:, kept:])


def test_a_cache_that_holds_all_tokens_is_refused(model, inputs):
    ids, cache = begun(model, inputs)
    with pytest.raises(
        InvalidRequest, match=f"holds {ids.shape[1] - 3} tokens and input_ids has 5"
    ):
        model.generate(ids[:, :5], **NEW, **{CACHE_OPTION: cache})


def test_a_cache_of_other_rows_is_refused_and_its_hint_works(model, inputs):
    ids, cache = begun(model, inputs)
    options = {**NEW, "num_beams": 2, CACHE_OPTION: cache}
    with pytest.raises(
        InvalidRequest, match=r"(?s)holds 1 row.s., and 2 .*batch_repeat_interleave"
    ):
        model.generate(ids, **options)
    cache.batch_repeat_interleave(2)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **NEW, num_beams=2))


@pytest.mark.parametrize("tokens_to_remove", [2, -100])
def test_a_crop_that_no_cache_can_do_is_refused(model, inputs, tokens_to_remove):
    """A positive number used to take that many tokens away, where transformers refuses it."""
    cache = model(**inputs)[CACHE_OPTION]
    with pytest.raises(InvalidRequest, match=f"crop was given {tokens_to_remove}"):
        cache.crop(tokens_to_remove)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


# Refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"assistant_early_exit": 1}, "assistant_early_exit is 1, but it drafts with first layers"),
        ({"use_mtp": True}, "use_mtp is True"),
        ({"speculation_type": "dflash"}, "speculation_type is 'dflash'"),
        ({"dola_layers": "high"}, "dola_layers is 'high', but it compares layers"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha is 0.6"),
        ({"token_healing": True}, "token_healing is True"),
        ({"output_attentions": True}, "output_attentions is True"),
        ({"output_hidden_states": True}, "output_hidden_states is True"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds was given"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation is 'offloaded'"),
        ({"cache_implementation": "quantized"}, "cache_implementation is 'quantized'"),
        ({CACHE_OPTION: DynamicCache(offloading=True)}, "is a DynamicCache, but each model"),
        ({CACHE_OPTION: ((torch.zeros(1, 1, 1, 1),) * 2,)}, "is a tuple, but each model"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_generate_refuses_what_only_one_model_can_do(model, inputs, options, why):
    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        with pytest.raises(InvalidRequest, match=why) as caught:
            model.generate(**inputs, **NEW, **options)
    finally:
        hook.remove()
    assert "hint:" in str(caught.value)


def test_a_static_cache_is_refused(model, base, inputs):
    cache = StaticCache(config=base.config, max_cache_len=32)
    with pytest.raises(InvalidRequest, match="is a StaticCache, but each model"):
        model.generate(**inputs, **NEW, **{CACHE_OPTION: cache})
    with pytest.raises(InvalidRequest, match="is a StaticCache, but each model"):
        model(**inputs, **{CACHE_OPTION: cache})


def test_a_generation_config_is_refused_as_its_options_are(model, inputs):
    config = GenerationConfig(assistant_early_exit=1, **NEW)
    with pytest.raises(InvalidRequest, match="assistant_early_exit is 1"):
        model.generate(**inputs, generation_config=config)


def test_continuous_batching_is_refused(model, inputs):
    ids = inputs["input_ids"].tolist()
    for begin in (
        lambda: model.generate_batch(inputs=ids, max_new_tokens=2),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager().__enter__(),
        lambda: model.generate(**inputs, **NEW, cache_implementation="paged"),
    ):
        with pytest.raises(UnsupportedModel, match=r"continuous batching keeps .* pages of one"):
            begin()


def test_token_healing_is_refused_by_itself_too(model, tokenizer, inputs):
    with pytest.raises(InvalidRequest, match="token_healing"):
        model.heal_tokens(inputs["input_ids"], tokenizer)


def test_what_is_no_batch_of_token_ids_is_refused_with_the_way_to_one(model, inputs):
    ids = inputs["input_ids"]
    for given, why in (
        (TEXT, "given a str.*tokenizer\\(text, return_tensors='pt'\\)"),
        (ids.tolist(), "given a list"),
        (inputs, r"given a BatchEncoding.*model\.generate\(\*\*inputs\)"),
        (ids[0], r"shape \[12\]"),
        (ids.float(), "torch.float32"),
    ):
        with pytest.raises(InvalidRequest, match=f"(?s){why}"):
            model.generate(given, **NEW)
    with pytest.raises(InvalidRequest, match=r"torch\.float32"):
        model(ids.float())


def test_a_mask_of_another_shape_is_refused_by_its_name(model, inputs):
    with pytest.raises(InvalidRequest, match=r"attention_mask has shape \[1, 5\].*\[1, 12\]"):
        model.generate(inputs["input_ids"], attention_mask=torch.ones(1, 5), **NEW)


def test_an_assistant_does_not_draft_for_beams(model, base, inputs):
    with pytest.raises(InvalidRequest, match="num_beams is 2, but drafts continue one sequence"):
        model.generate(**inputs, **NEW, num_beams=2, assistant_model=base)


def test_a_batch_padded_on_the_right_is_refused_and_the_hint_works(model, recipe, library):
    """transformers warned in its log, and the shorter texts went on after their padding."""
    tokenizer = AutoTokenizer.from_pretrained(recipe, padding_side="right")
    with pytest.raises(InvalidRequest, match="padding_side = 'left'"):
        model.generate(**tokenizer([TEXT, "a"], return_tensors="pt", padding=True), **NEW)
    tokenizer.padding_side = "left"
    ids = model.generate(**tokenizer([TEXT, "a"], return_tensors="pt", padding=True), **NEW)
    new = tokenizer.batch_decode(ids[:, -8:])
    assert new == [library.generate(text, EIGHT).text for text in (TEXT, "a")]


def test_a_text_that_may_outgrow_a_context_is_refused_before_the_first_token(
    model, tokenizer, inputs
):
    """It used to fail at the last token that fits, and the text until there was lost."""
    with pytest.raises(PromptTooLong, match="come to 132 tokens, and base has a context of 128"):
        model.generate(**inputs, max_new_tokens=120, do_sample=False)
    full = model.generate(**inputs, max_new_tokens=116, min_new_tokens=116, do_sample=False)
    assert full.shape[1] == 128
    padded = tokenizer([TEXT, TEXT * 4], return_tensors="pt", padding=True)
    width = padded["input_ids"].shape[1]
    row = {key: value[:1] for key, value in padded.items()}
    model.generate(**row, max_new_tokens=128 - 12, do_sample=False)  # padding takes no position
    with pytest.raises(PromptTooLong, match=f"ask for {width - 12} fewer"):
        model.generate(**padded, max_new_tokens=128 - 12, do_sample=False)


# Pipelines and chats --------------------------------------------------------------------------------


def answer_of(output: Any) -> str:
    text: str = output[0]["generated_text"]
    return text


@pytest.mark.parametrize(
    "chat", [CHAT, OTHER_CHAT, [*BEGUN, *CHAT]], ids=["one", "system", "three"]
)
@pytest.mark.parametrize("steering", [{}, {"alpha": 0.5, "experts": "full"}], ids=str)
def test_a_pipeline_answers_a_chat_as_the_library_does(pipe, library, chat, steering):
    request = Request(chat, EIGHT, **steering)
    ids = pipe.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert all(list(prompt) == ids for prompt in library.job(request).prompts)
    expected = library.generate(chat, EIGHT, **steering).text
    assert answer_of(pipe(chat, **NEW, **steering, return_full_text=False)) == expected
    (whole,) = pipe(chat, **NEW, **steering)
    assert whole["generated_text"] == [*chat, {"role": "assistant", "content": expected}]


def test_a_pipeline_continues_the_assistants_message_as_the_library_does(pipe, library):
    options = ChatOptions(continue_final_message=True)
    (trace,) = library.generate_batch([Request(BEGUN, EIGHT, chat=options)])
    assert answer_of(pipe(BEGUN, **NEW, return_full_text=False)) == trace.text
    (whole,) = pipe(BEGUN, **NEW)
    assert whole["generated_text"] == [
        *CHAT,
        {"role": "assistant", "content": "in Spa" + trace.text},
    ]
    new_turn = pipe(BEGUN, **NEW, continue_final_message=False, return_full_text=False)
    assert answer_of(new_turn) == library.generate(BEGUN, EIGHT).text


def test_a_pipeline_hands_variables_to_the_template_as_the_library_does(pipe, library):
    options = ChatOptions(template_kwargs={"enable_thinking": False})
    (trace,) = library.generate_batch([Request(CHAT, EIGHT, chat=options)])
    variables = {"enable_thinking": False}
    answered = pipe(CHAT, **NEW, tokenizer_encode_kwargs=variables, return_full_text=False)
    assert answer_of(answered) == trace.text
    assert trace.text != library.generate(CHAT, EIGHT).text
    encoded = pipe.tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt", **variables
    )
    assert pipe.tokenizer.decode(encoded["input_ids"][0]).startswith("(at once)")


@pytest.mark.parametrize("batch_size", [None, 2])
def test_several_chats_or_texts_are_answered_as_each_alone(pipe, library, batch_size):
    for prompts in ([CHAT, OTHER_CHAT], [TEXT, "a"]):
        answers = pipe(prompts, **NEW, batch_size=batch_size, return_full_text=False)
        expected = [library.generate(prompt, EIGHT).text for prompt in prompts]
        assert [answer_of(answer) for answer in answers] == expected


def test_a_pipeline_refuses_an_unknown_expert_by_name(pipe):
    with pytest.raises(UnknownExpert, match="no expert 'loar'"):
        pipe(TEXT, **NEW, experts="loar")


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device": "cpu"},
        {"model_kwargs": {"attn_implementation": "eager"}},
        {"dtype": torch.float32},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_pipelines_options_for_its_model_reach_it(recipe, pipe, options):
    """The pipeline gives some of them to the tokenizer as well, which used to refuse them."""
    other = pipeline("text-generation", model=str(recipe), **options)
    assert other(TEXT, **NEW) == pipe(TEXT, **NEW)
    if "model_kwargs" in options:
        assert {m.config._attn_implementation for m in other.model.members} == {"eager"}


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(tmp_path):
    """The pipeline used to send "text, end of text", and the library the text alone."""
    from tokenizers.processors import Sequence, TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokens = ("<|im_start|>", "<|endoftext|>")
    rule = TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens],
    )
    old = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = Sequence([*([old] if old else []), rule])
    for seed, name in enumerate(("base", "tuned", "small")):
        tiny_model(tmp_path / name, seed=seed, tokenizer=tokenizer)
    expert = ExpertSpec("e", ModelSpec(model="tuned"), ModelSpec(model="small"))
    Recipe(ModelSpec(model="base"), (expert,), directory=tmp_path).write(tmp_path)
    library, pipe = ProxyTuned.load(tmp_path), pipeline("text-generation", model=str(tmp_path))
    ids = pipe.tokenizer(TEXT)["input_ids"]
    assert pipe.tokenizer.convert_ids_to_tokens(ids[0]) == "<|im_start|>"
    assert list(library.job(Request(TEXT, EIGHT)).prompts[0]) == ids
    expected = library.generate(TEXT, EIGHT).text
    assert answer_of(pipe(TEXT, **NEW, return_full_text=False)) == expected


@pytest.mark.parametrize(
    "chat", [CHAT, OTHER_CHAT, [*BEGUN, *CHAT]], ids=["one", "system", "three"]
)
def test_a_chat_is_joined_as_in_the_library_where_no_model_has_a_template(tmp_path, chat):
    tokenizer = tiny_tokenizer(chat_template=None)
    for seed, name in enumerate(("base", "tuned", "small")):
        tiny_model(tmp_path / name, seed=seed, tokenizer=tokenizer)
    expert = ExpertSpec("e", ModelSpec(model="tuned"), ModelSpec(model="small"))
    Recipe(ModelSpec(model="base"), (expert,), directory=tmp_path).write(tmp_path)
    answered = pipeline("text-generation", model=str(tmp_path))(chat, **NEW, return_full_text=False)
    assert answer_of(answered) == ProxyTuned.load(tmp_path).generate(chat, EIGHT).text


def test_a_template_for_texts_is_not_applied_and_the_way_that_is_said_gives_the_librarys_text(
    tmp_path,
):
    for seed, name in enumerate(("base", "tuned", "small")):
        tiny_model(tmp_path / name, seed=seed)
    base, tuned, small = (
        ModelSpec(model=name, prompt="Q: {{ prompt }}\nA:") for name in ("base", "tuned", "small")
    )
    Recipe(base, (ExpertSpec("e", tuned, small),), directory=tmp_path).write(tmp_path)
    with pytest.warns(
        UserWarning, match="template, which is not applied here.*\nhint: give a text"
    ):
        pipe = pipeline("text-generation", model=str(tmp_path))
    message = [{"role": "user", "content": TEXT}]
    answered = pipe(message, **NEW, return_full_text=False)
    assert answer_of(answered) == ProxyTuned.load(tmp_path).generate(TEXT, EIGHT).text


def test_a_chat_that_the_models_read_differently_is_refused_with_a_way_out(tmp_path):
    tiny_model(tmp_path / "base", seed=1)
    tokenizer = tiny_tokenizer(chat_template="{{ messages[-1].content }}?")
    for name in ("tuned", "small"):
        tiny_model(tmp_path / name, seed=2, tokenizer=tokenizer)
    expert = ExpertSpec("e", ModelSpec(model="tuned"), ModelSpec(model="small"))
    Recipe(ModelSpec(model="base"), (expert,), directory=tmp_path).write(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path))
    with pytest.raises(
        TemplateError, match=r"read messages in different formats.*`proxytune serve`"
    ):
        pipe(CHAT, **NEW)
    text = ProxyTuned.load(tmp_path).generate(TEXT, EIGHT).text
    assert answer_of(pipe(TEXT, **NEW, return_full_text=False)) == text
