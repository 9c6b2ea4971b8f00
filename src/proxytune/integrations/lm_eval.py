"""A recipe as a model of lm-eval, EleutherAI's evaluation harness, under the name `proxytune`.

    python -m proxytune.integrations.lm_eval run --model proxytune --model_args recipe=DIR,alpha=0.7 --tasks
    arc_easy

runs `lm_eval` with this model registered, because the harness itself only finds its own models. In Python,
importing this module registers it.

At alpha 0 all results equal those of the harness's own `hf` model for the base, to the digits it prints. Each
model reads a context in its own prompt format; with `--apply_chat_template` it is rendered only then. Scores
are always of tokens of the base's vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from proxytune.backends.base import num_shared_tokens
from proxytune.data.lines import line_seed
from proxytune.errors import InvalidRequest, missing_extra
from proxytune.measure.likelihood import likelihoods
from proxytune.measure.score import Passage, needed_members, smallest_context
from proxytune.model import ProxyTuned
from proxytune.request import ChatOptions, Message, Prompt, Request, SamplingParams, Steering
from proxytune.text.prompts import prompt_ids, render_text, text_ids

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise missing_extra("lm-eval is not installed", "eval") from error

CHAT_MARK = "\x02messages:"
"""Prefix of a context that is a conversation as JSON, because the harness passes contexts as text."""
BEGUN_MARK = "\x02begun:"
"""The same for a conversation whose last message, the beginning of the answer, is continued."""
MAX_NEW_TOKENS = 256
"""Maximum number of new tokens if a task gives none, as in the harness's own models."""
DEFAULT_LENGTH = 2048
"""Maximum length if no model has a limit, as in the harness's own models."""
HARNESS_DEVICE = "cuda:0"
"""The device that the harness passes if the user names none, whether or not there is a GPU."""
_LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("proxytune")
class ProxyTunedLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A steered base for lm-eval.

    Args:
        recipe: A recipe's reference, or a loaded model.
        alpha: Strength of steering; None for the recipe's.
        expert: The expert that steers, or several joined with `+`; None for the recipe's default.
        batch_size: Number of rows per batch.
        max_length: Maximum length of prompt and continuation, in tokens; None for the smallest context.
        seed: Random seed of sampled answers.
        device: Device of all models; None or `cuda:0` for the recipe's.
        dtype: Dtype of all models; None for the recipe's.
        exact: As in `ProxyTuned.load`.
        speculative: Use speculative decoding when generating.
        trust_remote_code: Grant what the recipe asks for: run Python code that comes with its models.
        allow_pickle: Grant what the recipe asks for: read pickled weights, which can run any code.

    Raises:
        UnsafeModel: The recipe asks for a right that is not granted.
        InvalidRequest: A value cannot be used.
        UserError: The recipe cannot be loaded.
    """

    def __init__(
        self,
        recipe: str | ProxyTuned = "",
        alpha: float | None = None,
        expert: str | tuple[str, ...] | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        seed: int = 0,
        device: str | None = None,
        dtype: str | None = None,
        exact: bool = False,
        speculative: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        if not recipe:
            raise InvalidRequest("no recipe was given.\nhint: --model_args recipe=DIR")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InvalidRequest(
                f"batch_size is {batch_size!r}, but must be a whole number above 0; auto is not supported.\n"
                "hint: --batch_size 8"
            )
        device = None if device == HARNESS_DEVICE else device
        names = tuple(expert.split("+")) if isinstance(expert, str) else expert
        if isinstance(recipe, ProxyTuned):
            self.model = recipe
        else:
            self.model = ProxyTuned.load(
                recipe,
                device=device,
                dtype=dtype,
                exact=exact,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
            )
        self.batch_size = int(batch_size)
        self.tokenizer = self.model.tokenizer
        self._steering, self._seed = Steering(alpha, names), seed
        self._speculative = speculative
        strengths = self.model.recipe.strengths(self._steering)
        self._alphas = tuple(strengths.get(pair.name, 0.0) for pair in self.model.ensemble.pairs)
        ensemble = self.model.ensemble
        pairs = zip(ensemble.pairs, self._alphas, strict=True)
        used = needed_members(pair for pair, alpha in pairs if alpha)
        context = smallest_context(ensemble.members[i] for i in used)
        self._max_length = max_length or context or DEFAULT_LENGTH
        self._num_requests = 0

    # What the harness asks about the model ---------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Maximum length of prompt and continuation together, in tokens."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Maximum number of new tokens if a task gives none."""
        return MAX_NEW_TOKENS

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self.tokenizer.eos_token_id
        return eos if eos is not None else self.model.ensemble.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        bos = self.tokenizer.bos_token
        return self.eot_token_id if bos is None else self.tokenizer.get_vocab()[bos]

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in the harness's cache."""
        return self.model.ensemble.members[0].name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the token ids of a text; a start token that it begins with is not put there twice."""
        start = str(self.tokenizer.decode([self.prefix_token_id]))
        begins = bool(start) and string.startswith(start)
        if add_special_tokens is False or (add_special_tokens is None and begins):
            return list(self.tokenizer.encode(string, add_special_tokens=False))
        return prompt_ids(string, self.tokenizer)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return what the harness records as the chat template: the prompt format of each model."""
        if isinstance(chat_template, str):
            raise InvalidRequest(
                f"a chat template was given ({chat_template}), but each model of a recipe has its own.\n"
                'hint: set "chat" in the recipe'
            )
        return " | ".join(f.chat for f in self.model.formats) if chat_template else ""

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as a context, which each model later renders in its own format."""
        # Without a generation prompt, the task has begun the assistant's answer (gen_prefix).
        mark = CHAT_MARK if add_generation_prompt else BEGUN_MARK
        return mark + json.dumps(list(chat_history), ensure_ascii=False)

    # Likelihoods -----------------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether greedy decoding would give it."""
        arguments = [request.args for request in requests]
        return self._score([self._passage(*pair) for pair in arguments], arguments, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each whole text, split into the harness's windows."""
        passages, owners = [], []
        for owner, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, windows):
                passages.append(self._plain_passage(context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scored = self._score(passages, [None] * len(passages), disable_tqdm)
        for owner, (logprob, _) in zip(owners, scored, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the same as `loglikelihood` for token ids, which all models read as they are."""
        passages = [self._plain_passage(context, rest) for _, context, rest in requests]
        return self._score(passages, [None] * len(passages), True)

    def _score(
        self, passages: Sequence[Passage], keys: Sequence[Any], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        from tqdm import tqdm

        scores: list[tuple[float, bool]] = [(0.0, True)] * len(passages)
        ensemble, size, total = self.model.ensemble, self.batch_size, len(passages)
        scored = likelihoods(ensemble, passages, self._alphas, batch_size=size)
        bar = tqdm(scored, total=total, disable=disable_tqdm, desc="Scoring continuations")
        for index, each in bar:
            scores[index] = (each.logprob, each.is_greedy)
            if keys[index] is not None:
                self.cache_hook.add_partial("loglikelihood", keys[index], scores[index])
        return scores

    def _passage(self, context: str, continuation: str) -> Passage:
        if not continuation:
            raise InvalidRequest(
                f"the continuation of {context[-40:]!r} is empty, so there is nothing to score.\n"
                "hint: the task's answers must have at least one character"
            )
        prompt, options = self._prompt(context)
        formats = self.model.formats
        if isinstance(prompt, str) and not prompt:
            # As in the harness: a start token before the text, unless the text begins with it.
            ids = self.tok_encode(continuation, add_special_tokens=False)
            if ids[0] == self.prefix_token_id and len(ids) > 1:
                return self._plain_passage(ids[:1], ids[1:])
            return self._plain_passage([self.prefix_token_id], ids)
        texts = [
            render_text(
                prompt,
                prompt_format=own.of(prompt),
                tokenizer=own.tokenizer,
                name=member.name,
                chat_template=own.template,
                options=options,
            )
            for member, own in zip(self.model.ensemble.members, formats, strict=True)
        ]
        is_plain = formats[0].of(prompt) == "plain"
        context_ids, continued, taken = self._split(texts[0], continuation, is_plain)
        prompts = []
        for member, own, text in zip(self.model.ensemble.members, formats, texts, strict=True):
            kept = text.removesuffix(taken)
            if own is formats[0] or (is_plain and own.of(prompt) == "plain"):
                ids = member.own_ids(context_ids, is_start=True)
            elif own.of(prompt) == "plain":
                ids = prompt_ids(kept, own.tokenizer)
            else:
                ids = text_ids(kept, own.tokenizer)
            prompts.append(ids or own.render(prompt, member.name, options))
        return self._truncated(prompts, continued)

    def _split(
        self, context: str, continuation: str, is_plain: bool
    ) -> tuple[list[int], list[int], str]:
        """Return the token ids of a context and of what follows, cut as the harness's own models cut them.

        They move white space at the context's end to the continuation, cut both together, and take what comes
        after as many tokens as the context alone has. If nothing is left on one side, they fail. Then a token
        that spans the end of the context is the first of the continuation, and a start token stands before a
        text without context.

        Returns:
            The ids of the context, those of the continuation, and the end of the context that is among them.
        """

        def encode(text: str) -> list[int]:
            # A template writes its special tokens itself.
            return self.tok_encode(text, add_special_tokens=None if is_plain else False)

        kept = context.rstrip()
        before, whole = encode(kept), encode(context + continuation)
        num_before = len(before)
        if not 0 < num_before < len(whole):
            num_before = min(num_shared_tokens(before, whole), len(whole) - 1)
            kept = kept.removesuffix(str(self.tokenizer.decode(before[num_before:])))
        taken = context[len(kept) :]
        return before[:num_before] or [self.prefix_token_id], whole[num_before:], taken

    def _plain_passage(self, context: Sequence[int], continuation: Sequence[int]) -> Passage:
        members = self.model.ensemble.members
        return self._truncated([m.own_ids(context, is_start=True) for m in members], continuation)

    def _truncated(self, prompts: Sequence[Sequence[int]], continuation: Sequence[int]) -> Passage:
        """Return a passage of at most `max_length`; a longer one loses its beginning, as in the harness."""
        # The last token is predicted but not read, so there is room for one more.
        kept = tuple(continuation)[-self.max_length :]
        room = self.max_length + 1 - len(kept)
        return Passage(tuple(tuple(prompt)[-max(1, room) :] for prompt in prompts), kept)

    # Generation ------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return an answer to each context, cut before the first stop string."""
        from tqdm import tqdm

        wanted = [self._request(*request.args) for request in requests]
        order = sorted(range(len(wanted)), key=lambda i: -len(str(requests[i].args[0])))
        texts = [""] * len(wanted)
        with tqdm(total=len(wanted), disable=disable_tqdm, desc="Generating") as bar:
            for start in range(0, len(order), self.batch_size):
                block = order[start : start + self.batch_size]
                traces = self.model.generate_batch(
                    [wanted[i] for i in block], batch_size=len(block), speculative=self._speculative
                )
                for i, trace in zip(block, traces, strict=True):
                    texts[i] = trace.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, trace.text)
                bar.update(len(block))
        return texts

    def _request(self, context: str, settings: Mapping[str, Any]) -> Request:
        given = dict(settings)
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        lengths = [given.pop(name) for name in _LENGTH_OPTIONS if given.get(name) is not None]
        temperature = float(given.pop("temperature", 0.0) or 0.0)
        asked = given.pop("do_sample", None)
        is_sampled = temperature > 0 if asked is None else asked
        temperature = (temperature or 1.0) if is_sampled else 0.0
        top_p, top_k = given.pop("top_p", None), given.pop("top_k", None)
        others = [k for k, v in given.items() if v is not None and k not in _LENGTH_OPTIONS]
        if others:
            raise InvalidRequest(
                f"the task generates with {', '.join(map(repr, others))}, which proxytune does not support.\n"
                "hint: change the task's generation_kwargs, or --gen_kwargs"
            )
        self._num_requests += 1
        sampling = SamplingParams(
            max_new_tokens=int(lengths[0]) if lengths else MAX_NEW_TOKENS,
            temperature=temperature,
            top_p=float(top_p) if top_p is not None and is_sampled else 1.0,
            top_k=int(top_k) if top_k is not None and is_sampled else 0,
            seed=line_seed(self._seed, self._num_requests) if is_sampled else None,
            stop=tuple(text for text in until if text),
        )
        prompt, options = self._prompt(context)
        if isinstance(prompt, str) and all(f.text == "plain" for f in self.model.formats):
            ids = self.tok_encode(prompt) if prompt else [self.prefix_token_id]
            room = self.max_length - sampling.max_new_tokens
            prompt = ids[-room:] if 0 < room < len(ids) else ids
        steering = self._steering
        return Request(prompt, sampling, steering.alpha, steering.experts, chat=options)

    @staticmethod
    def _prompt(context: str) -> tuple[Prompt, ChatOptions]:
        """Return a context as text, or as messages with how they are rendered."""
        for mark in (CHAT_MARK, BEGUN_MARK):
            if context.startswith(mark):
                messages: list[Message] = json.loads(context.removeprefix(mark))
                return messages, ChatOptions(continue_final_message=mark == BEGUN_MARK)
        return context, ChatOptions()


def main() -> None:
    """Run the harness's command line with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
