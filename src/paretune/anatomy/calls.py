"""The attention call: transformers' table of attention implementations, and which modules look there."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TABLE = "ALL_ATTENTION_FUNCTIONS"  # the name of transformers' table in its modeling files


@functools.cache
def calls_attention(cls: type[nn.Module]) -> bool:
    """Does a module of this class compute attention by a function of transformers' table?"""
    forwards = [inspect.unwrap(c.__dict__["forward"]) for c in cls.__mro__ if "forward" in c.__dict__]
    return any(TABLE in f.__code__.co_names for f in forwards if hasattr(f, "__code__"))


def attention_function(cls: type[nn.Module], implementation: str) -> Callable[..., Any]:
    """The table's function of this name; for "eager" the one of the file in which the module's class is written."""
    files = (sys.modules[c.__module__] for c in cls.__mro__)
    eager = next((f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward")), None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def register_attention(name: str, function: Callable[..., Any], *, masks: str | None = None) -> None:
    """Puts a function into the table; `masks` names the implementation whose masks it takes, for one that a model's config may name."""
    AttentionInterface.register(name, function)
    if masks is not None:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks])
