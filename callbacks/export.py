"""The trained policy as a Hugging Face folder, at the end of a fit."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from modules.export import Form, check_folder, check_form, export_policy, exportable
from modules.policy import PolicyModule


class Export(L.Callback):
    """Writes the policy of the last step as a Hugging Face folder when a fit ends.

    ``python train.py export`` does the same of any checkpoint.

    Args:
        folder: where to; None: ``<default_root_dir>/export``.
        lora: adapters merged into the weights, or only the adapters; a policy without any is ``merged``.
    """

    def __init__(self, folder: str | None = None, lora: Form = "merged") -> None:
        self.folder = folder
        self.lora = lora

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say before training what would fail after it.

        Raises:
            ExportError: if the backbone, the adapters or the folder are not such that they can be exported.
        """
        if stage != "fit":
            return
        assert isinstance(pl_module, PolicyModule)
        exportable(pl_module.backbone)
        check_form(self.lora, pl_module.lora)
        check_folder(self._target(trainer))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the folder, on the first rank."""
        assert isinstance(pl_module, PolicyModule)
        state = trainer.strategy.lightning_module_state_dict()  # sharded weights are gathered, by all ranks
        if not trainer.is_global_zero:
            return
        prefix = "backbone."
        weights = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        backbone = exportable(pl_module.backbone)
        base = None if pl_module.init_from else backbone.model.name_or_path
        export_policy(backbone, weights, pl_module.lora, self._target(trainer), self.lora, base)

    def _target(self, trainer: L.Trainer) -> Path:
        return Path(self.folder or Path(trainer.default_root_dir) / "export")
