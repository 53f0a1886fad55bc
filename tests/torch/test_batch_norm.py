"""``fastema.torch.update_bn`` against torch's own, and what it does where torch's gives up."""

from __future__ import annotations

import copy
import sys
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import fastema
from fastema.errors import ArgumentError, BridgeError
from fastema.torch import update_bn

pytestmark = pytest.mark.torch

DIMS = {nn.BatchNorm1d: 0, nn.SyncBatchNorm: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
Point = namedtuple("Point", "x y")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def net(norm: Any = nn.BatchNorm1d, momentum: float | None = 0.3) -> nn.Module:
    """Two layers of norms, with statistics that no reset would give."""
    model = nn.Sequential(norm(3, momentum=momentum), nn.ReLU(), norm(3, momentum=momentum))
    for buffer in model.buffers():
        buffer.copy_(17 + torch.rand(buffer.shape))
    return model


def inputs(count: int = 4, size: int = 6, dims: int = 0) -> list[Tensor]:
    return [torch.randn(size + i, 3, *[4] * dims) * (i + 1) + i for i in range(count)]


def failing_loader(after: int, error: BaseException) -> Iterator[Tensor]:
    yield from inputs(after)
    raise error


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def momenta(model: nn.Module) -> list[float | None]:
    return [m.momentum for m in model.modules() if hasattr(m, "momentum")]


def assert_equal(got: Any, want: Any) -> None:
    """Every parameter and buffer, bit for bit."""
    got, want = (state(x) if isinstance(x, nn.Module) else dict(x) for x in (got, want))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def by_torch(model: nn.Module, loader: Any) -> nn.Module:
    """The model after torch's update_bn; the one given is left alone."""
    model = copy.deepcopy(model)
    swa_utils.update_bn(loader, model)
    return model


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("norm", DIMS, ids=lambda norm: norm.__name__)
def test_statistics_equal_torchs(norm: type[nn.Module], momentum: float | None) -> None:
    model, loader = net(norm, momentum), inputs(dims=DIMS[norm])
    before, expected = state(model), by_torch(model, loader)
    update_bn(loader, model)
    assert_equal(model, expected)
    changed = {name for name, was in before.items() if not torch.equal(was, state(model)[name])}
    assert changed == {name for name, _ in model.named_buffers()}
    assert momenta(model) == [momentum] * 2


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(2), nn.BatchNorm1d(3, track_running_stats=False)], ids=str
)
def test_without_statistics_the_loader_is_not_touched(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 2), layer).eval()
    update_bn(failing_loader(0, AssertionError("touched")), model)
    assert not model.training


# -- what stays -----------------------------------------------------------------------------------


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
    used = {name: expected[name] for name in expected if name.startswith("used.")}
    assert_equal(model, {**before, **used})


def test_each_module_keeps_its_own_mode_and_no_gradients_are_recorded() -> None:
    """torch's gives all modules the mode of the outermost one."""
    model = net().train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    during: list[tuple[bool, bool]] = []

    def look(module: nn.Module, given: Any, output: Tensor) -> None:
        during.append((all(m.training for m in model.modules()), output.requires_grad))

    model.register_forward_hook(look)
    update_bn(inputs(2), model)
    assert during == [(True, False)] * 2
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


# -- nothing is lost ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_error_of_the_loader_loses_nothing(after: int, error: BaseException) -> None:
    model = net(momentum=0.3)
    model[2].momentum = None
    model[2].running_mean[1] = torch.nan
    model.eval()
    pointers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    before = {name: tensor.numpy().tobytes() for name, tensor in state(model).items()}
    with pytest.raises(type(error)):
        update_bn(failing_loader(after, error), model)
    assert {name: tensor.numpy().tobytes() for name, tensor in state(model).items()} == before
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == pointers
    assert momenta(model) == [0.3, None]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ArgumentError, "no batch"),
        (iter([]), ArgumentError, "no batch"),
        # torch's own
        ([*inputs(2), torch.randn(1, 3)], ValueError, "more than 1 value per channel"),
    ],
    ids=["empty", "used up", "last batch of one"],
)
def test_loaders_that_cannot_be_used(loader: Any, error: type[Exception], message: str) -> None:
    model = net().eval()
    before = state(model)
    with pytest.raises(error, match=message):
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


