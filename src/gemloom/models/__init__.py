"""One file an architecture; each a forward pass that can be recited."""

from gemloom.models.gemma3 import Gemma3
from gemloom.models.gemma4 import Gemma4

ARCHITECTURES: dict[str, type[Gemma3] | type[Gemma4]] = {"gemma3": Gemma3, "gemma4": Gemma4}
