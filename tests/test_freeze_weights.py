"""A weight given up for its packed form comes back whole, whichever way somebody looks at it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_freeze import Net, converted, images
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

import eagerq
from eagerq import Frozen, native
from eagerq.freeze.weights import _Away
from eagerq.kernels import onednn, packing

pytestmark = pytest.mark.skipif(
    not (native.conv_ready() or onednn.available()), reason="nothing packs weights here: no AVX-512 VNNI, no oneDNN"
)


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """What is there before need not be looked through at each collection."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def frozen() -> Frozen:
    return eagerq.freeze(converted(Net(), 2, 3, 32, 32), (images(),))


@pytest.fixture
def plain(frozen: Frozen) -> dict[str, Tensor]:
    """The weights before anything is given up."""
    return {name: x.clone() for name, x in frozen.model.named_buffers()}


def given_up(module: nn.Module) -> int:
    return sum(type(m._buffers) is _Away for m in module.modules())


def assert_whole(model: nn.Module, plain: dict[str, Tensor]) -> None:
    there = dict(model.named_buffers())
    assert [*there] == [*plain]
    assert all(torch.equal(there[name], plain[name]) for name in plain)
    assert all((there[name].dtype, there[name].stride()) == (x.dtype, x.stride()) for name, x in plain.items())
    assert not given_up(model)


def test_the_plans_go_on(frozen: Frozen, plain: dict[str, Tensor]) -> None:
    frozen.add((images(1),))
    wanted = frozen(images()), frozen(images(1))
    plans = [plan for _, plan in frozen._plans.values()]
    weights = [x for name, x in plain.items() if name.endswith("_weight")]
    assert frozen.pack_weights() == sum(x.numel() for x in weights)
    assert given_up(frozen) == len(weights) == 4
    for _ in range(2):
        assert torch.equal(frozen(images()), wanted[0])
        assert torch.equal(frozen(images(1)), wanted[1])
    assert given_up(frozen) == 4
    assert [plan for _, plan in frozen._plans.values()] == plans
    assert frozen.pack_weights() == 0
    assert_whole(frozen.model, plain)


def test_packed_again_after_one_more_shape(frozen: Frozen) -> None:
    """Planning takes the weights back; the plans made hold on."""
    all_of_them = frozen.pack_weights()
    frozen.add((images(1),))
    assert not given_up(frozen)
    frozen(images())
    plans = [plan for _, plan in frozen._plans.values()]
    assert frozen.pack_weights() == all_of_them
    wanted = frozen.model(images(1))  # a look
    frozen(images())
    frozen(images(1))
    again = [plan for _, plan in frozen._plans.values()]
    assert not set(map(id, plans)) & set(map(id, again))
    assert torch.equal(frozen(images(1)), wanted)
    frozen(images())
    assert [plan for _, plan in frozen._plans.values()] == again


def state(model: nn.Module) -> Any:
    return {name: x.clone() for name, x in model.state_dict(keep_vars=True).items() if torch.is_tensor(x)}


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def faked(model: nn.Module) -> list[Any]:
    """Looked at where whatever is made is no real tensor."""
    with FakeTensorMode():
        list(model.buffers())
    return [x.clone() for x in model.buffers()]


def inferred(model: nn.Module) -> list[Tensor]:
    with torch.inference_mode():
        found = list(model.buffers())
    assert not any(x.is_inference() for x in found)
    return [x.clone() for x in found]


def transformed(model: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    torch.func.vmap(lambda x: seen.extend(model.buffers()) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.extend(model.buffers()) or x)(torch.ones(()))
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in seen)
    return [x.clone() for x in seen]


