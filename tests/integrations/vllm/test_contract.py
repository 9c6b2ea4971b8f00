"""What the plugin relies on in vLLM, name by name, checked in the files of the oldest and the newest version.

The newest version has no CPU build, so its files are read: `make test-vllm` unpacks its wheel. To support
another version, change `NEWEST` here and in the Makefile, mend what fails, and move the upper bound of the
extra `vllm` in pyproject.toml. Beside what the plugin calls and overrides, the table has what vLLM must do
for it to be called at all.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.vllm_source import UNPACKED, VllmSource, code, parameters, strings

ROOT = Path(__file__).parents[3]
OLDEST, NEWEST = "0.32", "0.33"


@dataclass(frozen=True)
class Reliance:
    """One thing that the plugin relies on.

    Args:
        name: `module:name` as `VllmSource.find` takes it; several, divided by "|", where versions differ.
        takes: Parameters that the plugin gives. There may be others that need not be given.
        is_called_with: The parameters with which vLLM calls what the plugin puts in its place; all of them.
        does: Calls and assignments in its body, as code; of one that ends with a bracket, the beginning.
        holds: Strings in its body, such as routes and the values of a Literal.
    """

    name: str
    takes: tuple[str, ...] | None = None
    is_called_with: tuple[str, ...] | None = None
    does: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()


def members(owner: str, *names: str) -> list[Reliance]:
    """Return fields, properties and attributes of a class."""
    return [Reliance(f"{owner}.{name}") for name in names]


MODELS = "vllm.model_executor.models"
LOADER = "vllm.model_executor.model_loader"
GPU = "vllm.v1.worker.gpu"
FIRST = "vllm.v1.sample.logits_processor"
SECOND = f"{GPU}.sample.logits_processor"
OPENAI = "vllm.entrypoints.openai"

RELIANCES: dict[str, list[Reliance]] = {
    "vLLM finds the plugin, and reads a recipe with its classes": [
        Reliance("vllm.plugins:DEFAULT_PLUGINS_GROUP", holds=("vllm.general_plugins",)),
        Reliance(
            "vllm.transformers_utils.config:HFConfigParser.parse",
            does=("AutoConfig.from_pretrained(",),
        ),
        Reliance(
            "vllm.tokenizers.hf:CachedHfTokenizer.from_pretrained",
            does=("AutoTokenizer.from_pretrained(",),
        ),
        Reliance(f"{MODELS}.registry:ModelRegistry"),
        Reliance(
            f"{MODELS}.registry:_ModelRegistry.register_model", takes=("model_arch", "model_cls")
        ),
    ],
    "config.py checks vLLM's whole config": [
        Reliance(f"{MODELS}.config:MODELS_CONFIG_MAP"),
        Reliance(f"{MODELS}.config:VerifyAndUpdateConfig"),
        Reliance(
            f"{MODELS}.config:VerifyAndUpdateConfig.verify_and_update_config",
            is_called_with=("vllm_config",),
        ),
        Reliance(
            "vllm.config.vllm:VllmConfig.try_verify_and_update_config",
            does=(
                "MODELS_CONFIG_MAP.get(architecture, None)",
                "cls.verify_and_update_config(self)",
            ),
        ),
        *members(
            "vllm.config.vllm:VllmConfig",
            "model_config",
            "load_config",
            "parallel_config",
            "quant_config",
            "speculative_config",
            "lora_config",
            "additional_config",
            "use_v2_model_runner",
        ),
        *members(
            "vllm.config.model:ModelConfig",
            "hf_config",
            "hf_text_config",
            "dtype",
            "max_model_len",
            "max_logprobs",
            "quantization",
            "enable_prompt_embeds",
            "model_arch_config",
        ),
        Reliance("vllm.config.parallel:ParallelConfig.prefill_context_parallel_size"),
        Reliance("vllm.config.load:LoadConfig.load_format"),
        Reliance(f"{LOADER}:LoadFormats", holds=("auto", "hf", "safetensors", "dummy")),
        *members(
            "vllm.config.speculative:SpeculativeConfig", "method", "model", "num_speculative_tokens"
        ),
        Reliance(
            "vllm.config.speculative:SpeculativeMethod", holds=("draft_model", "ngram", "suffix")
        ),
        Reliance("vllm.config.speculative:NgramGPUTypes", holds=("ngram_gpu",)),
    ],
    "weights.py loads several models": [
        Reliance(f"{LOADER}:register_model_loader", takes=("load_format",)),
        Reliance(
            f"{LOADER}:get_model_loader",
            does=("_LOAD_FORMAT_TO_MODEL_LOADER[load_format](load_config)",),
        ),
        Reliance(
            f"{LOADER}.default_loader:DefaultModelLoader",
        ),
        Reliance(
            f"{LOADER}.default_loader:DefaultModelLoader.__init__", is_called_with=("load_config",)
        ),
        Reliance(
            f"{LOADER}.default_loader:DefaultModelLoader.download_model",
            is_called_with=("model_config",),
        ),
        Reliance(
            f"{LOADER}.default_loader:DefaultModelLoader.get_all_weights",
            is_called_with=("model_config", "model"),
        ),
        Reliance(
            f"{LOADER}.default_loader:DefaultModelLoader.load_weights",
            does=("model.load_weights(self.get_all_weights(model_config, model))",),
        ),
        Reliance(
            f"{LOADER}.default_loader:DefaultModelLoader._get_weights_iterator", takes=("source",)
        ),
        Reliance(f"{LOADER}.default_loader:DefaultModelLoader.Source"),
        *members(
            f"{LOADER}.default_loader:DefaultModelLoader.Source",
            "model_or_path",
            "revision",
            "prefix",
            "fall_back_to_pt",
        ),
    ],
    "model.py builds models out of vLLM's": [
        Reliance(f"{MODELS}.interfaces:SupportsPP"),
        Reliance(f"{MODELS}.interfaces:SupportsPP.make_empty_intermediate_tensors"),
        Reliance(
            f"{MODELS}.interfaces:_MakeEmptyIntermediateTensors.__call__",
            is_called_with=("batch_size", "dtype", "device"),
        ),
        Reliance(
            f"{MODELS}.interfaces_base:VllmModel.embed_input_ids", is_called_with=("input_ids",)
        ),
        Reliance(
            f"{MODELS}.interfaces_base:VllmModel.forward", is_called_with=("input_ids", "positions")
        ),
        Reliance(
            f"{MODELS}.interfaces_base:VllmModelForTextGeneration.compute_logits",
            is_called_with=("hidden_states",),
        ),
        Reliance(f"{MODELS}.utils:AutoWeightsLoader"),
        Reliance(f"{MODELS}.utils:AutoWeightsLoader.__init__", takes=("module",)),
        Reliance(f"{MODELS}.utils:AutoWeightsLoader.load_weights", takes=("weights",)),
        Reliance("vllm.sequence:IntermediateTensors"),
        Reliance("vllm.sequence:IntermediateTensors.items", takes=()),
        Reliance("vllm.compilation.backends:set_model_tag", takes=("tag",)),
        Reliance(f"{LOADER}.utils:initialize_model", takes=("vllm_config", "prefix")),
        Reliance(
            "vllm.config.vllm:VllmConfig.with_hf_config", takes=("hf_config", "architectures")
        ),
        Reliance(
            "vllm.config.vllm:VllmConfig.get_quantization_config",
            takes=("model_config", "load_config"),
        ),
        Reliance("vllm.config.model:ModelConfig.get_model_arch_config", takes=()),
        Reliance("vllm.config.model:ModelConfig._verify_quantization", takes=()),
        Reliance("vllm.config.model_arch:ModelArchitectureConfig.quantization_config"),
    ],
    "The first runner: processor.py follows the batch, and the model computes one row per request": [
        Reliance(f"{FIRST}:LogitsProcessor"),
        Reliance(f"{FIRST}:LOGITSPROCS_GROUP", holds=("vllm.logits_processors",)),
        Reliance(f"{FIRST}:build_logitsprocs", does=("ctor(vllm_config, device, is_pin_memory)",)),
        Reliance(
            f"{FIRST}.interface:LogitsProcessor.__init__",
            is_called_with=("vllm_config", "device", "is_pin_memory"),
        ),
        Reliance(
            f"{FIRST}.interface:LogitsProcessor.validate_params",
            is_called_with=("sampling_params",),
        ),
        Reliance(
            f"{FIRST}.interface:LogitsProcessor.update_state", is_called_with=("batch_update",)
        ),
        Reliance(f"{FIRST}.interface:LogitsProcessor.is_argmax_invariant", is_called_with=()),
        Reliance(f"{FIRST}.interface:LogitsProcessor.apply", is_called_with=("logits",)),
        *members(f"{FIRST}.interface:BatchUpdate", "batch_size", "removed", "added", "moved"),
        Reliance(f"{FIRST}.interface:MoveDirectionality.SWAP"),
        Reliance(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model",
            does=("self.model.compute_logits(sample_hidden_states)",),
        ),
        # Why requests cannot choose while this runner drafts: it then builds no processor of a plugin.
        Reliance(
            f"{FIRST}:build_logitsprocs",
            does=(
                "LogitsProcessors([MinTokensLogitsProcessor(vllm_config, device, is_pin_memory)])",
            ),
        ),
    ],
    "The second runner: model.py follows the batch, with drafts too": [
        Reliance(f"{SECOND}.interface:LogitsProcessor"),
        Reliance(f"{SECOND}.loader:LOGITSPROCS_GROUP", holds=("vllm.logits_processors",)),
        Reliance(
            f"{SECOND}.loader:build_custom_logits_processors",
            does=("ctor(vllm_config, lp_req_state)",),
        ),
        Reliance(
            f"{SECOND}.interface:LogitsProcessor.__init__",
            is_called_with=("vllm_config", "req_states"),
        ),
        Reliance(
            f"{SECOND}.interface:LogitsProcessor.validate_params",
            is_called_with=("sampling_params",),
        ),
        Reliance(
            f"{SECOND}.interface:LogitsProcessor.add_request",
            is_called_with=("req_idx", "sampling_params"),
        ),
        Reliance(f"{SECOND}.interface:LogitsProcessor.apply", is_called_with=("logits", "ctx")),
        Reliance(
            f"{GPU}.model_states:resolve_model_state_cls",
            takes=("vllm_config", "model"),
            does=("model.get_model_state_cls()",),
        ),
        Reliance(
            f"{GPU}.model_states.interface:ModelState.add_request",
            is_called_with=("req_index", "new_req_data"),
        ),
        Reliance(
            f"{GPU}.model_states.interface:ModelState.preprocess_state",
            is_called_with=(
                "input_batch",
                "block_tables",
                "kv_cache_config",
                "num_computed_tokens",
            ),
        ),
        Reliance("vllm.v1.core.sched.output:NewRequestData.sampling_params"),
        *members(f"{GPU}.input_batch:InputBatch", "idx_mapping_np", "expanded_idx_mapping"),
        Reliance(
            f"{GPU}.model_runner:GPUModelRunner.execute_model",
            does=(
                "self.model_state.preprocess_state(input_batch, block_tables, self.kv_cache_config, "
                "self.req_states.num_computed_tokens.gpu)",
            ),
        ),
        Reliance(
            f"{GPU}.model_runner:GPUModelRunner.sample",
            does=("self.model.compute_logits(sample_hidden_states)",),
        ),
        Reliance("vllm.envs:VLLM_USE_V2_MODEL_RUNNER"),
        Reliance("vllm.triton_utils:HAS_TRITON"),
    ],
    "request.py checks a request in the front end": [
        *members(
            "vllm.sampling_params:SamplingParams",
            "extra_args",
            "prompt_logprobs",
            "prompt_logprob_token_ids",
        ),
        Reliance(
            "vllm.v1.engine.input_processor:InputProcessor._validate_params",
            does=("self.validate_logits_processors_params(params)",),
        ),
    ],
    "server.py starts vLLM's server": [
        Reliance(f"{OPENAI}.api_server", holds=("__main__",), does=("main()",)),
        *members(
            "vllm.engine.arg_utils:EngineArgs",
            "model",
            "served_model_name",
            "dtype",
            "max_model_len",
            "max_num_seqs",
            "trust_remote_code",
            "additional_config",
            "speculative_config",
        ),
        # 0.33 moved them.
        *(
            Reliance(
                f"vllm.entrypoints.launchers.cli_args:{name}|vllm.entrypoints.common.cli_args:{name}"
            )
            for name in (
                "FrontendArgs.host",
                "FrontendArgs.port",
                "FrontendArgs.middleware",
                "FrontendArgs.allowed_origins",
            )
        ),
        Reliance("vllm.envs:VLLM_API_KEY"),
        Reliance("vllm.envs:VLLM_BATCH_INVARIANT"),
    ],
    "server/vllm.py changes requests on their way": [
        Reliance(
            "vllm.entrypoints.serve.middleware.register",
            does=(
                "app.add_middleware(AuthenticationMiddleware, tokens=tokens)",
                "app.add_middleware(imported)",
            ),
        ),
        Reliance(
            "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
            does=("state.args = args", "state.vllm_config = vllm_config"),
        ),
        Reliance(f"{OPENAI}.completion.api_router", holds=("/v1/completions",)),
        Reliance(
            f"{OPENAI}.chat_completion.api_router",
            holds=("/v1/chat/completions", "/v1/chat/completions/batch"),
        ),
        Reliance(f"{OPENAI}.responses.api_router", holds=("/v1/responses",)),
        Reliance(
            "vllm.entrypoints.anthropic.api_router",
            holds=("/v1/messages", "/v1/messages/count_tokens"),
        ),
        Reliance(
            "vllm.entrypoints.scale_out.render.api_router",
            holds=(
                "/v1/completions/render",
                "/v1/chat/completions/render",
                "/v1/responses/render",
                "/v1/messages/render",
            ),
        ),
        Reliance("vllm.entrypoints.serve.tokenize.api_router", holds=("/tokenize", "/detokenize")),
        Reliance("vllm.entrypoints.serve.sagemaker.api_router", holds=("/invocations",)),
        *members(
            f"{OPENAI}.completion.protocol:CompletionRequest",
            "model",
            "prompt",
            "echo",
            "add_special_tokens",
            "use_beam_search",
            "vllm_xargs",
        ),
        *members(
            f"{OPENAI}.chat_completion.protocol:ChatCompletionRequest",
            "model",
            "stop",
            "use_beam_search",
            "vllm_xargs",
        ),
        *members(f"{OPENAI}.responses.protocol:ResponsesRequest", "model", "stop", "vllm_xargs"),
        *members(
            "vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest",
            "model",
            "stop_sequences",
            "vllm_xargs",
        ),
    ],
    "config.py asks whether vLLM has batch-invariant kernels": [
        Reliance("vllm.platforms:current_platform"),
        *members("vllm.platforms.interface:Platform", "is_cuda_alike", "is_xpu", "device_type"),
    ],
    "engine.py runs vLLM in this process, and worker.py is a part of its workers": [
        Reliance("vllm.engine.arg_utils:EngineArgs"),
        Reliance("vllm.engine.arg_utils:EngineArgs.add_cli_args", takes=("parser",)),
        Reliance("vllm.engine.arg_utils:EngineArgs.from_cli_args", takes=("args",)),
        *members(
            "vllm.engine.arg_utils:EngineArgs",
            "model",
            "dtype",
            "max_model_len",
            "max_logprobs",
            "trust_remote_code",
            "worker_extension_cls",
            "speculative_config",
            "data_parallel_size",
            "additional_config",
            "disable_log_stats",
        ),
        Reliance("vllm.utils.argparse_utils:FlexibleArgumentParser"),
        Reliance(
            "vllm.utils.argparse_utils:FlexibleArgumentParser.error", is_called_with=("message",)
        ),
        Reliance("vllm.usage.usage_lib:UsageContext"),
        Reliance("vllm.usage.usage_lib:UsageContext.LLM_CLASS"),
        Reliance("vllm.v1.engine.llm_engine:LLMEngine"),
        Reliance(
            "vllm.v1.engine.llm_engine:LLMEngine.from_engine_args",
            takes=("engine_args", "usage_context"),
        ),
        Reliance(
            "vllm.v1.engine.llm_engine:LLMEngine.add_request",
            takes=("request_id", "prompt", "params"),
        ),
        Reliance("vllm.v1.engine.llm_engine:LLMEngine.step", takes=()),
        Reliance("vllm.v1.engine.llm_engine:LLMEngine.abort_request", takes=("request_ids",)),
        Reliance("vllm.v1.engine.llm_engine:LLMEngine.collective_rpc", takes=("method", "args")),
        Reliance("vllm.v1.engine.llm_engine:LLMEngine.engine_core"),
        Reliance("vllm.v1.engine.core_client:EngineCoreClient.shutdown", takes=()),
        Reliance("vllm.v1.engine.core_client:MPClient.shutdown"),
        Reliance("vllm.inputs:tokens_input"),
        Reliance("vllm.inputs.engine:tokens_input", takes=("prompt_token_ids",)),
        Reliance("vllm:SamplingParams"),
        Reliance("vllm.sampling_params:RequestOutputKind"),
        Reliance("vllm.sampling_params:RequestOutputKind.FINAL_ONLY"),
        *members(
            "vllm.sampling_params:SamplingParams",
            "max_tokens",
            "min_tokens",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
            "seed",
            "stop",
            "stop_token_ids",
            "ignore_eos",
            "logprobs",
            "prompt_logprobs",
            "logprob_token_ids",
            "detokenize",
            "output_kind",
        ),
        *members(
            "vllm.outputs:RequestOutput", "request_id", "prompt_logprobs", "outputs", "finished"
        ),
        *members("vllm.outputs:CompletionOutput", "token_ids", "logprobs", "finish_reason"),
        Reliance("vllm.logprobs:Logprob.logprob"),
        Reliance("vllm.v1.worker.worker_base:WorkerBase.get_model", takes=()),
    ],
}


def faults(source: VllmSource, reliance: Reliance) -> Iterator[str]:
    """Yield what a version lacks of what the plugin relies on."""
    names = [name for name in reliance.name.split("|")]
    node = next((found for name in names if (found := source.find(name)) is not None), None)
    if node is None:
        yield f"{reliance.name} is gone"
        return
    if reliance.takes is not None:
        known, needed = parameters(node)
        if missing := set(reliance.takes) - set(known):
            yield f"{reliance.name} does not take {sorted(missing)}"
        if more := set(needed) - set(reliance.takes):
            yield f"{reliance.name} needs {sorted(more)} as well"
    if reliance.is_called_with is not None and parameters(node)[0] != [*reliance.is_called_with]:
        yield f"{reliance.name} is called with {parameters(node)[0]}, not {list(reliance.is_called_with)}"
    done = code(node)
    for each in reliance.does:
        if not any(one == each or (each[-1] == "(" and one.startswith(each)) for one in done):
            yield f"{reliance.name} does not do {each}"
    for string in set(reliance.holds) - strings(node):
        yield f"{reliance.name} does not hold {string!r}"


EVERY = [one for group in RELIANCES.values() for one in group]


@pytest.fixture(scope="module")
def sources() -> list[VllmSource]:
    found = [
        source for source in (VllmSource.installed(), VllmSource.newest()) if source is not None
    ]
    if not found:
        pytest.skip("no version of vLLM is installed or unpacked; `make test-vllm` does both")
    return found


@pytest.mark.parametrize("reliance", EVERY, ids=lambda one: one.name)
def test_every_version_has_what_the_plugin_relies_on(sources, reliance):
    assert [f"{s.version}: {fault}" for s in sources for fault in faults(s, reliance)] == []


def changes(reliance: Reliance) -> Iterator[tuple[str, str]]:
    """Yield words of a module, without each of which it is not what the plugin relies on."""
    if ":" in reliance.name:
        yield r"\b" + re.split(r"[:.]", reliance.name)[-1] + r"\b"
    yield from (rf"\b{name}\b" for name in (reliance.takes or ()) + (reliance.is_called_with or ()))
    yield from (rf"\b{max(re.findall(r'[A-Za-z_]+', each), key=len)}\b" for each in reliance.does)
    yield from (re.escape(string) for string in reliance.holds)


def test_a_version_without_one_of_these_words_is_found_out(sources):
    source, num_words = sources[-1], 0
    for reliance in EVERY:
        name = next(name for name in reliance.name.split("|") if source.find(name) is not None)
        for word in changes(reliance):
            changed = source.without(name.split(":")[0], word)
            assert list(faults(changed, reliance)), (reliance.name, word)
            num_words += 1
    assert num_words > len(EVERY)


OWNERS = {
    "vllm_config": "vllm.config.vllm:VllmConfig",
    "inner": "vllm.config.vllm:VllmConfig",
    "model_config": "vllm.config.model:ModelConfig",
    "inner.model_config": "vllm.config.model:ModelConfig",
    "vllm_config.model_config": "vllm.config.model:ModelConfig",
    "inner.model_config.model_arch_config": "vllm.config.model_arch:ModelArchitectureConfig",
    "vllm_config.load_config": "vllm.config.load:LoadConfig",
    "vllm_config.parallel_config": "vllm.config.parallel:ParallelConfig",
    "speculative": "vllm.config.speculative:SpeculativeConfig",
    "batch_update": f"{FIRST}.interface:BatchUpdate",
    "input_batch": f"{GPU}.input_batch:InputBatch",
    "new_req_data": "vllm.v1.core.sched.output:NewRequestData",
}
"""What the plugin calls objects of vLLM, and their classes."""


def test_all_that_the_plugin_imports_and_reads_is_in_the_table():
    named = {name for reliance in EVERY for name in reliance.name.split("|")}
    used = set()
    for path in sorted((ROOT / "src" / "proxytune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                used |= {f"{node.module}:{alias.name}" for alias in node.names}
            if isinstance(node, ast.Attribute) and "vllm" in path.parts[-2:][0]:
                owner = OWNERS.get(ast.unparse(node.value))
                used |= set() if owner is None else {f"{owner}.{node.attr}"}
    assert len(used) > 30
    assert used - named == set()


def test_the_extra_allows_the_versions_whose_files_are_read(sources):
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    bounds = re.search(r'^vllm = \["vllm>=([\d.]+),<([\d.]+)"\]$', text, re.MULTILINE)
    major, minor = NEWEST.split(".")
    assert bounds is not None and bounds.groups() == (OLDEST, f"{major}.{int(minor) + 1}")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert f"VLLM_NEWEST := {UNPACKED.name.removeprefix('vllm-')}\n" in makefile
    found = {source.version.rpartition(".")[0] for source in sources}
    assert found <= {OLDEST, NEWEST}


def test_names_are_found_where_a_module_defines_or_imports_them(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "one.py").write_text(
        "from vllm.two import imported as known\n"
        "class Base:\n    field: int = 1\n"
        "class Own(Base):\n    def method(self, a, *, b, c=1):\n        self.attribute = f(a)\n"
        "try:\n    late = 1\nexcept ImportError:\n    pass\n"
    )
    source = VllmSource(tmp_path / "vllm")
    for name in ("known", "Own", "Own.method", "Own.field", "Own.attribute", "late"):
        assert source.find(f"vllm.one:{name}") is not None, name
    for name in ("imported", "Own.other", "f", "method"):
        assert source.find(f"vllm.one:{name}") is None, name
    assert source.find("vllm.three:anything") is None
    method = source.find("vllm.one:Own.method")
    assert parameters(method) == (["a", "b", "c"], ["a", "b"])
    assert {"f(a)", "self.attribute = f(a)"} <= code(method)
