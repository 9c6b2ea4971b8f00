"""Train the smol family: one anti-expert from scratch, then a LoRA expert per domain on top of it.

    python zoo/train.py anti-expert
    python zoo/train.py expert tinyshakespeare

The model is an ordinary Llama from transformers. The 49,152-way softmax is most of the work of a model this
small, so most steps sample it: the loss runs over the batch's own targets and uniformly drawn negatives, each
negative's logit corrected by the log of its chance to be in the sample (the logQ correction; Bengio and
Senecal 2008, "Adaptive importance sampling"). The last steps use the full softmax, which calibrates the
probabilities that steering subtracts from each other.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import corpora
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

GENERAL_MIX = {
    "english_fiction": 1.0,
    "english_digitalgov": 1.0,
    "medical_medquad": 0.5,
    "python_stdlib": 0.5,
}
MAX_LENGTH = 1024


# The softmax ------------------------------------------------------------------------------------------------


@torch.compile
def _normalise(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's probs in bfloat16, its loss, and the gradient at its target.

    Compiled, so that the float32 values between exist only in registers: 1.7 to 2.3 times faster.
    """
    wide = logits.float()
    highest = wide.amax(-1, keepdim=True)
    norm = (wide - highest).exp().sum(-1, keepdim=True).log() + highest
    chosen = wide.gather(1, targets[:, None])
    return (wide - norm).exp().bfloat16(), (norm - chosen)[:, 0], (chosen - norm).exp() - 1


class FullSoftmax(torch.autograd.Function):
    """Cross-entropy over the whole vocabulary, logits made in chunks of rows and never kept.

    Matrix products run in bfloat16, which doubles the speed on CPUs that have it.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        rows = 256
        weights = embedding.detach().bfloat16()
        transposed = weights.t().contiguous()
        grad_hidden = torch.empty_like(hidden)
        grad_embedding = torch.zeros_like(embedding) if ctx.needs_input_grad[1] else None
        total = 0.0
        for start in range(0, len(hidden), rows):
            chunk = hidden[start : start + rows].detach().bfloat16()
            wanted = targets[start : start + rows]
            grad, losses, at_target = _normalise(torch.mm(chunk, transposed), wanted)
            # Subtracted before rounding: near 1 bfloat16 has steps of 1/256.
            grad.scatter_(1, wanted[:, None], at_target.bfloat16())
            total += float(losses.sum())
            grad_hidden[start : start + rows] = torch.mm(grad, weights)
            if grad_embedding is not None:
                grad_embedding += torch.mm(grad.t(), chunk)
        ctx.num_rows = len(hidden)
        ctx.save_for_backward(grad_hidden, grad_embedding)
        return hidden.new_tensor(total / len(hidden))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_hidden, grad_embedding = ctx.saved_tensors
        scale = grad / ctx.num_rows
        return grad_hidden * scale, None if grad_embedding is None else grad_embedding * scale, None


def sampled_softmax(
    hidden: Tensor, embedding: Tensor, targets: Tensor, num_negatives: int
) -> Tensor:
    """Return the sampled cross-entropy of `hidden [rows, width]` against `targets [rows]`.

    Candidates are the distinct targets of the batch and uniform negatives. A candidate's chance to be
    sampled is estimated from its count in the batch and the uniform share; a row's own target is certain.
    """
    num_words = len(embedding)
    own, own_index, counts = torch.unique(targets, return_inverse=True, return_counts=True)
    drawn = torch.randint(0, num_words, (num_negatives,))
    extra = drawn[~torch.isin(drawn, own)].unique()
    candidates = torch.cat([own, extra])
    uniform = 1 - (1 - 1 / num_words) ** num_negatives
    expected = torch.cat([counts.float(), torch.zeros(len(extra))])
    log_chance = torch.log1p(-(1 - uniform) * torch.exp(-expected))
    logits = F.linear(hidden.bfloat16(), embedding[candidates].bfloat16()).float() - log_chance
    logits = logits.scatter_add(1, own_index[:, None], log_chance[own_index][:, None])
    return F.cross_entropy(logits, own_index)


@torch.no_grad()
def held_out_nats(
    model: LlamaForCausalLM, corpus: str, *, num_windows: int = 24, length: int = 512
) -> float:
    """Return the mean negative log-likelihood of held-out windows, nats per token, in float32."""
    model.eval()
    total = count = 0.0
    for window in corpora.valid_windows(corpus, length, num_windows):
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        count += length
    model.train()
    return total / count


def load_base() -> LlamaForCausalLM:
    """Return SmolLM2-135M-Instruct in float32, from the GGUF file of an installed package."""
    from proxytune.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(corpora.BASE_GGUF, root=Path())
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.weights_path(), dtype=torch.float32
    ).eval()


# The anti-expert --------------------------------------------------------------------------------------------


def principal_components(width: int, seed: int) -> Tensor:
    """Return the base's embeddings `[vocab, width]` on their first principal components, at 0.02 std."""
    torch.manual_seed(seed)
    base = load_base()
    embedding = base.get_input_embeddings().weight.detach()
    centred = embedding - embedding.mean(0)
    _, _, directions = torch.pca_lowrank(centred, q=width, center=False, niter=4)
    components = centred @ directions
    return components * (0.02 / components.std())


