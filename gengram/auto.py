"""Registration with Transformers' Auto classes and pipelines, without importing either before they are needed.

Two steps, because our classes stand on Transformers' own and cannot be imported while it is being imported:

1. `import gengram` places a finder in `sys.meta_path`. It lets the modules that define the Auto classes and `pipeline`
   be imported as usual, adds Gengram to each when it has run, and goes when all have. Modules that are there already
   come first.
2. What is added is a promise. The class itself is imported when Transformers asks for it.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto"
# Module of Transformers -> its mappings by configuration -> the class of Gengram that belongs there.
_MAPPINGS = {
    f"{_AUTO}.configuration_auto": {"CONFIG_MAPPING": "GengramConfig"},
    f"{_AUTO}.tokenization_auto": {"TOKENIZER_MAPPING": "GengramTokenizer"},
    f"{_AUTO}.modeling_auto": {
        "MODEL_MAPPING": "GengramModel",
        "MODEL_FOR_CAUSAL_LM_MAPPING": "GengramForCausalLM",
        "MODEL_FOR_MASKED_LM_MAPPING": "GengramForMaskedLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "GengramForSequenceClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "GengramForTokenClassification",
    },
}
_PIPELINES = "transformers.pipelines"
_TASKS = ("dna-embedding", "dna-fill-mask", "dna-variant-effect")


def register() -> None:
    """Make the Auto classes and `pipeline()` know Gengram, its classes loaded; calling it again changes nothing.

    Importing `gengram` is enough; this is for a process in which another class was registered in Gengram's place.
    """
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration import GengramConfig
    from .inference.pipelines import TASKS
    from .modeling_gengram import (
        GengramForCausalLM,
        GengramForMaskedLM,
        GengramForSequenceClassification,
        GengramForTokenClassification,
        GengramModel,
    )
    from .tokenization import GengramTokenizer

    AutoConfig.register(GengramConfig.model_type, GengramConfig, exist_ok=True)
    AutoTokenizer.register(GengramConfig, tokenizer_class=GengramTokenizer, exist_ok=True)
    for auto_class, model_class in (
        (AutoModel, GengramModel),
        (AutoModelForCausalLM, GengramForCausalLM),
        (AutoModelForMaskedLM, GengramForMaskedLM),
        (AutoModelForSequenceClassification, GengramForSequenceClassification),
        (AutoModelForTokenClassification, GengramForTokenClassification),
    ):
        auto_class.register(GengramConfig, model_class, exist_ok=True)
    PIPELINE_REGISTRY.supported_tasks.update(TASKS)


def register_with_auto_classes() -> None:
    """Have Gengram registered as soon as the Auto classes and `pipeline` are imported; at once if they are."""
    finder = _AutoFinder()
    sys.meta_path.insert(0, finder)
    there = list(_MAPPINGS) if _AUTO in sys.modules else []
    for name in [*there, *({_PIPELINES} & sys.modules.keys())]:
        finder.add_gengram(import_module(name))  # which waits for a module that another thread is importing


class _AutoFinder:
    """Has these modules found by the finders behind it, and Gengram added when they have run."""

    def __init__(self) -> None:
        self._awaited = {*_MAPPINGS, _PIPELINES}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._awaited or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None

    def add_gengram(self, module: ModuleType) -> None:
        """Add Gengram to what `module` holds, unless it is done."""
        if module.__name__ not in self._awaited:
            return
        self._awaited.remove(module.__name__)
        for mapping, class_name in _MAPPINGS.get(module.__name__, {}).items():
            if mapping == "CONFIG_MAPPING":
                _promise_configuration(getattr(module, mapping), class_name)
            else:
                _promise_class(getattr(module, mapping), class_name)
        for task in _TASKS if module.__name__ == _PIPELINES else ():
            module.PIPELINE_REGISTRY.supported_tasks.setdefault(task, _PromisedTask(task))
        if not self._awaited:  # a new list: another thread may be going through the old one
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]


class _Loader:
    """The loader of one module of the Auto classes; afterwards the module keeps its own."""

    def __init__(self, loader: Any, finder: _AutoFinder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.add_gengram(module)

    def __getattr__(self, name: str) -> Any:  # who only looks, as `inspect` does, sees the module's own loader
        return getattr(self._loader, name)


def _promise_configuration(mapping: Any, class_name: str) -> None:
    """Add our model type to `CONFIG_MAPPING` as Transformers does its own: the class's name, and where to look for it.

    Not at the first reading: Transformers reads this mapping while it imports the configurations that ours stands on.
    """
    model_type = "gengram"
    mapping._mapping[model_type] = class_name
    mapping._modules[model_type] = import_module(__package__)


def _promise_class(mapping: Any, class_name: str) -> None:
    """Add one of our classes to `mapping`, whose keys are configuration classes, when it is first read."""
    complete: Any = type(mapping)

    class Incomplete(complete):
        @property
        def _extra_content(self) -> dict[type, type]:
            gengram = import_module(__package__)
            vars(self)["_extra_content"].setdefault(gengram.GengramConfig, getattr(gengram, class_name))
            self.__class__ = complete
            return self._extra_content

        def __reduce__(self) -> Any:
            len(self)  # completes it
            return self.__reduce__()

    mapping.__class__ = Incomplete


class _PromisedTask(dict):
    """What the registry of pipelines holds for a task; its classes are imported when one of them is asked for."""

    def __init__(self, task: str) -> None:
        super().__init__(type="text")
        self._task = task

    def __missing__(self, name: str) -> Any:
        found = import_module(f"{__package__}.inference.pipelines").TASKS[self._task]
        self.update(found)
        return found[name]
