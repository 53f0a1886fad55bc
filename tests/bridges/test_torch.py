import threading
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastema.bridges import torch as bridge
from fastema.bridges.torch_link import Link
from fastema.errors import BridgeError, DTypeError

nn = torch.nn

pytestmark = pytest.mark.torch

BASE = torch.arange(1.0, 121.0).view(4, 5, 6)
TENSORS = [
    *(nn.Parameter(BASE), BASE.permute(2, 0, 1), BASE[1:, ::2, 3], BASE[:, :0], torch.tensor(3.5)),
    *(BASE[0, 0].expand(3, 6), torch.ones(7, dtype=torch.bool)),
    torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.ones(2, 3, dtype=torch.complex128)[:, 1],
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda one: f"{one.dtype}{one.stride()}")
def test_spec_has_address_strides_and_dtype_of_the_tensor(tensor: Any) -> None:
    spec = bridge.describe(tensor)
    assert spec.address == tensor.data_ptr()
    assert (spec.shape, spec.strides) == (tuple(tensor.shape), tensor.stride())
    assert (spec.dtype, spec.device) == (bridge.code(tensor.dtype), "cpu")
    assert spec.writable
    assert spec.owner is tensor


def _with_storage_of(nbytes: int) -> Any:
    tensor = torch.ones(30)
    tensor.untyped_storage().resize_(nbytes)
    return tensor


UNUSABLE = {
    "sparse": lambda: torch.ones(3, 3).to_sparse(),
    "compressed": lambda: torch.ones(3, 3).to_sparse_csr(),
    "meta": lambda: torch.ones(3, device="meta"),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "freed": lambda: _with_storage_of(0),
    "beyond the storage": lambda: _with_storage_of(64),
    "unaligned": lambda: torch.frombuffer(bytearray(41), dtype=torch.float32, offset=1),
    "fake": lambda: FakeTensorMode().from_tensor(torch.ones(3)),
}


@pytest.mark.filterwarnings("ignore")  # torch deprecates some of these kinds
@pytest.mark.parametrize("case", UNUSABLE)
def test_tensors_without_plain_memory_are_refused(case: str) -> None:
    tensor = UNUSABLE[case]()
    with pytest.raises(BridgeError):
        bridge.describe(tensor)


def test_writes_bump_autograd_versions_except_of_inference_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.inference_mode():
        silent = torch.ones(2)
    tensors = [silent, torch.ones(3), nn.Parameter(torch.ones(2)), silent]
    bridge.notify_write(tensors)
    assert [one._version for one in tensors[1:3]] == [1, 1]

    def refusing(tensors: Any) -> None:  # as in older versions of torch
        if any(tensor.is_inference() for tensor in tensors):
            raise RuntimeError("Inference tensors do not track version counter.")
        told.extend(tensors)

    told: list[Any] = []
    monkeypatch.setattr(torch.autograd.graph, "increment_version", refusing)
    bridge.notify_write(tensors)
    assert list(map(id, told)) == list(map(id, tensors[1:3]))


def network() -> Any:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4)), nn.Linear(4, 4))
    net[0].bias.requires_grad_(False)
    net[2].weight = net[0].weight
    return net


def test_walk_names_all_tensors_of_a_module_and_their_roles() -> None:
    net = network()
    leaves = bridge.walk(net)
    items = {leaf.name: leaf for leaf in leaves.items}
    assert set(items) == set(net.state_dict())  # tied parameters have every name
    assert items["2.weight"].spec == items["0.weight"].spec
    named = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert all(items[name].spec.owner is one for name, one in named.items())
    assert [items[f"0.{name}"].role for name in ("weight", "bias")] == ["weight", "frozen"]
    assert items["1.0.running_mean"].role == items["1.0.num_batches_tracked"].role == "buffer"
    assert bridge.walk([net]).names == leaves.names
    assert bridge.walk([net, 1]) is bridge.walk([]) is bridge.walk(named) is None


def test_buffers_outside_the_state_dict_are_not_persistent() -> None:
    net = network()
    net[1][0].register_buffer("cache", torch.ones(3), persistent=False)
    net[1].register_buffer("small", torch.ones(3).to(torch.float8_e5m2), persistent=False)
    net.register_buffer("late", None, persistent=False)
    net[0].register_buffer("cache", torch.ones(3))
    for wrapped in (net, nn.ModuleDict({"module": net}), nn.ModuleDict({"_orig_mod": net})):
        leaves = bridge.walk(wrapped)
        everything = [*leaves.items, *leaves.opaque]
        kept = {one.name for one in everything if one.persistent}
        assert kept == set(net.state_dict())
        assert {one.name for one in everything} - kept == {"1.0.cache", "1.small"}


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_unusable_tensors_of_a_module_are_refused_by_name() -> None:
    """A module may have unusable tensors as long as nothing needs them."""
    odd = network()
    odd.register_buffer("scale", torch.ones(3, dtype=torch.uint8).view(torch.bits8))
    for model, name, error, message in (
        (nn.Sequential(nn.LazyLinear(4)), "0.weight", BridgeError, "no shape yet"),
        (nn.Linear(2, 2, device="meta"), "weight", BridgeError, "no plain memory"),
        (odd, "scale", DTypeError, "bits8"),
    ):
        leaves = bridge.walk(model)
        assert name not in leaves.names
        assert name in {one.name for one in leaves.opaque}
        with pytest.raises(error, match=f"{name}.*{message}"):
            leaves.refuse_opaque()


def _wait(event: threading.Event) -> None:
    event.wait(60)


def test_fence_waits_for_the_copy_to_the_host_and_says_so() -> None:
    weights = {"w": torch.ones(3, requires_grad=True)}
    link, begin = Link(weights), threading.Event()
    link.delay = lambda number: _wait(begin)
    fetch = link.fetch(weights)

    class Copied(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            begin.set()
            return super().wait(timeout)

    fetch._copied = Copied()
    worker = threading.Thread(target=fetch.complete)
    worker.start()
    assert fetch.fence()
    assert torch.equal(link.staging["w"], weights["w"])
    worker.join()
    assert not fetch.fence()
