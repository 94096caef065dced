"""`fuse`: what it accepts, what it looks through, and that it leaves a model as it was."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel

from lorafuse import FuseConfig, fuse
from lorafuse.plugin.errors import FuseConfigError, FuseError

IDS = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))


def forwards(model: nn.Module) -> dict[str, object]:
    """The forwards that sit on instances."""
    return {n: m.__dict__["forward"] for n, m in model.named_modules() if "forward" in m.__dict__}


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step."""
    model.zero_grad()
    ids = IDS.to(next(model.parameters()).device)  # DataParallel and FSDP move models to a GPU
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach().cpu(), {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def test_a_fused_model_computes_what_the_stock_one_does(llama) -> None:
    loss, gradients = step(llama)
    keys = list(llama.state_dict())
    report = fuse(llama)
    assert {name: one.fused for name, one in report.operations().items() if one.fused} == {
        "lora_mlp": 2,
        "lora_qkv": 2,
        "lora_o": 2,
        "cross_entropy": 1,
        "rms_norm": 5,
        "rope": 2,
        "checkpointing": 2,
        "traversal": 1,
    }
    fused_loss, fused_gradients = step(llama)
    assert all(one.called == one.fused for one in report.operations().values())
    assert (loss - fused_loss).abs() < 1e-5
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, atol=1e-6, rtol=1e-3, msg=name)
    assert list(llama.state_dict()) == keys


def test_unfuse_restores_the_model_and_may_be_called_twice(llama) -> None:
    with torch.no_grad():
        before = llama(input_ids=IDS).logits
    report = fuse(llama)
    assert forwards(llama)
    report.unfuse()
    report.unfuse()
    assert forwards(llama) == {}
    with torch.no_grad():
        assert torch.equal(llama(input_ids=IDS).logits, before)


def test_fusing_twice_gives_the_result_of_the_second_flags(llama) -> None:
    fuse(llama)
    report = fuse(llama, fused_lora_mlp=True)
    assert len(forwards(llama)) == 2
    assert all(name.endswith("mlp") for name in forwards(llama))
    step(llama)
    assert report.operations()["lora_mlp"].called == 2
    report.unfuse()
    assert forwards(llama) == {}


def test_two_models_do_not_touch_each_other(llama, another_llama) -> None:
    fuse(llama)
    assert forwards(another_llama) == {}
    report = fuse(another_llama)
    step(llama)
    assert report.operations()["lora_mlp"].called == 0


def test_wrappers_are_looked_through(llama) -> None:
    report = fuse(DataParallel(llama))
    assert report.operations()["lora_mlp"].fused == 2
    step(llama)
    assert report.operations()["lora_mlp"].called == 2


def test_distributed_data_parallel_trains_fused(llama, tmp_path) -> None:
    loss, _ = step(llama)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(llama)
        report = fuse(wrapped)
        fused_loss, gradients = step(wrapped)
        assert (loss - fused_loss).abs() < 1e-5 and gradients
        assert report.operations()["lora_qkv"].called == 2
        # The same model, reached without its wrapper.
        assert len(forwards(llama)) > 0
        fuse(llama, fused_lora_o=True).unfuse()
        assert forwards(llama) == {}
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_is_copied_in_each_step_stays_as_it_is(llama) -> None:
    wrapped = DataParallel(llama)
    wrapped.device_ids = [0, 1]
    report = fuse(wrapped)
    assert forwards(llama) == {}
    (reason,) = report.operations()["lora_mlp"].fallbacks
    assert "DataParallel copies it to every GPU" in reason.reason


