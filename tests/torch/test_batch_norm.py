"""``fastema.torch.update_bn`` against torch's own, and what it does where torch's gives up."""

from __future__ import annotations

import copy
import sys
import threading
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import swa_utils

import fastema
from fastema.errors import ArgumentError, BridgeError
from fastema.torch import update_bn

pytestmark = pytest.mark.torch

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
State = dict[str, Tensor]


class Loaded(Exception):
    """What a loader or a model of these tests raises."""


def dims_of(norm: type[nn.Module]) -> int:
    return {nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}.get(norm, 0)


def net(norm: type[nn.Module] = nn.BatchNorm1d, momentum: float | None = 0.3) -> nn.Module:
    """Two layers of norms, with statistics that no reset would give."""
    dims = dims_of(norm)
    mix: nn.Module = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims](3, 5, *[1] * bool(dims))
    model = nn.Sequential(mix, norm(5, momentum=momentum), nn.ReLU(), norm(5, momentum=momentum))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 2.0, 3.0)
        else:
            buffer.fill_(17)
    return model


def inputs(count: int = 4, size: int = 6, dims: int = 0) -> list[Tensor]:
    return [torch.randn(size + i, 3, *[4] * dims) * (i + 1) + i for i in range(count)]


def state(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def momenta(model: nn.Module) -> list[float | None]:
    return [m.momentum for m in model.modules() if hasattr(m, "momentum")]


def assert_equal(got: nn.Module | State, want: nn.Module | State) -> None:
    """Every parameter and buffer, bit for bit."""
    got, want = (x if isinstance(x, dict) else state(x) for x in (got, want))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def by_torch(model: nn.Module, loader: Any) -> nn.Module:
    """The model after torch's update_bn; the one given is left alone."""
    model = copy.deepcopy(model)
    swa_utils.update_bn(loader, model)
    return model


def assert_as_torch(model: nn.Module, loader: Any) -> None:
    expected = by_torch(model, loader)
    update_bn(loader, model)
    assert_equal(model, expected)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20)


# -- the same numbers as torch --------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
def test_statistics_equal_torchs(norm: type[nn.Module], momentum: float | None) -> None:
    model = net(norm, momentum)
    before = state(model)
    assert_as_torch(model, inputs(dims=dims_of(norm)))
    changed = {name for name, was in before.items() if not torch.equal(was, state(model)[name])}
    assert changed == {name for name, _ in model.named_buffers()}
    assert momenta(model) == [momentum] * 2


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6))
def test_statistics_are_means_over_the_batches(seed: int, sizes: list[int]) -> None:
    torch.manual_seed(seed)
    layer = nn.BatchNorm1d(3)
    loader = [torch.randn(size, 3) + 5 * i for i, size in enumerate(sizes)]
    update_bn(loader, nn.Sequential(layer))
    mean = torch.stack([batch.double().mean(0) for batch in loader]).mean(0)
    var = torch.stack([batch.double().var(0) for batch in loader]).mean(0)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=1e-5)
    assert layer.num_batches_tracked == len(sizes)


@pytest.mark.parametrize("wrap", [list, tuple, namedtuple("Pair", "x y")._make])
def test_the_first_of_a_list_or_tuple_is_the_input(wrap: Callable[[Any], Any]) -> None:
    model = net()
    loader = [wrap([x, "a target without a device"]) for x in inputs()]
    expected = by_torch(model, inputs_of := [pair[0] for pair in loader])
    assert_equal(by_torch(model, loader), expected)
    update_bn(loader, model, "cpu")
    assert_equal(model, expected)
    update_bn(iter(inputs_of), model)
    assert_equal(model, expected)


def test_layers_without_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    model[0].momentum = 0.4
    assert_as_torch(model, inputs())
    assert momenta(model) == [0.4, 0.1]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 2), nn.InstanceNorm1d(2), nn.LayerNorm(2)),
        nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
    ],
    ids=["none", "none tracks"],
)
def test_without_statistics_the_loader_is_not_touched(model: nn.Module) -> None:
    def loader() -> Iterator[Tensor]:
        raise AssertionError("touched")
        yield

    model.eval()
    before = state(model)
    update_bn(loader(), model)
    assert_equal(model, before)
    assert not model.training


def test_a_data_loader() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.randn(20))
    assert_as_torch(net(), torch.utils.data.DataLoader(data, batch_size=8))


# -- what stays -----------------------------------------------------------------------------------


def test_each_module_keeps_its_own_mode() -> None:
    """torch's gives all of them the outermost one's."""
    model = net()
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    during: list[bool] = []
    model.register_forward_hook(lambda *_: during.append(all(m.training for m in model.modules())))
    update_bn(inputs(2), model)
    assert [module.training for module in model.modules()] == modes
    assert during == [True, True]


