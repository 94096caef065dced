"""The named families at their released widths: a step's numbers and its time, stock and fused.

    python integration_tests/gpu/family_times.py --json $OUT/families.json
    python integration_tests/gpu/family_times.py --tiny --device cpu      # does it run?
    python integration_tests/gpu/family_times.py --markdown families.json # the table, for a page

Each model is cut to a few layers, so that twenty of them fit into a lease: the head, which
`fused_cross_entropy` serves, weighs more than in the whole model, and the ratios are those of the
layers and the head together. NF4 (experts in bf16), LoRA on all linear layers (PEFT's `all-linear`
takes the experts along), 8-bit AdamW. The same step first, stock and fused: loss and gradient norm.
Then whole steps: stock with the trainer's checkpointing (how 7B and larger are trained), stock
without, fused with `selective`, fused without recomputation.
"""

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from lorafuse import FuseConfig, fuse
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model
from lorafuse.plugin.bench_worker import Training, make_optimizer
from lorafuse.plugin.geometries import Model

SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def sizes(
    vocab: int, hidden: int, inner: int, heads: int, key_value: int, **more: Any
) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": key_value,
        "max_position_embeddings": 16384, "pad_token_id": 0, **more,
    }  # fmt: skip


# Family: config class, what the released config.json says, what attends.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama 2 7B": ("Llama", sizes(32000, 4096, 11008, 32, 32), "sdpa"),
    "Llama 3.1 8B": (
        "Llama", sizes(128256, 4096, 14336, 32, 8, rope_parameters=LLAMA3), "sdpa",
    ),
    "Mistral 7B v0.3": ("Mistral", sizes(32768, 4096, 14336, 32, 8, sliding_window=None), "sdpa"),
    "Mistral Nemo 12B": (
        "Mistral", sizes(131072, 5120, 14336, 32, 8, head_dim=128, sliding_window=None), "sdpa",
    ),
    "Gemma 7B": ("Gemma", sizes(256000, 3072, 24576, 16, 16, head_dim=256), "sdpa"),
    "Gemma 2 9B": (
        "Gemma2",
        sizes(256000, 3584, 14336, 16, 8, head_dim=256, query_pre_attn_scalar=256),
        "eager",
    ),
    "Gemma 3 12B": (
        "Gemma3Text",
        sizes(262208, 3840, 15360, 16, 8, head_dim=256, query_pre_attn_scalar=256,
              sliding_window=1024),
        "sdpa",
    ),
    "Qwen2.5 7B": ("Qwen2", sizes(152064, 3584, 18944, 28, 4), "sdpa"),
    "Qwen3 8B": ("Qwen3", sizes(151936, 4096, 12288, 32, 8, head_dim=128), "sdpa"),
    "Phi-2": ("Phi", sizes(51200, 2560, 10240, 32, 32, partial_rotary_factor=0.4), "sdpa"),
    "Phi-3.5 mini": ("Phi3", sizes(32064, 3072, 8192, 32, 32), "sdpa"),
    "Phi-4": ("Phi3", sizes(100352, 5120, 17920, 40, 10), "sdpa"),
    "DeepSeek-V2 Lite": (
        "DeepseekV2",
        sizes(102400, 2048, 10944, 16, 16, moe_intermediate_size=1408, n_routed_experts=64,
              n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1,
              kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128,
              v_head_dim=128, n_group=1, topk_group=1),
        "sdpa",
    ),
    "Mixtral 8x7B": (
        "Mixtral",
        sizes(32000, 4096, 14336, 32, 8, num_local_experts=8, num_experts_per_tok=2,
              sliding_window=None),
        "sdpa",
    ),
    "Qwen3 30B-A3B": (
        "Qwen3Moe",
        sizes(151936, 2048, 6144, 32, 4, head_dim=128, num_experts=128, num_experts_per_tok=8,
              moe_intermediate_size=768, norm_topk_prob=True),
        "sdpa",
    ),
    "Granite 3.1 8B": (
        "Granite",
        sizes(49155, 4096, 12800, 32, 8, embedding_multiplier=12.0, residual_multiplier=0.22,
              attention_multiplier=0.0078125, logits_scaling=16.0),
        "sdpa",
    ),
    "Command R7B": (
        "Cohere2",
        sizes(256000, 4096, 14336, 32, 8, sliding_window=4096, logit_scale=0.25,
              layer_types=[SLIDING, SLIDING, SLIDING, FULL]),
        "sdpa",
    ),
    "OLMo 2 7B": ("Olmo2", sizes(100352, 4096, 11008, 32, 32), "sdpa"),
    "SmolLM3 3B": ("SmolLM3", sizes(128256, 2048, 11008, 16, 4), "sdpa"),
    "GLM-4 9B (0414)": (
        "Glm4", sizes(151552, 4096, 13696, 32, 2, head_dim=128, partial_rotary_factor=0.5), "sdpa",
    ),
    "StableLM 2 12B": (
        "StableLm",
        sizes(100352, 5120, 13824, 32, 8, qk_layernorm=True, use_parallel_residual=True,
              partial_rotary_factor=0.25),
        "sdpa",
    ),
    "Falcon 7B": (
        "Falcon",
        {"vocab_size": 65024, "hidden_size": 4544, "num_attention_heads": 71, "multi_query": True,
         "parallel_attn": True, "bias": False, "new_decoder_architecture": False},
        "sdpa",
    ),
}  # fmt: skip
TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip


