"""``fastema.torch.update_bn`` against torch's own, and where it does more."""

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

from ..support.requirements import require_packages

pytestmark = pytest.mark.torch

DIMS = {nn.BatchNorm1d: 0, nn.SyncBatchNorm: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build_net(norm: Any = nn.BatchNorm1d, momentum: float | None = 0.3) -> nn.Module:
    """Build a model of two norms, whose statistics differ from a reset."""
    model = nn.Sequential(norm(3, momentum=momentum), nn.ReLU(), norm(3, momentum=momentum))
    for buffer in model.buffers():
        buffer.copy_(17 + torch.rand(buffer.shape))
    return model


def inputs(count: int = 4, size: int = 6, dims: int = 0) -> list[Tensor]:
    return [torch.randn(size + i, 3, *[4] * dims) * (i + 1) + i for i in range(count)]


def failing_loader(after: int, error: BaseException) -> Iterator[Tensor]:
    yield from inputs(after)
    raise error


def clone(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(got: Any, want: Any) -> None:
    """Assert that all parameters and buffers are equal, bit for bit."""
    got, want = (clone(x) if isinstance(x, nn.Module) else dict(x) for x in (got, want))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def update_with_torch(model: nn.Module, loader: Any) -> nn.Module:
    """Return a copy of the model after torch's update_bn."""
    model = copy.deepcopy(model)
    swa_utils.update_bn(loader, model)
    return model


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("norm", DIMS, ids=lambda norm: norm.__name__)
def test_statistics_match_torch(norm: type[nn.Module], momentum: float | None) -> None:
    model, loader = build_net(norm, momentum), inputs(dims=DIMS[norm])
    before, expected = clone(model), update_with_torch(model, loader)
    update_bn(loader, model)
    assert_equal(model, expected)
    changed = {name for name, was in before.items() if not torch.equal(was, clone(model)[name])}
    assert changed == {name for name, _ in model.named_buffers()}
    assert [model[0].momentum, model[2].momentum] == [momentum] * 2


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(2), nn.BatchNorm1d(3, track_running_stats=False)], ids=str
)
def test_model_without_statistics_does_not_read_the_loader(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 2), layer).eval()
    update_bn(failing_loader(0, AssertionError("touched")), model)
    assert not model.training


def test_layers_without_batches_keep_their_statistics() -> None:
    """torch's function leaves them reset: mean 0, variance 1."""
    model, loader = build_net(), inputs()
    used, unused = update_with_torch(model[0], loader), clone(model[2])
    update_bn(loader, model, forward=lambda model, batch: model[0](batch))
    assert_equal(model[0], used)
    assert_equal(model[2], unused)


def test_each_module_keeps_its_own_mode_and_no_gradients_are_recorded() -> None:
    """torch's function gives all modules the mode of the outermost one."""
    model = build_net().train()
    model[2].eval()

    def forward(model: nn.Module, batch: Tensor) -> None:
        assert not model(batch).requires_grad
        assert all(module.training for module in model.modules())

    update_bn(inputs(2), model, forward=forward)
    assert (model.training, model[0].training, model[2].training) == (True, True, False)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_loader_error_changes_nothing(after: int, error: BaseException) -> None:
    model = build_net(momentum=0.3)
    model[2].momentum = None
    model[2].running_mean[1] = torch.nan
    model.eval()
    pointers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    before = {name: tensor.numpy().tobytes() for name, tensor in clone(model).items()}
    with pytest.raises(type(error)):
        update_bn(failing_loader(after, error), model)
    assert {name: tensor.numpy().tobytes() for name, tensor in clone(model).items()} == before
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == pointers
    assert [model[0].momentum, model[2].momentum] == [0.3, None]
    assert not any(module.training for module in model.modules())


