"""Whole networks down the road: trained, converted, saved, and compared with torch.ao at each end."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
from conftest import Oracle
from quantize.networks import NETWORKS, Network, completed, images, prepared, prepared_oracle, train
from torch import nn

import eagerq
from eagerq import QTensor
from eagerq.nn.quantized import QuantizedModule

each_network = pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)


@functools.cache
def trained_once(kind: type[Network]) -> nn.Module:
    model = prepared(kind)
    train(model, kind)
    return model.eval()


def trained(kind: type[Network]) -> nn.Module:
    return copy.deepcopy(trained_once(kind))


def converted(kind: type[Network]) -> nn.Module:
    return eagerq.convert(trained(kind), inplace=True)


@each_network
def test_int8_is_close_to_what_was_trained(kind: type[Network]) -> None:
    model = trained(kind).apply(eagerq.disable_observer)
    x = images(kind)
    fake, real = model(x), eagerq.convert(model, as_trained=True)(x)
    assert real.shape == fake.shape
    assert real.dtype is torch.float32
    assert (fake - real).norm() < 0.05 * fake.norm() + 1e-3


@each_network
def test_every_activation_between_the_stubs_is_quantized(kind: type[Network]) -> None:
    model = converted(kind)
    seen: list[Any] = []
    for module in model.modules():
        inside = isinstance(module, QuantizedModule) or type(module).__module__.startswith("torch.nn")
        if inside and module is not model.quant:
            module.register_forward_hook(lambda module, args, output: seen.append((module, args, output)))
    model(images(kind))
    assert len(seen) > 5
    for module, args, output in seen:
        assert isinstance(args[0], QTensor), module
        assert isinstance(output, QTensor), module


@each_network
def test_prepared_checkpoints_and_int8_outputs_equal_the_oracle(ao: Oracle, kind: type[Network]) -> None:
    ours = trained(kind)
    other = prepared_oracle(ao, kind, seed=3)
    dtypes = {key: value.dtype for key, value in ours.state_dict().items()}
    assert {key: value.dtype for key, value in other.state_dict().items()} == dtypes
    other.load_state_dict(ours.state_dict())
    x = images(kind)
    torch.testing.assert_close(other.eval()(x), ours.eval()(x), rtol=1e-4, atol=1e-5)
    other.load_state_dict(ours.state_dict())  # the forward above moved the observers
    reference = ao.quantization.convert(other, mapping=completed(ao)[1])
    assert torch.equal(eagerq.convert(ours)(x), reference(x))


@each_network
def test_saved_and_loaded_into_a_new_model(kind: type[Network]) -> None:
    model = converted(kind)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = eagerq.convert(prepared(kind, seed=5).eval())
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(images(kind)), model(images(kind)))


@each_network
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_format_does_not_matter(kind: type[Network], layout: str) -> None:
    model, x = converted(kind), images(kind)
    if x.dim() == 4 and layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        y = model(x)
    assert torch.equal(y, model(images(kind)))
    # nor does the batch
    assert torch.equal(y[1:2], model(images(kind)[1:2]))


@each_network
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(kind: type[Network]) -> None:
    model, x = converted(kind), images(kind)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@each_network
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.usefixtures("fresh_compiler")
def test_exported(kind: type[Network], strict: bool) -> None:
    model, x = converted(kind), images(kind)
    assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), model(x))


@each_network
def test_on_each_device(kind: type[Network], device: torch.device) -> None:
    model, x = trained(kind).to(device), images(kind).to(device)
    real = eagerq.convert(model)(x)
    assert real.device.type == device.type
    assert torch.equal(real.cpu(), eagerq.convert(model.cpu())(x.cpu()))
