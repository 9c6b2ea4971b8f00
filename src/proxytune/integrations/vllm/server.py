"""The command that starts vLLM's OpenAI-compatible server on a recipe.

vLLM's own command `vllm serve` needs a distribution named `vllm`, and CPU builds have other names. The module
behind it starts under any name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from proxytune.errors import InvalidRequest, missing_extra
from proxytune.grants import NOTHING, Grants
from proxytune.integrations.vllm.config import BATCH_INVARIANT, check_batch_invariance
from proxytune.recipe.recipe import Recipe

MODULE = "vllm.entrypoints.openai.api_server"
MIDDLEWARE = "proxytune.server.vllm.RequestLanguage"
"""Makes vLLM's server understand the requests of the local one; vLLM imports it by this name."""


def vllm_server_command(
    recipe: str | Recipe,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    experts: Sequence[str] | None = None,
    dtype: str | None = None,
    max_model_len: int | None = None,
    num_drafted: int = 0,
    grants: Grants = NOTHING,
    options: Sequence[str] = (),
) -> list[str]:
    """Return the command that serves a recipe with vLLM, after checking that vLLM can.

    Args:
        recipe: A directory, `package:NAME/PATH`, a Hub id, or a recipe already read.
        host: Address to listen on.
        port: Port to listen on.
        name: The model's name for clients, beside `NAME:EXPERT` for each expert; None for the name of the
            recipe's directory.
        experts: Serve only these; None serves all.
        dtype: Dtype of all models; None leaves it to vLLM.
        max_model_len: Maximum number of tokens of a row; None for the shortest context of the models.
        num_drafted: Number of tokens that the default expert drafts at a time; 0 turns speculative decoding
            off. With drafts, requests can choose strength and experts on vLLM's second model runner alone.
        grants: What the caller allows.
        options: Further options of vLLM's server, passed on unchanged.

    Raises:
        UnsafeModel: The recipe asks for a right that the caller does not grant.
        MissingExtra: vLLM is not installed.
        RecipeError: The recipe is missing or malformed.
        UnsupportedModel: vLLM cannot run it; the message says why.
        InvalidRequest: A number is out of range.
        UserError: A model is missing, unsafe, corrupt or does not match; see `errors.py`.
    """
    if importlib.util.find_spec("vllm") is None:
        raise missing_extra("vLLM is not installed", "vllm")
    from proxytune.integrations.vllm.config import find_ensemble
    from proxytune.integrations.vllm.draft import speculative_config

    if num_drafted < 0:
        raise InvalidRequest(f"num_drafted is {num_drafted}, and must be 0 or more")
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    served = recipe.only(experts)
    find_ensemble(served, grants)
    command = [sys.executable, "-m", MODULE, "--model", str(recipe.directory)]
    name = name or recipe.directory.name
    # Where requests cannot choose, an expert's name would promise what is not done.
    can_choose = not num_drafted or _is_second_runner()
    names = [f"{name}:{expert.name}" for expert in served.experts] if can_choose else []
    command += ["--served-model-name", name, *names, "--middleware", MIDDLEWARE]
    command += ["--host", host, "--port", str(port)]
    own: dict[str, object] = {}
    if experts is not None:
        own["experts"] = [expert.name for expert in served.experts]
    if grants.allow_pickle:
        own["allow_pickle"] = True
    if served.base.prompt != "plain":
        own["renders_texts"] = True  # by the middleware
    if own:
        command += ["--additional-config", json.dumps({"proxytune": own})]
    if grants.trust_remote_code:
        command += ["--trust-remote-code"]
    if dtype is not None:
        command += ["--dtype", dtype]
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    if num_drafted:
        drafting = speculative_config(served, num_tokens=num_drafted, grants=grants)
        command += ["--speculative-config", json.dumps(drafting)]
    return [*command, *options]


def _is_second_runner() -> bool:
    """Whether vLLM will run its second model runner, which tells rows apart while an expert drafts."""
    from vllm.envs import VLLM_USE_V2_MODEL_RUNNER
    from vllm.triton_utils import HAS_TRITON

    chosen: bool | None = VLLM_USE_V2_MODEL_RUNNER
    return bool(HAS_TRITON) if chosen is None else chosen


def become_vllm_server(
    command: list[str], keys: Sequence[str], *, is_exact: bool = False
) -> NoReturn:
    """Replace this process by vLLM's server.

    Args:
        command: What `vllm_server_command` returns.
        keys: The key that clients need, if there is one.
        is_exact: Whether vLLM is to use its batch-invariant kernels.

    Raises:
        InvalidRequest: Several keys were given, of which vLLM takes one.
        UnsupportedModel: vLLM has no such kernels here.
    """
    if len(keys) > 1:
        raise InvalidRequest(
            f"{len(keys)} keys were given, and vLLM takes one.\nhint: a proxy in front can know several"
        )
    # A key on the command line would show in the list of processes.
    environment = dict(os.environ) | ({"VLLM_API_KEY": keys[0]} if keys else {})
    if is_exact:
        check_batch_invariance()
        environment[BATCH_INVARIANT] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)