UNUSABLE: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": ([], ArgumentError, "no batch"),
    "used up": (iter([]), ArgumentError, "no batch"),
    "last of one": ([*inputs(2), torch.randn(1, 3)], ValueError, "more than 1 value per"),
    "names": ([{"image": 0}], ArgumentError, r"'scale', 'x'.*'image'.*forward="),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_loader_changes_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, error, message = UNUSABLE[case]
    model = (NamedInputs() if case == "names" else build_net()).eval()
    before = clone(model)
    with pytest.raises(error, match=message):
        update_bn(loader, model)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ArgumentError, match="pip install rich"):
        update_bn(inputs(), model, progress=True)
    with pytest.raises(BridgeError, match="run the model once"):
        update_bn(loader, nn.Sequential(nn.LazyBatchNorm1d()))
    assert_equal(model, before)
    assert not any(module.training for module in model.modules())


Point = namedtuple("Point", "x text")


def test_all_nested_tensors_move_to_the_device_and_progress_is_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    require_packages("rich")
    x = torch.randn(4, 3)
    batch = {"list": [x, (x, 1)], "point": Point(x, "a"), "mapping": UserDict(x=x), "none": None}

    def forward(model: nn.Module, batch: Any) -> None:
        first, (second, one) = batch["list"]
        (third, text), fourth = batch["point"], batch["mapping"]["x"]
        # The meta device shows a move without a second device.
        assert all(tensor.is_meta for tensor in (first, second, third, fourth))
        assert (one, text, batch["none"], type(batch["point"])) == (1, "a", None, Point)
        model(x)

    update_bn([batch], build_net(), "meta", progress=True, forward=forward)
    printed = capsys.readouterr()
    assert ("BatchNorm statistics" in printed.err, printed.out) == (True, "")


def test_batches_without_a_device_are_passed_unchanged() -> None:
    batch, seen = UserDict(x=torch.randn(4, 3)), []

    def forward(model: nn.Module, batch: Any) -> None:
        seen.append(batch)
        model(batch["x"])

    update_bn([batch], build_net(), forward=forward)
    assert [one is batch for one in seen] == [True]


class NamedInputs(nn.Module):
    """Take two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_net()
        self.seen: list[float] = []

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.seen.append(scale)
        return self.inner(x * scale)


class Wrapper(nn.Module):
    """Wrap a module as data parallel wrappers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


class WithOptions(Wrapper):
    """Take an input, and options that the module inside does not know."""

    def forward(self, x: Tensor, **options: Any) -> Any:
        assert options == {"mask": 1}
        return self.module(x)


def test_model_that_takes_any_keyword_gets_those_that_its_only_child_does_not_take() -> None:
    model, x = WithOptions(build_net()), inputs()
    expected = update_with_torch(model.module, x)
    update_bn([{"x": one, "mask": 1} for one in x], model)
    assert_equal(model.module, expected)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "averaged": swa_utils.AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "twice": lambda model: Wrapper(Wrapper(model)),
}


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_mapping_batches_are_passed_by_name(wrapper: str, kind: type) -> None:
    named = NamedInputs()
    model = WRAPPERS[wrapper](named)
    held = model.module if wrapper == "averaged" else named  # it copies the model
    loader = [kind(label=torch.zeros(9), x=x, scale=2.0) for x in inputs()]
    expected = update_with_torch(named.inner, [2.0 * batch["x"] for batch in loader])
    update_bn(loader, model)
    assert_equal(held.inner, expected)
    assert held.seen == [2.0] * 4


@pytest.mark.parametrize("kind", ["EMA", "SWA", "SMA"])
def test_update_bn_in_swapped_spares_the_weights_statistics(kind: str) -> None:
    model, loader = build_net(), inputs()
    average = getattr(fastema, kind)(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
            model(inputs(1)[0])
        average.update()
    raw = clone(model)
    with pytest.raises(OSError, match="disk"), average.swapped():
        update_bn(failing_loader(2, OSError("disk")), model)
    assert_equal(model, raw)
    with average.swapped():
        assert not torch.equal(model[0].weight, raw["0.weight"])
        expected = update_with_torch(model, loader)
        update_bn(loader, model)
        assert_equal(model, expected)
    assert_equal(model, raw)
    assert not torch.equal(expected[0].running_mean, raw["0.running_mean"])
    assert_equal(average.shadow, {name: clone(expected)[name] for name in average.shadow})
    with average.swapped():
        assert_equal(model, expected)