def test_a_sharded_model_is_fused_in_time_or_not_at_all(llama, another_llama, tmp_path) -> None:
    loss, _ = step(llama)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        for model in (llama, another_llama):
            if model is llama:
                report = fuse(model)
            for layer in model.get_base_model().model.layers:
                fully_shard(layer)
            fully_shard(model)
        late = fuse(another_llama)
        assert fuse(llama) is report
        for model in (llama, another_llama):
            torch.testing.assert_close(step(model)[0], loss)
    finally:
        torch.distributed.destroy_process_group()
    assert forwards(another_llama) == {}
    for name, one in late.operations().items():
        assert all("its weights are sharded by now" in r.reason for r in one.fallbacks), name
    for name in ("lora_mlp", "lora_qkv", "lora_o", "rms_norm", "rope", "cross_entropy"):
        one = report.operations()[name]
        assert one.called == one.fused > 0 and not one.runtime_fallbacks, name
        assert late.operations()[name].fallbacks, name


def test_a_compiled_model_is_looked_through(llama) -> None:
    report = fuse(torch.compile(DataParallel(llama)), fused_strict=True)  # type: ignore[arg-type]
    assert report.operations()["lora_mlp"].fused == 2
    assert fuse(llama).operations()["lora_mlp"].fused == 2  # and known again


def test_a_strict_error_says_why_and_leaves_the_model_alone(gpt2) -> None:
    gpt2.eval()  # or its dropout gives every step another loss
    before, _ = step(gpt2)
    with pytest.raises(FuseError) as error:
        fuse(gpt2, fused_strict=True)
    assert "fused_lora_mlp: no gated MLP" in str(error.value)
    assert "GPT2LMHeadModel" in str(error.value)
    assert "Switch these flags off, or set `fused_strict: false`" in str(error.value)
    assert forwards(gpt2) == {}
    # cross_entropy was fused, and taken off again
    assert torch.equal(step(gpt2)[0], before)
    assert fuse(gpt2).operations()["cross_entropy"].fused == 1


def test_strict_passes_where_all_that_is_asked_for_is_fused(llama, gpt2) -> None:
    fuse(llama, fused_strict=True)
    fuse(gpt2, FuseConfig(fused_cross_entropy=True, fused_strict=True))


def test_a_model_without_adapters_stays_as_it_is(bare_llama) -> None:
    report = fuse(bare_llama)
    assert forwards(bare_llama) == {}
    (reason,) = report.operations()["lora_mlp"].fallbacks
    assert str(reason) == "the model has no LoRA adapters"


def test_what_is_no_model_is_a_type_error(llama) -> None:
    with pytest.raises(TypeError, match=r"got dict; for a trainer, give its `\.model`"):
        fuse({"model": llama})  # type: ignore[arg-type]


def test_either_a_configuration_or_flags(llama) -> None:
    with pytest.raises(FuseConfigError, match=r"not both: got \['fused_rope'\]"):
        fuse(llama, FuseConfig(), fused_rope=True)
    with pytest.raises(FuseConfigError, match="must be a FuseConfig, got dict"):
        fuse(llama, {"fused_rope": True})  # type: ignore[arg-type]
    with pytest.raises(FuseConfigError, match="did you mean `fused_rope`"):
        fuse(llama, fused_rop=True)
    assert forwards(llama) == {}


def test_checkpointing_that_was_asked_for_stands_aside_with_its_reason(llama) -> None:
    wrapped = DataParallel(llama)
    wrapped.device_ids = [0, 1]
    report = fuse(wrapped, fused_checkpointing="selective")
    (reason,) = report.operations()["checkpointing"].fallbacks
    assert "DataParallel copies" in reason.reason
    assert "checkpointing" not in fuse(wrapped).operations()


@pytest.mark.parametrize("keep", [False, True])
def test_a_fused_model_that_nobody_holds_is_freed(make_llama, keep) -> None:
    model = make_llama()
    report = fuse(model)
    step(model)
    calls = report.operations()["traversal"].calls
    gone = weakref.ref(model)
    if keep:  # whoever has unfused a model may keep the report
        report.unfuse()
        assert report.operations()["traversal"].calls == calls > 0
    else:
        del report
    del model
    gc.collect()
    assert gone() is None