LOOKS: dict[str, Callable[[Any], Any]] = {
    "state_dict": state,
    "buffers": lambda model: [x.clone() for x in model.buffers()],
    "get_buffer": lambda model: model.get_buffer("fc._weight").clone(),
    "attribute": lambda model: model.fc._weight.clone(),
    "dict": lambda model: {**model.fc._buffers}["_weight"].clone(),
    "instance dict": lambda model: model.fc.__dict__["_buffers"].get("_weight").clone(),
    "method": lambda model: (model.fc.weight().integers.clone(), model.depthwise.weight().dequantize()),
    "repr": repr,
    "call": lambda model: model(images(seed=3)),
    "other shape": lambda model: model(images(1)),
    "layer": lambda model: model.depthwise(model.stem(model.quant(images()))).integers,
    "deepcopy": lambda model: [*copy.deepcopy(model).buffers()],
    "copy": lambda model: [x.clone() for x in copy.copy(model.fc).buffers()],
    "pickle": lambda model: [*pickle.loads(pickle.dumps(model)).buffers()],
    "save": lambda model: [*saved(model).buffers()],
    "to": lambda model: [x.clone() for x in model.to(torch.float32).buffers()],
    "meta": lambda model: [x.shape for x in copy.deepcopy(model).to("meta").buffers()],
    "apply": lambda model: [x.clone() for x in model.half().float().buffers()],
    "share": lambda model: [x.clone() for x in model.share_memory().buffers()],
    "functional": lambda model: functional_call(model, {"fc._weight": model.fc._weight * 0}, (images(),)),
    "compile": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)(images()),
    "export": lambda model: torch.export.export(model, (images(),)).module()(images()),
    "strict": lambda model: torch.export.export(model, (images(),), strict=True).module()(images()),
    "fake": faked,
    "inference": inferred,
    "transforms": transformed,
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        a, b = list(a.items()), list(b.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("look", LOOKS)
def test_looks(frozen: Frozen, plain: dict[str, Tensor], look: str) -> None:
    wanted = LOOKS[look](copy.deepcopy(frozen.model))
    if look == "compile":
        torch.compiler.reset()
    frozen.pack_weights()
    assert given_up(frozen) == 4
    assert equal(LOOKS[look](frozen.model), wanted)
    if look != "apply":  # halves a float layer
        assert_whole(frozen.model, plain)
    assert torch.equal(frozen(images()), frozen.model(images()))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_before_and_after(frozen: Frozen, plain: dict[str, Tensor], whole: bool) -> None:
    """What was compiled for the plain weights finds them again; and so does a frozen model under the compiler."""
    compiled = torch.compile(frozen if whole else frozen.model, backend="aot_eager", fullgraph=True)
    wanted = compiled(images())
    for _ in range(2):
        frozen(images())
        frozen.pack_weights()
        assert torch.equal(compiled(images()), wanted)
    assert_whole(frozen.model, plain)


def load(model: Any) -> None:
    model.load_state_dict(converted(Net(), 2, 3, 32, 32, seed=5).state_dict())


def load_assigned(model: Any) -> None:
    model.load_state_dict(converted(Net(), 2, 3, 32, 32, seed=5).state_dict(), assign=True)


def change_weight(model: Any) -> None:
    model.fc._weight.mul_(-1)


def change_bias(model: Any) -> None:
    model.fc._bias = model.fc._bias * 3 + 100


def set_weight(model: Any) -> None:
    model.fc.set_weight_bias(model.fc.weight().like(-model.fc.weight().integers), None)


@pytest.mark.parametrize("change", [load, load_assigned, change_weight, change_bias, set_weight])
@pytest.mark.parametrize("again", [False, True])
def test_changes_are_seen(frozen: Frozen, change: Callable[[Any], None], again: bool) -> None:
    before = frozen(images())
    frozen.pack_weights()
    change(frozen.model)
    if again:
        frozen.pack_weights()
    result = frozen(images())
    assert not torch.equal(result, before)
    assert torch.equal(result, frozen.model(images()))


@pytest.mark.parametrize("change", [load, load_assigned, copy.deepcopy])
def test_packed_when_the_plans_are_made_anew(frozen: Frozen, change: Callable[[Any], Any]) -> None:
    frozen.add((images(1),))
    all_of_them = frozen.pack_weights()
    if change is copy.deepcopy:
        frozen = copy.deepcopy(frozen)
    else:
        change(frozen.model)
    assert given_up(frozen) == 0
    assert frozen.pack_weights() == 0, "nothing is packed before it is used"
    other = copy.deepcopy(frozen.model)
    for x, there in ((images(), 0), (images(1), 4), (images(), 4), (images(1), 4)):
        assert torch.equal(frozen(x), other(x))
        assert given_up(frozen) == there, "given up when both plans are there, and not before"
    plans = [plan for _, plan in frozen._plans.values()]
    assert torch.equal(frozen(images()), other(images()))
    assert [plan for _, plan in frozen._plans.values()] == plans
    frozen.model(images())
    for x in (images(), images(1)):
        frozen(x)
        assert given_up(frozen) == 0, "asked once, it is done once"
    assert frozen.pack_weights() == all_of_them


HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda w: w,
    "view": lambda w: w.view(-1),
    "detached": lambda w: w.detach(),
    "numpy": lambda w: w.numpy(),
    "storage": lambda w: w.untyped_storage(),
    "table": lambda w: {"weight": w},
}


