"""Imports go one way, load nothing heavy, and change nothing in anybody else's library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each package may import beside the standard library, torch and what stands before it.
LAYERS = ["kernels", "patches", "plugin"]
FORBIDDEN = {
    "kernels": {"transformers", "peft", "bitsandbytes", "trl", "axolotl", "pluggy", "pydantic"},
    "patches": {"trl", "axolotl", "pluggy", "pydantic", "rich", "typer", "triton"},
    "plugin": {"triton"},
}
SOURCES = [file for layer in LAYERS for file in sorted((ROOT / layer).glob("*.py"))]


def imported(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_imports_go_one_way(file: Path) -> None:
    layer = file.parent.name
    later = LAYERS[LAYERS.index(layer) + 1 :]
    for name in imported(file):
        for other in later:
            assert not name.startswith(f"lorafuse.{other}"), f"{file} imports {name}"
        assert name.split(".")[0] not in FORBIDDEN[layer], f"{file} imports {name}"


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from lorafuse.plugin import config\n    import triton.jit\n")
    assert {"lorafuse.plugin.config", "triton.jit"} <= imported(file)


def run(code: str) -> str:
    """The standard output of a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_package_itself_loads_nothing_heavy() -> None:
    loaded = run(
        "import sys, lorafuse\n"
        "dir(lorafuse)\n"
        "print([m for m in ('torch', 'triton', 'transformers', 'peft', 'trl', 'axolotl', 'pluggy')"
        " if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_configuration_and_fusing_load_no_trainer_library() -> None:
    loaded = run(
        "import sys\n"
        "from lorafuse import FuseConfig, FuseReport, LorafuseCallback, fuse\n"
        "print([m for m in ('trl', 'axolotl') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


# Every class and function of the libraries whose instances we touch, by identity, so that anything
# replaced, wrapped or added shows.
SNAPSHOT = """
import functools, inspect, sys

def snapshot():
    seen = {}
    for module_name in sorted(sys.modules):
        if module_name.split(".")[0] not in ("torch", "transformers", "peft", "trl"):
            continue
        if module_name.startswith("torch.") and not module_name.startswith("torch.nn"):
            continue
        module = sys.modules[module_name]
        for name, value in list(vars(module).items()):
            if inspect.isclass(value) and getattr(value, "__module__", "") == module_name:
                for attribute, one in list(vars(value).items()):
                    if callable(one) or isinstance(one, (classmethod, staticmethod, property)):
                        seen[f"{module_name}.{name}.{attribute}"] = id(one)
            elif inspect.isfunction(value):
                seen[f"{module_name}.{name}"] = id(value)
    return seen
"""
LIBRARIES = """
import torch, transformers, peft, trl
import transformers.models.llama.modeling_llama, transformers.models.gemma2.modeling_gemma2
import peft.tuners.lora.layer
from trl import SFTTrainer, SFTConfig
"""
# Every module of ours but the one for Axolotl, which changes much by itself when it is imported.
OURS = "import lorafuse\n" + "".join(
    f"import lorafuse.{file.parent.name}.{file.stem}\n"
    for file in SOURCES
    if file.stem != "axolotl"
)


def test_importing_it_changes_nothing() -> None:
    report = run(
        SNAPSHOT
        + LIBRARIES
        + "before = snapshot()\n"
        + OURS
        + "after = snapshot()\n"
        + "changed = [k for k, v in before.items() if after.get(k) != v]\n"
        + "print(len(before), changed, torch.backends.cuda.matmul.allow_tf32,"
        " torch.get_default_dtype())"
    )
    count, rest = report.strip().split(" ", 1)
    assert int(count) > 10_000
    assert rest == "[] False torch.float32"


# A tiny training step's numbers, and the code behind the forwards, in a fresh process.
FINGERPRINT = """
import hashlib, json
from peft import LoraConfig, get_peft_model
torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=64)
model = get_peft_model(
    transformers.LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
ids = torch.arange(24).reshape(2, 12)
model(input_ids=ids, labels=ids).loss.backward()
numbers = b"".join(p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None)
code = [
    f"{type(m).__module__}.{type(m).__qualname__}:{type(m).forward.__code__.co_filename}:"
    f"{type(m).forward.__code__.co_firstlineno}:{'forward' in vars(m)}"
    for m in model.modules() if hasattr(type(m).forward, "__code__")
]
for function in (torch.nn.functional.cross_entropy, torch.nn.functional.linear,
                 torch.nn.functional.scaled_dot_product_attention, torch.optim.AdamW.step):
    code.append(f"{function!r}".split(" at 0x")[0])
print(hashlib.sha256(numbers).hexdigest(), hashlib.sha256(json.dumps(code).encode()).hexdigest())
"""
ORDERS = {
    "without": LIBRARIES,
    "last": LIBRARIES + OURS,
    "first": OURS + LIBRARIES,
    "between": "import torch, transformers\n" + OURS + LIBRARIES,
}


def test_importing_it_in_any_order_gives_the_stock_model() -> None:
    prints = {name: run(order + FINGERPRINT).strip() for name, order in ORDERS.items()}
    assert len(set(prints.values())) == 1, prints
