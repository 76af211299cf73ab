"""What a file of each architecture says, by the architecture's name: one line for each.

Pure: the forward passes are in ``registry.py``.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Protocol

from gemloom.errors import ConfigError
from gemloom.files.gguf import GGUF
from gemloom.models import gemma3_facts, gemma4_facts
from gemloom.models.config import Config, check
from gemloom.models.keys import ArchitectureKeys
from gemloom.models.module_names import ModuleNames


class FileFacts(Protocol):
    """Of one architecture; a module is one."""

    @property
    def NAMES(self) -> ModuleNames:
        """What transformers calls its tensors."""

    def config(self, file: GGUF, keys: ArchitectureKeys) -> Config:
        """Its Config, from the keys and tensor names of a file."""


FACTS: dict[str, FileFacts] = {"gemma3": gemma3_facts, "gemma4": gemma4_facts}


def module_names() -> ModuleNames:
    """Those of all architectures: exports of adapters do not say which one they are of."""
    return reduce(or_, (facts.NAMES for facts in FACTS.values()))


def from_gguf(file: GGUF) -> Config:
    """The Config of a file. ConfigError or TensorError where its keys do not make one."""
    architecture = file.metadata.string("general.architecture")
    facts = FACTS.get(architecture)
    if facts is None:
        known = ", ".join(sorted(FACTS))
        raise ConfigError(
            f"{file.name}: the architecture {architecture!r} is not supported; {known} are"
        )
    config = facts.config(file, ArchitectureKeys(file.metadata, architecture))
    check(file.name, config)
    return config
