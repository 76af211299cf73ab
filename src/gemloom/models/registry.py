"""Which class is the forward pass of which architecture."""

from gemloom.errors import OptionError
from gemloom.models.config import Config
from gemloom.models.gemma3 import Gemma3
from gemloom.models.gemma4 import Gemma4

Architecture = type[Gemma3] | type[Gemma4]
ARCHITECTURES: dict[str, Architecture] = {"gemma3": Gemma3, "gemma4": Gemma4}


def check_own(config: Config, own: object) -> None:
    """OptionError unless ``own`` is a class whose forward pass can take this model's place."""
    known = ARCHITECTURES[config.architecture]
    if not (isinstance(own, type) and issubclass(own, known)):
        path = f"{known.__module__}.{known.__name__}"
        raise OptionError(f"architecture must be a subclass of {path} for this file, is {own!r}")
