"""install replaces a peer's classes wherever they were imported; uninstall restores them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

import fastema
from fastema.compat import installation
from fastema.errors import ArgumentError, PeerError

from ..support.requirements import require


class Ema:
    """Stand in for our class; the peers' classes are built like it."""

    def __init__(self, model: Any, decay: float = 0.9) -> None:
        self.model, self.decay = model, decay

    def update(self, model: Any) -> None: ...


def peer_class(**changes: Any) -> type:
    own = {"__init__": Ema.__init__, "update": Ema.update, **changes}
    return type("Ema", (), {**own, "__module__": "fakepeer.ema"})


def add_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    made.__spec__ = import_module("importlib.machinery").ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Create two peers, the first with its class in two modules and in the script yielded."""
    for name in ("fakepeer", "otherpeer"):
        original = peer_class()
        add_module(monkeypatch, name, Ema=original, __path__=[])
        add_module(monkeypatch, f"{name}.ema", Ema=original, other=object())
        add_module(monkeypatch, f"fastema.compat.{name}", Ema=Ema, their_ema=original)
        monkeypatch.setitem(installation._KNOWN, name, {f"{name}.ema": ("Ema",)})
    script = add_module(monkeypatch, "script", Average=sys.modules["fakepeer"].Ema, number=3)
    yield script
    for name in ("fakepeer", "otherpeer"):
        if name in fastema.compat.installed():
            fastema.compat.uninstall(name)


def test_install_replaces_every_import_and_uninstall_restores_it(peer: Any) -> None:
    original = peer.Average
    fastema.compat.install("fakepeer")
    assert fastema.compat.installed() == ("fakepeer",)
    for name in ("fakepeer", "fakepeer.ema"):
        assert sys.modules[name].Ema is Ema
    assert peer.Average is Ema
    assert sys.modules["otherpeer"].Ema is not Ema
    assert sys.modules["fastema.compat.fakepeer"].their_ema is original  # used by our class
    fastema.compat.uninstall("fakepeer")
    assert fastema.compat.installed() == ()
    for holder in (sys.modules["fakepeer"].Ema, sys.modules["fakepeer.ema"].Ema, peer.Average):
        assert holder is original


@pytest.mark.parametrize(
    "stand_in",
    [MagicMock(), 5, print, "Ema", MagicMock(spec=Ema)],
    ids=lambda one: type(one).__name__,
)
def test_peer_whose_class_is_not_a_class_is_refused(
    peer: Any, monkeypatch: pytest.MonkeyPatch, stand_in: Any
) -> None:
    monkeypatch.setattr(sys.modules["otherpeer.ema"], "Ema", stand_in)
    with pytest.raises(PeerError, match=r"Ema is a \w+, not a class"):
        fastema.compat.install("fakepeer", "otherpeer")
    assert fastema.compat.installed() == ()


@pytest.mark.parametrize("names", [(), ("optax",), ("swa_utils", "nemo")])
def test_library_without_a_class_is_refused_with_advice(names: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"known are diffusers, .*drop-in\.md says what"):
        fastema.compat.install(*names)
    assert fastema.compat.installed() == ()


def new_init(self: Any, model: Any, decay: float = 0.9, novelty: int = 1) -> None: ...


def test_unknown_interface_is_refused_by_name_and_version(
    peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = peer.Average
    monkeypatch.setattr(installation.metadata, "version", lambda name: "99.1")
    monkeypatch.setattr(sys.modules["otherpeer.ema"], "Ema", peer_class(__init__=new_init))
    with pytest.raises(PeerError, match=r"otherpeer 99\.1 .*\n.*takes 'novelty'"):
        fastema.compat.install("fakepeer", "otherpeer")
    assert peer.Average is original
    assert fastema.compat.installed() == ()


def test_missing_class_and_missing_peer_are_refused(
    peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["otherpeer.ema"], "Ema")
    with pytest.raises(PeerError, match=r"otherpeer\.ema\.Ema is missing"):
        fastema.compat.install("otherpeer")
    monkeypatch.setitem(installation._KNOWN, "absent", {"no_such_peer.ema": ("Ema",)})
    with pytest.raises(PeerError, match="no-such-peer is not installed"):
        fastema.compat.install("absent")


SCRIPT = """
import json, sys, traceback
from types import ModuleType
import fastema

def run_script(name, statement):
    # Make the script a module: only in modules are classes replaced.
    script = sys.modules[name] = ModuleType(name)
    exec(statement, vars(script))
    return script

def find_homes(script, names):
    return [getattr(script, name).__module__ for name in names]

def observe(peer, statement, names):
    if peer == "timm":
        from bench.race.without_torchvision import stand_in
        stand_in()
    fastema.compat.install(peer)
    late = run_script(f"{peer}_late", statement)
    found = {"late": [find_homes(late, names)]}
    fastema.compat.uninstall(peer)
    early = run_script(f"{peer}_early", statement)
    found["untouched"] = find_homes(early, names)
    fastema.compat.install(peer)
    found["early"] = [find_homes(early, names)]
    fastema.compat.uninstall(peer)
    found["early"].append(find_homes(early, names))
    return found

shown = {}
for peer, (statement, names) in json.loads(sys.argv[1]).items():
    try:
        shown[peer] = observe(peer, statement, names)
    except Exception:
        shown[peer] = traceback.format_exc()
print(json.dumps(shown))
"""

STATEMENTS = {
    "diffusers": "from diffusers.training_utils import EMAModel",
    "ema_pytorch": "from ema_pytorch import EMA, PostHocEMA",
    "keras": "from keras.callbacks import SwapEMAWeights",
    "lightning": "from lightning.pytorch.callbacks import WeightAveraging, EMAWeightAveraging",
    "swa_utils": "from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn",
    "timm": "from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3",
    "torch_ema": "from torch_ema import ExponentialMovingAverage",
}
"""The import that a script writes, for each peer whose classes can be replaced."""


def names_in(statement: str) -> list[str]:
    return [one.strip() for one in statement.partition("import ")[2].split(",")]


def package_in(statement: str) -> str:
    return statement.split()[1].partition(".")[0]


@pytest.fixture(scope="module")
def scripts() -> dict[str, Any]:
    """Run a script of each peer, in turn in one fresh process; return the classes they saw."""
    given = {
        peer: (statement, names_in(statement))
        for peer, statement in STATEMENTS.items()
        if find_spec(package_in(statement))
    }
    given |= {"timm": given.pop("timm")} if "timm" in given else {}  # last: it adds a stand-in
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(given)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.torch
@pytest.mark.parametrize("peer", sorted(STATEMENTS))
def test_installed_classes_reach_the_scripts(peer: str, scripts: dict[str, Any]) -> None:
    package = package_in(STATEMENTS[peer])
    require(find_spec(package), package)
    shown = scripts[peer]
    assert isinstance(shown, dict), shown
    for when in ("late", "early"):
        assert all(home.startswith("fastema.") for home in shown[when][0])
    # Uninstalling restores a class that was imported before the installation.
    assert not any(home.startswith("fastema.") for home in shown["early"][1])
    assert shown["early"][1] == shown["untouched"]
