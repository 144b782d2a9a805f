"""Trains one twin of the pair within a given number of seconds and writes its weights and its held-out figures."""

import argparse
import json
import logging
import multiprocessing
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dllm_sparsity.pair.making.objective import causal_loss, diffusion_loss
from dllm_sparsity.pair.making.optimizer import make_optimizers
from dllm_sparsity.pair.making.pack import END_ID, MASK_ID, PAD_ID, ROW_TOKENS, Packer
from dllm_sparsity.pair.making.score import evaluate, read_items

TASKS = ("easy_endings", "piqa_local", "heldout_text")
WARMUP_STEPS, CONSTANT_SHARE = 200, 0.3


def make_config(causal: bool, hidden: int = 320, layers: int = 5) -> LlamaConfig:
    """Return the twins' shape; the diffusion twin is marked bidirectional and names its mask token."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 14 // 5,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        use_cache=causal,
    )
    if not causal:
        config.is_causal = False
        config.mask_token_id = MASK_ID
    return config


def add_dropout(model: LlamaForCausalLM, share: float) -> None:
    """Drop a share of what each attention and each FFN adds to the residual stream while training."""

    def drop(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.dropout(output, share, training=module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


class Trainer:
    """The training loop of one twin, with its averaged copy."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(arguments.seed)
        torch.set_float32_matmul_precision("high")
        self.arguments, self.causal = arguments, arguments.twin == "autoregressive"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = make_config(self.causal, arguments.hidden, arguments.layers)
        self.model = LlamaForCausalLM(config).to(self.device)
        self.averaged = LlamaForCausalLM(config).to(self.device).eval()
        self.averaged.load_state_dict(self.model.state_dict())
        if arguments.dropout:
            add_dropout(self.model, arguments.dropout)
        self.optimizers = make_optimizers(self.model, arguments.matrix_lr, arguments.other_lr, arguments.decay)
        loss = causal_loss if self.causal else diffusion_loss
        self.loss = loss if arguments.eager else torch.compile(loss, dynamic=False)
        encode = AutoTokenizer.from_pretrained(arguments.tokenizer).encode
        self.items = {name: read_items(arguments.tasks / f"{name}.jsonl", encode, arguments.items) for name in TASKS}
        self.items |= {path.stem: read_items(path, encode, arguments.items) for path in arguments.choosing}

    def set_rates(self, step: int, progress: float) -> None:
        """Set the learning rates: a linear warm-up, a constant part, a linear decay to a fiftieth."""
        decay = min(1.0, 1.0 - 0.98 * (progress - CONSTANT_SHARE) / (1 - CONSTANT_SHARE))
        for optimizer, rate in zip(
            self.optimizers, (self.arguments.matrix_lr, self.arguments.other_lr), strict=True
        ):  # fmt: skip
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARMUP_STEPS) * decay

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Do one update and return the loss, still on the device."""
        batch = {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss(self.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        pairs = list(self.averaged.parameters()), list(self.model.parameters())
        torch._foreach_lerp_([p.data for p in pairs[0]], [p.data for p in pairs[1]], 1 - self.arguments.average)
        return loss.detach()

    def figures(self, counts: int, limit: int) -> dict[str, list[float]]:
        """Return mean and standard error of the averaged weights on the held-out items."""
        found = {}
        with torch.autocast(self.device.type, torch.bfloat16):
            for name, items in self.items.items():
                values = evaluate(self.averaged, items[:limit], self.causal, counts)
                found[name] = [values.mean().item(), (values.std() / len(values) ** 0.5).item()]
        return found

    def save(self) -> Path:
        """Write the averaged weights in float16."""
        folder = self.arguments.out / self.arguments.twin
        half = LlamaForCausalLM(self.averaged.config)
        half.load_state_dict(self.averaged.state_dict())
        half.half().save_pretrained(folder, max_shard_size=self.arguments.shard)
        return folder

    def run(self) -> None:
        """Train until the seconds are gone, then write weights, figures and what it took."""
        progress = multiprocessing.Value("d", 0.0)
        arguments = self.arguments
        packer = Packer(arguments.arrays, arguments.rows, progress, not self.causal, arguments.seed)
        loader = iter(DataLoader(packer, batch_size=None, num_workers=arguments.workers, pin_memory=True))
        start, evaluating, num_tokens, step, next_look = time.monotonic(), 0.0, 0, 0, 0.25
        while progress.value < 1.0:
            batch = next(loader)
            num_tokens += int((batch["segment"] > 0).sum())
            self.set_rates(step, progress.value)
            batch["noise"] = torch.tensor(arguments.noise * min(1.0, 1.25 * (1 - progress.value)))
            loss = self.step(batch)
            if step == 5:  # the schedule starts once everything is compiled
                start = time.monotonic()
            step += 1
            progress.value = max(0.0, (time.monotonic() - start - evaluating) / arguments.seconds) if step > 6 else 0.0
            if step % 500 == 0:
                logging.info("step %d, %.2f of the time, loss %.3f", step, progress.value, loss.item())
            if next_look <= progress.value < 1.0:
                began, next_look = time.monotonic(), next_look + 0.25
                logging.info("%.2f: %s", progress.value, self.figures(4, 500))
                evaluating += time.monotonic() - began
        folder = self.save()
        took = {"seconds": time.monotonic() - start - evaluating, "tokens": num_tokens, "steps": step}
        logging.info("%s", took)
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        record = {**took, "rows": arguments.rows, "row_tokens": ROW_TOKENS, "device": device}
        record["held_out"] = self.figures(16, arguments.items)
        logging.info("%s", record)
        (folder / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def main() -> None:
    """Train one twin."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("twin", choices=["autoregressive", "diffusion"])
    parser.add_argument("--arrays", type=Path, required=True, help="train.npz, written by prepare")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True, help="folder with the items of the embedded tasks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="training time, compilation not counted")
    parser.add_argument("--rows", type=int, default=256, help="rows of 256 tokens in a batch")
    parser.add_argument("--matrix-lr", type=float, default=0.02)
    parser.add_argument("--other-lr", type=float, default=0.004)
    parser.add_argument("--decay", type=float, default=0.02)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--noise", type=float, default=0.0, help="largest share of input tokens hidden, causal twin")
    parser.add_argument("--average", type=float, default=0.998)
    parser.add_argument(
        "--choosing", type=Path, nargs="*", default=[], help="items to choose between runs by; see making.items"
    )
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--shard", default="12MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