# -- batches of many kinds ------------------------------------------------------------------------


class Named(nn.Module):
    """Takes two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.seen: list[float] = []

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.seen.append(scale)
        return self.inner(x * scale)


class PassOn(nn.Module):
    """A wrapper as the data parallel ones are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.forward = module.__call__


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
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


def test_all_names_are_passed_to_a_model_that_takes_any() -> None:
    class Open(nn.BatchNorm1d):
        def forward(self, x: Tensor, **others: Any) -> Tensor:
            seen.append(set(others))
            return super().forward(x)

    seen: list[set[str]] = []
    update_bn([{"x": x, "label": 1, "mask": 2} for x in inputs()], Open(3))
    assert seen == [{"label", "mask"}] * 4


def test_a_mapping_without_a_known_name_is_an_error() -> None:
    model = Named()
    before = state(model)
    with pytest.raises(ArgumentError, match=r"'scale', 'x'.*'image', 'label'.*forward="):
        update_bn([{"image": inputs()[0], "label": 1}], model)
    assert_equal(model, before)


@pytest.mark.parametrize(
    ("wrap", "forward"),
    [
        (lambda x: [x, "a target without a device"], None),
        (lambda x: (x, 1), None),
        (lambda x: Point(x, 1), None),
        (lambda x: {"deep": [x - 1]}, lambda model, batch: model(batch["deep"][0] + 1)),
    ],
    ids=["list", "tuple", "named tuple", "forward"],
)
def test_the_first_is_the_input_and_forward_gets_all(wrap: Any, forward: Any) -> None:
    model, loader = net(), [torch.round(x) for x in inputs()]
    expected = by_torch(model, loader)
    update_bn(map(wrap, loader), model, "cpu", forward=forward)
    assert_equal(model, expected)


def test_everything_nested_is_moved() -> None:
    """To the meta device: a move that can be seen without a second device."""
    x = torch.randn(4, 3)
    own = type("Movable", (), {"to": lambda self, device: f"moved to {device}"})()
    batch = {"list": [x, {"deep": (x, 1)}], "point": Point(x, "text"), "own": own}
    batch |= {"mapping": UserDict(x=x), "none": None}
    seen: list[Any] = []

    def forward(model: nn.Module, batch: Any) -> None:
        seen.append(batch)
        model(x)

    update_bn([batch], net(), "meta", forward=forward)
    update_bn([batch], net(), forward=forward)
    moved, same = seen
    assert same is batch
    first, deep = moved["list"][0], moved["list"][1]["deep"]
    assert all(one.is_meta for one in (first, deep[0], moved["mapping"]["x"], moved["point"].x))
    assert (type(deep), type(moved["point"])) == (tuple, Point)
    assert (deep[1], moved["point"].y, moved["none"]) == (1, "text", None)
    assert moved["own"] == "moved to meta"
    assert not x.is_meta


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
    update_bn(inputs() if sized else (x for x in inputs()), net(), progress=True)
    printed = capsys.readouterr()
    assert "BatchNorm statistics" in printed.err
    assert ("100%" in printed.err) == sized
    assert printed.out == ""


def test_progress_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    model = net()
    before = state(model)
    with pytest.raises(ArgumentError, match="pip install rich"):
        update_bn(inputs(), model, progress=True)
    assert_equal(model, before)


# -- with an average ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [fastema.EMA, fastema.SWA, fastema.SMA], ids=lambda make: make.__name__
)
def test_the_average_keeps_its_statistics_and_the_weights_get_theirs(
    make: Callable[..., Any],
) -> None:
    model, loader = net(), inputs()
    average = make(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
            model(inputs(1)[0])
        average.update()
    raw = state(model)
    with pytest.raises(OSError, match="disk"), average.swapped():
        update_bn(failing_loader(2, OSError("disk")), model)
    assert_equal(model, raw)
    with average.swapped():
        assert not torch.equal(model[0].weight, raw["0.weight"])
        expected = by_torch(model, loader)
        update_bn(loader, model)
        assert_equal(model, expected)
    assert_equal(model, raw)
    assert not torch.equal(expected[0].running_mean, raw["0.running_mean"])
    assert_equal(average.shadow, {name: state(expected)[name] for name in average.shadow})
    with average.swapped():
        assert_equal(model, expected)
