"""The hooks: each is called where it says, and a third party's plugin is loaded, named, blocked."""

import inspect
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from lorafuse import LorafuseCallback, fuse
from lorafuse.plugin import hookspecs
from lorafuse.plugin.config import FuseConfig
from lorafuse.plugin.errors import FuseError
from lorafuse.plugin.manager import Plugins

DECLARED = {
    name
    for name, function in inspect.getmembers(hookspecs, inspect.isfunction)
    if name.startswith("lorafuse_")
}
# A plugin that implements every hook, with all its arguments, and notes each call.
EVERY_HOOK = "from lorafuse.plugin.hookspecs import hookimpl\ncalls = []\n" + "".join(
    f"""
@hookimpl
def {name}({", ".join(inspect.signature(getattr(hookspecs, name)).parameters)}):
    calls.append(("{name}", dict(locals())))
    return []
"""
    for name in sorted(DECLARED)
)
IMPORTS = "from lorafuse.plugin.hookspecs import hookimpl\n"


def loaded() -> ModuleType:
    """The third party's module, as the entry point has imported it."""
    return next(module for name, module in sys.modules.items() if name.startswith("thirdparty_"))


@pytest.fixture(autouse=True)
def forget_thirdparties() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.startswith("thirdparty_")]:
        del sys.modules[name]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What lorafuse logs."""
    from lorafuse.plugin import log

    logger = log._logger()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="lorafuse")
    messages: list[str] = []
    caplog.handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore
    yield messages
    logger.removeHandler(caplog.handler)


def build_trainer(model: Any, folder: Any) -> Trainer:
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 8
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=args, train_dataset=rows)  # type: ignore[arg-type]


def test_every_declared_hook_is_called(llama, tmp_path, install) -> None:
    install(EVERY_HOOK)
    callback = LorafuseCallback()
    trainer = build_trainer(llama, tmp_path / "run")
    trainer.add_callback(callback)
    trainer.train()
    calls = loaded().calls
    names = [name for name, _ in calls]
    # These two stages exist in Axolotl only; test_axolotl.py has them.
    assert set(names) == DECLARED - {"lorafuse_model_built", "lorafuse_trainer_built"}
    order = sorted(set(names), key=names.index)
    assert order[0] == "lorafuse_adapter_attached"
    assert order[-2:] == ["lorafuse_train_begin", "lorafuse_step_end"]
    of = dict(reversed(calls))
    assert of["lorafuse_adapter_attached"] == {"model": llama, "config": callback.config}
    assert of["lorafuse_train_begin"] == {"model": llama, "report": callback.report}
    assert [kw["step"] for name, kw in calls if name == "lorafuse_step_end"] == [1, 2]


def test_axolotls_stages_reach_a_plugin(llama, tmp_path, install) -> None:
    from axolotl.utils.dict import DictDefault

    from lorafuse.plugin.axolotl import LorafusePlugin

    install(EVERY_HOOK)
    cfg = DictDefault({"plugins": ["lorafuse.LorafusePlugin"], "fused_lora_mlp": True})
    plugin, trainer = LorafusePlugin(), build_trainer(llama, tmp_path / "run")
    plugin.register(cfg)
    plugin.post_model_build(cfg, llama)
    plugin.post_trainer_create(cfg, trainer)
    names = [name for name, _ in loaded().calls]
    assert names[:3] == [
        "lorafuse_model_built",
        "lorafuse_trainer_built",
        "lorafuse_adapter_attached",
    ]
    assert loaded().calls[1][1]["trainer"] is trainer
    callback = trainer.callback_handler.callbacks[-1]
    assert callback.report.operations()["lora_mlp"].fused == 2


def test_a_third_partys_structures_and_formats_come_before_ours(llama, install) -> None:
    install(
        IMPORTS
        + """
asked = []

def recognise(module):
    asked.append(type(module).__name__)

class Format:
    pass

@hookimpl
def lorafuse_structures():
    return [recognise]

@hookimpl
def lorafuse_weight_formats():
    return [Format]
"""
    )
    plugins = Plugins(FuseConfig())
    assert plugins.third_parties == ["'extra' of thirdparty 1.2"]
    structures = plugins.contributions("lorafuse_structures")
    assert structures[0] is loaded().recognise and len(structures) > 1
    assert plugins.contributions("lorafuse_weight_formats")[0] is loaded().Format
    report = fuse(llama, fused_rms_norm=True)
    assert "LlamaDecoderLayer" in loaded().asked
    assert report.operations()["rms_norm"].fused == 5


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import does_not_exist_anywhere\n", "ModuleNotFoundError: No module named 'does_not"),
        ("raise RuntimeError('at import')\n", "RuntimeError: at import"),
        (IMPORTS + "@hookimpl\ndef lorafuse_step_finished(step): pass\n", "unknown hook"),
        (IMPORTS + "@hookimpl\ndef lorafuse_step_end(stepp): pass\n", "Argument(s) {'stepp'}"),
    ],
    ids=["missing module", "raises at import", "unknown hook", "unknown argument"],
)
def test_a_plugin_that_does_not_load_is_named(install, source: str, what: str) -> None:
    install(source)
    with pytest.raises(FuseError) as error:
        Plugins(FuseConfig())
    message = str(error.value)
    assert message.startswith("plugin 'extra' of thirdparty 1.2 does not load: ")
    assert what in message
    assert "set `fused_plugins: false`" in message


def test_a_plugin_that_fails_in_a_hook_is_named(llama, install) -> None:
    install(
        IMPORTS + "@hookimpl\ndef lorafuse_adapter_attached(model):\n    raise KeyError('gone')\n"
    )
    with pytest.raises(FuseError) as error:
        fuse(llama)
    assert "plugin 'extra' of thirdparty 1.2 failed in lorafuse_adapter_attached" in str(
        error.value
    )
    assert "KeyError: 'gone'" in str(error.value)
    assert not any("forward" in module.__dict__ for module in llama.modules())


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_third_parties_can_be_switched_off(llama, install, monkeypatch, how: str) -> None:
    install("raise RuntimeError('must not be imported')\n")
    if how == "environment":
        monkeypatch.setenv("LORAFUSE_PLUGINS", "0")
    config = FuseConfig(fused_plugins=how != "flag")
    plugins = Plugins(config)
    assert plugins.third_parties == []
    assert plugins.blocked == ["'extra' of thirdparty 1.2"]
    assert fuse(llama, config).operations()["lora_mlp"].fused == 2


def test_tracing_logs_each_call(llama, lines) -> None:
    fuse(llama, fused_lora_mlp=True)
    assert not [line for line in lines if line.startswith("trace:")]
    fuse(llama, fused_lora_mlp=True, fused_trace=True)
    traced = [line for line in lines if line.startswith("trace:")]
    assert any("lorafuse_adapter_attached" in line for line in traced)
    assert any("lorafuse_weight_formats" in line for line in traced)


def test_tracing_by_environment(llama, lines, monkeypatch) -> None:
    monkeypatch.setenv("LORAFUSE_TRACE", "1")
    fuse(llama, fused_lora_mlp=True)
    assert any("trace:" in line and "lorafuse_structures" in line for line in lines)


def test_our_own_features_come_through_the_same_hooks() -> None:
    from importlib.metadata import entry_points

    assert "lorafuse.plugin.builtin" in [e.value for e in entry_points(group="lorafuse")]
    plugins = Plugins(FuseConfig())
    assert plugins.third_parties == []
    assert len(plugins.contributions("lorafuse_structures")) >= 5