def train_anti_expert(args: argparse.Namespace) -> None:
    """Train the anti-expert and write it to `args.output` in bfloat16."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    table = model.get_input_embeddings().weight
    checkpoint = args.output / "checkpoint.pt"
    if not checkpoint.exists():
        table.data.copy_(principal_components(128, args.seed))
    body = torch.compile(model.model) if args.compile else model.model

    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(
            matrices,
            lr=args.matrix_lr,
            momentum=0.95,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [args.matrix_lr, args.lr]
    windows = corpora.Windows(GENERAL_MIX, args.seed)
    log = args.output / "train_log.jsonl"
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.time()
    seen = step = first_step = 0
    last_eval = 0.0
    average = None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        seen, step, average = state["seen"], state["step"], state["average"]
        windows = corpora.Windows(GENERAL_MIX, args.seed + step)
        first_step = step
        print(f"resumed at step {step}, {seen:,} tokens", flush=True)
    total = args.sampled_tokens + args.full_tokens
    start_seen = seen
    while seen < total:
        full = seen >= args.sampled_tokens
        long = step % 2 == 0 if full else step % 4 == 3
        rows, length = (4, 1024) if long else (16, 256)
        scale = min(1.0, (step + 1) / 100)
        if full:
            scale *= max(0.02, (total - seen) / args.full_tokens)
        elif seen > 0.5 * args.sampled_tokens:
            scale *= 1 - 0.5 * (seen / args.sampled_tokens - 0.5)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        batch = windows.batch(rows, length)
        inputs, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
        embedded = F.embedding(inputs, table)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(inputs_embeds=embedded, use_cache=False).last_hidden_state
        hidden = hidden.float().reshape(-1, hidden.shape[-1])
        if full:
            loss = FullSoftmax.apply(hidden, table, targets)
        else:
            loss = sampled_softmax(hidden, table, targets, args.negatives)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += targets.numel()
        step += 1
        if full and step % 10 == 0:  # the average over the decay is what is shipped
            with torch.no_grad():
                if average is None:
                    average = {n: p.detach().clone() for n, p in model.named_parameters()}
                else:
                    for name, parameter in model.named_parameters():
                        average[name].lerp_(parameter, 0.05)
        if step % 50 == 0:
            speed = (seen - start_seen) / (time.time() - started)
            print(
                f"step {step} tokens {seen:,} loss {float(loss):.3f} {speed:.0f} tokens/s",
                flush=True,
            )
        if time.time() - last_eval > args.eval_every_s or seen >= total:
            last_eval = time.time()
            names = [*GENERAL_MIX, "tinyshakespeare", "legal_dc_code"]
            row = {"tokens": seen, "elapsed_s": round(time.time() - started)}
            row |= {n: round(math.exp(held_out_nats(model, n, num_windows=8)), 1) for n in names}
            print(json.dumps(row), flush=True)
            with log.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            if step > first_step + 1:
                state = {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "seen": seen,
                    "step": step,
                    "average": average,
                }
                torch.save(state, checkpoint.with_suffix(".partial"))
                checkpoint.with_suffix(".partial").replace(checkpoint)
    if average is not None:
        plain = sum(held_out_nats(model, n) for n in GENERAL_MIX)
        kept = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.load_state_dict(average, strict=False)
        averaged = sum(held_out_nats(model, n) for n in GENERAL_MIX)
        print(
            f"held-out nats, last weights {plain / 4:.4f}, averaged {averaged / 4:.4f}", flush=True
        )
        if averaged > plain:
            model.load_state_dict(kept, strict=False)
    model.to(torch.bfloat16).save_pretrained(args.output)


# Experts ----------------------------------------------------------------------------------------------------


class SteeredSoftmax(torch.autograd.Function):
    """Cross-entropy of the steered base at strength 1, for training the expert through the ensemble.

    Output heads are linear, so the steered logits are one product of concatenated hidden states:

        base + expert - anti_expert = [h_base, h_expert - h_anti] @ [E_base, E_small]^T

    and base logits, 96 KB a token, never have to be stored: its hidden states are 1 KB.
    """

    @staticmethod
    def forward(ctx, offset: Tensor, base_hidden: Tensor, heads: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss.

        Args:
            ctx: Autograd's.
            offset: `[rows, small width]`, the expert's hidden states minus the anti-expert's.
            base_hidden: `[rows, base width]` bfloat16.
            heads: `[base width + small width, vocab]` bfloat16.
            targets: `[rows]`.
        """
        rows = 256
        small_head = heads[base_hidden.shape[1] :]
        grad_offset = torch.empty_like(offset)
        total = 0.0
        for start in range(0, len(offset), rows):
            part = slice(start, start + rows)
            both = torch.cat([base_hidden[part], offset[part].bfloat16()], dim=1)
            grad, losses, at_target = _normalise(torch.mm(both, heads), targets[part])
            grad.scatter_(1, targets[part, None], at_target.bfloat16())
            total += float(losses.sum())
            grad_offset[part] = torch.mm(grad, small_head.t())
        ctx.save_for_backward(grad_offset / len(offset))
        return offset.new_tensor(total / len(offset))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the offset."""
        return ctx.saved_tensors[0] * grad, None, None, None


class SteeredValidation:
    """The perplexity of held-out text under the steered base, for choosing an expert by what it is for.

    The base's and the anti-expert's logits do not change while an expert is trained, so they are computed
    once, over a fixed sample of the domain's validation split, and kept in half precision.
    """

    ALPHAS = (0.5, 0.75, 1.0, 1.25)

    def __init__(
        self, base: nn.Module, anti_expert: nn.Module, corpus: str, num_windows: int
    ) -> None:
        self._windows = corpora.valid_windows(corpus, 512, num_windows)
        self._kept = [
            tuple(
                m(input_ids=w[None, :-1], use_cache=False).logits[0].half()
                for m in (base, anti_expert)
            )
            for w in self._windows
        ]

    @torch.no_grad()
    def perplexities(self, expert: nn.Module) -> dict[str, float]:
        """Return the perplexity of base, expert alone, and steered at each of `ALPHAS`."""
        expert.eval()
        sums = dict.fromkeys(("base", "expert", *map(str, self.ALPHAS)), 0.0)
        for window, (base, anti_expert) in zip(self._windows, self._kept, strict=True):
            logits = expert(input_ids=window[None, :-1], use_cache=False).logits[0].float()
            offset = logits - anti_expert.float()
            candidates = {"base": base.float(), "expert": logits}
            candidates |= {str(a): base.float() + a * offset for a in self.ALPHAS}
            for name, values in candidates.items():
                sums[name] += float(F.cross_entropy(values, window[1:]))
        expert.train()
        return {name: math.exp(total / len(self._windows)) for name, total in sums.items()}


@torch.no_grad()
def hidden_states(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Return hidden states `[windows, length, width]` in bfloat16 for `[windows, length + 1]` token ids."""
    parts = []
    for start in range(0, len(windows), 4):
        with torch.autocast("cpu", torch.bfloat16):
            out = model.model(input_ids=windows[start : start + 4, :-1], use_cache=False)
        parts.append(out.last_hidden_state.bfloat16())
        if start % 80 == 0:
            print(f"hidden states of the base: {start} of {len(windows)} windows", flush=True)
    return torch.cat(parts)