def config_of(name: str, args: argparse.Namespace) -> PretrainedConfig:
    kind, values, _ = FAMILIES[name]
    values = values | {"num_hidden_layers": args.layers}
    if "layer_types" in values:
        values["layer_types"] = (values["layer_types"] * args.layers)[: args.layers]
    if args.tiny:
        values |= {key: value for key, value in TINY.items() if values.get(key) is not None}
    config: PretrainedConfig = getattr(transformers, f"{kind}Config")(**values)
    return config


class Family:
    """One model, and what was found on it."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.args = args
        self.job = Job(
            "lorafuse", name, None, "none" if args.tiny else "nf4", args.rank, args.batch,
            args.tokens, 1, False, args.steps, FAMILIES[name][2], args.device,
        )  # fmt: skip
        base = base_model(Model(name, config_of(name, args), None), self.job)
        self.model = adapted(base, self.job)
        self.optimizer = make_optimizer(self.model, torch.device(args.device))
        self.model.enable_input_require_grads()
        self.found: dict[str, Any] = {}

    def numbers(self) -> list[float]:
        found = [float(x) for x in self.training().backward()]
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def training(self) -> Training:
        return Training(self.model, self.optimizer, self.job)

    def time(self, name: str) -> None:
        found = self.training().repeated(self.args.steps, warm_up=2)
        if found is None:
            self.found[name] = "out of memory"
            return
        self.found[name] = {
            "step_ms": round(statistics.median(found.step_ms), 1),
            "peak_GB": round(found.allocated_GB, 2),
        }

    def fused(self, run: Callable[[], Any], **flags: Any) -> Any:
        start = time.perf_counter()
        report = fuse(self.model, FuseConfig(**flags), optimizer=self.optimizer)
        self.found.setdefault("fuse_s", round(time.perf_counter() - start, 1))
        try:
            result = run()
            self.found["operations"] = {
                key: f"{row.called}/{row.found}"
                for key, row in report.operations().items()
                if row.found
            }
            return result
        finally:
            report.unfuse()

    def run(self) -> dict[str, Any]:
        stock = self.numbers()
        ours = self.fused(self.numbers)
        self.found["same_step"] = {
            "stock": stock, "fused": ours, "loss_difference": ours[0] - stock[0],
            "norm_ratio": ours[1] / stock[1],
        }  # fmt: skip
        self.time("stock")
        self.fused(lambda: self.time("fused"), fused_checkpointing="off")
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.time("stock, checkpointing")
        self.fused(lambda: self.time("fused, selective"), fused_checkpointing="selective")
        return self.found


def ratio(a: Any, b: Any) -> str:
    both = isinstance(a, dict) and isinstance(b, dict)
    return f"{a['step_ms'] / b['step_ms']:.2f}" if both else "–"


def table(found: dict[str, Any]) -> str:
    """Markdown: a row a family."""
    lines = [
        "| family | stock, checkpointing ms, GB | fused, `selective` | × | stock, all kept ms, GB "
        "| fused, all kept | × | Δ loss | gradient norm, fused / stock |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(one: Any) -> str:
        return f"{one['step_ms']:.0f}, {one['peak_GB']:.1f}" if isinstance(one, dict) else str(one)

    for name, one in found.items():
        if "failed" in one:
            lines.append(f"| {name} | {one['failed']} |" + " |" * 7)
            continue
        a, b = one["stock, checkpointing"], one["fused, selective"]
        c, d = one["stock"], one["fused"]
        same = one["same_step"]
        lines.append(
            f"| {name} | {cell(a)} | {cell(b)} | {ratio(a, b)} | {cell(c)} | {cell(d)} "
            f"| {ratio(c, d)} | {same['loss_difference']:+.1e} | {same['norm_ratio']:.4f} |"
        )
    return "\n".join(lines)


def page(files: list[Path]) -> str:
    """The table of what `--json` has written into `files`."""
    merged: dict[str, Any] = {}
    for file in files:
        merged |= json.loads(file.read_text(encoding="utf-8"))["families"]
    return table({name: merged[name] for name in FAMILIES if name in merged})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a family's name")
    parser.add_argument("--part", default="1/1", help="of the families, I/N: one a GPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--budget", type=float, default=500, help="seconds; later ones are left")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes; for a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, nargs="*", help="files of --json: print the table")
    args = parser.parse_args(argv)
    if args.markdown:
        print(page(args.markdown))
        return
    if args.tiny:
        args.tokens, args.rank, args.steps, args.layers = 32, 4, 1, 2
    until = time.monotonic() + args.budget
    which, parts_count = (int(x) for x in args.part.split("/"))
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    content: dict[str, Any] = {
        "gpu": gpu, "torch": torch.__version__, "transformers": transformers.__version__,
        "args": {k: str(v) for k, v in vars(args).items()}, "families": {},
    }  # fmt: skip
    names = [n for n in FAMILIES if args.only.lower() in n.lower()][which - 1 :: parts_count]
    for name in names:
        if time.monotonic() > until:
            print(f"{name}: skipped, {args.budget:g} s were over", flush=True)
            continue
        start = time.monotonic()
        try:
            found = Family(name, args).run()
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"[:200]}
        content["families"][name] = found
        print(f"{name}, {time.monotonic() - start:.1f} s: {json.dumps(found)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(table(content["families"]))


if __name__ == "__main__":
    main()
