"""`save_pretrained` of an adapted model: what it saves, a plain class would load without the adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from complora_kernels.modules.extend import Extension

FOLDER = "complora"


class SavesAdapter(Extension):
    """A model with a `save_pretrained` of its own, which saves the adapter too, in the folder `complora` within."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Saves the model as before, and all its adapters beside it, where PEFT writes them.

        `from_pretrained(save_directory)` gives the plain model, and says that it leaves the adapter's parameters out;
        `load_adapter(model, save_directory + "/complora")` adapts it, by the adapter that is called "default". Another
        one lies in the folder of its name within.

        Raises:
            ValueError: as `save_adapter`, before anything is saved; of a part of the model that was adapted too.
        """
        # They import what this file is a part of.
        from complora_kernels.adapters.save_load import save_adapter
        from complora_kernels.adapters.several import adapter_names

        if kwargs.get("is_main_process", True):
            save_adapter(self, Path(save_directory) / FOLDER, adapter_names=adapter_names(self))
        plain: Any = super()
        return plain.save_pretrained(save_directory, *args, **kwargs)
