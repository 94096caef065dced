"""One family tried: a tiny model of it makes the same training step stock and fused.

LoRA stands on every linear layer, and on experts that are kept in one weight, with B non-zero; norm
weights and biases are perturbed, so that no one and no zero hides a mistake. Loss and the gradient
of every adapter are compared, in fp32 on the CPU. The same model type always gives the same
numbers.

A causal LM makes its step on whole rows, and where it takes that on padded ones without a KV cache,
with labels on the tokens alone and on the padding too. An image-text class makes it on a batch with
images, the vision tower adapted too, and one more on text alone where it takes that.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lorafuse.patches.decoder_layer import FusedDecoderLayer
from lorafuse.patches.label_places import IGNORED
from lorafuse.patches.structure import in_out, is_linear, recognise_experts
from lorafuse.plugin.fuse import fuse
from lorafuse.plugin.image_batch import image_batch, text_batch
from lorafuse.plugin.report import FuseReport, OperationReport
from lorafuse.plugin.tiny_config import TEXT_WORDS, tiny_config

LAYER, PARTS, STOCK = "layer", "parts", "stock"
WRONG, CRASHED, NOT_BUILT = "wrong", "crashed", "not built"
LEVELS = (LAYER, PARTS, STOCK, WRONG, CRASHED, NOT_BUILT)
BLOCK_OPERATIONS = ("lora_mlp", "lora_qkv", "lora_o", "rms_norm", "rope", "moe")
LOSS = "cross_entropy"
PROJECTIONS = ("lora_mlp", "lora_qkv", "lora_o")
IMAGE_TEXT = "AutoModelForImageTextToText"
# Part of a module's path: what looks at images (or hears), up to what the text tower reads.
VISION = re.compile(
    r"(^|[._])(vision|visual|video|audio|vit|vpm|image|images|pixel|img|patch|qformer|perceiver|encoder_vision"
    r"|projector|projection|projecter|connector|aligner|merger|resampler|high|sam|vq|vqmodel)[a-z0-9]*"
)

# Mamba's out_proj, which its kernels read: PEFT raises for these types.
PEFT_REFUSES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
TOKENS = (2, 20)
# Relative error of a gradient in fp32, and what rounding may leave where a gradient is zero:
# relative to the gradient of all adapters together.
TOLERANCE = 1e-4
FLOOR = 1e-6


@dataclass(frozen=True)
class Family:
    """What became of one family.

    Attributes:
        model_type: transformers' key.
        model_class: the class that the auto mapping gives for it.
        level: one of `LEVELS`.
        reason: why it is not fused whole; the message where it is wrong, crashed or not built.
        fused: operation -> (modules fused and called, modules that offered themselves).
        whole_layers: decoder layers fused whole, of `layers`.
        layers: decoder layers that carry adapters.
        expected: the operations that its blocks hold by their shapes, of `PROJECTIONS`.
        error: the largest relative error of loss and gradients.
        images: an image-text class; `fused` and the layers are the text tower's then.
        vision: as `fused`, of the vision tower and what joins it to the text tower.
        vision_layers: as `whole_layers` and `layers`, of the vision tower.
        text_alone: why there was no step without images; "" where there was.
        padded: why there was no step on padded rows; "" where there was.
    """

    model_type: str
    model_class: str
    level: str
    reason: str = ""
    fused: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    whole_layers: int = 0
    layers: int = 0
    expected: tuple[str, ...] = ()
    error: float = 0.0
    images: bool = False
    vision: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    vision_layers: tuple[int, int] = (0, 0)
    text_alone: str = ""
    padded: str = ""

    @property
    def operations(self) -> tuple[str, ...]:
        """Fused and called in at least one module."""
        return tuple(name for name, (fused, _) in self.fused.items() if fused)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def try_family(
    model_type: str, model_class: str, auto_class: str, built: Callable[[], None] = lambda: None
) -> Family:
    """Makes the two steps. Raises nothing: whatever goes wrong is in the result.

    Args:
        model_type: transformers' key.
        model_class: the class's name, for the result.
        auto_class: the auto class that builds it, such as AutoModelForCausalLM.
        built: called once the stock step works: what goes wrong from now on is lorafuse's.
    """
    warnings.simplefilter("ignore")
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    images = auto_class == IMAGE_TEXT
    family = Family(model_type, model_class, STOCK, images=images)
    try:
        model = tiny_model(tiny_config(model_type, images=images), auto_class)
        expected = expected_operations(model, looking(model) if images else frozenset())
        batches = [image_batch(model.get_base_model())] if images else [tokens_batch()]
        stock = [one_step(model, batch) for batch in batches]
        core = model.get_base_model()
        for more in [text_batch(core)] if images else padded_batches(core):
            try:
                stock.append(one_step(model, more))
                batches.append(more)
            except Exception as refusal:  # a class may want an image in every batch, or no mask
                why = _message(refusal)
                family = replace(family, text_alone=why) if images else replace(family, padded=why)
        if not all(bool(value.isfinite().all()) for step in stock for value in step.values()):
            raise ValueError("the stock step is not finite")
    except Exception as refusal:  # any class may refuse to be small or to train on these batches
        return replace(family, level=NOT_BUILT, reason=_message(refusal))
    built()
    family = replace(family, expected=expected)
    try:
        report = fuse(model)
        errors = [
            largest_error(one_step(model, batch), exact)
            for batch, exact in zip(batches, stock, strict=True)
        ]
    except Exception as crash:
        return replace(family, level=CRASHED, reason=_message(crash))
    error, where = max(errors, key=_badness)
    return _judge(family, model, report, where, error)


def tokens_batch() -> dict[str, Tensor]:
    """A step's arguments for a causal LM."""
    tokens = torch.randint(3, TEXT_WORDS, TOKENS, generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def padded_batches(model: nn.Module) -> list[dict[str, Any]]:
    """The same with padding behind the second row: without labels on it, and with them."""
    inputs: dict[str, Any] = tokens_batch()
    mask = inputs["attention_mask"]
    mask[1, TOKENS[1] // 3 :] = 0
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return [inputs | {"labels": inputs["labels"].masked_fill(mask == 0, IGNORED)}, inputs]


def _badness(error: tuple[float, str]) -> float:
    return error[0] if error[0] == error[0] else float("inf")


def tiny_model(config: PretrainedConfig, auto_class: str) -> Any:
    """The model with adapters, in training mode, all of it random but the same each time."""
    torch.manual_seed(0)
    build: Any = getattr(transformers, auto_class)
    model = build.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name, parameter in module.named_parameters(recurse=False):
                if not bool(parameter.isfinite().all()):  # left as allocated
                    parameter.normal_(std=0.02)
                if isinstance(module, nn.Linear) and name == "weight":
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
                elif name == "bias" or (name == "weight" and parameter.dim() == 1):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    # Of a causal LM, PEFT's wrapper hands on inputs_embeds, which not every image-text class takes.
    takes = inspect.signature(type(model).forward).parameters
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=_linear_layers(model),
        target_parameters=_experts(model) or None,
        task_type="CAUSAL_LM" if auto_class != IMAGE_TEXT or "inputs_embeds" in takes else None,
    )
    peft = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return peft.train()


def _linear_layers(model: Any) -> list[str]:
    """All but the head, and those that PEFT refuses (a Mamba's) or breaks (tuples come out)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    refused = ("out_proj", "conv1d") if model.config.model_type in PEFT_REFUSES else ()
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is head:
            continue
        own_forward = type(module).forward not in (nn.Linear.forward, Conv1D.forward)
        if not name.endswith(refused) and not (own_forward and name.endswith(("router", "gate"))):
            names.append(name)
    return names


def _experts(model: nn.Module) -> list[str]:
    """The weights of experts that the fused form knows; PEFT wraps parameters by their names."""
    found = ((name, recognise_experts(module)) for name, module in model.named_modules())
    return [
        f"{name}.{weight}"
        for name, experts in found
        if experts is not None and not experts.problem
        for weight in (experts.gate_up, experts.down)
    ]


def one_step(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The loss and the gradient of every adapter."""
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(**batch).loss
    if loss is None:
        raise ValueError("it returns no loss for labels")
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    if not gradients:
        raise ValueError("no adapter gets a gradient")
    return {"loss": loss.detach(), **gradients}


def largest_error(got: dict[str, Tensor], stock: dict[str, Tensor]) -> tuple[float, str]:
    """(the largest relative error, which result has it); infinite where results are missing."""
    if odd := sorted(set(got) ^ set(stock)):
        return float("inf"), f"{odd[0]} is in only one of the two"
    whole = sum(float(g.double().pow(2).sum()) for n, g in stock.items() if n != "loss") ** 0.5
    worst, where = 0.0, ""
    for name, exact in stock.items():
        difference = float((got[name].double() - exact.double()).norm())
        floor = 0.0 if name == "loss" else FLOOR / TOLERANCE * whole
        error = difference / max(float(exact.double().norm()), floor, 1e-30)
        if not error <= worst:
            worst, where = error, name
    return worst, where


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of the outermost lists of modules that carry adapters, by name."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside |= set(module.modules())
            for i, one in enumerate(module):
                if any(isinstance(m, LoraLayer) for m in one.modules()):
                    found[f"{name}.{i}"] = one
    return found


def looking(model: nn.Module) -> frozenset[str]:
    """Names of the modules that look at images, up to what the text tower reads."""
    return frozenset(name for name, _ in model.named_modules() if VISION.search(name))


def expected_operations(model: nn.Module, but: Container[str] = ()) -> tuple[str, ...]:
    """Which of `PROJECTIONS` the blocks hold, told by shapes and not by what is recognised.

    A gated MLP: a module with two linear layers [I, H] (or one [2I, H]) and one [H, I], and no
    other linear layers. Attention: a module whose class calls itself so, with three linear
    layers that read H features (or one) and one that writes H.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) or name in but:
            continue
        shapes = [in_out(child) for child in module.children() if is_linear(child)]
        if "Attention" in type(module).__name__:
            for hidden in {k for k, _ in shapes}:
                reads = sum(k == hidden for k, _ in shapes)
                writes = any(n == hidden for _, n in shapes)
                if (len(shapes), reads) in ((4, 3), (4, 4), (2, 1), (2, 2)) and writes:
                    found |= {"lora_qkv", "lora_o"}
        elif _is_gated(shapes):
            found.add("lora_mlp")
    return tuple(name for name in PROJECTIONS if name in found)


def _is_gated(shapes: list[tuple[int, int]]) -> bool:
    for hidden, inner in shapes:
        if sorted(shapes) == sorted([(hidden, inner), (hidden, inner), (inner, hidden)]):
            return hidden != inner
        if inner % 2 == 0 and sorted(shapes) == sorted([(hidden, inner), (inner // 2, hidden)]):
            return True
    return False


def _judge(
    family: Family, model: nn.Module, report: FuseReport, where: str, error: float
) -> Family:
    """The result, from the report after the fused step."""
    operations = report.operations()
    looks = looking(model) if family.images else frozenset()
    operations = report.operations(lambda name: name not in looks)
    seeing = report.operations(looks.__contains__)
    fused, vision = _counts(operations), _counts(seeing)
    towers = [
        [m for name, m in decoder_layers(model).items() if (name in looks) == vision]
        for vision in (False, True)
    ]
    whole, whole_vision = (
        sum(isinstance(m.__dict__.get("forward"), FusedDecoderLayer) for m in layers)
        for layers in towers
    )
    layers, vision_layers = map(len, towers)
    reasons = _reasons(operations)
    reasons += [note for note in report.notes if "in parts" in note]
    reasons += [str(r) for r in operations[LOSS].fallbacks]
    reasons += [f"vision: {reason}" for reason in _reasons(seeing)]
    blocks = [name for name in BLOCK_OPERATIONS if fused.get(name, (0, 0))[0]]
    blocks += [name for name in BLOCK_OPERATIONS if vision.get(name, (0, 0))[0]]
    level = PARTS if blocks else STOCK
    if layers and whole == layers:
        level = LAYER
    if not error <= TOLERANCE:
        level = WRONG
        reasons.insert(0, f"{where} differs by {error:.1e} from stock (limit {TOLERANCE:.0e})")
    return replace(
        family,
        level=level,
        reason="; ".join(dict.fromkeys(reasons)),
        fused=fused,
        whole_layers=whole,
        layers=layers,
        error=error,
        vision=vision,
        vision_layers=(whole_vision, vision_layers),
    )


def _reasons(operations: Mapping[str, OperationReport]) -> list[str]:
    """Why blocks are not fused, and why calls of fused ones ran as stock."""
    reasons = [str(r) for name in BLOCK_OPERATIONS for r in operations[name].fallbacks]
    return reasons + [str(r) for one in operations.values() for r in one.runtime_fallbacks]


def _counts(operations: Mapping[str, OperationReport]) -> dict[str, tuple[int, int]]:
    return {name: (one.called, one.found) for name, one in operations.items() if one.found}


def _message(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