def train_expert(args: argparse.Namespace) -> None:
    """Train a LoRA expert through the ensemble and keep the state that steers the base best.

    The loss is that of `base + expert - anti_expert` with base and anti-expert frozen: Consistent Proxy
    Tuning, He et al. 2024, arXiv:2407.01155, where both of its forms coincide, at alpha 1.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(args.seed)
    base = load_base()
    anti_expert = LlamaForCausalLM.from_pretrained(args.anti_expert, dtype=torch.float32)
    with torch.no_grad():
        validation = SteeredValidation(base, anti_expert, args.corpus, args.valid_windows)
    windows = corpora.train_windows(args.corpus, 512, args.max_windows, args.seed)
    base_hidden = hidden_states(base, windows)
    anti_hidden = hidden_states(anti_expert, windows)
    tables = [m.get_input_embeddings().weight.detach() for m in (base, anti_expert)]
    heads = torch.cat(tables, dim=1).bfloat16().t().contiguous()
    del base, tables
    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(anti_expert, config)
    body = anti_expert.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    output = args.output or corpora.BUILD_DIR / args.corpus
    output.mkdir(parents=True, exist_ok=True)
    log = (output / "train_log.jsonl").open("w")
    rows = 4
    num_steps = args.epochs * (len(windows) // rows)
    best = math.inf
    started = time.time()
    order: list[int] = []
    for step in range(num_steps + 1):
        if step % args.eval_every == 0 or step == num_steps:
            scores = validation.perplexities(model)
            alpha = min(SteeredValidation.ALPHAS, key=lambda a: scores[str(a)])
            row = {"step": step, "of": num_steps, "elapsed_s": round(time.time() - started)}
            row |= {"alpha": alpha} | {name: round(value, 3) for name, value in scores.items()}
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            if scores[str(alpha)] < best:
                best = scores[str(alpha)]
                model.save_pretrained(output)
        if step == num_steps:
            break
        if len(order) < rows:
            order = torch.randperm(len(windows)).tolist()
        picks, order = order[:rows], order[rows:]
        optimizer.param_groups[0]["lr"] = (
            args.lr * min(1.0, (step + 1) / 20) * max(0.05, 1 - step / num_steps)
        )
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(input_ids=windows[picks, :-1], use_cache=False).last_hidden_state
        offset = (hidden.float() - anti_hidden[picks].float()).flatten(0, 1)
        targets = windows[picks, 1:].flatten()
        loss = SteeredSoftmax.apply(offset, base_hidden[picks].flatten(0, 1), heads, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # Half the size, and the rounding is part of the expert that is measured afterwards.
    from safetensors.torch import load_file

    weights = load_file(output / "adapter_model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in weights.items()},
        output / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    anti = commands.add_parser("anti-expert", help="train the small general model from scratch")
    anti.add_argument("--output", type=Path, default=corpora.BUILD_DIR / "anti-expert")
    anti.add_argument("--sampled-tokens", type=int, default=10_000_000)
    anti.add_argument("--full-tokens", type=int, default=3_000_000)
    anti.add_argument("--negatives", type=int, default=2048)
    anti.add_argument("--layers", type=int, default=6)
    anti.add_argument("--lr", type=float, default=3e-3)
    anti.add_argument("--matrix-lr", type=float, default=1e-2)
    anti.add_argument("--eval-every-s", type=float, default=300)
    anti.add_argument("--seed", type=int, default=0)
    anti.add_argument("--no-compile", dest="compile", action="store_false")
    expert = commands.add_parser("expert", help="train a LoRA expert for one domain")
    expert.add_argument("corpus")
    expert.add_argument("--anti-expert", type=Path, default=corpora.BUILD_DIR / "anti-expert")
    expert.add_argument("--output", type=Path)
    expert.add_argument("--rank", type=int, default=32)
    expert.add_argument("--dropout", type=float, default=0.1)
    expert.add_argument("--lr", type=float, default=2e-3)
    expert.add_argument("--epochs", type=int, default=3)
    expert.add_argument("--max-windows", type=int, default=600)
    expert.add_argument("--valid-windows", type=int, default=10)
    expert.add_argument("--eval-every", type=int, default=75)
    expert.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"anti-expert": train_anti_expert, "expert": train_expert}[args.command](args)


if __name__ == "__main__":
    main()