def test_no_gradients_are_recorded() -> None:
    model = net()
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda module, given, output: outputs.append(output))
    update_bn(inputs(2), model)
    assert [output.requires_grad for output in outputs] == [False, False]
    assert torch.is_grad_enabled()


class Partial(nn.Module):
    """Runs one of two layers, and keeps a third from training."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = (nn.BatchNorm1d(3) for _ in range(3))
        for layer in (self.used, self.unused, self.frozen):
            nn.init.uniform_(layer.running_mean)
            layer.num_batches_tracked.fill_(3)

    def train(self, mode: bool = True) -> Partial:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.used(x))


def test_layers_that_saw_no_batch_keep_their_statistics() -> None:
    """torch's leaves them reset: mean 0, variance 1."""
    model, loader = Partial(), inputs()
    before, expected = state(model), state(by_torch(model, loader))
    update_bn(loader, model)
    for name, tensor in state(model).items():
        wanted = expected if name.startswith("used.") else before
        assert torch.equal(tensor, wanted[name]), name


# -- nothing is lost ------------------------------------------------------------------------------


def failing_loader(after: int, error: BaseException) -> Iterator[Tensor]:
    yield from inputs(after)
    raise error


@pytest.mark.parametrize("error", [Loaded("disk"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_error_of_the_loader_loses_nothing(after: int, error: BaseException) -> None:
    model = net(momentum=0.3)
    model[3].momentum = None
    model[3].running_mean[1] = torch.nan
    model.eval()
    pointers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    before = {name: tensor.numpy().tobytes() for name, tensor in state(model).items()}
    with pytest.raises(type(error)):
        update_bn(failing_loader(after, error), model)
    assert {name: tensor.numpy().tobytes() for name, tensor in state(model).items()} == before
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == pointers
    assert momenta(model) == [0.3, None]
    assert not any(module.training for module in model.modules())


def test_an_error_of_the_model_loses_nothing() -> None:
    """Such as torch's own for a last batch of one."""
    model = net()
    before = state(model)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        update_bn([*inputs(2), torch.randn(1, 3)], model)
    assert_equal(model, before)
    assert momenta(model) == [0.3, 0.3]


def test_an_empty_loader_is_an_error() -> None:
    model = net().eval()
    before, used_up = state(model), iter(inputs())
    list(used_up)
    for loader in ([], used_up):
        with pytest.raises(ArgumentError, match="no batch"):
            update_bn(loader, model)
        assert_equal(model, before)
        assert momenta(model) == [0.3, 0.3]
        assert not any(module.training for module in model.modules())


def test_a_lazy_layer_is_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(BridgeError, match="run the model once"):
        update_bn(inputs(), model)
    model(torch.randn(5, 3))
    update_bn(inputs(), model)
    assert model[1].num_batches_tracked == 4


# -- mappings, nested batches, wrappers -----------------------------------------------------------


class Named(nn.Module):
    """Takes two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.seen: list[float] = []

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.seen.append(scale)
        return self.inner(x * scale)


class Open(nn.Module):
    """Takes any names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.seen: list[set[str]] = []

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        self.seen.append(set(others))
        return self.inner(x)


class PassOn(nn.Module):
    """A wrapper as the data parallel ones are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


WRAPPERS = {
    "bare": lambda model: model,
    "parallel": PassOn,
    "averaged": swa_utils.AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "twice": lambda model: PassOn(PassOn(model)),
}


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_mapping_is_passed_by_name(wrapper: str, kind: type) -> None:
    named = Named()
    model = WRAPPERS[wrapper](named)
    held = model.module if wrapper == "averaged" else named  # which copies the model
    loader = [kind(label=torch.zeros(9), x=x, scale=2.0) for x in inputs()]
    expected = by_torch(named.inner, [2.0 * batch["x"] for batch in loader])
    update_bn(loader, model)
    assert_equal(held.inner, expected)
    assert held.seen == [2.0] * 4


def test_a_mapping_within_a_tuple() -> None:
    model = Named()
    expected = by_torch(model.inner, loader := inputs())
    update_bn([({"x": x, "unknown": None}, "target") for x in loader], model)
    assert_equal(model.inner, expected)


def test_all_names_are_passed_to_a_model_that_takes_any() -> None:
    model = Open()
    update_bn([{"x": x, "label": 1, "mask": 2} for x in inputs()], model)
    assert model.seen == [{"label", "mask"}] * 4


def test_a_mapping_without_a_known_name_is_an_error() -> None:
    model = Named()
    before = state(model)
    with pytest.raises(ArgumentError, match=r"'scale', 'x'.*'image', 'label'.*forward="):
        update_bn([{"image": inputs()[0], "label": 1}], model)
    assert_equal(model, before)


@pytest.mark.parametrize("batch", ["tensor", "tuple", "dict"])
def test_forward_gets_model_and_whole_batch(batch: str) -> None:
    model, loader = net(), inputs()
    expected = by_torch(model, [x + 1 for x in loader])
    wrap, pick = {
        "tensor": (lambda x: x, lambda batch: batch),
        "tuple": (lambda x: (0, x), lambda batch: batch[1]),
        "dict": (lambda x: {"deep": [x]}, lambda batch: batch["deep"][0]),
    }[batch]
    update_bn(map(wrap, loader), model, forward=lambda given, each: given(pick(each) + 1))
    assert_equal(model, expected)


Point = namedtuple("Point", "x y")


class Movable:
    """Not a tensor, but it moves."""

    device = "cpu"

    def to(self, device: str) -> Movable:
        moved = Movable()
        moved.device = device
        return moved


def test_everything_nested_is_moved() -> None:
    """To the meta device: a move that can be seen without a second device."""
    x = torch.randn(4, 3)
    batch = {
        "list": [x, {"deep": (x, 1)}],
        "point": Point(x, "text"),
        "own": Movable(),
        "mapping": UserDict(x=x),
        "none": None,
    }
    seen: list[Any] = []

    def forward(model: nn.Module, batch: Any) -> None:
        seen.append(batch)
        model(x)

    update_bn([batch], net(), "meta", forward=forward)
    (moved,) = seen
    assert moved["list"][0].is_meta
    assert moved["list"][1]["deep"][0].is_meta
    assert moved["list"][1]["deep"][1] == 1
    assert isinstance(moved["list"][1]["deep"], tuple)
    assert isinstance(moved["point"], Point)
    assert moved["point"].x.is_meta
    assert moved["point"].y == "text"
    assert moved["own"].device == "meta"
    assert moved["mapping"]["x"].is_meta
    assert moved["none"] is None
    assert not batch["list"][0].is_meta
    update_bn([batch], net(), forward=forward)
    assert seen[1] is batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_follow_the_model_to_a_gpu() -> None:
    model, loader = Named().cuda(), inputs()
    expected = copy.deepcopy(model.inner)
    swa_utils.update_bn(loader, expected, "cuda")
    update_bn([{"x": x} for x in loader], model, "cuda")
    assert_equal(model.inner, expected)


# -- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sized", [True, False])
def test_progress_is_shown_on_standard_error(
    sized: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    model, loader = net(), inputs()
    expected = by_torch(model, loader)
    update_bn(loader if sized else (x for x in loader), model, progress=True)
    assert_equal(model, expected)
    printed = capsys.readouterr()
    assert "BatchNorm statistics" in printed.err
    assert ("100%" in printed.err) == sized
    assert printed.out == ""


def test_a_bar_does_not_outlive_an_error() -> None:
    """Even while the traceback holds everything that was at work."""
    pytest.importorskip("rich")
    before = set(threading.enumerate())
    during: list[threading.Thread] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        during.extend(set(threading.enumerate()) - before)
        raise Loaded

    with pytest.raises(Loaded) as caught:
        update_bn(inputs(), net(), progress=True, forward=forward)
    assert during
    for thread in during:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in during), caught


def test_progress_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    model = net()
    before = state(model)
    with pytest.raises(ArgumentError, match="pip install rich"):
        update_bn(inputs(), model, progress=True)
    assert_equal(model, before)
    update_bn(inputs(), model)


# -- with an average ------------------------------------------------------------------------------


@torch.no_grad()
def train(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter += torch.randn_like(parameter)
    model(inputs(1)[0])


@pytest.mark.parametrize(
    "make", [fastema.EMA, fastema.SWA, fastema.SMA], ids=lambda make: make.__name__
)
def test_the_average_keeps_its_statistics_and_the_weights_get_theirs(
    make: Callable[..., Any],
) -> None:
    model, loader = net(), inputs()
    average = make(model)
    for _ in range(3):
        train(model)
        average.update()
    raw = state(model)
    with average.swapped():
        applied = state(model)
        assert not torch.equal(applied["0.weight"], raw["0.weight"])
        expected = by_torch(model, loader)
        update_bn(loader, model)
        assert_equal(model, expected)
        recomputed = state(model)
    assert_equal(model, raw)
    assert not torch.equal(recomputed["1.running_mean"], raw["1.running_mean"])
    for name, tensor in average.shadow.items():
        assert torch.equal(tensor, recomputed[name]), name
    with average.swapped():
        assert_equal(model, recomputed)


def test_an_error_while_the_average_is_applied_loses_nothing() -> None:
    model = net()
    average = fastema.EMA(model)
    train(model)
    average.update()
    raw, kept = state(model), {name: tensor.clone() for name, tensor in average.shadow.items()}
    with pytest.raises(Loaded), average.swapped():
        update_bn(failing_loader(2, Loaded()), model)
    assert_equal(model, raw)
    assert_equal(dict(average.shadow), kept)
