"""A device for tests: its tensors compute on the CPU, say that they lie elsewhere, and refuse what a GPU refuses.

An operation between them and a CPU tensor is an error, but for the few that CUDA allows (a copy, a scalar, an index).
So is one in float64, which Apple's GPUs do not have. The device counts as busy after each operation until it is
synchronised, or a value is read from it.
"""

import os
from contextlib import contextmanager
from unittest import mock

import torch
from accelerate import PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.index_put.default}
FACTORIES = ["tensor", "as_tensor", "arange", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm"]
FACTORIES += ["zeros_like", "ones_like", "empty_like", "full_like", "rand_like"]


class Pretend(_DummyBackendModule):
    """The module `torch.pretend`."""

    on, busy = False, False

    def is_available(self):
        return self.on

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device=None):
        self.busy = False


BACKEND = Pretend()


class Hook(_DummyPrivateUse1Hook):
    """What torch itself asks."""

    def is_available(self):
        return BACKEND.on


_setup_privateuseone_for_python_backend("pretend", backend_module=BACKEND, hook=Hook())
DEVICE = torch.device("pretend:0")


class PretendTensor(torch.Tensor):
    """A CPU tensor `inner` that says it lies on `DEVICE`."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise RuntimeError(f"{DEVICE} has no float64")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=DEVICE)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"PretendTensor({self.inner})"

    def untyped_storage(self):
        return self.inner.untyped_storage()

    storage = untyped_storage

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        check_devices(func, args, tensors)
        moves = func is aten._to_copy.default and kwargs.get("device") is not None
        to_cpu = moves and torch.device(kwargs["device"]).type == "cpu"
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map(inner_of, args), **tree_map(inner_of, kwargs))
        BACKEND.busy = not (to_cpu or func is aten._local_scalar_dense.default)
        if to_cpu:
            return result
        known = {id(t.inner): t for t in tensors if isinstance(t, PretendTensor)}
        return tree_map(lambda t: known.get(id(t)) if id(t) in known else on_device(t), result)


def check_devices(func, args, tensors):
    """RuntimeError for what a GPU does not do."""
    if func is aten.copy_.default:
        return
    elsewhere = [t for t in tensors if not isinstance(t, PretendTensor) and t.ndim]
    if func in INDEXED and isinstance(args[0], PretendTensor):  # by indices on the CPU
        elsewhere = [t for t in args[2:3] if isinstance(t, torch.Tensor) and any(t is e for e in elsewhere)]
    if elsewhere:
        raise RuntimeError(f"{func}: tensors on {DEVICE} and on the CPU, of shape {[tuple(t.shape) for t in tensors]}")


def inner_of(value):
    return value.inner if isinstance(value, PretendTensor) else value


def on_device(value):
    return PretendTensor(value) if type(value) is torch.Tensor else value


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return PretendTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient.inner


def named(device):
    return isinstance(device, str | torch.device) and torch.device(device).type == DEVICE.type


class _Placing(TorchFunctionMode):
    """Factories and `.to` make tensors of the device where it is named."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "tolist" and isinstance(args[0], PretendTensor):
            BACKEND.busy = False
            return args[0].inner.tolist()
        if name in FACTORIES and named(kwargs.get("device")):
            return on_device(func(*tree_map(inner_of, args), **kwargs | {"device": "cpu"}))
        if name == "to" and any(map(named, [*args[1:], kwargs.get("device")])):
            rest = [a for a in args[1:] if not named(a)]
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "copy")}
            tensor = args[0] if isinstance(args[0], PretendTensor) else _Move.apply(args[0])
            return tensor.to(*rest, **kwargs) if [a for a in rest if isinstance(a, torch.dtype)] or kwargs else tensor
        if name == "scaled_dot_product_attention" and isinstance(args[0], PretendTensor):
            query, key, value = (tensor.contiguous() for tensor in args[:3])
            mask = kwargs.pop("attn_mask", None)
            if mask is not None and mask.dtype == torch.bool:  # what is underneath wants what is added to the scores
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
            return aten._scaled_dot_product_attention_math(query, key, value, mask, **kwargs)[0]
        return func(*args, **kwargs)


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return PretendTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    inner_of(target).copy_(inner_of(source))
    return target


LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


@contextmanager
def pretend_device():
    """Within, a process has the device, and accelerate chooses it."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    PartialState._reset_state()
    try:
        chosen = mock.patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": str(DEVICE)})
        with chosen, mock.patch.object(BACKEND, "on", True), _Placing():
            yield BACKEND
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        PartialState._reset_state()
