"""Parameters that lie on the host and are read by the GPU."""

import pytest
import torch
from transformers import LlamaConfig

from lorafuse.patches import checkpointing, host_memory
from lorafuse.patches.apply import OPERATIONS, apply
from lorafuse.patches.host_memory import embedding_table
from lorafuse.patches.modes import OFF, OFFLOAD

from .conftest import SMALL

ALL = dict.fromkeys(OPERATIONS, True)


@pytest.fixture(autouse=True)
def every_table_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "LEAST_BYTES", 1)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    return device


def table(model) -> torch.nn.Parameter:
    return model.get_base_model().get_input_embeddings().weight


def test_the_embeddings_are_read_from_the_host(cuda, make_peft, step) -> None:
    model = make_peft(LlamaConfig(**SMALL | {"vocab_size": 2**18}))
    fused = apply(model, ALL, checkpointing=OFF)
    off = step(model)
    fused.unfuse()
    expected, nbytes = table(model).detach().clone(), table(model).nbytes
    names = list(model.state_dict())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    parameter = table(model)
    fused = apply(model, ALL, checkpointing=OFFLOAD)
    slack = 2**20  # other tensors of fusing
    assert torch.cuda.memory_allocated() <= before - nbytes + slack
    assert table(model) is parameter and parameter.device.type == "cuda"
    assert any("on the host" in note for note in fused.notes)
    ours = step(model)
    for name, value in off.items():
        assert torch.equal(ours[name], value), name
    assert list(model.state_dict()) == names
    assert torch.equal(parameter.cpu(), expected.cpu())
    fused.unfuse()
    assert torch.cuda.memory_allocated() >= before - slack
    assert torch.equal(parameter, expected)


def test_ranks_on_one_host_share_its_memory(monkeypatch) -> None:
    monkeypatch.setattr(host_memory, "_free_bytes", lambda: 1000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert host_memory.available_bytes() == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_memory.available_bytes() == 250


def test_it_is_moved_by_offload_alone(make_peft) -> None:
    model = make_peft("llama")
    before = table(model).data_ptr()
    for mode in ("off", "selective", "auto"):
        apply(model, ALL, checkpointing=mode).unfuse()
    assert table(model).data_ptr() == before


@pytest.mark.parametrize("why", ["tied", "trained", "adapted", "small"])
def test_tables_that_stay(why, device, make_peft, step, monkeypatch) -> None:
    options = {}
    if why == "adapted":
        options = {"target_modules": ["q_proj", "embed_tokens"]}
    model = make_peft(LlamaConfig(**SMALL, tie_word_embeddings=why == "tied"), **options)
    if why == "trained":
        table(model).requires_grad_(True)
    if why == "small":
        monkeypatch.setattr(host_memory, "LEAST_BYTES", 1e9)
    assert embedding_table(model.get_base_model()) is None
    apply(model, ALL, checkpointing=OFFLOAD)
    step(model)


def test_what_cannot_be_pinned_stays_and_is_not_said_to_have_gone(monkeypatch) -> None:
    monkeypatch.setattr(host_memory, "pinned_buffer", lambda n: (torch.empty(n), False))
    parameter = torch.nn.Parameter(torch.randn(8, 4), requires_grad=False)
    address = parameter.data_ptr()
    table = host_memory.OnHost(parameter)
    table.undo()
    assert not table.moved and parameter.data_ptr() == address
    chosen = checkpointing.Checkpointing(OFFLOAD)
    monkeypatch.setattr(checkpointing, "embedding_table", lambda model: parameter)
    assert "stay: the host has too little memory" in chosen.move_embeddings(torch.nn.Module())


def test_a_table_that_can_go(cuda, make_peft) -> None:
    model = make_peft("llama")
    assert embedding_table(model.get_base_model()) is table(model)


class Driver:
    """What is pinned, as CUDA would keep it."""

    def __init__(self) -> None:
        self.pinned: set[int] = set()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert address not in self.pinned, "pinned twice"
        self.pinned.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        assert not torch.cuda.is_current_stream_capturing(), "breaks the recording off"
        self.pinned.remove(address)
        return 0


def test_nothing_is_unpinned_while_a_stream_is_recorded(monkeypatch) -> None:
    """And the memory is not given to anybody else until it is."""
    driver, records = Driver(), [False]
    monkeypatch.setattr(host_memory, "_cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: records[0])
    first, second, third = (host_memory.pinned_buffer(2**20)[0] for _ in range(3))
    assert len(driver.pinned) == 3
    del first
    assert len(driver.pinned) == 2
    records[0] = True
    del second
    assert len(driver.pinned) == 2
    fourth = host_memory.pinned_buffer(2**20)[0]  # not at the second's address
    records[0] = False
    assert len(driver.pinned) == 3
    del third
    assert driver.pinned == {fourth.data_ptr()}
    del fourth
    assert not driver.pinned
