"""Ours in the place of a peer's classes: everywhere, and taken back."""

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
from fastema.errors import PeerError

from ..support.requirements import require


class Ema:
    """As ours; theirs are made like it."""

    def __init__(self, model: Any, decay: float = 0.9) -> None:
        self.model, self.decay = model, decay

    def update(self, model: Any) -> None: ...


def theirs(**changes: Any) -> type:
    own = {"__init__": Ema.__init__, "update": Ema.update, **changes}
    return type("Ema", (), {**own, "__module__": "fakepeer.ema"})


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    made.__spec__ = import_module("importlib.machinery").ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A peer with a class that two of its modules and a script hold; another one beside it."""
    for name in ("fakepeer", "otherpeer"):
        original = theirs()
        module(monkeypatch, name, Ema=original, __path__=[])
        module(monkeypatch, f"{name}.ema", Ema=original, other=object())
        module(monkeypatch, f"fastema.compat.{name}", Ema=Ema, their_ema=original)
        monkeypatch.setitem(installation._KNOWN, name, {f"{name}.ema": ("Ema",)})
    script = module(monkeypatch, "script", Average=sys.modules["fakepeer"].Ema, number=3)
    yield script
    for name in ("fakepeer", "otherpeer"):
        if name in fastema.compat.installed():
            fastema.compat.uninstall(name)


def test_replaced_wherever_it_was_imported_to_and_given_back(peer: Any) -> None:
    original = peer.Average
    fastema.compat.install("fakepeer")
    assert fastema.compat.installed() == ("fakepeer",)
    for name in ("fakepeer", "fakepeer.ema"):
        assert sys.modules[name].Ema is Ema
    assert peer.Average is Ema
    assert sys.modules["otherpeer"].Ema is not Ema
    assert sys.modules["fastema.compat.fakepeer"].their_ema is original  # what ours builds on
    fastema.compat.uninstall("fakepeer")
    assert fastema.compat.installed() == ()
    for holder in (sys.modules["fakepeer"].Ema, sys.modules["fakepeer.ema"].Ema, peer.Average):
        assert holder is original


@pytest.mark.parametrize(
    "stand_in",
    [MagicMock(), 5, print, "Ema", MagicMock(spec=Ema)],
    ids=lambda one: type(one).__name__,
)
def test_a_peer_that_something_else_stands_in_for_is_refused(
    peer: Any, monkeypatch: pytest.MonkeyPatch, stand_in: Any
) -> None:
    monkeypatch.setattr(sys.modules["otherpeer.ema"], "Ema", stand_in)
    with pytest.raises(PeerError, match=r"Ema is a \w+, not a class"):
        fastema.compat.install("fakepeer", "otherpeer")
    assert fastema.compat.installed() == ()


def more(self: Any, model: Any, decay: float = 0.9, novelty: int = 1) -> None: ...


def test_an_unknown_interface_is_refused_by_name_and_version(
    peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = peer.Average
    monkeypatch.setattr(installation.metadata, "version", lambda name: "99.1")
    monkeypatch.setattr(sys.modules["otherpeer.ema"], "Ema", theirs(__init__=more))
    with pytest.raises(PeerError, match=r"otherpeer 99\.1 .*\n.*takes 'novelty'"):
        fastema.compat.install("fakepeer", "otherpeer")
    assert peer.Average is original
    assert fastema.compat.installed() == ()


def test_a_name_that_is_gone_and_a_peer_that_is_missing(
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

def written(name, statement):
    # A script is a module: classes are replaced in those.
    script = sys.modules[name] = ModuleType(name)
    exec(statement, vars(script))
    return script

def homes(script, names):
    return [getattr(script, name).__module__ for name in names]

def seen(peer, statement, names):
    if peer == "timm":
        from bench.race.without_torchvision import stand_in
        stand_in()
    fastema.compat.install(peer)
    late = written(f"{peer}_late", statement)
    found = {"late": [homes(late, names)]}
    fastema.compat.uninstall(peer)
    early = written(f"{peer}_early", statement)
    found["untouched"] = homes(early, names)
    fastema.compat.install(peer)
    found["early"] = [homes(early, names)]
    fastema.compat.uninstall(peer)
    found["early"].append(homes(early, names))
    return found

shown = {}
for peer, (statement, names) in json.loads(sys.argv[1]).items():
    try:
        shown[peer] = seen(peer, statement, names)
    except Exception:
        shown[peer] = traceback.format_exc()
print(json.dumps(shown))
"""

REAL = {
    "diffusers": "from diffusers.training_utils import EMAModel",
    "ema_pytorch": "from ema_pytorch import EMA, PostHocEMA",
    "keras": "from keras.callbacks import SwapEMAWeights",
    "lightning": "from lightning.pytorch.callbacks import WeightAveraging, EMAWeightAveraging",
    "swa_utils": "from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn",
    "timm": "from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3",
    "torch_ema": "from torch_ema import ExponentialMovingAverage",
}
"""What scripts write, for every peer whose classes can be replaced here."""


def names_in(statement: str) -> list[str]:
    return [one.strip() for one in statement.partition("import ")[2].split(",")]


def package_in(statement: str) -> str:
    return statement.split()[1].partition(".")[0]


@pytest.fixture(scope="module")
def scripts() -> dict[str, Any]:
    """What scripts of all peers saw, one after the other in a process that began without any."""
    given = {
        peer: (statement, names_in(statement))
        for peer, statement in REAL.items()
        if find_spec(package_in(statement))
    }
    given |= {"timm": given.pop("timm")} if "timm" in given else {}  # its stand-in comes last
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
@pytest.mark.parametrize("peer", sorted(REAL))
def test_a_script_of_each_peer(peer: str, scripts: dict[str, Any]) -> None:
    package = package_in(REAL[peer])
    require(find_spec(package), package)
    shown = scripts[peer]
    assert isinstance(shown, dict), shown
    for when in ("late", "early"):
        assert all(home.startswith("fastema.") for home in shown[when][0])
    # What was imported before is given back; what came after is the script's own.
    assert not any(home.startswith("fastema.") for home in shown["early"][1])
    assert shown["early"][1] == shown["untouched"]
