"""The type of the networks that pruning is installed in."""

from typing import Any, TypeAlias

#: A module of transformers that is used by its own attributes (`layers`, `self_attn`, `config`), of which `nn.Module`
#: knows no types.
Network: TypeAlias = Any
