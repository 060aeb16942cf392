"""The kinds of task: a file each."""

from __future__ import annotations

from paretune.errors import DataError, unknown
from paretune.tasks.kinds.audio import Audio
from paretune.tasks.kinds.base import Bad, Kind
from paretune.tasks.kinds.choice import Choice
from paretune.tasks.kinds.classification import Classification
from paretune.tasks.kinds.generation import Generation
from paretune.tasks.kinds.image import Image
from paretune.tasks.kinds.language import Language
from paretune.tasks.kinds.multilabel import Multilabel
from paretune.tasks.kinds.regression import Regression
from paretune.tasks.kinds.tokens import Tokens

_ALL = (Classification, Regression, Tokens, Multilabel, Choice, Generation, Language, Image, Audio)
KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in _ALL}

__all__ = ["KINDS", "Bad", "Kind", "kind_class"]


def kind_class(name: str) -> type[Kind]:
    """The class of a kind by its name.

    Raises:
        DataError: for a name that is none, with the nearest one.
    """
    if name not in KINDS:
        raise DataError(unknown("kind of task", name, allowed=KINDS))
    return KINDS[name]