@pytest.mark.parametrize("hold", HOLDS)
def test_what_somebody_holds_stays(frozen: Frozen, plain: dict[str, Tensor], hold: str) -> None:
    held = HOLDS[hold](frozen.model.fc._weight)
    address = frozen.model.fc._weight.data_ptr()
    frozen.pack_weights()
    assert given_up(frozen) == 3
    assert frozen.model.fc._weight.data_ptr() == address
    assert_whole(frozen.model, plain)
    del held
    frozen(images())
    frozen.pack_weights()
    assert given_up(frozen) == 4


def test_weights_are_packed_once(frozen: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving up, looking, planning again: the packed form is the same all along."""
    made: list[int] = []
    first = native.PackedConv.__init__

    def counted(self: Any, *args: Any) -> None:
        made.append(1)
        first(self, *args)

    monkeypatch.setattr(native.PackedConv, "__init__", counted)
    for batch in (1, 3):
        frozen.pack_weights()
        frozen.add((images(batch),))
        frozen.model(images(batch))
    assert not made


def test_threads(frozen: Frozen, plain: dict[str, Tensor]) -> None:
    """All that look at once get one and the same tensor; calls go on meanwhile."""
    wanted = frozen(images())
    for _ in range(10):
        frozen.pack_weights()
        seen: list[Tensor] = []
        wrong: list[int] = []
        ready = threading.Barrier(4)

        def look(seen: list[Tensor] = seen, wrong: list[int] = wrong, ready: Any = ready) -> None:
            ready.wait()
            seen.append(frozen.model.fc._weight)
            if not torch.equal(frozen(images()), wanted):
                wrong.append(1)

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len({id(x) for x in seen}) == 1
        assert len(seen) == 4
        assert_whole(frozen.model, plain)


def test_giving_up_while_others_call(frozen: Frozen, plain: dict[str, Tensor]) -> None:
    wanted = frozen(images(1))
    wrong: list[int] = []
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            if not torch.equal(frozen.model(images(1)), wanted):
                wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        frozen(images())
        frozen.pack_weights()
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_whole(frozen.model, plain)


def test_a_plan_that_reads_the_plain_weight_keeps_it(plain: dict[str, Tensor], frozen: Frozen) -> None:
    """Some channels with zero points of their own are computed beside the packed ones, by a library that knows none."""
    frozen.model.grouped._weight_zero_point = torch.eye(1, 16, dtype=torch.int32)[0]
    wanted = frozen(images())
    frozen.pack_weights()
    assert torch.equal(frozen(images()), wanted)
    assert given_up(frozen) == 3
    assert torch.equal(frozen.model.grouped._weight, plain["grouped._weight"])


def test_a_failing_unpack_changes_nothing(frozen: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    before = frozen(images())
    with monkeypatch.context() as patch:
        patch.setattr(native.PackedConv, "unpack", lambda self: torch.zeros(self.shape, dtype=torch.int8))
        patch.setattr(packing.Packed, "unpack", lambda self: self.weight.to_dense() + 1)
        frozen.pack_weights()
        assert given_up(frozen) == 0
    assert torch.equal(frozen(images()), before)


def test_copies_hold_no_packed_weight(frozen: Frozen) -> None:
    frozen.pack_weights()
    other = copy.deepcopy(frozen)
    assert not given_up(other)
    assert torch.equal(other(images()), frozen(images()))
    assert packing.unpacker(other.model.fc._weight) is not None


def test_a_look_at_exit() -> None:
    """When no thread can be started."""
    program = (
        "import atexit, torch, eagerq\n"
        "from torch import nn\n"
        "net = eagerq.QuantWrapper(nn.Linear(8, 4)).eval()\n"
        "net.qconfig = eagerq.get_default_qconfig('onednn')\n"
        "prepared = eagerq.prepare(net)\n"
        "prepared(torch.randn(2, 8))\n"
        "frozen = eagerq.freeze(eagerq.convert(prepared), (torch.randn(2, 8),))\n"
        "look = lambda: int(frozen.state_dict()['model.module.weight'].sum(dtype=torch.int))\n"
        "total = look()\n"
        "assert frozen.pack_weights() == 32\n"
        "atexit.register(lambda: print(look() == total))\n"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("True\n", "")


def test_every_way_into_a_dict_is_a_look() -> None:
    compared = {f"__{name}__" for name in ("lt", "le", "gt", "ge", "hash", "doc", "class_getitem")}
    born = {"__new__", "__init__", "__getattribute__", "fromkeys"}
    assert {*vars(dict)} - compared - born - {*vars(_Away)} == set()
